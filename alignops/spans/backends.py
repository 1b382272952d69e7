"""Where the parts of a large index live: in this process, in worker processes, or behind Ray.

A part is an index of its own, a folder that `build_index` wrote; new text becomes a new part. A
backend holds some parts, maps them once and answers for all of them: counts and documents add up,
longest matches take the longest. `DistributedIndex` puts several backends together.

Symbols: M(s) occurrences of the span s; V size of the vocabulary. Ragged batches are flat ids and
offsets (rows + 1,). Arrays are int64.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Ints
from alignops.spans.errors import TokenizerMismatchError
from alignops.spans.index import SpanIndex
from alignops.spans.matcher import MatchRule, MatchState, Peek, SpanMatcher
from alignops.spans.results import Document, Hits, NextDist

__all__ = [
    "LocalBackend",
    "MatcherLostError",
    "MatcherSpec",
    "Part",
    "RowText",
    "ShardBackend",
]

Bools = npt.NDArray[np.bool_]
S = TypeVar("S", MatchState, Peek)


class MatcherLostError(LookupError):
    """A backend does not have the state of a matcher, or one of another moment: give it the text.

    `DistributedIndex` answers it by itself.
    """


@dataclass(frozen=True)
class Part:
    """What a backend holds, all its indexes together; `uuids` and `shards` by index."""

    vocab_size: int
    token_bits: int
    fingerprint: str | None
    n_tokens: int
    n_docs: int
    uuids: tuple[str, ...]
    shards: tuple[int, ...]
    counts: Ints  # (V,)
    removed: Ints

    @property
    def n_shards(self) -> int:
        return sum(self.shards)


@dataclass(frozen=True)
class MatcherSpec:
    """What a matcher is made from. The rule names its surprisals, which are of the whole index."""

    max_match: int
    rule: MatchRule


class RowText(NamedTuple):
    """The text of one row as far as it can matter, and whether nothing came after its prompt."""

    tokens: list[int]
    prompt: bool


class ShardBackend(Protocol):
    """Some parts of an index, somewhere.

    Calls raise what `SpanIndex` raises, and ShardUnavailableError where nobody answers in time.
    Matchers have an id and a step: the number of changes so far. `advance` and `peek` raise
    MatcherLostError unless the backend is at this step, `restore` sets it.
    """

    def part(self) -> Part:
        """What this backend holds."""

    def find(self, ids: Ints, offsets: Ints) -> Ints:
        """Ranks [lo, hi) of each row in each shard, (rows, shards, 2)."""

    def count_batch(self, ids: Ints, offsets: Ints) -> Ints:
        """M of each row, (rows,)."""

    def matching_stats(self, ids: Ints, offsets: Ints, counts: bool) -> tuple[Ints, Ints | None]:
        """Longest match from each token inside its row, (len(ids),), and with `counts` its M."""

    def locate(self, ids: Ints, offsets: Ints, rows: Ints, numbers: Ints) -> Hits:
        """Places of occurrences of rows, numbered in the order of the ranks, shard after shard."""

    def hits(self, shard: int, ranks: Ints) -> Hits:
        """Places of the suffixes at these ranks of a shard."""

    def next_dist(self, ctx: Ints) -> NextDist:
        """All tokens that follow, with their counts."""

    def next_tokens(self, ctx: Ints, numbers: Ints) -> Ints:
        """What follows these occurrences, -1 at the end of a document."""

    def eos_count(self, ctx: Ints) -> int:
        """How often it ends a document."""

    def verify(self, level: str) -> None:
        """Check the files."""

    def document(self, d: int) -> Document:
        """Document d of this backend."""

    def restore(
        self, matcher: str, step: int, spec: MatcherSpec, rows: list[RowText], active: Bools
    ) -> MatchState:
        """Make a matcher whose rows have this text."""

    def advance(
        self, matcher: str, step: int, tokens: Ints, parent: Ints | None, active: Bools
    ) -> MatchState:
        """Row b becomes row parent[b], or b, followed by tokens[b]."""

    def peek(self, matcher: str, step: int, cand: Ints) -> Bools:
        """Whether candidates (B, K) would be flagged as next tokens, by the counts of this part."""

    def peek_exact(self, matcher: str, step: int, cand: Ints) -> Peek:
        """The states to which they would lead."""

    def flagged(self, matcher: str, step: int) -> tuple[Ints, Ints]:
        """All rows and tokens that `peek` flags."""

    def drop(self, matcher: str) -> None:
        """Forget a matcher, if it is there."""

    def close(self) -> None:
        """Release files and processes."""


def check_same_tokens(parts: Sequence[Any], names: Sequence[str], op: str) -> None:
    """All of them index tokens of one tokenizer.

    Raises:
        TokenizerMismatchError: vocabulary size, width or fingerprint differ.
    """
    for field in ("vocab_size", "token_bits", "fingerprint"):
        want = getattr(parts[0], field)
        for part, name in zip(parts, names, strict=True):
            if (got := getattr(part, field)) != want:
                raise TokenizerMismatchError(
                    f"{op}: {field} of {name} must be {want!r}, as of {names[0]}, got {got!r}"
                )


def split_occurrences(
    counts: Sequence[Ints], rows: Ints, numbers: Ints
) -> Iterator[tuple[Ints, Ints]]:
    """Which occurrences of rows are in each of several parts, and their numbers there.

    `counts` says how many each part has of each row; part after part, they are numbered through.
    """
    below = np.zeros_like(counts[0])
    for count in counts:
        own = numbers - below[rows]
        at = np.flatnonzero((own >= 0) & (own < count[rows]))
        yield at, own[at]
        below = below + count


def merge_states(states: Sequence[S], max_count: int | None) -> S:
    """The longest match over several parts: its count is the sum over those that reach it.

    A part judges its own longest match by its own count. If that passes, the longest one of all
    does, except for being too frequent, which only the sum tells.
    """
    if len(states) == 1:
        return states[0]
    length = np.maximum.reduce([state.length for state in states])
    reach = [state.length == length for state in states]
    count = np.sum([np.where(r, s.count, 0) for r, s in zip(reach, states, strict=True)], axis=0)
    rare = np.ones_like(reach[0]) if max_count is None else count <= max_count
    return type(states[0])(
        length=length,
        count=count,
        bci=np.max([np.where(r, s.bci, 0.0) for r, s in zip(reach, states, strict=True)], axis=0),
        risk=np.max(
            [np.where(r & rare, s.risk, 0.0) for r, s in zip(reach, states, strict=True)], axis=0
        ),
        flag=np.any([r & rare & s.flag for r, s in zip(reach, states, strict=True)], axis=0),
    )


def merge_stats(
    found: Sequence[tuple[Ints, Ints | None]],
) -> tuple[Ints, Ints | None]:
    """The longest of several matches; counts of those that reach it add up."""
    lengths: Ints = np.maximum.reduce([length for length, _ in found])
    counts: Ints | None = None
    for length, count in found:
        if count is not None:
            counts = np.zeros_like(lengths) if counts is None else counts
            counts += np.where(length == lengths, count, 0)
    return lengths, counts


def merge_next(found: Sequence[NextDist]) -> NextDist:
    """Counts of equal tokens add up."""
    ids, where = np.unique(np.concatenate([f.ids for f in found]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, where, np.concatenate([f.counts for f in found]))
    return NextDist(ids, counts, any(f.approx for f in found))


def merge_pairs(found: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Each pair once, ascending."""
    pairs = np.unique(np.concatenate([np.stack(f, axis=1) for f in found]), axis=0)
    return pairs[:, 0], pairs[:, 1]


