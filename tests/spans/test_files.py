"""Damaged files: 1,000 changed bits, cuts and exchanges, seen by every level of verification, and
the words of every refusal."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignops.spans import SpanIndex, build_index, store
from alignops.spans.errors import (
    IndexCorruptError,
    IndexIncompleteError,
    IndexVersionError,
    NotAnIndexError,
)
from tests.spans.index_files import (
    BLOCK,
    HEADER,
    PAYLOAD,
    crc32c,
    flat_of,
    manifest_of,
    names_in,
    random_docs,
)

REFUSALS = (NotAnIndexError, IndexVersionError, IndexCorruptError, IndexIncompleteError)
VOCAB = 500
DAMAGES = 1000


def make_index(out: Path, seed: int) -> Path:
    """Two shards, every optional file, several blocks per large file."""
    docs = random_docs(np.random.default_rng(seed), VOCAB, 80, 3000)
    build_index(
        docs,
        out,
        vocab_size=VOCAB,
        fingerprint="fuzz",
        shard_tokens=sum(map(len, docs)) // 2 + 3000,
        directory_tokens=1,
        labels=range(80),
        meta=[{"document": d, "text": "x" * 1000} for d in range(80)],
        byte_offsets=[np.arange(len(doc)) for doc in docs],
    )
    assert len(manifest_of(out)["shards"]) == 2
    return out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("pristine") / "index", 1)


@pytest.fixture
def index(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "index"))


class Questions:
    """Queries whose answers together depend on much of every file."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(2)
        with SpanIndex.open(path, fingerprint="fuzz") as index:
            texts = [np.asarray(index.document(d).tokens, np.int64) for d in range(index.n_docs)]
        text = np.concatenate(texts)
        spans = []
        for _ in range(400):
            at, size = int(rng.integers(text.size - 8)), int(rng.integers(1, 8))
            spans.append(text[at : at + size].tolist())
        self.flat, self.offsets = flat_of(spans)
        self.text = np.concatenate([text[1000:1100], rng.integers(0, VOCAB, 50)])
        self.documents = rng.choice(len(texts), 12, replace=False).tolist()
        self.spans = spans[:10]

    def answers(self, index: SpanIndex) -> list[Any]:
        hits = [index.locate(span, limit=5) for span in self.spans]
        documents = [index.document(d) for d in self.documents]
        return [
            index.counts.tolist(),
            index.count_batch(self.flat, self.offsets).tolist(),
            index.find_batch(self.flat, self.offsets).tolist(),
            index.matching_stats(self.text).tolist(),
            [(h.document.tolist(), h.offset.tolist()) for h in hits],
            [
                (
                    np.asarray(d.tokens).tolist(),
                    d.meta,
                    d.label,
                    np.asarray(d.byte_offsets).tolist(),
                )
                for d in documents
            ],
        ]


@dataclass
class Damage:
    """A change of one file; `quick` tells whether the quick checks must see it."""

    path: Path
    what: str
    quick: bool
    do: Callable[[Path], None]


def flip(offset: int, bit: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << bit]))

    return change


