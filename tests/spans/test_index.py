"""Queries against brute force, on many small corpora, however they are stored and computed."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignops import testing
from alignops.reference.spans import NaiveIndex
from alignops.spans import SpanIndex, build_index
from tests.spans.corpora import Corpus, ragged, random_corpus, random_query, shard_size

SHARDS, THREADS = (1, 2, 7), (1, 2, 8)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opened(corpus: Corpus, folder: Path, shards: int = 1, **options: Any) -> SpanIndex:
    """An index of the corpus in at most about this many shards."""
    build_index(
        corpus.docs,
        folder,
        vocab_size=corpus.vocab_size,
        shard_tokens=shard_size(corpus.docs, shards),
        fingerprint="test",
        allow_empty=True,
        **options,
    )
    return SpanIndex.open(folder)


def equal(a: Any, b: Any) -> bool:
    """Same numbers in the same shape, tuples item by item; NaN equals itself."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return np.shape(a) == np.shape(b) and np.array_equal(a, b, equal_nan=True)


def spans_options(rng: np.random.Generator, x: list[int], corpus: Corpus) -> dict[str, Any]:
    options: dict[str, Any] = {"min_len": int(rng.integers(1, 5))}
    if rng.random() < 0.5:
        options["max_count"] = int(rng.integers(0, 4))
    if rng.random() < 0.5:
        options["word_start"] = (rng.random(len(x)) < 0.6).tolist()
    if rng.random() < 0.5:
        options["delimiters"] = rng.choice(corpus.alphabet, 2).tolist()
    return options


def check_one(index: SpanIndex, naive: NaiveIndex, x: list[int], t: int, options: Any) -> None:
    """Answers that do not depend on shards."""
    assert index.count(x) == naive.count(x)
    assert equal(index.matching_stats(x), naive.matching_stats(x))
    assert equal(index.longest_prefix(x)[:2], naive.longest_prefix(x)[:2])
    assert equal(index.longest_suffix(x)[:2], naive.longest_suffix(x)[:2])
    assert equal(index.maximal_spans(x, **options), naive.maximal_spans(x, **options))
    context = x[-3:]
    candidates = [t, *x[:5], t]
    assert equal(index.next_counts(context, candidates), naive.next_counts(context, candidates))
    assert equal(index.next_dist(context), naive.next_dist(context))
    assert index.eos_count(context) == naive.eos_count(context)
    assert equal(index.ngram_prob(context, t), naive.ngram_prob(context, t))
    assert equal(index.infgram_prob(x, t), naive.infgram_prob(x, t))


def check_places(
    index: SpanIndex, naive: NaiveIndex, x: list[int], text_size: int | None = None
) -> None:
    """Every place is an occurrence; as many as asked for, none twice; all of them if allowed."""
    m = naive.count(x)
    text_size = naive.n_tokens + naive.n_docs if text_size is None else text_size
    for limit in (3, m + 1):
        hits = index.locate(x, limit)
        places = set(zip(hits.document.tolist(), hits.offset.tolist(), strict=True))
        assert len(places) == len(hits.document) == min(m, limit)
        assert all(naive.docs[d][o : o + len(x)] == x for d, o in places)
        assert set(zip(hits.shard.tolist(), hits.position.tolist(), strict=True)) <= {
            (s, p) for s in range(index.n_shards) for p in range(text_size)
        }
    everywhere = naive.locate(x, m + 1)
    assert places == set(zip(everywhere.document.tolist(), everywhere.offset.tolist(), strict=True))


def check_batches(index: SpanIndex, queries: list[list[int]], options: Any) -> None:
    """A batch answers like its rows."""
    ids, offsets = ragged(queries)
    assert index.count_batch(ids, offsets).tolist() == [index.count(x) for x in queries]
    assert equal(index.find_batch(ids, offsets), np.stack([index.find(x) for x in queries]))
    lengths, counts = index.matching_stats_batch(ids, offsets, counts=True)
    stats = [index.matching_stats(x) for x in queries]
    assert equal(lengths, np.concatenate(stats))
    assert equal(lengths, index.matching_stats_batch(ids, offsets))
    matches = [
        x[i : i + k] for x, row in zip(queries, stats, strict=True) for i, k in enumerate(row)
    ]
    assert equal(counts, index.count_batch(*ragged(matches)))
    mask = [True] * len(ids)
    spans, row = index.maximal_spans_batch(ids, offsets, **options, word_start=mask)
    for i, x in enumerate(queries):
        one = index.maximal_spans(x, **options)
        assert equal(tuple(a[row == i] for a in spans), one)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in which a thousand indexes can be built without waiting for a disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("group", range(20))