@dataclass
class _Followed:
    """A matcher of one request: one `SpanMatcher` per index."""

    spec: MatcherSpec
    step: int
    matchers: list[SpanMatcher]
    used: float


class LocalBackend(ShardBackend):
    """Parts that this process holds.

    Args:
        indexes: opened indexes, or their folders, which are then opened and closed with the
            backend.
        idle_seconds: a matcher that nobody asks for this long is forgotten; its user has the text
            and gives it again.

    Raises:
        What `SpanIndex.open` raises; TokenizerMismatchError: the indexes differ in their tokens.
    """

    def __init__(
        self,
        indexes: Sequence[SpanIndex | str | os.PathLike[str]],
        *,
        idle_seconds: float = 600.0,
    ) -> None:
        if not indexes:
            raise ValueError("LocalBackend: indexes must hold at least one, got none")
        self._indexes = [i if isinstance(i, SpanIndex) else SpanIndex.open(i) for i in indexes]
        self._opened = [o for i, o in zip(indexes, self._indexes, strict=True) if i is not o]
        check_same_tokens(self._indexes, [str(i.path) for i in self._indexes], "LocalBackend")
        self._idle_seconds = idle_seconds
        self._followed: dict[str, _Followed] = {}
        self._first_shard = [0, *itertools.accumulate(i.n_shards for i in self._indexes)]
        self._first_document = [0, *itertools.accumulate(i.n_docs for i in self._indexes)]

    def part(self) -> Part:
        first = self._indexes[0]
        return Part(
            first.vocab_size,
            first.token_bits,
            first.fingerprint,
            sum(i.n_tokens for i in self._indexes),
            self._first_document[-1],
            tuple(i.uuid for i in self._indexes),
            tuple(i.n_shards for i in self._indexes),
            np.sum([i.counts for i in self._indexes], axis=0, dtype=np.int64),
            np.concatenate(
                [i.removed + d for i, d in zip(self._indexes, self._first_document, strict=False)]
            ),
        )

    # Queries

    def find(self, ids: Ints, offsets: Ints) -> Ints:
        return np.concatenate([i.find_batch(ids, offsets) for i in self._indexes], axis=1)

    def count_batch(self, ids: Ints, offsets: Ints) -> Ints:
        total: Ints = np.sum([i.count_batch(ids, offsets) for i in self._indexes], axis=0)
        return total

    def matching_stats(self, ids: Ints, offsets: Ints, counts: bool) -> tuple[Ints, Ints | None]:
        if not counts:
            found = [i.matching_stats_batch(ids, offsets) for i in self._indexes]
            return merge_stats([(lengths, None) for lengths in found])
        return merge_stats([i.matching_stats_batch(ids, offsets, True) for i in self._indexes])

    def locate(self, ids: Ints, offsets: Ints, rows: Ints, numbers: Ints) -> Hits:
        counts = [i.count_batch(ids, offsets) for i in self._indexes]
        result = Hits(*(np.zeros_like(numbers) for _ in range(4)))
        for i, (at, own) in enumerate(split_occurrences(counts, rows, numbers)):
            if len(at):
                index = self._indexes[i]
                batch = index._encode("locate", "ids", ids, offsets)
                found = index._occurrences(batch, rows[at], own)[0]
                self._renumber(i, found, result, at)
        return result

    def hits(self, shard: int, ranks: Ints) -> Hits:
        i = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        found = self._indexes[i].hits(shard - self._first_shard[i], ranks)
        result = Hits(*(np.zeros_like(ranks) for _ in range(4)))
        self._renumber(i, found, result, slice(None))
        return result

    def _renumber(self, i: int, found: Hits, result: Hits, at: Any) -> None:
        """Write hits in index i to these places of a result, numbered over all indexes."""
        result.shard[at] = found.shard + self._first_shard[i]
        result.position[at] = found.position
        result.document[at] = found.document + self._first_document[i]
        result.offset[at] = found.offset

    def next_dist(self, ctx: Ints) -> NextDist:
        return merge_next([i.next_dist(ctx) for i in self._indexes])

    def next_tokens(self, ctx: Ints, numbers: Ints) -> Ints:
        counts = [np.array([i.count(ctx)]) for i in self._indexes]
        result = np.empty_like(numbers)
        for i, (at, own) in enumerate(split_occurrences(counts, np.zeros_like(numbers), numbers)):
            if len(at):
                index = self._indexes[i]
                result[at] = index._next_tokens(index._encode("next_dist", "ctx", ctx), own)
        return result

    def eos_count(self, ctx: Ints) -> int:
        return sum(i.eos_count(ctx) for i in self._indexes)

    def verify(self, level: str) -> None:
        for index in self._indexes:
            index.verify(level)

    def document(self, d: int) -> Document:
        i = int(np.searchsorted(self._first_document, d, side="right")) - 1
        return self._indexes[i].document(d - self._first_document[i])

    # Matchers

    def restore(
        self, matcher: str, step: int, spec: MatcherSpec, rows: list[RowText], active: Bools
    ) -> MatchState:
        self._evict(matcher)
        made = [
            SpanMatcher(index, batch=len(rows), max_match=spec.max_match, rule=spec.rule)
            for index in self._indexes
        ]
        # The last token of what is no prompt is advanced by, so that its match is judged.
        judged = np.array([not row.prompt and bool(row.tokens) for row in rows])
        prompts = [
            row.tokens[:-1] if j else row.tokens for row, j in zip(rows, judged, strict=True)
        ]
        last = [row.tokens[-1] if j else 0 for row, j in zip(rows, judged, strict=True)]
        for one in made:
            one.extend_prompt(prompts)
            one.active = judged
            one.advance(last)
            one.active = active
        entry = self._followed[matcher] = _Followed(spec, step, made, time.monotonic())
        return self._state(entry)

    def advance(
        self, matcher: str, step: int, tokens: Ints, parent: Ints | None, active: Bools
    ) -> MatchState:
        entry = self._at(matcher, step)
        entry.step = -1  # lost, if this fails halfway
        for one in entry.matchers:
            one.active = active
            one.advance(tokens, parent)
        entry.step = step + 1
        return self._state(entry)

    def peek(self, matcher: str, step: int, cand: Ints) -> Bools:
        flags: Bools = np.any([m.peek(cand) for m in self._at(matcher, step).matchers], axis=0)
        return flags

    def peek_exact(self, matcher: str, step: int, cand: Ints) -> Peek:
        entry = self._at(matcher, step)
        states: list[Peek] = [one.peek(cand, exact=True) for one in entry.matchers]
        return merge_states(states, entry.spec.rule.max_count)

    def flagged(self, matcher: str, step: int) -> tuple[Ints, Ints]:
        return merge_pairs([one.flagged() for one in self._at(matcher, step).matchers])

    def drop(self, matcher: str) -> None:
        self._followed.pop(matcher, None)

    def close(self) -> None:
        self._followed.clear()
        for index in self._opened:
            index.close()

    def _state(self, entry: _Followed) -> MatchState:
        return merge_states([one.state() for one in entry.matchers], entry.spec.rule.max_count)

    def _at(self, matcher: str, step: int) -> _Followed:
        self._evict(matcher)
        entry = self._followed.get(matcher)
        if entry is None or entry.step != step:
            raise MatcherLostError(f"LocalBackend: no matcher {matcher} at step {step}")
        entry.used = time.monotonic()
        return entry

    def _evict(self, asked: str) -> None:
        oldest = time.monotonic() - self._idle_seconds
        for name in [n for n, e in self._followed.items() if e.used < oldest and n != asked]:
            del self._followed[name]
