"""Inputs of the spans benchmarks, and what is timed on them, as contestants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.corpus import SEPARATOR, VOCABULARY, Corpus
from benchmarks.spans_peers import InfiniGram, Peer, Span, Tokengrams
from benchmarks.timing import Runner

if TYPE_CHECKING:
    from alignops.spans import SpanIndex, TraceShield

Tokens = list[int]
BYTES_PER_TOKEN = 6  # 2 of text, 4 of SUF
MAX_COUNT = 10  # of a span, as infini-gram's service uses it
DIRECTORY_TOKENS, DIRECTORY_STRIDE = 1 << 26, 256  # from how many tokens on there is a directory


def windows(tokens: np.ndarray, length: int, count: int, seed: int) -> list[Tokens]:
    """`count` random windows of `length` tokens of one document each."""
    rng = np.random.default_rng(seed)
    found: list[Tokens] = []
    while len(found) < count:
        start = int(rng.integers(0, len(tokens) - length))
        window = tokens[start : start + length]
        if not (window == SEPARATOR).any():
            found.append(window.tolist())
    return found


def queries(text: Corpus, count: int, length: int = 8) -> list[Tokens]:
    """Half from the text, half from files that are not in it, in turn."""
    inside = windows(text.tokens, length, count // 2, seed=1)
    outside = windows(text.held_out, length, count // 2, seed=2)
    return [query for pair in zip(inside, outside, strict=True) for query in pair]


def completions(text: Corpus, length: int, count: int) -> list[Tokens]:
    """Windows of files that are not in the text."""
    return windows(text.held_out, length, count, seed=3)


def ragged(rows: list[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Flat uint16 tokens and int64 offsets."""
    offsets = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
    return np.concatenate(rows).astype(np.uint16), offsets


def _halvings(index: SpanIndex, tokens: Tokens) -> float:
    """Steps of a binary search in the bucket of each token, or, with a directory, in a stride."""
    buckets = np.asarray(index.counts)[tokens]
    if index.n_tokens > DIRECTORY_TOKENS:
        buckets = np.minimum(buckets, DIRECTORY_STRIDE)
    return float(np.ceil(np.log2(buckets + 1)).sum())


def count_reads(index: SpanIndex, rows: list[Tokens], counts: list[int]) -> float:
    """Random reads that a count takes at least: a read of SUF and one of the text per step.

    The search halves the bucket of the first token, then it gallops over the occurrences.
    """
    gallop = float(np.ceil(np.log2(np.array(counts) + 1)).sum())
    return 2 * (_halvings(index, [row[0] for row in rows]) + gallop) / len(rows)


def span_reads(index: SpanIndex, rows: list[Tokens]) -> float:
    """The same for the spans of a completion: a search from each token."""
    return 2 * _halvings(index, [token for row in rows for token in row]) / len(rows)


def build(text: Corpus, target: Path, builder: str) -> Runner:
    """The traffic is what a build must read and write: text and SUF."""
    from alignops.spans import build_index

    documents = text.documents()

    def run() -> None:
        build_index(documents, target, vocab_size=VOCABULARY, builder=builder, overwrite=True)

    return Runner(f"alignops {builder}", run, 1, BYTES_PER_TOKEN * len(text.tokens))


def answers(index: SpanIndex, rows: list[Tokens]) -> list[int]:
    found: list[int] = index.count_batch(*ragged(rows)).tolist()
    return found


def count_batch(index: SpanIndex, rows: list[Tokens]) -> Runner:
    flat, offsets = ragged(rows)
    return Runner("alignops, batch", lambda: index.count_batch(flat, offsets), len(rows))


def count_each(index: SpanIndex, rows: list[Tokens]) -> Runner:
    arrays = [np.array(row, np.uint16) for row in rows]

    def run() -> None:
        for row in arrays:
            index.count(row)

    return Runner("alignops, one by one", run, len(rows))


def count_peer(peer: Peer, rows: list[Tokens]) -> Runner:
    def run() -> None:
        for row in rows:
            peer.count(row)

    return Runner(peer.name, run, len(rows))


def maximal_spans(index: SpanIndex, rows: list[Tokens]) -> Runner:
    arrays = [np.array(row, np.uint16) for row in rows]

    def run() -> None:
        for row in arrays:
            index.maximal_spans(row, max_count=MAX_COUNT)

    return Runner("alignops, one completion at a time", run, len(rows))


def maximal_spans_batch(index: SpanIndex, rows: list[Tokens]) -> Runner:
    flat, offsets = ragged(rows)

    def run() -> None:
        index.maximal_spans_batch(flat, offsets, max_count=MAX_COUNT)

    return Runner("alignops, batch", run, len(rows))


