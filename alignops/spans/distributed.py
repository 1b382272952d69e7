"""One index out of the parts that several backends hold."""

from __future__ import annotations

import copy
import uuid as uuids
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np

from alignops.spans.arrays import Floats, Ints, as_ids, as_mask, as_ragged
from alignops.spans.backends import (
    ShardBackend,
    check_same_tokens,
    merge_next,
    merge_stats,
)
from alignops.spans.distributed_matcher import DistributedMatcher
from alignops.spans.errors import IndexCorruptError, ShardUnavailableError
from alignops.spans.index import SpanIndex
from alignops.spans.matcher import MatchRule
from alignops.spans.results import Document, Hits, Match, NextDist, Spans

__all__ = ["Answer", "DistributedIndex"]

T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A result that may lack some parts: `complete` without any, `missing` says which and why."""

    value: T
    complete: bool
    missing: tuple[str, ...]


class _Replicas:
    """Backends that hold the same parts. One answers; where it fails, another one is asked once."""

    def __init__(self, backends: Sequence[ShardBackend]) -> None:
        self._backends = tuple(backends)
        self._current = 0
        parts = [backend.part() for backend in backends]
        self.part = parts[0]
        for other in parts[1:]:
            if other.uuids != self.part.uuids:
                raise ValueError(
                    f"DistributedIndex: replicas must hold the same indexes, got {other.uuids} "
                    f"beside {self.part.uuids}"
                )

    def ask(self, call: Callable[[ShardBackend], T]) -> T:
        """The answer of the backend that answered last, or of the one after it.

        Raises:
            ShardUnavailableError: neither answers.
            IndexCorruptError: the last one asked holds a damaged file.
        """
        current = self._current
        try:
            return call(self._backends[current])
        except OSError:
            if len(self._backends) == 1:
                raise
        following = (current + 1) % len(self._backends)
        answer = call(self._backends[following])
        self._current = following
        return answer

    def close(self) -> None:
        for backend in self._backends:
            backend.close()


class DistributedIndex:
    """What `SpanIndex` answers, over the parts of several backends.

    The parts are put together in the order of the backends: shards and documents are numbered
    through. No answer depends on which backend holds which part; and only `find`, `locate` and the
    numbers of documents depend on how the documents were divided into parts and shards. A query
    goes to all backends at once and takes two rounds at most. Calls may come from any thread.

    Args:
        backends: each a backend, or a list of replicas, which hold the same parts: where one does
            not answer, another one is asked, once.

    Attributes:
        vocab_size, token_bits, fingerprint, n_tokens, n_docs, n_shards, max_match: of `SpanIndex`,
            over all parts.
        uuid: follows from those of the parts and their order.
        counts, unigram: int64 and float64 (V,), over all parts.

    Raises:
        TokenizerMismatchError: the parts differ in vocabulary size, width or fingerprint.
        ShardUnavailableError: a backend does not answer, in the constructor or in a query. See
            `partially`.

    Example:
        >>> import tempfile
        >>> from alignops.spans import LocalBackend, build_index
        >>> folder = tempfile.mkdtemp()
        >>> for part, docs in enumerate([[[1, 2, 1, 2]], [[2, 1]]]):
        ...     _ = build_index(docs, f"{folder}/{part}", vocab_size=4, fingerprint="toy")
        >>> index = DistributedIndex([LocalBackend([f"{folder}/{part}"]) for part in range(2)])
        >>> index.count([2, 1]), index.locate([2, 1]).document.tolist()
        (2, [0, 1])
    """

    max_match = SpanIndex.max_match

    def __init__(self, backends: Sequence[ShardBackend | Sequence[ShardBackend]]) -> None:
        if not backends:
            raise ValueError("DistributedIndex: backends must name at least one, got none")
        self._groups = [_Replicas(b if isinstance(b, Sequence) else [b]) for b in backends]
        parts = [group.part for group in self._groups]
        names = [f"backend {i}" for i in range(len(parts))]
        check_same_tokens(parts, names, "DistributedIndex")
        self.vocab_size = parts[0].vocab_size
        self.token_bits = parts[0].token_bits
        self.fingerprint = parts[0].fingerprint
        self.n_tokens = sum(part.n_tokens for part in parts)
        self.n_docs = sum(part.n_docs for part in parts)
        self.n_shards = sum(part.n_shards for part in parts)
        self.uuid = str(
            uuids.uuid5(uuids.NAMESPACE_OID, ",".join(u for p in parts for u in p.uuids))
        )
        self._first_document = [0, *accumulate(part.n_docs for part in parts)]
        self._first_shard = [0, *accumulate(part.n_shards for part in parts)]
        self._pool = ThreadPoolExecutor(len(parts), thread_name_prefix="spans")
        self._missing: dict[int, str] | None = None  # a dict: parts may be missing

    def __repr__(self) -> str:
        return (
            f"DistributedIndex({len(self._groups)} backends, {self.n_tokens} tokens, "
            f"{self.n_docs} documents, {self.n_shards} shards)"
        )

    def close(self) -> None:
        """Close all backends."""
        self._pool.shutdown()
        for group in self._groups:
            group.close()

    def __enter__(self) -> DistributedIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def partially(self, query: Callable[[DistributedIndex], T]) -> Answer[T]:
        """The answer of the parts that can be reached.

        Args:
            query: gets an index that leaves out parts which do not answer, from the moment on when
                they did not. Matchers need all parts.

        Raises:
            ShardUnavailableError: no part can be reached.

        Example:
            >>> import tempfile
            >>> from alignops.spans import LocalBackend, build_index
            >>> folder = tempfile.mkdtemp() + "/part"
            >>> _ = build_index([[1, 2, 1]], folder, vocab_size=4, fingerprint="toy")
            >>> index = DistributedIndex([LocalBackend([folder])])
            >>> index.partially(lambda reachable: reachable.count([1]))
            Answer(value=2, complete=True, missing=())
        """
        reachable = copy.copy(self)
        missing: dict[int, str] = {}
        reachable._missing = missing
        value = query(reachable)
        return Answer(value, not missing, tuple(missing[i] for i in sorted(missing)))

    def _scatter(self, call: Callable[[int, ShardBackend], T]) -> dict[int, T]:
        """Answers by backend; call(i, backend) asks backend i."""
        missing = self._missing

        def ask(i: int) -> tuple[int, T] | None:
            try:
                return i, self._groups[i].ask(lambda backend: call(i, backend))
            except (ShardUnavailableError, IndexCorruptError) as error:
                if missing is None:
                    raise
                missing[i] = str(error)
                return None

        wanted = [i for i in range(len(self._groups)) if not missing or i not in missing]
        found = [ask(i) for i in wanted] if len(wanted) < 2 else self._pool.map(ask, wanted)
        answers = dict(entry for entry in found if entry is not None)
        if not answers:
            raise ShardUnavailableError("DistributedIndex: no part can be reached")
        return answers

    # The corpus

    @cached_property
    def counts(self) -> Ints:
        """Occurrences of each token, int64 (V,)."""
        total: Ints = np.sum([group.part.counts for group in self._groups], axis=0)
        total.flags.writeable = False
        return total

    @cached_property
    def unigram(self) -> Floats:
        """P(t) = c_t / N, float64 (V,); zeros for an empty corpus."""
        probs: Floats = self.counts / max(self.n_tokens, 1)
        probs.flags.writeable = False
        return probs

    def document(self, d: int) -> Document:
        """See `SpanIndex.document`."""
        if not 0 <= d < self.n_docs:
            raise IndexError(f"document: d must lie in [0, {self.n_docs}), got {d}")
        i = int(np.searchsorted(self._first_document, d, side="right")) - 1
        return self._groups[i].ask(lambda backend: backend.document(d - self._first_document[i]))

    # Counts and places

    def count(self, q: Any) -> int:
        """See `SpanIndex.count`."""
        q = as_ids(q, "count", "q")
        return int(self.count_batch(q, [0, len(q)])[0])

    def count_batch(self, ids: Any, offsets: Any) -> Ints:
        """See `SpanIndex.count_batch`."""
        flat, bounds = as_ragged(ids, offsets, "count_batch")
        found = self._scatter(lambda _, backend: backend.count_batch(flat, bounds))
        total: Ints = np.sum(list(found.values()), axis=0)
        return total

    def find(self, q: Any) -> Ints:
        """See `SpanIndex.find`."""
        q = as_ids(q, "find", "q")
        intervals: Ints = self.find_batch(q, [0, len(q)])[0]
        return intervals

    def find_batch(self, ids: Any, offsets: Any) -> Ints:
        """See `SpanIndex.find_batch`. Shards that cannot be reached (`partially`): [0, 0)."""
        flat, bounds = as_ragged(ids, offsets, "find_batch")
        intervals = np.zeros((len(bounds) - 1, self.n_shards, 2), np.int64)
        for i, found in self._scatter(lambda _, backend: backend.find(flat, bounds)).items():
            intervals[:, self._first_shard[i] : self._first_shard[i + 1]] = found
        return intervals

    def locate(self, q: Any, limit: int = 10) -> Hits:
        """See `SpanIndex.locate`."""
        if limit < 0:
            raise ValueError(f"locate: limit must not be negative, got {limit}")
        q = as_ids(q, "locate", "q")
        intervals = self.find(q)
        ends = np.cumsum(intervals[:, 1] - intervals[:, 0])
        total = int(ends[-1])
        kept = min(total, limit)
        chosen = np.array([(2 * i + 1) * total // (2 * kept) for i in range(kept)], np.int64)
        # Occurrences of backend i are those from starts[i] on.
        starts = np.concatenate([[0], ends])[self._first_shard]
        wanted = [
            chosen[(chosen >= begin) & (chosen < end)] - begin for begin, end in pairwise(starts)
        ]
        found = self._scatter(
            lambda i, backend: backend.locate(q, wanted[i]) if len(wanted[i]) else _NO_HITS
        )
        hits = [
            Hits(
                h.shard + self._first_shard[i],
                h.position,
                h.document + self._first_document[i],
                h.offset,
            )
            for i, h in sorted(found.items())
        ]
        return Hits(*map(np.concatenate, zip(*hits, strict=True)))

    # Matches

    def _stats(self, flat: Ints, bounds: Ints, counts: bool) -> tuple[Ints, Ints | None]:
        found = self._scatter(lambda _, backend: backend.matching_stats(flat, bounds, counts))
        return merge_stats(list(found.values()))

    def matching_stats(self, x: Any) -> Ints:
        """See `SpanIndex.matching_stats`."""
        x = as_ids(x, "matching_stats", "x")
        return self._stats(x, np.array([0, len(x)]), False)[0]

    @overload
    def matching_stats_batch(
        self, ids: Any, offsets: Any, counts: Literal[False] = False
    ) -> Ints: ...

    @overload
    def matching_stats_batch(
        self, ids: Any, offsets: Any, counts: Literal[True]
    ) -> tuple[Ints, Ints]: ...

    def matching_stats_batch(self, ids: Any, offsets: Any, counts: bool = False) -> Any:
        """See `SpanIndex.matching_stats_batch`."""
        found = self._stats(*as_ragged(ids, offsets, "matching_stats_batch"), counts)
        return found if counts else found[0]

    def _match(self, x: Ints) -> Match:
        intervals = self.find(x)
        return Match(len(x), int((intervals[:, 1] - intervals[:, 0]).sum()), intervals)

    def longest_prefix(self, x: Any) -> Match:
        """See `SpanIndex.longest_prefix`."""
        x = as_ids(x, "longest_prefix", "x")
        return self._match(x[: self.matching_stats(x)[0]] if len(x) else x)

    def longest_suffix(self, x: Any) -> Match:
        """See `SpanIndex.longest_suffix`."""
        x = as_ids(x, "longest_suffix", "x")
        reach = np.arange(len(x)) + self.matching_stats(x)
        # Where matches end does not fall from start to start.
        return self._match(x[np.searchsorted(reach, len(x)) :])

    def maximal_spans(
        self,
        x: Any,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> Spans:
        """See `SpanIndex.maximal_spans`."""
        x = as_ids(x, "maximal_spans", "x")
        options = (min_len, max_count, word_start, delimiters)
        return self.maximal_spans_batch(x, [0, len(x)], *options)[0]

    def maximal_spans_batch(
        self,
        ids: Any,
        offsets: Any,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> tuple[Spans, Ints]:
        """See `SpanIndex.maximal_spans_batch`."""
        op = "maximal_spans_batch"
        flat, bounds = as_ragged(ids, offsets, op)
        start = np.arange(len(flat))
        row = np.searchsorted(bounds, start, side="right") - 1
        end = start + self._stats(flat, bounds, False)[0]
        keep = np.ones(len(flat), dtype=bool)
        if delimiters is not None:
            stops = np.isin(flat, as_ids(delimiters, op, "delimiters"))
            coming = np.where(stops, start, len(flat))
            end = np.minimum(end, np.minimum.accumulate(coming[::-1])[::-1] + 1)
        if word_start is not None:
            keep = as_mask(word_start, op, "word_start")
            if len(keep) != len(flat):
                raise ValueError(
                    f"{op}: word_start must have one entry per token, got {len(keep)} for "
                    f"{len(flat)}"
                )
            before = np.maximum.accumulate(np.where(keep, start, 0))
            inside = end < bounds[row + 1]
            end = np.where(inside, before[np.where(inside, end, 0)], end)
        chosen = np.flatnonzero(keep & (end - start >= max(min_len, 1)))
        count: Ints | None = None
        if max_count is not None:
            count = self._count_spans(flat, chosen, end[chosen])
            chosen, count = chosen[count <= max_count], count[count <= max_count]
        # Kept are those that end after all before them.
        last = np.maximum.accumulate(np.concatenate([[0], end[chosen]]))[:-1]
        new = end[chosen] > last
        chosen = chosen[new]
        count = self._count_spans(flat, chosen, end[chosen]) if count is None else count[new]
        first = bounds[row[chosen]]
        return Spans(chosen - first, end[chosen] - first, count), row[chosen]

    def _count_spans(self, flat: Ints, start: Ints, end: Ints) -> Ints:
        """M of flat[start:end] for each pair."""
        rows = [flat[a:b] for a, b in zip(start, end, strict=True)]
        bounds = np.concatenate([[0], np.cumsum(end - start)])
        return self.count_batch(np.concatenate([flat[:0], *rows]), bounds)

    # Next tokens

    def next_counts(self, ctx: Any, cand: Any) -> Ints:
        """See `SpanIndex.next_counts`."""
        ctx, cand = as_ids(ctx, "next_counts", "ctx"), as_ids(cand, "next_counts", "cand")
        rows = np.concatenate([np.tile(ctx, (len(cand), 1)), cand[:, None]], axis=1)
        return self.count_batch(rows.ravel(), np.arange(len(cand) + 1) * (len(ctx) + 1))

    def next_dist(self, ctx: Any) -> NextDist:
        """See `SpanIndex.next_dist`; always exact."""
        ctx = as_ids(ctx, "next_dist", "ctx")
        found = self._scatter(lambda _, backend: backend.next_dist(ctx))
        return merge_next(list(found.values()))

    def eos_count(self, ctx: Any) -> int:
        """See `SpanIndex.eos_count`."""
        ctx = as_ids(ctx, "eos_count", "ctx")
        return self.count(ctx) - int(self.next_dist(ctx).counts.sum())

    # Following text

    def matcher(
        self,
        allow: SpanIndex | None = None,
        *,
        batch: int = 1,
        max_match: int = SpanIndex.max_match,
        rule: MatchRule | None = None,
    ) -> DistributedMatcher:
        """What `SpanMatcher` does, with its arguments, over all parts.

        `allow` is opened by every backend, so its folder must be there under the same path.
        """
        if self._missing is not None:
            raise ValueError(
                "DistributedIndex: a matcher needs all parts, got an index without some"
            )
        if not isinstance(allow, SpanIndex | None):
            raise TypeError(
                "DistributedIndex: allow must be a SpanIndex, which every backend opens, "
                f"got {type(allow).__name__}"
            )
        return DistributedMatcher(self, allow, batch, max_match, rule or MatchRule())


_NO_HITS = Hits(*(np.empty(0, np.int64),) * 4)
