"""One index out of parts: the answers of `SpanIndex`, wherever the parts are."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignops.spans import (
    DistributedIndex,
    IndexCorruptError,
    LocalBackend,
    MatchRule,
    ProcessBackend,
    ShardUnavailableError,
    SpanIndex,
    SpanMatcher,
    TokenizerMismatchError,
    TraceShield,
    build_index,
    build_shard,
    merge_manifest,
)

VOCABULARY = 40
TOKENIZER = "tests"
Queries = tuple[np.ndarray, np.ndarray]


def documents(seed: int = 0) -> list[list[int]]:
    """Repetitive ones, some empty, some copies."""
    rng = np.random.default_rng(seed)
    docs: list[list[int]] = [[]]
    for i in range(42):
        docs.append(rng.integers(0, 6 if i % 2 else VOCABULARY - 1, rng.integers(0, 60)).tolist())
        if i % 5 == 0:
            docs.append(list(docs[rng.integers(len(docs))]))
    return docs


def divided(docs: list[list[int]], parts: int) -> list[list[list[int]]]:
    bounds = [p * len(docs) // parts for p in range(parts + 1)]
    return [docs[a:b] for a, b in itertools.pairwise(bounds)]


class Case:
    """The same shards as one index and as an index each."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.docs = documents()
        self.folders = []
        for p, docs in enumerate(divided(self.docs, parts)):
            target = folder / f"part-{p}"
            build_index(docs, target, vocab_size=VOCABULARY, fingerprint=TOKENIZER)
            self.folders.append(str(target))
            build_shard(docs, folder / "shards", p, vocab_size=VOCABULARY)
        merge_manifest(folder / "shards", folder / "whole", shards=parts, fingerprint=TOKENIZER)
        self.whole = SpanIndex.open(folder / "whole", fingerprint=TOKENIZER)

    def split(self, workers: int) -> list[list[str]]:
        """The folders of each of so many workers."""
        n = len(self.folders)
        bounds = [w * n // workers for w in range(workers + 1)]
        return [self.folders[a:b] for a, b in itertools.pairwise(bounds)]

    def queries(self, seed: int = 1) -> Queries:
        """Pieces of documents, some changed, and the empty query, as a ragged batch."""
        rng = np.random.default_rng(seed)
        rows: list[list[int]] = [[]]
        for _ in range(60):
            doc = self.docs[rng.integers(len(self.docs))]
            start = int(rng.integers(len(doc) + 1))
            row = doc[start : start + int(rng.integers(1, 12))]
            if rng.random() < 0.3:
                row = [*row, int(rng.integers(VOCABULARY)), *row]
            rows.append(row)
        flat = np.array([t for row in rows for t in row], np.int64)
        return flat, np.cumsum([0, *map(len, rows)])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Case]:
    return {parts: Case(tmp_path_factory.mktemp(f"parts{parts}"), parts) for parts in (1, 2, 7)}


@pytest.fixture(scope="module")
def processes(cases: dict[int, Case]) -> Iterator[dict[int, list[ProcessBackend]]]:
    """Seven parts in one process and in three, which all tests share and none harms."""
    started = {n: [ProcessBackend(f) for f in cases[7].split(n)] for n in (1, 3)}
    yield started
    for backend in (b for group in started.values() for b in group):
        backend.close()


@pytest.fixture(params=["1 local", "2 local", "7 local in 3", "7 in 1 process", "7 in 3 processes"])
def placed(
    request: pytest.FixtureRequest,
    cases: dict[int, Case],
    processes: dict[int, list[ProcessBackend]],
) -> tuple[Case, DistributedIndex]:
    words = request.param.split()
    case = cases[int(words[0])]
    if words[-1].startswith("process"):
        return case, DistributedIndex(processes[int(words[2])])
    workers = int(words[3]) if len(words) > 2 else 1
    return case, DistributedIndex([LocalBackend(f) for f in case.split(workers)])