def test_brute_force(memory_folder: Path, group: int) -> None:
    """2,000 corpora: every kind of answer, from every instruction set in turn."""
    rng = np.random.default_rng(group)
    isas = testing.available_isas()
    for i in range(100):
        corpus = random_corpus(rng, longest=300 if i % 10 == 0 else 60)
        shards, count = int(rng.choice(SHARDS)), int(rng.choice(THREADS))
        naive = NaiveIndex(corpus.docs, corpus.vocab_size)
        queries = [random_query(rng, corpus) for _ in range(4)]
        folder = memory_folder / str(i)
        with (
            opened(corpus, folder, shards) as index,
            threads(count),
            testing.use_isa(isas[i % len(isas)]),
        ):
            assert (index.n_tokens, index.n_docs) == (naive.n_tokens, naive.n_docs)
            assert equal(index.counts, naive.counts)
            assert equal(index.unigram, naive.unigram)
            for x in queries:
                options = spans_options(rng, x, corpus)
                check_one(index, naive, x, int(rng.choice(corpus.alphabet)), options)
                check_places(index, naive, x)
                if index.n_shards == 1:
                    assert equal(index.find(x), naive.find(x))
                    assert equal(index.locate(x, 3), naive.locate(x, 3))
                    assert equal(index.longest_prefix(x), naive.longest_prefix(x))
                    assert equal(index.longest_suffix(x), naive.longest_suffix(x))
            check_batches(index, queries, {"min_len": 2, "max_count": 3})


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("shards", SHARDS)
def test_every_width_shard_and_thread_count(tmp_path: Path, bits: int, shards: int) -> None:
    rng = np.random.default_rng(bits + shards)
    docs = [rng.integers(0, 5, size=rng.integers(0, 80)).tolist() for _ in range(40)]
    corpus = Corpus(docs, 200, list(range(5)))
    naive = NaiveIndex(docs, 200)
    queries = [random_query(rng, corpus, 40) for _ in range(60)]
    ids, offsets = ragged(queries)
    expected = [
        naive.count_batch(ids, offsets),
        naive.matching_stats_batch(ids, offsets, counts=True),
        naive.maximal_spans_batch(ids, offsets, min_len=3),
    ]
    with opened(corpus, tmp_path / "index", shards, token_bits=bits) as index:
        assert index.token_bits == bits
        assert (index.n_shards > 1) == (shards > 1)
        for isa in testing.available_isas():
            for count in THREADS:
                with testing.use_isa(isa), threads(count):
                    got = [
                        index.count_batch(ids, offsets),
                        index.matching_stats_batch(ids, offsets, counts=True),
                        index.maximal_spans_batch(ids, offsets, min_len=3),
                    ]
                    assert equal(got[0], expected[0])
                    assert equal(got[1], expected[1])
                    assert equal(got[2][0], expected[2][0])
                    assert equal(got[2][1], expected[2][1])


def test_directory(tmp_path: Path) -> None:
    """The directory of first tokens is a shortcut only."""
    rng = np.random.default_rng(1)
    docs = [rng.integers(0, 3, size=400).tolist() for _ in range(30)]
    corpus = Corpus(docs, 3, [0, 1, 2])
    ids, offsets = ragged([random_query(rng, corpus, 40) for _ in range(300)])
    with (
        opened(corpus, tmp_path / "with", directory_tokens=0) as shortcut,
        opened(corpus, tmp_path / "without") as plain,
    ):
        for isa in testing.available_isas():
            with testing.use_isa(isa):
                assert equal(shortcut.find_batch(ids, offsets), plain.find_batch(ids, offsets))
                assert equal(
                    shortcut.matching_stats_batch(ids, offsets, counts=True),
                    plain.matching_stats_batch(ids, offsets, counts=True),
                )


def test_large_vocabulary(tmp_path: Path) -> None:
    """Above 2^22 ids, counts are stored sparsely."""
    large = 2**22 + 5
    docs = [[0, large - 1, 7, large - 1], [large - 1, 7]]
    with opened(Corpus(docs, large, [0]), tmp_path / "index") as index:
        assert index.count([large - 1, 7]) == 2
        assert index.count([5]) == 0
        assert index.find([5]).tolist() == [[1, 1]]
        assert equal(index.counts[[0, 7, large - 1, 8]], [1, 2, 3, 0])
        assert equal(index.next_dist([])[:2], ([0, 7, large - 1], [1, 2, 3]))
        assert equal(index.next_dist([large - 1])[:2], ([7], [2]))


