"""Removed documents: answers are those of an index in which they are empty, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignops import testing
from alignops.reference.spans import NaiveIndex
from alignops.spans import (
    DistributedIndex,
    IndexCorruptError,
    IndexTensors,
    LocalBackend,
    MatchRule,
    NotAnIndexError,
    Removal,
    SpanIndex,
    SpanMatcher,
    TraceShield,
    build_index,
    find_documents,
    removal,
    remove_documents,
)
from alignops.spans.store import encode_manifest
from tests.spans.corpora import Corpus, random_corpus, random_query, shard_size
from tests.spans.index_files import File, manifest_of, names_in, random_docs, read_file
from tests.spans.test_index import (
    check_batches,
    check_one,
    check_places,
    equal,
    memory_folder,
    spans_options,
)

__all__ = ["memory_folder"]

VOCAB = 12


def blanked(docs: list[list[int]], removed: Any) -> list[list[int]]:
    gone = set(np.asarray(removed).tolist())
    return [[] if d in gone else doc for d, doc in enumerate(docs)]


def built(docs: list[list[int]], folder: Path, vocab_size: int = VOCAB, shards: int = 1) -> Path:
    build_index(
        docs,
        folder,
        vocab_size=vocab_size,
        shard_tokens=shard_size(docs, shards),
        fingerprint="test",
        allow_empty=True,
        directory_tokens=0,
    )
    return folder


@pytest.mark.parametrize("group", range(10))
def test_brute_force(memory_folder: Path, group: int) -> None:
    """Every kind of answer after one and after two removals, on 300 corpora."""
    rng = np.random.default_rng(group)
    isas = testing.available_isas()
    for i in range(30):
        corpus = random_corpus(rng, longest=300 if i % 10 == 0 else 60)
        folder = built(
            corpus.docs, memory_folder / str(i), corpus.vocab_size, int(rng.choice([1, 2, 5]))
        )
        n = len(corpus.docs)
        gone: list[int] = []
        for _ in range(2):
            new = rng.choice(n, int(rng.integers(1, n + 1)), replace=False)
            gone = sorted({*gone, *new.tolist()})
            remove_documents(folder, new)
            check_everything(folder, corpus, gone, rng, isas[i % len(isas)])


def check_everything(
    folder: Path, corpus: Corpus, gone: list[int], rng: np.random.Generator, isa: str
) -> None:
    docs = blanked(corpus.docs, gone)
    naive = NaiveIndex(docs, corpus.vocab_size)
    queries = [random_query(rng, corpus) for _ in range(4)]
    with SpanIndex.open(folder, verify="full") as index, testing.use_isa(isa):
        assert index.removed.tolist() == gone
        assert (index.n_tokens, index.n_docs) == (naive.n_tokens, naive.n_docs)
        assert equal(index.counts, naive.counts)
        assert equal(index.unigram, naive.unigram)
        for x in queries:
            check_one(
                index, naive, x, int(rng.choice(corpus.alphabet)), spans_options(rng, x, corpus)
            )
            check_places(index, naive, x, sum(len(doc) + 1 for doc in corpus.docs))
            for s, (lo, hi) in enumerate(index.find(x).tolist()):
                hits = index.hits(s, range(lo, hi))
                for d, o in zip(hits.document.tolist(), hits.offset.tolist(), strict=True):
                    assert docs[d][o : o + len(x)] == x
            if index.n_shards == 1:
                assert equal(index.find(x), naive.find(x))
            got = index.attribute(x, share=1.0, documents=10**6)
            want = naive.attribute(x, share=1.0, documents=10**6)
            assert [a[:3] + a[4:] for a in got] == [a[:3] + a[4:] for a in want]
            rare = index.next_dist(x[-2:], max_support=3)
            if rare.approx:
                ends = index.eos_count(x[-2:])
                assert 0 <= rare.counts.sum() <= index.count(x[-2:])
                assert ends or rare.counts.sum() == index.count(x[-2:])
        check_batches(index, queries, {"min_len": 2, "max_count": 3})
        for d in range(index.n_docs):
            if d in gone:
                with pytest.raises(IndexError, match=f"must not be a removed document, got {d}"):
                    index.document(d)
            else:
                assert index.document(d).tokens.tolist() == docs[d]


class Pair:
    """Random documents of which some were removed, and an index without them."""

    def __init__(self, folder: Path, seed: int, shards: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.docs = random_docs(rng, VOCAB - 1, 40, 60)
        self.gone = rng.choice(40, 18, replace=False)
        self.folder = built(self.docs, folder / "with", shards=shards)
        remove_documents(self.folder, self.gone)
        built(blanked(self.docs, self.gone), folder / "without", shards=shards)
        self.ours = SpanIndex.open(self.folder)
        self.theirs = SpanIndex.open(folder / "without")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return [Pair(tmp_path_factory.mktemp("pair"), seed) for seed in (1, 2)]


RULES = {
    "bci": MatchRule(tau=6.0, min_len=1),
    "rare": MatchRule(tau=4.0, min_len=2, max_count=3),
    "norm": MatchRule(kind="norm", tau=1.0, min_len=2),
    "max": MatchRule(kind="max", tau=2.0, min_len=2),
    "exact": MatchRule(tau=4.0, min_len=2),
    "cover": MatchRule(tau=4.0, min_len=2, allow_mode="cover"),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("distributed", [False, True])
def test_matcher(pairs: list[Pair], name: str, distributed: bool) -> None:
    """Row for row and candidate for candidate, over text that was removed and text that was not."""
    unsafe, harmless = pairs
    rng = np.random.default_rng(3)
    options: dict[str, Any] = {"batch": 2, "max_match": 20, "rule": RULES[name]}
    allowed = name in ("exact", "cover")
    theirs = SpanMatcher(unsafe.theirs, harmless.theirs if allowed else None, **options)
    allow: Any = harmless.ours if allowed else None
    ours: Any = SpanMatcher(unsafe.ours, allow, **options)
    if distributed:
        ours = DistributedIndex([LocalBackend([unsafe.ours])]).matcher(allow, **options)
    text = [t for doc in unsafe.docs for t in doc]
    flagged = 0
    for t, token in enumerate(text[:200]):
        if t % 40 == 20:
            for one in (ours, theirs):
                one.extend_prompt(text[300:304])
        parent = rng.integers(0, 2, 2) if t % 7 == 6 else None
        tokens = [token, text[200 + t]]
        for one in (ours, theirs):
            one.advance(tokens, parent)
        for a, b in zip(ours.state(), theirs.state(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        cand = rng.integers(0, VOCAB, (2, 6))
        np.testing.assert_array_equal(ours.peek(cand), theirs.peek(cand))
        for a, b in zip(ours.peek(cand, exact=True), theirs.peek(cand, exact=True), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        for a, b in zip(ours.flagged(), theirs.flagged(), strict=True):
            np.testing.assert_array_equal(a, b)
        flagged += len(ours.flagged()[0])
    assert flagged > 0


@pytest.mark.parametrize("allow_mode", ["exact", "cover"])
def test_filter(pairs: list[Pair], allow_mode: str) -> None:
    unsafe, harmless = pairs
    options: dict[str, Any] = {"tau": 16.0, "min_len": 6, "allow_mode": allow_mode}
    ours = TraceShield(unsafe.ours, allow=harmless.ours, **options)
    theirs = TraceShield(unsafe.theirs, allow=harmless.theirs, **options)
    verdicts = ours.check_batch(unsafe.docs)
    for a, b in zip(verdicts, theirs.check_batch(unsafe.docs), strict=True):
        assert (a.refused, a.risk) == (b.refused, b.risk)
        assert [s[:5] for s in a.spans] == [s[:5] for s in b.spans]
        assert not {d for s in a.spans for d in s.documents} & set(unsafe.gone.tolist())
    assert {v.refused for v in verdicts} == {False, True}
    assert ours.parameters() != TraceShield(unsafe.theirs, allow=harmless.ours).parameters()


def test_parts(pairs: list[Pair]) -> None:
    """Documents of parts are numbered through, the removed ones too."""
    ours = DistributedIndex([LocalBackend([pair.ours]) for pair in pairs])
    theirs = DistributedIndex([LocalBackend([pair.theirs]) for pair in pairs])
    assert ours.removed.tolist() == [
        *sorted(pairs[0].gone.tolist()),
        *(40 + np.sort(pairs[1].gone)).tolist(),
    ]
    with pytest.raises(IndexError, match="removed document"):
        ours.document(int(ours.removed[-1]))
    flat = [t for doc in pairs[1].docs for t in doc][:60]
    assert ours.attribute(flat, share=1.0, documents=999) == theirs.attribute(
        flat, share=1.0, documents=999
    )
    with pytest.raises(ValueError, match="replicas must hold the same indexes"):
        DistributedIndex([[LocalBackend([pairs[0].ours]), LocalBackend([pairs[0].theirs])]])


# Files


def lists_of(folder: Path) -> dict[int, tuple[str, File]]:
    """By shard: name and content of the list of removed documents."""
    found = {}
    for s, shard in enumerate(manifest_of(folder)["shards"]):
        if "del" in shard["files"]:
            name = shard["files"]["del"]["name"]
            found[s] = name, read_file(folder / name)
    return found


def test_lists_as_documented(tmp_path: Path) -> None:
    docs = random_docs(np.random.default_rng(4), VOCAB, 30, 40)
    folder = built(docs, tmp_path / "index", shards=3)
    before = manifest_of(folder)
    assert remove_documents(folder, [29, 2, 2]).documents == 2
    old = names_in(folder)
    assert remove_documents(folder, [3]) == Removal(1, len(docs[3]), 3)
    assert len(names_in(folder)) == len(old)
    manifest = manifest_of(folder)
    lists = lists_of(folder)
    assert len(lists) == 2
    first = 0
    for s, shard in enumerate(manifest["shards"]):
        removed = [d - first for d in (2, 3, 29) if first <= d < first + shard["documents"]]
        first += shard["documents"]
        entry = shard["files"].pop("del", None)
        if not removed:
            assert entry is None
            continue
        name, file = lists[s]
        assert name == f"del.{s}.{entry['table_crc32c']:08x}"
        assert (folder / name).stat().st_size == entry["bytes"]
        starts = np.frombuffer(read_file(folder / f"doc.{s}").payload, np.uint64).astype(np.int64)
        suf = np.frombuffer(read_file(folder / f"suf.{s}").payload, np.uint32).astype(np.int64)
        owner = np.searchsorted(starts, suf, side="right") - 1
        ranks = np.flatnonzero(np.isin(owner, removed)).tolist()
        words = np.frombuffer(file.payload, np.uint64).tolist()
        assert words == [len(removed), *removed, *ranks]
        assert (file.kind, file.shard, file.shards, file.elements) == (
            "DEL ",
            s,
            len(manifest["shards"]),
            len(words),
        )
        assert file.uuid.hex() == manifest["uuid"].replace("-", "")
    del manifest["sha256"], before["sha256"]
    assert manifest == before


def test_every_damage_is_refused(tmp_path: Path) -> None:
    """Changed bytes, cuts, lists that are missing or of another index: never an answer."""
    rng = np.random.default_rng(5)
    docs = random_docs(rng, VOCAB, 60, 400)
    folder = built(docs, tmp_path / "index")
    remove_documents(folder, range(0, 60, 2))
    ((name, file),) = lists_of(folder).values()
    data = (folder / name).read_bytes()
    assert len(file.payload) > 1 << 15
    for i in range(400):
        changed = bytearray(data)
        if i % 4 == 3:
            del changed[int(rng.integers(len(changed))) :]
        else:
            place = int(rng.integers(4200 if i % 2 else len(changed)))
            changed[place] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(changed)
        for verify in ("quick", "lazy", "full"):
            with pytest.raises((IndexCorruptError, NotAnIndexError, ValueError), match="del"):
                SpanIndex.open(folder, verify=verify)
    (folder / name).unlink()
    with pytest.raises(IndexCorruptError, match="missing"):
        SpanIndex.open(folder)
    other = built(docs, tmp_path / "other")
    remove_documents(other, [1])
    ((foreign, _),) = lists_of(other).values()
    shutil.copy(other / foreign, folder / name)
    with pytest.raises(IndexCorruptError, match="UUID"):
        SpanIndex.open(folder)
    (folder / name).write_bytes(data)
    SpanIndex.open(folder, verify="full").close()


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (lambda words: [0, *words[1:]], "quick", "number of documents"),
        (lambda words: [10**6, *words[1:]], "quick", "number of documents"),
        (
            lambda words: [words[0], words[2], words[1], *words[3:]],
            "quick",
            "documents out of order",
        ),
        (lambda words: [*words[:3], *words[4:]], "quick", "more or fewer ranks"),
        (
            lambda words: [*words[:3], *sorted(words[3:], reverse=True)],
            "quick",
            "ranks out of order",
        ),
        (lambda words: [*words[:-1], 10**6], "quick", "ranks out of order"),
        (lambda words: [*words[:3], *range(len(words) - 3)], "full", "ranks of other documents"),
    ],
    ids=str,
)
def test_lists_that_make_no_sense(
    tmp_path: Path, change: Callable[[list[int]], list[int]], level: str, text: str
) -> None:
    """With the right checksums, as only a faulty writer could make them."""
    docs = [[1, 2, 3], [4, 1, 2, 5], [0, 0, 1], [7, 8, 2]]
    folder = built(docs, tmp_path / "index")
    remove_documents(folder, [1, 3])
    ((name, file),) = lists_of(folder).values()
    words = change(np.frombuffer(file.payload, np.uint64).tolist())
    forge(folder, name, np.array(words, np.uint64))
    with pytest.raises(IndexCorruptError, match=text):
        SpanIndex.open(folder, verify=level)


def forge(folder: Path, name: str, words: Any) -> None:
    """A list with this payload under a manifest that names it."""
    import json
    import struct

    from tests.spans.index_files import BLOCK, HEADER, PAYLOAD, crc32c

    payload = words.tobytes()
    assert len(payload) <= BLOCK
    fields = list(HEADER.unpack((folder / name).read_bytes()[: HEADER.size]))
    fields[11:17] = [len(payload), len(words), fields[13], 16, 1, PAYLOAD + len(payload)]
    header = HEADER.pack(*fields)
    header = header[:120] + struct.pack("<II", crc32c(header[:120]), 0)
    table = struct.pack("<I", crc32c(payload))
    data = header.ljust(PAYLOAD, b"\0") + payload + table
    data += struct.pack("<I", crc32c(table)) + b"ALNEND\x1a\n"
    (folder / name).unlink()
    manifest = json.loads((folder / "index.json").read_bytes())
    del manifest["sha256"]
    entry = manifest["shards"][0]["files"]["del"]
    entry |= {"bytes": len(data), "table_crc32c": crc32c(table)}
    entry["name"] = f"del.0.{entry['table_crc32c']:08x}"
    (folder / entry["name"]).write_bytes(data)
    (folder / "index.json").write_bytes(encode_manifest(manifest))


# Failures


def test_a_failed_removal_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built([[1, 2], [2, 3], [3, 1]], tmp_path / "index")
    remove_documents(folder, [0])
    names = names_in(folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(removal, "write_manifest", full)
        with pytest.raises(OSError, match="No space"):
            remove_documents(folder, [1])
    assert names_in(folder) == names
    with SpanIndex.open(folder, verify="full") as index:
        assert (index.removed.tolist(), index.count([2])) == ([0], 1)


def _remove_and_die(folder: Path, after: bool) -> None:
    write = removal.write_manifest

    def write_and_die(*arguments: Any) -> None:
        if after:
            write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    removal.write_manifest = write_and_die
    remove_documents(folder, [1])


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_removal(tmp_path: Path, after: bool) -> None:
    folder = built([[1, 2], [2, 3], [3, 1]], tmp_path / "index")
    remove_documents(folder, [0])
    process = multiprocessing.get_context("fork").Process(
        target=_remove_and_die, args=(folder, after)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with SpanIndex.open(folder, verify="full") as index:
        assert index.removed.tolist() == ([0, 1] if after else [0])
        assert index.count([2]) == (0 if after else 1)
    assert len([n for n in names_in(folder) if n.startswith("del")]) == 2
    remove_documents(folder, [2])
    assert len([n for n in names_in(folder) if n.startswith("del")]) == 1
    with SpanIndex.open(folder) as index:
        assert index.n_tokens == (0 if after else 2)


def test_readers_while_documents_are_removed(tmp_path: Path) -> None:
    """Whoever opens the index sees it before or after a removal; whoever has it open, as it was."""
    docs = [[1, 2, d % VOCAB] for d in range(40)]
    folder = built(docs, tmp_path / "index")
    done = threading.Event()

    def remove() -> None:
        for d in range(40):
            remove_documents(folder, [d])
        done.set()

    with SpanIndex.open(folder) as old:
        thread = threading.Thread(target=remove)
        thread.start()
        seen = set()
        while not done.is_set():
            with SpanIndex.open(folder) as index:
                seen.add(len(index.removed))
                assert index.count([1, 2]) == 40 - len(index.removed)
            assert old.count([1, 2]) == 40
        thread.join()
    assert len(seen) > 1


def test_refusals(tmp_path: Path) -> None:
    folder = built([[1, 2], [2, 3], [3, 1]], tmp_path / "index")
    index = SpanIndex.open(folder)
    names = names_in(folder)
    for bad in ([3], [0, -1]):
        with pytest.raises(IndexError, match=r"documents must lie in \[0, 3\)"):
            remove_documents(folder, bad)
    with pytest.raises(TypeError, match="remove_documents: documents must be integers"):
        remove_documents(folder, [0.5])
    with pytest.raises(FileNotFoundError):
        remove_documents(tmp_path / "nothing", [0])
    assert names_in(folder) == names
    assert names_in(tmp_path) == ["index"]
    assert remove_documents(folder, []) == Removal(0, 0, 0)
    sent = pickle.dumps(index)
    assert remove_documents(folder, [1]) == Removal(1, 2, 1)
    assert remove_documents(folder, [1]) == Removal(0, 0, 1)
    with pytest.raises(ValueError, match="must be the pickled one"):
        pickle.loads(sent)
    with SpanIndex.open(folder) as now:
        assert now.uuid != index.uuid
        assert pickle.loads(pickle.dumps(now)).count([2]) == 1
        with pytest.raises(ValueError, match="without removed documents, got 1"):
            IndexTensors.load(now)
        with pytest.raises(ValueError, match="must have metadata"):
            list(find_documents(now, "source", "a"))


@pytest.fixture
def large_vocabulary(tmp_path: Path) -> Iterator[SpanIndex]:
    """Counts are kept as pairs above 2^22 tokens."""
    folder = built([[5_000_000, 1], [1, 7], [5_000_000]], tmp_path / "index", 6_000_000)
    remove_documents(folder, [0, 1])
    with SpanIndex.open(folder) as index:
        yield index


def test_sparse_counts(large_vocabulary: SpanIndex) -> None:
    index = large_vocabulary
    assert (index.counts.sum(), index.counts[5_000_000], index.counts[1]) == (1, 1, 0)
    assert index.next_dist([]).ids.tolist() == [5_000_000]
    assert index.count([7]) == 0