def attribute(engine: InfiniGram, rows: list[Tokens]) -> Runner:
    def run() -> None:
        for row in rows:
            engine.attribute(row, MAX_COUNT)

    return Runner("infini-gram attribute", run, len(rows))


def compare_spans(index: SpanIndex, engine: InfiniGram, rows: list[Tokens]) -> str:
    """Compares the spans of both; returns what differs, for the report.

    Raises:
        RuntimeError: a span of infini-gram occurs another number of times in ours.
    """
    same = differ = 0
    for row in rows:
        theirs = engine.attribute(row, MAX_COUNT)
        counts = answers(index, [row[start:end] for start, end, _ in theirs]) if theirs else []
        for (start, end, count), ours in zip(theirs, counts, strict=True):
            if count != ours:
                raise RuntimeError(
                    f"infini-gram counts {count} occurrences of {row[start:end]}, alignops {ours}"
                )
        found = index.maximal_spans(np.array(row, np.uint16), max_count=MAX_COUNT)
        mine: set[Span] = set(
            zip(found.start.tolist(), found.end.tolist(), found.count.tolist(), strict=True)
        )
        same += len(mine & set(theirs))
        differ += len(mine ^ set(theirs))
    return (
        f"Spans of {len(rows)} completions in {index.n_tokens / 1e6:.1f} M tokens: {same} are the "
        f"same for infini-gram and alignops, {differ} are found by one only."
    )


def open_index(place: Path, verify: str) -> Runner:
    from alignops.spans import SpanIndex

    return Runner(f"alignops, {verify}", lambda: SpanIndex.open(place, verify=verify).close(), 1)


def open_infini_gram(folder: Path) -> Runner:
    return Runner("infini-gram with unigrams", lambda: InfiniGram(folder, unigrams=True), 1)


def open_tokengrams(folder: Path, text: Path) -> Runner:
    return Runner("tokengrams", lambda: Tokengrams(folder, text), 1)


def extend(index: SpanIndex, source: np.ndarray, rows: int, steps: int = 512) -> Runner:
    """`advance` of a matcher with `rows` rows by text of `source`; per row and token."""
    from alignops.spans import SpanMatcher

    stream = np.array(windows(source, steps, rows, seed=4), np.int64).T.copy()
    matcher = SpanMatcher(index, batch=rows)

    def run() -> None:
        matcher.reset()
        for tokens in stream:
            matcher.advance(tokens)

    return Runner(f"alignops, {rows} row{'s' * (rows > 1)}", run, rows * steps)


class PeekCase:
    """Eight rows in the middle of text of `source`, 50 candidates each.

    The candidates are the tokens that follow the row's match in the corpus, at most 25, and tokens
    drawn by their frequency.
    """

    ROWS, CANDIDATES, CONTEXT = 8, 50, 64

    def __init__(self, index: SpanIndex, source: np.ndarray) -> None:
        from alignops.spans import SpanMatcher

        self.rows = windows(source, self.CONTEXT, self.ROWS, seed=5)
        self.matcher = SpanMatcher(index, batch=self.ROWS)
        for tokens in np.array(self.rows, np.int64).T:
            self.matcher.advance(np.ascontiguousarray(tokens))
        lengths = self.matcher.state().length.tolist()
        self.contexts = [
            row[len(row) - n :] for row, n in zip(self.rows, map(int, lengths), strict=True)
        ]
        rng = np.random.default_rng(6)
        probabilities = np.asarray(index.unigram) / np.sum(index.unigram)
        self.candidates = np.empty((self.ROWS, self.CANDIDATES), np.int64)
        for row, context in zip(self.candidates, self.contexts, strict=True):
            following = index.next_dist(context).ids[: self.CANDIDATES // 2]
            drawn = rng.choice(len(probabilities), self.CANDIDATES, p=probabilities)
            row[:] = np.concatenate([following, drawn])[: self.CANDIDATES]

    def runner(self, exact: bool = False) -> Runner:
        name = "alignops peek" + (", with length, count and score" if exact else "")
        matcher, candidates = self.matcher, self.candidates
        return Runner(name, lambda: matcher.peek(candidates, exact=exact), 1)

    def peer(self, peer: Peer) -> Runner:
        """What follows each row's match: from it a veto could be computed."""

        def run() -> None:
            for context in self.contexts:
                peer.next_counts(context)

        return Runner(peer.name, run, 1)


def check(shield: TraceShield, rows: list[Tokens]) -> Runner:
    def run() -> None:
        for row in rows:
            shield.check(row)

    return Runner("alignops, one completion at a time", run, len(rows))


def check_batch(shield: TraceShield, rows: list[Tokens]) -> Runner:
    flat, offsets = ragged(rows)
    run: Any = lambda: shield.check_batch(flat, offsets)  # noqa: E731
    return Runner("alignops, batch", run, len(rows))