def test_attribute(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for i in range(40):
        corpus = random_corpus(rng)
        naive = NaiveIndex(corpus.docs, corpus.vocab_size)
        x = random_query(rng, corpus, 60)
        with opened(corpus, tmp_path / str(i)) as index:
            for options in ({}, {"min_len": 3}, {"preset": "paper"}):
                got = index.attribute(x, share=1.0, **options)
                expected = naive.attribute(x, share=1.0, **options)
                assert [a._replace(score=0.0) for a in got] == [
                    a._replace(score=0.0) for a in expected
                ]
                np.testing.assert_allclose(
                    [a.score for a in got], [a.score for a in expected], atol=1e-9
                )
                best = index.attribute(x, share=0.05, **options)
                assert len(best) == min(math.ceil(0.05 * len(x)), len(got))
                assert best == sorted(best)
                dropped = [a.score for a in got if a not in best]
                assert min((a.score for a in best), default=0) >= max(dropped, default=0) - 1e-9
                assert (
                    index.top_docs(best, 3)
                    == sorted(index.top_docs(best, 10_000), key=lambda d: (-d[1], -d[2], d[0]))[:3]
                )


def test_sampled_next_tokens(tmp_path: Path) -> None:
    docs = [[1, i % 3] for i in range(300)] + [[1]]
    with opened(Corpus(docs, 4, [1]), tmp_path / "index", 7) as index:
        exact = index.next_dist([1], max_support=401)
        assert not exact.approx
        assert equal(exact[:2], ([0, 1, 2], [100, 100, 100]))
        for support in (1, 7, 30, 400):
            sample = index.next_dist([1], max_support=support)
            assert sample.approx
            estimate = dict(zip(sample.ids.tolist(), sample.counts.tolist(), strict=True))
            assert set(estimate) <= {0, 1, 2}
            # Estimates of the counts of all occurrences: in each shard, a step of the sample off.
            step = math.ceil(401 / support)
            assert all(abs(estimate.get(t, 0) - 100) <= index.n_shards * step for t in range(3))
    with opened(Corpus(docs, 4, [1]), tmp_path / "one") as index:
        following = [0] * 100 + [1] * 100 + [2] * 100 + [-1] * 101  # by rank; -1 ends a document
        estimate = dict.fromkeys((-1, 0, 1, 2), 0)
        for i in range(10):
            stands_for = (i + 1) * 401 // 10 - i * 401 // 10
            estimate[following[(2 * i + 1) * 401 // 20]] += stands_for
        sample = index.next_dist([1], max_support=10)
        assert equal(sample[:2], ([0, 1, 2], [estimate[t] for t in range(3)]))
        assert sample.counts.sum() + estimate[-1] == index.count([1])


def test_places_of_ranks(tmp_path: Path) -> None:
    docs = [[1, 2, 1, 2], [], [2, 1], [1, 2, 2]]
    with opened(Corpus(docs, 4, [1, 2]), tmp_path / "index", 3) as index:
        intervals = index.find([1, 2]).tolist()
        hits = [index.hits(s, range(lo, hi)) for s, (lo, hi) in enumerate(intervals)]
        for mine, whole in zip(zip(*hits, strict=True), index.locate([1, 2], 9), strict=True):
            assert equal(np.concatenate(mine), whole)
        for shard, ranks, text in ((0, [9], "ranks"), (1, [-1], "ranks"), (9, [], "shard")):
            with pytest.raises(IndexError, match=f"hits: {text}"):
                index.hits(shard, ranks)


def test_longest_match_is_capped(tmp_path: Path) -> None:
    x = [3] * 5000
    with opened(Corpus([x], 4, [3]), tmp_path / "index") as index:
        assert index.max_match == 4096
        stats = index.matching_stats(x)
        assert equal(stats, np.minimum(4096, np.arange(5000, 0, -1)))
        assert index.longest_prefix(x)[:2] == (4096, 905)
        assert index.longest_suffix(x)[:2] == (4096, 905)
        assert index.count(x) == 1


def test_ids_of_every_kind(tmp_path: Path) -> None:
    corpus = Corpus([[1, 2, 1, 2], [2, 1]], 4, [1, 2])
    with opened(corpus, tmp_path / "index") as index:
        kinds = [np.array([1, 2], name) for name in "bBhHiIlLqQ"]
        views = [np.array([1, 9, 2, 9])[::2], np.array([1, 2], ">i4"), (1, 2), range(1, 3)]
        tensors = [torch.tensor([1, 2], dtype=t) for t in (torch.int64, torch.int32, torch.uint8)]
        for q in (*kinds, *views, *tensors):
            assert index.count(q) == 2
        assert index.count_batch(torch.tensor([1, 2, 1]), np.array([0, 2, 2, 3])).tolist() == [
            2,
            6,
            3,
        ]


def test_document(tmp_path: Path) -> None:
    docs = [[1, 2], [], [3]]
    extra = {"meta": [{"a": 1}, None, "x"], "labels": [5, 0, 7], "byte_offsets": [[0, 4], [], [9]]}
    with opened(Corpus(docs, 4, [1]), tmp_path / "index", 2, **extra) as index:
        first, _, last = (index.document(d) for d in range(3))
        assert (first.tokens.tolist(), first.meta, first.label) == ([1, 2], {"a": 1}, 5)
        assert (last.tokens.tolist(), last.meta, last.label) == ([3], "x", 7)
        assert last.byte_offsets is not None
        assert last.byte_offsets.tolist() == [9]
    with opened(Corpus(docs, 4, [1]), tmp_path / "bare") as index:
        assert index.document(1)[0].tolist() == []
        assert index.document(0)[1:] == (None, None, None)


def test_empty_corpus(tmp_path: Path) -> None:
    with opened(Corpus([[], []], 4, [1]), tmp_path / "index") as index:
        assert index.count([]) == index.count([1]) == 0
        assert index.find([1]).tolist() == [[0, 0]]
        assert index.matching_stats([1, 2]).tolist() == [0, 0]
        assert index.attribute([1, 2]) == []
        assert index.next_dist([]).ids.tolist() == []
        assert len(index.locate([], 5).shard) == 0
        assert math.isnan(index.ngram_prob([], 1))


def test_life(tmp_path: Path) -> None:
    corpus = Corpus([[1, 2, 1, 2], [2, 1]], 4, [1, 2])
    index = opened(corpus, tmp_path / "index")
    copy = pickle.loads(pickle.dumps(index))
    assert (copy.uuid, copy.count([1])) == (index.uuid, 3)
    index.verify()
    index.verify("quick")
    assert "6 tokens, 2 documents, 1 shards" in repr(index)
    index.close()
    index.close()
    assert "closed" in repr(index)
    with pytest.raises(ValueError, match="is closed"):
        index.count([1])
    stored = pickle.dumps(copy)
    build_index(corpus.docs, tmp_path / "index", vocab_size=4, fingerprint="test", overwrite=True)
    assert copy.count([1]) == 3
    with pytest.raises(ValueError, match="must be the pickled one"):
        pickle.loads(stored)


def test_threads_share_one_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    docs = [rng.integers(0, 4, size=500).tolist() for _ in range(60)]
    corpus = Corpus(docs, 4, [0, 1, 2, 3])
    ids, offsets = ragged([random_query(rng, corpus) for _ in range(200)])
    with opened(corpus, tmp_path / "index", 2) as index:
        expected = index.count_batch(ids, offsets)
    results: list[bool] = []
    with SpanIndex.open(tmp_path / "index") as index:

        def work() -> None:
            results.extend(equal(index.count_batch(ids, offsets), expected) for _ in range(20))

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert results == [True] * 160


def _answer(index: SpanIndex, ids: Any, offsets: Any, queue: Any) -> None:
    queue.put(index.count_batch(ids, offsets).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(tmp_path: Path, method: str) -> None:
    rng = np.random.default_rng(4)
    docs = [rng.integers(0, 4, size=300).tolist() for _ in range(60)]
    corpus = Corpus(docs, 4, [0, 1, 2, 3])
    ids, offsets = ragged([random_query(rng, corpus) for _ in range(400)])
    context = multiprocessing.get_context(method)
    with opened(corpus, tmp_path / "index") as index, threads(2):
        expected = index.count_batch(ids, offsets).tolist()  # torch's threads run before the fork
        queue = context.Queue()
        process = context.Process(target=_answer, args=(index, ids, offsets, queue), daemon=True)
        process.start()
        assert queue.get(timeout=120) == expected
        process.join()
        assert process.exitcode == 0