def random_damages(index: Path, count: int) -> Iterator[Damage]:
    """Half of them bits anywhere, a quarter bits outside the payload, a quarter cuts."""
    rng = np.random.default_rng(3)
    paths = sorted(index.iterdir())
    sizes = [path.stat().st_size for path in paths]
    for i in range(count):
        # Large files are more often hit, but every file is.
        if i % 2:
            at = int(rng.choice(len(paths), p=np.array(sizes) / sum(sizes)))
        else:
            at = int(rng.integers(len(paths)))
        path, size = paths[at], sizes[at]
        if i % 4 == 3:
            length = int(rng.integers(size))
            yield Damage(path, f"cut to {length}", True, lambda p, n=length: os.truncate(p, n))
            continue
        offset, bit = int(rng.integers(size)), int(rng.integers(8))
        if path.name == store.MANIFEST:
            yield Damage(path, f"bit {bit} of {offset}", True, flip(offset, bit))
            continue
        payload = HEADER.unpack(path.read_bytes()[: HEADER.size])[11]
        if i % 4 == 2:
            offset = [*range(HEADER.size), *range(PAYLOAD + payload, size)][
                int(rng.integers(HEADER.size + size - PAYLOAD - payload))
            ]
        block = (offset - PAYLOAD) // BLOCK
        quick = (
            not PAYLOAD <= offset < PAYLOAD + payload
            or block in (0, (payload - 1) // BLOCK)
            or path.name.startswith(("uni", "dir"))
        )
        yield Damage(path, f"bit {bit} of {offset}", quick, flip(offset, bit))


def refused(index: Path, verify: str) -> bool:
    try:
        SpanIndex.open(index, verify=verify, fingerprint="fuzz").close()
    except REFUSALS:
        return True
    return False


def test_a_thousand_damages(pristine: Path, index: Path) -> None:
    questions = Questions(pristine)
    with SpanIndex.open(pristine, fingerprint="fuzz") as whole:
        truth = questions.answers(whole)
    seen = dict.fromkeys(("open", "query", "not read"), 0)
    for damage in random_damages(index, DAMAGES):
        before = damage.path.read_bytes()
        damage.do(damage.path)
        label = f"{damage.path.name}: {damage.what}"
        assert refused(index, "full"), label
        assert refused(index, "quick") or not damage.quick, label
        outcome = "open"
        try:
            with SpanIndex.open(index, fingerprint="fuzz") as opened:
                outcome = "query"
                assert questions.answers(opened) == truth, label
                outcome = "not read"
        except REFUSALS as error:
            text = str(error)
            assert str(index) in text, label
        seen[outcome] += 1
        damage.path.write_bytes(before)
    assert min(seen.values()) > 0, seen
    with SpanIndex.open(index, verify="full", fingerprint="fuzz") as restored:
        assert questions.answers(restored) == truth


def test_lazy_sees_damage_when_it_reads_it(index: Path) -> None:
    """One changed bit anywhere: reading everything always meets it."""
    for name in ("tok.0", "suf.1", "doc.0", "lab.1", "meta.0", "moff.1", "boff.0"):
        path = index / name
        payload = HEADER.unpack(path.read_bytes()[: HEADER.size])[11]
        blocks = -(-payload // BLOCK)
        for block in range(0, blocks, max(1, blocks // 3)):
            change = flip(PAYLOAD + min(block * BLOCK + 777, payload - 1), 3)
            change(path)
            with (
                pytest.raises(IndexCorruptError, match=rf"{name}: block {block} \(bytes"),
                SpanIndex.open(index, fingerprint="fuzz") as opened,
            ):
                read_all(opened, name)
            change(path)


def read_all(index: SpanIndex, name: str) -> None:
    if name.startswith("suf"):
        for token in range(VOCAB):
            index.locate([token], limit=10**6)
    for d in range(index.n_docs):
        document = index.document(d)
        assert document.byte_offsets is not None


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["random", "constant", "reversed", "shifted", "beyond"])
def test_quick_sees_a_damaged_share_of_the_suffixes(index: Path, share: float, kind: str) -> None:
    """Without the first and the last block, which have their checksums looked at."""
    rng = np.random.default_rng(7)
    path = index / "suf.0"
    data = bytearray(path.read_bytes())
    suffixes = np.frombuffer(data, np.uint32, HEADER.unpack(data[: HEADER.size])[12], PAYLOAD)
    inner = suffixes[BLOCK // 4 : (suffixes.size - 1) * 4 // BLOCK * BLOCK // 4]
    count = min(int(share * suffixes.size), inner.size)
    start = int(rng.integers(inner.size - count + 1))
    part = inner[start : start + count]
    change = {
        "random": lambda: rng.permutation(part),
        "constant": lambda: np.full_like(part, part[0]),
        "reversed": lambda: part[::-1].copy(),
        "shifted": lambda: part + np.uint32(1),
        "beyond": lambda: part + np.uint32(1 << 30),
    }[kind]
    part[:] = change()
    path.write_bytes(data)
    with pytest.raises(IndexCorruptError, match=r"suf\.0: the file"):
        store.open_store(index, verify="quick")


def test_exchanged_files(pristine: Path, index: Path, tmp_path: Path) -> None:
    other = make_index(tmp_path / "other", 1)  # the same documents, another UUID
    for level in ("quick", "lazy", "full"):
        for name in names_in(index):
            if name == store.MANIFEST:
                continue
            shutil.copy(other / name, index / name)
            with pytest.raises(IndexCorruptError, match=f"{name}: the file belongs to another"):
                store.open_store(index, verify=level)
            neighbour = f"{name[:-1]}{1 - int(name[-1])}"
            shutil.copy(pristine / neighbour, index / name)
            with pytest.raises(IndexCorruptError, match="belongs to another shard"):
                store.open_store(index, verify=level)
            kind = "tok.0" if name != "tok.0" else "suf.0"
            shutil.copy(pristine / kind, index / name)
            with pytest.raises(IndexCorruptError):
                store.open_store(index, verify=level)
            (index / name).unlink()
            with pytest.raises(IndexCorruptError, match=f"{name}: the file is missing"):
                store.open_store(index, verify=level)
            shutil.copy(pristine / name, index / name)
        shutil.copy(other / store.MANIFEST, index / store.MANIFEST)
        with pytest.raises(IndexCorruptError, match="belongs to another index"):
            store.open_store(index, verify=level)
        shutil.copy(pristine / store.MANIFEST, index / store.MANIFEST)
        store.open_store(index, verify=level)


# Files that change while they are open


def ask(index: SpanIndex) -> None:
    index.count_batch([1, 2, 3], [0, 1, 3])
    for d in range(index.n_docs):
        index.document(d)


@pytest.mark.parametrize("verify", ["quick", "lazy", "full"])
def test_a_file_that_shrinks_while_open(index: Path, verify: str) -> None:
    for name in ("suf.1", "tok.0", "doc.0", "meta.0"):
        path = index / name
        before = path.read_bytes()
        with SpanIndex.open(index, verify=verify, fingerprint="fuzz") as opened:
            os.truncate(path, 5000)
            with pytest.raises(IndexCorruptError, match=rf"{name}: the file has 5000 bytes"):
                ask(opened)
            with pytest.raises(IndexCorruptError):
                opened.verify("full")
        path.write_bytes(before)


def test_memory_mode_keeps_its_copy(index: Path) -> None:
    questions = Questions(index)
    with SpanIndex.open(index, mode="ram", fingerprint="fuzz") as opened:
        truth = questions.answers(opened)
        for path in index.iterdir():
            os.truncate(path, 0)
        assert questions.answers(opened) == truth
        opened.verify("full")


def test_memory_mode_checks_all_blocks(index: Path) -> None:
    flip(PAYLOAD + BLOCK + 5, 0)(index / "suf.0")
    for verify in ("quick", "lazy", "full"):
        with pytest.raises(IndexCorruptError, match=r"suf.0: block 1 \(bytes 69632 to 135167\)"):
            store.open_store(index, "ram", verify)


# Refusals word by word


def edit_header(path: Path, offset: int, fmt: str, value: Any) -> None:
    """Change a field and give the header its checksum again."""
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, offset, value)
    struct.pack_into("<I", data, 120, crc32c(bytes(data[:120])))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "error", "text"),
    [
        (0, "8s", b"GGUFxxxx", NotAnIndexError, "begins with other bytes than 'ALNSPAN'"),
        (8, "<I", 0x0D0C0B0A, NotAnIndexError, "the endian tag is 0xd0c0b0a, 0xa0b0c0d expected"),
        (
            12,
            "<H",
            2,
            IndexVersionError,
            "format version 2.0 cannot be read by this release, which",
        ),
        (16, "4s", b"ABCD", IndexCorruptError, "is of another kind"),
        (20, "B", 4, IndexCorruptError, "has tokens of another width"),
        (22, "<H", 1, IndexCorruptError, "has another layout than the vocabulary needs"),
        (24, "16s", bytes(16), IndexCorruptError, "belongs to another index (UUID)"),
        (40, "<I", 1, IndexCorruptError, "belongs to another shard or number of shards"),
        (44, "<I", 9, IndexCorruptError, "belongs to another shard or number of shards"),
        (48, "<Q", 1 << 62, IndexCorruptError, "bytes, its header says"),
        (48, "<Q", 2**64 - 1, IndexCorruptError, "bytes, its header says"),
        (56, "<Q", 7, IndexCorruptError, "has another number of elements"),
        (64, "<Q", 7, IndexCorruptError, "has another vocabulary size"),
        (72, "<I", 12, IndexCorruptError, "the header describes another block table"),
    ],
)
def test_headers(
    index: Path, offset: int, fmt: str, value: Any, error: type[Exception], text: str
) -> None:
    edit_header(index / "uni.0", offset, fmt, value)
    with pytest.raises(error) as caught:
        store.open_store(index, verify="quick")
    assert text in str(caught.value)
    assert str(index / "uni.0") in str(caught.value)


def test_another_minor_version_is_readable(index: Path) -> None:
    for path in index.glob("*.?"):
        edit_header(path, 14, "<H", 3)
    edit_manifest(index, lambda fields: fields.update(version=[1, 3], new="field"))
    store.open_store(index, verify="full")


def edit_manifest(index: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change fields and give the manifest its digest again."""
    path = index / store.MANIFEST
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    edit(fields)
    path.write_bytes(store.encode_manifest(fields))


def test_unknown_optional_files_are_ignored(index: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        fields["shards"][0]["files"]["lcp"] = {"name": "lcp.0", "bytes": 5, "table_crc32c": 6}

    edit_manifest(index, edit)
    store.open_store(index, verify="full")


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda f: f.update(format="other"), NotAnIndexError, "not the manifest of an index"),
        (lambda f: f.update(version=[2, 1]), IndexVersionError, "format version 2.1 cannot be"),
        (lambda f: f["shards"][1]["files"].pop("suf"), IndexCorruptError, "lacks the file suf.1"),
        (lambda f: f["shards"][0]["files"].pop("moff"), IndexCorruptError, "only one of the files"),
        (lambda f: f["shards"].pop(), IndexCorruptError, "another shard or number of shards"),
        (lambda f: f.update(vocab_size=501), IndexCorruptError, "has another vocabulary size"),
        (lambda f: f.update(token_bits=32), IndexCorruptError, "has another size than its"),
        (lambda f: f["shards"][0].update(tokens=5), IndexCorruptError, "number of elements"),
        (lambda f: f["shards"][1].update(documents=5), IndexCorruptError, "number of elements"),
    ],
)
def test_manifests(
    index: Path, edit: Callable[[dict[str, Any]], Any], error: type[Exception], text: str
) -> None:
    edit_manifest(index, edit)
    with pytest.raises(error) as caught:
        store.open_store(index, verify="quick")
    assert text in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"7", b'{"format": "alignops-spans"}', b"\xff"])
def test_manifests_that_are_none(index: Path, raw: bytes) -> None:
    (index / store.MANIFEST).write_bytes(raw)
    with pytest.raises((IndexCorruptError, NotAnIndexError), match="manifest"):
        store.open_store(index)


def test_paths_that_hold_no_index(tmp_path: Path, index: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.open_store(tmp_path / "nothing")
    with pytest.raises(NotAnIndexError, match="which is a folder"):
        store.open_store(index / "tok.0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IndexIncompleteError, match=r"index\.json is missing"):
        store.open_store(tmp_path / "empty")
    unfinished = index.rename(tmp_path / "index.building-1")
    with pytest.raises(IndexIncompleteError, match="has not finished"):
        store.open_store(unfinished)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "disk"}, "mode must be mmap or ram, got 'disk'"),
        ({"verify": "none"}, "verify must be quick, lazy or full, got 'none'"),
    ],
)
def test_arguments_of_open(index: Path, arguments: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        store.open_store(index, **arguments)