Placed = tuple[Case, DistributedIndex]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Equal arrays, or tuples and lists of them."""
    if isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        np.testing.assert_array_equal(ours, theirs)


def test_attributes(placed: Placed) -> None:
    case, index = placed
    for name in ("vocab_size", "token_bits", "fingerprint", "n_tokens", "n_docs", "n_shards"):
        assert getattr(index, name) == getattr(case.whole, name), name
    assert_equal(index.counts, case.whole.counts)
    assert_equal(index.unigram, case.whole.unigram)
    for d in range(index.n_docs):
        assert index.document(d).tokens.tolist() == case.docs[d]


@pytest.mark.parametrize(
    "ask",
    [
        lambda index, q: index.count_batch(*q),
        lambda index, q: index.find_batch(*q),
        lambda index, q: index.matching_stats_batch(*q),
        lambda index, q: index.matching_stats_batch(*q, counts=True),
        lambda index, q: index.maximal_spans_batch(*q),
        lambda index, q: index.maximal_spans_batch(*q, min_len=3, max_count=4),
        lambda index, q: index.maximal_spans_batch(*q, word_start=q[0] % 3 > 0),
        lambda index, q: index.maximal_spans_batch(
            *q, word_start=q[0] % 2 > 0, delimiters=[1, 7], max_count=20
        ),
    ],
)
def test_batches(placed: Placed, ask: Callable[[Any, Queries], Any]) -> None:
    case, index = placed
    queries = case.queries()
    assert_equal(ask(index, queries), ask(case.whole, queries))


@pytest.mark.parametrize(
    "ask",
    [
        lambda index, q: index.count(q),
        lambda index, q: index.find(q),
        lambda index, q: index.locate(q),
        lambda index, q: index.locate(q, 3),
        lambda index, q: index.locate(q, 10**6),
        lambda index, q: index.matching_stats(q),
        lambda index, q: index.longest_prefix(q),
        lambda index, q: index.longest_suffix(q),
        lambda index, q: index.maximal_spans(q),
        lambda index, q: index.next_counts(q, list(range(VOCABULARY))),
        lambda index, q: index.next_counts(q, []),
        lambda index, q: index.next_dist(q),
        lambda index, q: index.next_dist(q, max_support=5),
        lambda index, q: index.next_dist(q, max_support=64),
        lambda index, q: index.eos_count(q),
        lambda index, q: index.attribute(q),
        lambda index, q: index.attribute(q, share=1.0, documents=3, min_len=2, max_count=9),
        lambda index, q: index.attribute(q, preset="paper"),
        lambda index, q: index.top_docs(index.attribute(q, share=1.0), 5),
        lambda index, q: [index.ngram_prob(q, t) for t in range(8)],
        lambda index, q: [index.infgram_prob(q, t) for t in range(8)],
    ],
)
def test_single_queries(placed: Placed, ask: Callable[[Any, np.ndarray], Any]) -> None:
    case, index = placed
    flat, bounds = case.queries(2)
    for a, b in itertools.pairwise(bounds[:20]):
        assert_equal(ask(index, flat[a:b]), ask(case.whole, flat[a:b]))


def test_everything_that_an_index_answers_is_compared() -> None:
    """A query that `SpanIndex` gets, `DistributedIndex` has, and the tests above ask."""
    own = {"open", "close", "path", "fingerprint", "uuid"}
    public = {n for n in dir(SpanIndex) if not n.startswith("_")} - own
    assert public <= set(dir(DistributedIndex))
    source = Path(__file__).read_text(encoding="utf-8")
    assert {n for n in public if f"index.{n}" not in source} == {"max_match"}


def test_places_of_ranks(placed: Placed) -> None:
    case, index = placed
    for s, (lo, hi) in enumerate(index.find([1]).tolist()):
        assert_equal(index.hits(s, range(lo, hi)), case.whole.hits(s, range(lo, hi)))
    for shard, ranks in ((-1, [0]), (index.n_shards, [0]), (0, [10**6])):
        with pytest.raises(IndexError, match="hits: "):
            index.hits(shard, ranks)
    index.verify("full")


RULES = {
    "bci": MatchRule(tau=6.0, min_len=2),
    "rare": MatchRule(tau=4.0, min_len=2, max_count=2),
    "norm": MatchRule(kind="norm", tau=1.0, min_len=2, severity=1.5),
    "max": MatchRule(kind="max", tau=1.5, min_len=2),
    "exact": MatchRule(tau=4.0, min_len=2),
    "cover": MatchRule(tau=4.0, min_len=2, allow_mode="cover"),
    "exact rare": MatchRule(kind="norm", tau=0.5, min_len=2, max_count=9, severity=2.0),
    "cover max": MatchRule(kind="max", tau=1.5, min_len=1, allow_mode="cover"),
}


class Harmless:
    """Harmless text as one index, and as parts of several backends."""

    def __init__(self, folder: Path) -> None:
        docs = documents()[::3]
        build_index(docs, folder / "index", vocab_size=VOCABULARY, fingerprint=TOKENIZER)
        self.whole = SpanIndex.open(folder / "index", fingerprint=TOKENIZER)
        self.folders = []
        for p, part in enumerate(divided(docs, 3)):
            target = folder / f"part-{p}"
            build_index(part, target, vocab_size=VOCABULARY, fingerprint=TOKENIZER)
            self.folders.append(str(target))
        self.parts = DistributedIndex(
            [LocalBackend(self.folders[:2]), LocalBackend(self.folders[2:])]
        )


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Harmless:
    return Harmless(tmp_path_factory.mktemp("allow"))


def follow(
    case: Case,
    index: DistributedIndex,
    name: str,
    harmless: Harmless,
    allow: SpanIndex | DistributedIndex | None = None,
) -> None:
    """A random walk of beams along documents: what `SpanMatcher` says, at every step."""
    rng = np.random.default_rng(5)
    options = {"batch": 3, "max_match": 12, "rule": RULES[name]}
    one = harmless.whole if name.startswith(("exact", "cover")) else None
    ours = index.matcher(one and (allow or one), **options)
    theirs = SpanMatcher(case.whole, one, **options)

    def compare() -> None:
        for a, b in zip(ours.state(), theirs.state(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        cand = rng.integers(0, VOCABULARY, (ours.batch, 9))
        assert_equal(ours.peek(cand), theirs.peek(cand))
        for a, b in zip(ours.peek(cand, exact=True), theirs.peek(cand, exact=True), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        assert_equal(ours.flagged(), theirs.flagged())

    compare()
    flagged = 0
    text = [t for doc in case.docs[3:30] for t in doc]
    for t, token in enumerate(text[:60]):
        if t % 20 == 10:
            for one in (ours, theirs):
                one.extend_prompt([text[60:64], [], [3]] if one.batch == 3 else text[60:64])
            compare()
        tokens = [token, *rng.integers(0, 6, ours.batch - 1).tolist()]
        parent = rng.integers(0, ours.batch, ours.batch) if t % 4 == 3 else None
        for one in (ours, theirs):
            one.advance(tokens, parent)
        compare()
        flagged += int(ours.state().flag.sum())
        if t == 30:
            for one in (ours, theirs):
                one.active = [True, False, True]
        if t == 40:
            for one in (ours, theirs):
                one.reset([1])
        if t == 50:
            for one in (ours, theirs):
                one.advance([1, 2], [0, 2])
    twin = ours.copy()
    twin.advance([0] * twin.batch)
    compare()
    assert flagged > 0


@pytest.mark.parametrize("name", RULES)
def test_matcher(placed: Placed, name: str, harmless: Harmless) -> None:
    follow(*placed, name, harmless)


@pytest.mark.parametrize("name", ["exact", "cover", "exact rare", "cover max"])
def test_matcher_with_harmless_text_in_parts(placed: Placed, name: str, harmless: Harmless) -> None:
    follow(*placed, name, harmless, harmless.parts)


def test_matcher_with_harmless_text_in_other_processes(
    cases: dict[int, Case], own: Make, harmless: Harmless
) -> None:
    """Backends of either index may be lost and come back."""
    case = cases[2]
    unsafe, allow = own([case.folders[:1], harmless.folders])
    index = DistributedIndex([unsafe, LocalBackend(case.folders[1:])])
    follow(case, index, "cover", harmless, DistributedIndex([allow]))
    options = {"rule": RULES["cover"]}
    ours = index.matcher(DistributedIndex([allow]), **options)
    theirs = SpanMatcher(case.whole, harmless.whole, **options)
    text = [t for doc in case.docs[3:30] for t in doc]
    for i, token in enumerate(text[:40]):
        if i % 20 == 10:
            kill(allow if i == 10 else unsafe)
            with pytest.raises(ShardUnavailableError):
                ours.advance([token])
            (allow if i == 10 else unsafe).restart()
        ours.advance([token])
        theirs.advance([token])
        assert_equal(ours.state()[:2], theirs.state()[:2])
        np.testing.assert_allclose(ours.state().bci, theirs.state().bci, rtol=1e-12)


class Forgetful(LocalBackend):
    """Has lost every matcher by the next call."""

    restored = 0

    def restore(self, *arguments: Any) -> Any:
        self.restored += 1
        return super().restore(*arguments)

    def _at(self, matcher: str, step: int) -> Any:
        entry = super()._at(matcher, step)
        del self._followed[matcher]
        return entry


@pytest.mark.parametrize("name", ["bci", "cover"])
def test_lost_matchers_are_rebuilt(cases: dict[int, Case], name: str, harmless: Harmless) -> None:
    backends = [Forgetful(f) for f in cases[7].split(3)]
    follow(cases[7], DistributedIndex(backends), name, harmless)
    assert all(backend.restored > 60 for backend in backends)


def test_idle_matchers_are_forgotten(cases: dict[int, Case]) -> None:
    backend = LocalBackend(cases[1].folders, idle_seconds=0.0)
    index = DistributedIndex([backend])
    first, second = index.matcher(), index.matcher()
    for matcher in (first, second, first):
        matcher.advance([1])
        assert len(backend._followed) == 1
    assert first.state().length.tolist() == [index.longest_suffix([1, 1]).length]
    first.close()
    assert not backend._followed


def test_long_texts_are_rebuilt_from_their_tails(cases: dict[int, Case]) -> None:
    case = cases[2]
    index = DistributedIndex([Forgetful(f) for f in case.split(2)])
    options = {"max_match": 4, "rule": MatchRule(tau=3.0, min_len=2)}
    ours, theirs = index.matcher(**options), SpanMatcher(case.whole, **options)
    for token in [t for doc in case.docs for t in doc][:100]:
        ours.advance([token])
        theirs.advance([token])
        for a, b in zip(ours.state(), theirs.state(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)  # sums from another beginning
    assert len(ours._rows[0].tokens) <= 3 * 4


@pytest.mark.parametrize("allow_mode", ["none", "exact", "cover"])
@pytest.mark.parametrize("parted", [False, True])
def test_filter(placed: Placed, allow_mode: str, parted: bool, harmless: Harmless) -> None:
    case, index = placed
    options: dict[str, Any] = {"tau": 4.0, "min_len": 3}
    if allow_mode != "none":
        options |= {"allow": harmless.whole, "allow_mode": allow_mode}
    theirs = TraceShield(case.whole, **options)
    if allow_mode != "none" and parted:
        options["allow"] = harmless.parts
        assert TraceShield(case.whole, **options).check(case.docs[5]) == theirs.check(case.docs[5])
        stream = TraceShield(case.whole, **options).stream()
        assert stream.push(case.docs[5]) == theirs.check(case.docs[5]).refused
    ours = TraceShield(index, **options)
    flat, bounds = case.queries(7)
    verdicts = theirs.check_batch(flat, bounds)
    assert ours.check_batch(flat, bounds) == verdicts
    assert any(verdict.refused for verdict in verdicts)
    stream = ours.stream()
    for token in flat[:40]:
        stream.push(token)
        assert stream.refused == theirs.check(stream.tokens).refused


def test_matchers_need_an_index_as_allow_index(cases: dict[int, Case], tmp_path: Path) -> None:
    index = DistributedIndex([LocalBackend(cases[1].folders)])
    with pytest.raises(
        TypeError, match="allow must be a SpanIndex or a DistributedIndex, got list"
    ):
        index.matcher([1])  # type: ignore[arg-type]
    build_index([[1]], tmp_path / "other", vocab_size=VOCABULARY, fingerprint="another")
    with pytest.raises(TokenizerMismatchError, match="fingerprint of allow must be 'tests'"):
        index.matcher(SpanIndex.open(tmp_path / "other"))


def test_bad_queries_raise_what_the_index_raises(placed: Placed) -> None:
    _, index = placed
    for q in ([VOCABULARY], [-1]):
        with pytest.raises(IndexError):
            index.count(q)
    with pytest.raises(TypeError):
        index.count([0.5])
    with pytest.raises(ValueError, match="offsets"):
        index.count_batch([1, 2], [0, 3])
    with pytest.raises(IndexError):
        index.document(index.n_docs)
    matcher = index.matcher()
    matcher.advance([1])
    with pytest.raises(IndexError):
        matcher.advance([VOCABULARY])
    matcher.advance([2])
    assert matcher.state().length.tolist() == [index.longest_suffix([1, 2]).length]


def test_parts_of_other_tokens_are_refused(cases: dict[int, Case], tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_index([[1]], other, vocab_size=VOCABULARY, fingerprint="another")
    ours = cases[1].folders[0]
    with pytest.raises(TokenizerMismatchError, match="fingerprint"):
        LocalBackend([ours, other])
    with pytest.raises(TokenizerMismatchError, match="fingerprint of backend 1"):
        DistributedIndex([LocalBackend([ours]), LocalBackend([other])])
    with pytest.raises(ValueError, match="replicas"):
        DistributedIndex([[LocalBackend([ours]), LocalBackend([cases[2].folders[0]])]])


@pytest.fixture
def own(cases: dict[int, Case]) -> Iterator[Callable[..., list[ProcessBackend]]]:
    """Makes processes that a test may kill."""
    made: list[ProcessBackend] = []

    def make(groups: Sequence[list[str]], **options: Any) -> list[ProcessBackend]:
        made.extend(ProcessBackend(group, **options) for group in groups)
        return made[-len(groups) :]

    yield make
    for backend in made:
        backend.close()


def kill(backend: ProcessBackend) -> None:
    assert backend.pid is not None
    os.kill(backend.pid, signal.SIGKILL)


Make = Callable[..., list[ProcessBackend]]


def test_killed_worker(cases: dict[int, Case], own: Make) -> None:
    case = cases[7]
    groups = case.split(2)
    (worker,) = own(groups[:1])
    rest = LocalBackend(groups[1])
    index = DistributedIndex([worker, rest])
    shield = TraceShield(index, tau=6.0, min_len=2)
    flat, bounds = case.queries(4)
    rule = RULES["bci"]
    ours, theirs = index.matcher(rule=rule), SpanMatcher(case.whole, rule=rule)
    for token in flat[:5]:
        ours.advance([token])
        theirs.advance([token])

    kill(worker)
    with pytest.raises(ShardUnavailableError, match="part-0"):
        index.count_batch(flat, bounds)
    with pytest.raises(ShardUnavailableError):
        ours.advance([1])
    verdict = shield.check(flat[:20])
    assert (verdict.refused, verdict.complete, verdict.reason) == (True, False, "index-unavailable")
    partial = index.partially(lambda reachable: reachable.count_batch(flat, bounds))
    assert not partial.complete
    assert len(partial.missing) == 1
    assert "part-0" in partial.missing[0]
    assert_equal(partial.value, rest.count_batch(flat, bounds))
    spans = index.partially(lambda reachable: reachable.maximal_spans(flat[:30]))
    assert_equal(spans.value, DistributedIndex([rest]).maximal_spans(flat[:30]))
    assert not spans.complete

    worker.restart()
    assert_equal(index.count_batch(flat, bounds), case.whole.count_batch(flat, bounds))
    assert index.partially(lambda reachable: reachable.count([1])).complete
    ours.advance([1])
    theirs.advance([1])
    assert_equal(ours.state(), theirs.state())


def test_nobody_answers(cases: dict[int, Case], own: Make) -> None:
    (worker,) = own(cases[1].split(1))
    index = DistributedIndex([worker])
    kill(worker)
    with pytest.raises(ShardUnavailableError, match="no part"):
        index.partially(lambda reachable: reachable.count([1]))


def test_replica_takes_over(cases: dict[int, Case], own: Make) -> None:
    case = cases[2]
    groups = case.split(2)
    first, second = own([groups[0], groups[0]])
    index = DistributedIndex([[first, second], LocalBackend(groups[1])])
    queries = case.queries(6)
    rule = RULES["rare"]
    ours, theirs = index.matcher(rule=rule), SpanMatcher(case.whole, rule=rule)
    for i, token in enumerate(queries[0][:30]):
        if i == 10:
            kill(first)
        if i == 20:
            first.restart()
            kill(second)
        ours.advance([token])
        theirs.advance([token])
        assert_equal(ours.state(), theirs.state())
        assert_equal(index.count_batch(*queries), case.whole.count_batch(*queries))
    first.close()
    second.close()
    with pytest.raises(ShardUnavailableError):
        index.count([1])


def test_late_answers_are_thrown_away(cases: dict[int, Case], own: Make) -> None:
    case = cases[1]
    (worker,) = own(case.split(1), timeout=0.5)
    index = DistributedIndex([worker])
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(ShardUnavailableError, match=r"count_batch within 0\.5 s"):
        index.count([1])
    assert time.monotonic() - start >= 0.5
    os.kill(worker.pid, signal.SIGCONT)
    worker.timeout = 30.0
    assert index.count([2]) == case.whole.count([2])
    assert index.count([]) == case.whole.n_tokens


def test_worker_raises_what_opening_raises(cases: dict[int, Case], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ProcessBackend([tmp_path / "nothing"])


def test_damaged_part(cases: dict[int, Case], tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(documents(), target, vocab_size=VOCABULARY, fingerprint=TOKENIZER)
    good = LocalBackend([cases[1].folders[0]])
    index = DistributedIndex([LocalBackend([target]), good])
    with (target / "suf.0").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(IndexCorruptError):
        index.count([1, 2])
    partial = index.partially(lambda reachable: reachable.count([1, 2]))
    assert (partial.value, partial.complete) == (cases[1].whole.count([1, 2]), False)
