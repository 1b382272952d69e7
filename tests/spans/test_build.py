"""build_index: every byte of the files, all forms of input, arguments, memory, progress, shards."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignops import spans
from alignops.spans import build_index, store
from alignops.spans._shards import Settings, builders_of
from alignops.spans.errors import IndexIncompleteError, TokenizerMismatchError
from tests.spans.index_files import (
    check_shard,
    flat_of,
    manifest_of,
    names_in,
    random_docs,
    read_file,
    shard_files,
)

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DOCS = [[1, 2, 3, 1, 2], [], [2, 3], [1, 2, 3]]


def contents(folder: Path) -> list[tuple[int, int]]:
    """Sizes and checksums of all files that documents determine."""
    return [
        (entry["bytes"], entry["table_crc32c"])
        for shard in manifest_of(folder)["shards"]
        for entry in shard["files"].values()
    ]


def only_index(tmp_path: Path) -> None:
    """Neither locks nor unfinished folders remain."""
    assert names_in(tmp_path) == ["index"]


# Files


@pytest.mark.parametrize("vocab_size", [3, 255, 256, 65535, 65536, (1 << 22) + 1])
def test_files_are_those_of_a_naive_sort(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for i in range(12):
        docs = random_docs(rng, min(vocab_size, 3 if i % 2 else vocab_size), 1 + 3 * i, 40)
        out = tmp_path / str(i)
        docs.append([vocab_size - 1])
        report = build_index(docs, out, vocab_size=vocab_size, directory_tokens=1 + 50 * (i % 4))
        files = shard_files(out, 0)
        assert report.token_bits == (8 if vocab_size < 256 else 16 if vocab_size < 65536 else 32)
        check_shard(files, docs)
        for name, file in files.items():
            assert file.kind == f"{name.upper():<4}"
            assert (file.shard, file.shards, file.vocab_size) == (0, 1, vocab_size)
            assert file.uuid.hex() == report.uuid.replace("-", "")
            assert file.token_bytes == report.token_bits // 8


def test_manifest(tmp_path: Path) -> None:
    out = tmp_path / "index"
    report = build_index(DOCS, out, vocab_size=10, fingerprint="toy")
    raw = (out / "index.json").read_bytes()
    fields = json.loads(raw)
    digest = fields.pop("sha256")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert (fields["tokens"], fields["documents"], fields["fingerprint"]) == (10, 4, "toy")
    assert fields["uuid"] == report.uuid
    for entry in fields["shards"][0]["files"].values():
        assert (out / entry["name"]).stat().st_size == entry["bytes"]
    assert report.disk_bytes == sum(p.stat().st_size for p in out.iterdir())
    assert (report.n_tokens, report.n_docs, report.n_shards, report.split_docs) == (10, 4, 1, 0)
    only_index(tmp_path)


@pytest.mark.parametrize("shard_tokens", [6, 7, 12, 50])
def test_shards_hold_whole_documents(tmp_path: Path, shard_tokens: int) -> None:
    docs = random_docs(np.random.default_rng(5), 4, 40, 5)
    docs = [doc[:5] for doc in docs]
    out = tmp_path / "index"
    report = build_index(iter(docs), out, vocab_size=4, shard_tokens=shard_tokens)
    first = 0
    for s in range(report.n_shards):
        files = shard_files(out, s)
        count = files["doc"].elements - 1
        part = docs[first : first + count]
        check_shard(files, part)
        size = sum(map(len, part)) + count
        assert size <= shard_tokens
        if first + count < len(docs):
            assert size + len(docs[first + count]) + 1 > shard_tokens
        assert (files["tok"].shard, files["tok"].shards) == (s, report.n_shards)
        first += count
    assert first == len(docs)


# Input


@pytest.mark.parametrize("name", INTEGERS)
def test_forms_of_input_give_the_same_files(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(name)
    build_index(DOCS, tmp_path / "lists", vocab_size=10)
    forms: dict[str, Any] = {
        "arrays": [np.array(doc, dtype) for doc in DOCS],
        "views": [np.array([9, *doc, 9, 9], dtype)[1:-2] for doc in DOCS],
        "strided": [np.repeat(np.array(doc, dtype), 2)[::2] for doc in DOCS],
        "foreign": [np.array(doc, dtype.newbyteorder()) for doc in DOCS],
        "generator": (np.array(doc, dtype) for doc in DOCS),
        "tuples": tuple(tuple(doc) for doc in DOCS),
        "flat": flat_of(DOCS, dtype),
        "tensors": [torch.from_numpy(np.array(doc, dtype)) for doc in DOCS],
        "mixed": [np.array(DOCS[0], dtype), DOCS[1], np.array(DOCS[2], np.uint64), DOCS[3]],
        "flat tensors": tuple(torch.from_numpy(a) for a in flat_of(DOCS, dtype)),
    }
    for form, docs in forms.items():
        build_index(docs, tmp_path / form, vocab_size=10)
        assert contents(tmp_path / form) == contents(tmp_path / "lists"), form


def test_two_lists_are_two_documents(tmp_path: Path) -> None:
    assert build_index(([1, 2], [0, 2]), tmp_path / "index", vocab_size=9).n_docs == 2


def test_long_documents_are_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignops.spans._shards._STEP_TOKENS", 7)
    monkeypatch.setattr("alignops.spans._documents.BATCH_DOCUMENTS", 3)
    docs = random_docs(np.random.default_rng(0), 5, 30, 40)
    extra: dict[str, Any] = {"labels": range(30), "meta": list(range(30))}
    for form, given, offsets in (
        ("stream", docs, [range(len(doc)) for doc in docs]),
        ("flat", flat_of(docs), np.concatenate([np.arange(len(doc)) for doc in docs])),
    ):
        out = tmp_path / form
        build_index(given, out, vocab_size=5, byte_offsets=offsets, **extra)
        check_shard(shard_files(out, 0), docs)
        opened, _ = store.open_store(out)
        for d, doc in enumerate(docs):
            assert opened.document_tokens(d).tolist() == doc
            assert opened.byte_offsets(d).tolist() == list(range(len(doc)))
            assert (opened.label(d), json.loads(opened.meta(d))) == (d, d)


def test_labels_metadata_and_byte_offsets(tmp_path: Path) -> None:
    out = tmp_path / "index"
    meta = [{"source": "a.txt", "ü": [1.5, None]}, None, "text", 7]
    build_index(
        iter(DOCS),
        out,
        vocab_size=10,
        meta=iter(meta),
        labels=torch.tensor([0, 65535, 2, 3]),
        byte_offsets=[[0, 1, 2, 5, 9], [], [0, 2**32 - 1], [0, 1, 1]],
        shard_tokens=8,
    )
    opened, manifest = store.open_store(out)
    assert len(manifest.shards) == 2
    assert [json.loads(opened.meta(d)) for d in range(4)] == meta
    assert [opened.label(d) for d in range(4)] == [0, 65535, 2, 3]
    assert [opened.byte_offsets(d).tolist() for d in (0, 2)] == [[0, 1, 2, 5, 9], [0, 2**32 - 1]]
    assert opened.has("meta")
    assert not opened.has("dir")
    assert [opened.place(s, p) for s, p in ((0, 0), (0, 4), (1, 0), (1, 3))] == [
        (0, 0),
        (0, 4),
        (2, 0),
        (3, 0),
    ]


def test_documents_are_consumed_once_and_streamed(tmp_path: Path) -> None:
    alive = 0

    class Document(list[int]):
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            super().__init__([1] * 60_000)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def docs() -> Iterator[Document]:
        nonlocal most
        for _ in range(100):
            yield Document()
            most = max(most, alive)

    report = build_index(docs(), tmp_path / "index", vocab_size=2, shard_tokens=200_000)
    assert report.n_tokens == 6_000_000
    assert most <= 3


def test_split_long_documents(tmp_path: Path) -> None:
    docs = [[1, 2], list(range(23)), [3]]
    out = tmp_path / "index"
    report = build_index(
        docs,
        out,
        vocab_size=30,
        shard_tokens=10,
        split_long_docs=True,
        meta="abc",
        labels=[4, 5, 6],
        byte_offsets=[range(len(doc)) for doc in docs],
    )
    assert (report.split_docs, report.n_docs, report.n_tokens) == (1, 5, 26)
    opened, manifest = store.open_store(out)
    parts = [opened.document_tokens(d).tolist() for d in range(5)]
    assert parts == [[1, 2], list(range(9)), list(range(9, 18)), list(range(18, 23)), [3]]
    assert [opened.label(d) for d in range(5)] == [4, 5, 5, 5, 6]
    assert [opened.meta(d) for d in range(5)] == [b'"a"', b'"b"', b'"b"', b'"b"', b'"c"']
    assert opened.byte_offsets(2).tolist() == list(range(9, 18))
    assert [shard["continued"] for shard in manifest.shards] == [False, False, True, True]
    assert [read_file(out / f"doc.{s}").flags for s in range(4)] == [0, 0, 2, 2]


# Errors: type, part of the text


@pytest.mark.parametrize(
    ("docs", "error", "text"),
    [
        ([], ValueError, "at least one token"),
        ([[], []], ValueError, "at least one token"),
        ([[1], [2, -1]], IndexError, "got -1 at offset 1 of document 1"),
        ([[1], [], [2, 3, 10]], IndexError, "got 10 at offset 2 of document 2"),
        ([[255]], IndexError, "got 255 (the separator between documents) at offset 0"),
        ([[2**70]], IndexError, "document 0 must be below 2^63"),
        ([np.array([2**64 - 1], np.uint64)], IndexError, "at offset 0 of document 0"),
        ([[0.5]], TypeError, "document 0 must be integers, got float64"),
        ([[1], [True]], TypeError, "document 1 must be integers, got bool"),
        ([["a"]], TypeError, "document 0 must be integers"),
        ([[[1, 2]]], ValueError, "document 0 must have 1 dimensions, got shape (1, 2)"),
        ([3], ValueError, "document 0 must have 1 dimensions, got shape ()"),
        ((np.zeros(3, int), np.array([0, 2])), ValueError, "end with len(flat)=3, got 0 and 2"),
        ((np.zeros(3, int), np.array([1, 3])), ValueError, "begin with 0"),
        ((np.zeros(3, int), np.array([0, 2, 1, 3])), ValueError, "got 1 after 2 at index 2"),
        ((np.zeros(3, int), np.array([0.0, 3.0])), TypeError, "offsets must be integers"),
        ((np.zeros(3), np.array([0, 3])), TypeError, "docs must be integers, got float64"),
        ((np.zeros((1, 3), int), np.array([0, 3])), ValueError, "docs must have 1 dimensions"),
        ((np.array([1, 2, 50]), np.array([0, 1, 3])), IndexError, "offset 1 of document 1"),
    ],
)
def test_bad_documents(tmp_path: Path, docs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        build_index(docs, tmp_path / "index", vocab_size=10)
    assert text in str(caught.value)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be in [1, 255]"),
        ({"vocab_size": 256, "token_bits": 8}, ValueError, "[1, 255] for tokens of 8 bits"),
        ({"vocab_size": 2**32}, ValueError, "vocab_size must be in [1, 4294967295]"),
        ({"vocab_size": 10.0}, TypeError, "vocab_size must be an integer"),
        ({"token_bits": 12}, ValueError, "token_bits must be 8, 16, 32 or 'auto', got 12"),
        ({"builder": "fast"}, ValueError, "builder must be one of auto, sais, radix, got 'fast'"),
        ({"shard_tokens": 1}, ValueError, "shard_tokens must be in [2, 2000000000], got 1"),
        ({"shard_tokens": 4}, ValueError, "document 0 has 5; split_long_docs=True cuts it"),
        ({"progress": 3}, TypeError, "progress must be a bool or a callable, got int"),
        ({"labels": [1, 2, 3]}, ValueError, "labels must have one entry per document, got 3"),
        ({"labels": range(5)}, ValueError, "labels must have one entry per document, got more"),
        ({"labels": [1, 2, 3, 65536]}, ValueError, "labels must be in [0, 65536), got 65536"),
        ({"labels": [1, 2, 3, 0.5]}, TypeError, "labels must be integers"),
        ({"meta": [1, 2, 3]}, ValueError, "meta must have one entry per document, got 3"),
        ({"meta": [1, 2, {3}, 4]}, TypeError, "meta of document 2 is not JSON"),
        ({"byte_offsets": [[]]}, ValueError, "byte_offsets of document 0 must have one entry"),
        ({"byte_offsets": [range(5)]}, ValueError, "byte_offsets must have one entry per document"),
        ({"byte_offsets": [[0, 1, 2, 3, -1]]}, ValueError, "must be in [0, 4294967296), got -1"),
        ({"mem_bytes": 100}, MemoryError, "mem_bytes is 100"),
        ({"out": "missing/index"}, FileNotFoundError, "missing"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    names = {"vocab_size": 10, **arguments}
    with pytest.raises(error) as caught:
        build_index(DOCS, tmp_path / names.pop("out", "index"), **names)
    assert text in str(caught.value)
    assert names_in(tmp_path) == []


def test_an_error_of_the_documents_passes_through(tmp_path: Path) -> None:
    def docs() -> Iterator[list[int]]:
        yield [1]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        build_index(docs(), tmp_path / "index", vocab_size=10)
    assert names_in(tmp_path) == []


def test_allow_empty(tmp_path: Path) -> None:
    for name, docs in (("none", []), ("empty", [[], []])):
        report = build_index(docs, tmp_path / name, vocab_size=5, allow_empty=True)
        assert (report.n_tokens, report.n_docs, report.n_shards) == (0, len(docs), 1)
        for mode in ("mmap", "ram"):
            opened, _ = store.open_store(tmp_path / name, mode, "full")
            assert opened.counts()[1].tolist() == [0] * 5
            assert opened.documents == len(docs)


def test_keep_partial(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        build_index([[1], [50]], tmp_path / "index", vocab_size=10, keep_partial=True)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("index.building-")
    with pytest.raises(IndexIncompleteError, match="has not finished"):
        store.open_store(folder)
    assert spans.clean_stale(tmp_path) == [folder]
    assert names_in(tmp_path) == []


# Replacing


def test_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build_index([[1]], out, vocab_size=10)
    opened, _ = store.open_store(out)
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        build_index(DOCS, out, vocab_size=10)
    with pytest.raises(IndexError):
        build_index([[11]], out, vocab_size=10, overwrite=True)
    assert store.open_store(out)[0].tokens == 1
    report = build_index(DOCS, out, vocab_size=10, overwrite=True)
    assert store.open_store(out)[0].tokens == report.n_tokens == 10
    assert opened.document_tokens(0).tolist() == [1]  # who had it open keeps the old one
    opened.check_sizes()
    only_index(tmp_path)


def test_overwrite_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignops.spans._folder.library.spans_exchange", lambda a, b: False)
    out = tmp_path / "index"
    build_index([[1]], out, vocab_size=10)
    build_index(DOCS, out, vocab_size=10, overwrite=True)
    assert store.open_store(out)[0].tokens == 10
    only_index(tmp_path)


def test_only_an_index_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "index"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not an index and is not replaced"):
        build_index(DOCS, out, vocab_size=10, overwrite=True)
    assert (out / "thesis.tex").exists()


# Memory


def test_shards_shrink_to_fit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignops.spans._shards._MIN_SHARD_TEXT", 100)
    docs = random_docs(np.random.default_rng(1), 200, 100, 80)
    settings = Settings(200, 1, ("sais",), 2**30, 0, 2**26, False, False, False, False)
    mem = settings.bytes_of("sais", 1000)
    out = tmp_path / "index"
    report = build_index(docs, out, vocab_size=200, builder="sais", mem_bytes=mem)
    assert report.n_shards > 1
    sizes = [shard["tokens"] + shard["documents"] for shard in manifest_of(out)["shards"]]
    assert max(sizes) <= 1000
    assert settings.bytes_of("sais", max(sizes)) <= mem
    docs.append([1] * 1500)
    with pytest.raises(MemoryError, match=r"sorting 1501 tokens by sais needs \d+"):
        build_index(docs, tmp_path / "other", vocab_size=200, builder="sais", mem_bytes=mem)
    only_index(tmp_path)


@pytest.mark.parametrize("vocab_size", [200, 60_000, 1 << 23])
def test_builders_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    """Also batch by batch, as if memory did not suffice for the whole array."""
    docs = random_docs(np.random.default_rng(4), 200, 100, 4000)
    options: dict[str, Any] = {"vocab_size": vocab_size, "directory_tokens": 1}
    for builder in ("auto", "sais", "radix"):
        report = build_index(docs, tmp_path / builder, builder=builder, **options)
        assert report.builders == builders_of(builder)[:1]
    monkeypatch.setattr("alignops.spans.build.builders_of", lambda _: ("radix-stream",))
    report = build_index(docs, tmp_path / "stream", mem_bytes=16 << 20, **options)
    assert report.builders == ("radix-stream",)
    for name in ("sais", "radix", "stream"):
        assert contents(tmp_path / name) == contents(tmp_path / "auto"), name


def test_text_larger_than_memory(tmp_path: Path) -> None:
    """Where neither whole shards nor small ones fit, the array is made batch by batch."""
    rng = np.random.default_rng(6)
    docs = flat_of([rng.integers(0, 50, 2_000_000)], np.uint8)
    settings = Settings(50, 1, ("radix-stream",), 0, 0, 0, False, False, False, False)
    mem = settings.bytes_of("radix-stream", 2_000_001)
    assert mem < settings.bytes_of("radix", 1 << 20)
    options: dict[str, Any] = {"vocab_size": 50}
    report = build_index(docs, tmp_path / "a", builder="radix", mem_bytes=mem, **options)
    assert (report.builders, report.n_shards) == (("radix-stream",), 1)
    build_index(docs, tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# Progress


def test_progress_callback(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    docs = random_docs(np.random.default_rng(2), 1000, 300, 4000)
    build_index(docs, tmp_path / "a", vocab_size=1000, progress=lambda *call: calls.append(call))
    assert calls[0][0] == "read"
    assert all(0 <= done <= (total or done) for _, done, total in calls)
    with pytest.raises(KeyError):
        build_index(docs, tmp_path / "b", vocab_size=1000, progress=lambda *_: {}["stop"])
    assert names_in(tmp_path) == ["a"]


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="needs the extra [corpus]")
    build_index(DOCS, tmp_path / "index", vocab_size=10, progress=True)
    assert "read" in capsys.readouterr().err


# Fingerprints


def test_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(DOCS, tmp_path / "with", vocab_size=10, fingerprint="one")
    build_index(DOCS, tmp_path / "without", vocab_size=10)
    monkeypatch.setattr(store, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.open_store(tmp_path / "with")
        store.open_store(tmp_path / "with", fingerprint="one")
        with pytest.raises(TokenizerMismatchError, match="must be 'one'"):
            store.open_store(tmp_path / "with", fingerprint="two")
    with pytest.warns(UserWarning, match="stores no fingerprint"):
        store.open_store(tmp_path / "without")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.open_store(tmp_path / "without")


# Shards of several tasks


def test_shards_built_one_by_one(tmp_path: Path) -> None:
    docs = random_docs(np.random.default_rng(3), 50, 60, 30)
    parts = [[d for i, d in enumerate(docs) if spans.shard_of(str(i), 3) == s] for s in range(3)]
    folder, out = tmp_path / "parts", tmp_path / "index"
    options: dict[str, Any] = {"vocab_size": 50, "fingerprint": "f"}
    for s in (2, 0):
        spans.build_shard(parts[s], folder, s, vocab_size=50)
    with pytest.raises(IndexIncompleteError, match="shard 1 is not finished"):
        spans.merge_manifest(folder, out, shards=3)
    spans.build_shard(parts[1], folder, 1, vocab_size=50)
    before = (folder / "suf.0").stat().st_mtime_ns
    spans.build_shard(iter(()), folder, 0, vocab_size=50)  # finished: not read, not written
    assert (folder / "suf.0").stat().st_mtime_ns == before
    report = spans.merge_manifest(folder, out, shards=3, fingerprint="f")
    assert (report.n_shards, report.n_docs) == (3, 60)
    only_index(tmp_path)
    opened, _ = store.open_store(out, verify="full", fingerprint="f")
    joined = [doc for part in parts for doc in part]
    assert [opened.document_tokens(d).tolist() for d in range(60)] == joined
    for s in range(3):
        check_shard(shard_files(out, s), parts[s])
    build_index(joined, tmp_path / "one", **options)
    assert opened.counts()[1].tolist() == store.open_store(tmp_path / "one")[0].counts()[1].tolist()


def test_a_task_that_was_killed_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    spans.build_shard(DOCS, folder, 0, vocab_size=10)
    (folder / "0.done").unlink()
    (folder / "suf.0").write_bytes(b"half")
    spans.build_shard(DOCS, folder, 0, vocab_size=10)
    spans.merge_manifest(folder, tmp_path / "index", shards=1)
    check_shard(shard_files(tmp_path / "index", 0), DOCS)


def test_shards_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    spans.build_shard(DOCS, folder, 0, vocab_size=10)
    spans.build_shard(DOCS, folder, 1, vocab_size=11)
    with pytest.raises(ValueError, match="vocab_size of shard 1 must be 10, as of shard 0, got 11"):
        spans.merge_manifest(folder, tmp_path / "index", shards=2)
    with pytest.raises(ValueError, match="vocab_size must be 10"):
        spans.build_shard(DOCS, folder, 0, vocab_size=11)
    spans.build_shard(DOCS, folder, 2, vocab_size=10, labels=range(4))
    (folder / "1.done").unlink()
    spans.build_shard(DOCS, folder, 1, vocab_size=10)
    with pytest.raises(ValueError, match="files of shard 2"):
        spans.merge_manifest(folder, tmp_path / "index", shards=3)
    with pytest.raises(ValueError, match="must fit into one shard of shard_tokens=6, document 1"):
        spans.build_shard([[1, 2, 3], [1, 2]], folder, 4, vocab_size=10, shard_tokens=6)
    with pytest.raises(ValueError, match="shard must not be negative"):
        spans.build_shard(DOCS, folder, -1, vocab_size=10)


def test_shard_of_never_changes() -> None:
    assert [spans.shard_of(key, 7) for key in ("", "a", "books/moby-dick.txt")] == [
        spans.shard_of(key, 7) for key in (b"", b"a", b"books/moby-dick.txt")
    ]
    counts = np.bincount([spans.shard_of(str(i), 8) for i in range(8000)], minlength=8)
    assert counts.min() > 850
