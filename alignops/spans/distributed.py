"""One index out of the parts that several backends hold."""

from __future__ import annotations

import copy
import uuid as uuids
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Ints, as_ids, as_int, check_rows
from alignops.spans.backends import (
    LocalBackend,
    ShardBackend,
    check_same_tokens,
    merge_next,
    merge_stats,
    split_occurrences,
)
from alignops.spans.distributed_matcher import DistributedMatcher
from alignops.spans.errors import IndexCorruptError, ShardUnavailableError
from alignops.spans.index import SpanIndex
from alignops.spans.matcher import MatchRule
from alignops.spans.queries import MAX_MATCH, Queries
from alignops.spans.results import Document, Hits, NextDist, Spans

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


@dataclass
class Rows:
    """Checked rows of a query; how often each occurs in each backend, as soon as that is known."""

    ids: Ints
    bounds: Ints
    counts: dict[int, Ints] = field(default_factory=dict)


class DistributedIndex(Queries[Rows]):
    """What `SpanIndex` answers, over the parts of several backends.

    The parts are put together in the order of the backends: shards and documents are numbered
    through. No answer depends on which backend holds which part; and only `find`, `locate` and the
    numbers of documents depend on how the documents were divided into parts and shards. A query
    goes to all backends at once, in a few rounds. Calls may come from any thread.

    Args:
        backends: each a backend, or a list of replicas, which hold the same parts: where one does
            not answer, another one is asked, once.

    Attributes:
        vocab_size, token_bits, fingerprint, n_tokens, n_docs, n_shards, removed, max_match: of
            `SpanIndex`, over all parts.
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
        self._first_document = first = [0, *accumulate(part.n_docs for part in parts)]
        self.removed = np.concatenate([p.removed + d for p, d in zip(parts, first, strict=False)])
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

    def verify(self, level: str = "full") -> None:
        """See `SpanIndex.verify`; all backends check their files."""
        self._scatter(lambda _, backend: backend.verify(level))

    def hits(self, shard: int, ranks: Any) -> Hits:
        """See `SpanIndex.hits`."""
        shard = as_int(shard, "hits", "shard")
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"hits: shard must lie in [0, {self.n_shards}), got {shard}")
        i = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        at = as_ids(ranks, "hits", "ranks")
        return self._renumbered(
            i, self._groups[i].ask(lambda backend: backend.hits(shard - self._first_shard[i], at))
        )

    def _renumbered(self, i: int, hits: Hits) -> Hits:
        """Hits of backend i, with shards and documents numbered over all."""
        return hits._replace(
            shard=hits.shard + self._first_shard[i],
            document=hits.document + self._first_document[i],
        )

    # Searches

    def _encode(
        self, op: str, argument: str, ids: npt.NDArray[Any], offsets: Ints | None = None
    ) -> Rows:
        check_rows(ids, offsets, self.vocab_size, self.token_bits, op, argument)
        return Rows(
            ids.astype(np.int64, copy=False),
            np.array([0, len(ids)]) if offsets is None else offsets,
        )

    def _document(self, d: int) -> Document:
        i = int(np.searchsorted(self._first_document, d, side="right")) - 1
        return self._groups[i].ask(lambda backend: backend.document(d - self._first_document[i]))

    def _count(self, batch: Rows) -> Ints:
        batch.counts = self._scatter(lambda _, b: b.count_batch(batch.ids, batch.bounds))
        total: Ints = np.sum(list(batch.counts.values()), axis=0)
        return total

    def _find(self, batch: Rows) -> Ints:
        """Shards that cannot be reached (`partially`): [0, 0)."""
        intervals = np.zeros((len(batch.bounds) - 1, self.n_shards, 2), np.int64)
        found = self._scatter(lambda _, backend: backend.find(batch.ids, batch.bounds))
        for i, part in found.items():
            intervals[:, self._first_shard[i] : self._first_shard[i + 1]] = part
        return intervals

    def _held(self, batch: Rows, rows: Ints, numbers: Ints) -> dict[int, tuple[Ints, Ints]]:
        """By backend: which of these occurrences it has, and their numbers there."""
        backends = sorted(batch.counts)
        counts = [batch.counts[i] for i in backends]
        return dict(zip(backends, split_occurrences(counts, rows, numbers), strict=True))

    def _occurrences(self, batch: Rows, rows: Ints, numbers: Ints) -> tuple[Hits, Ints]:
        held = self._held(batch, rows, numbers)

        def ask(i: int, backend: ShardBackend) -> Hits | None:
            at, own = held.get(i, _NOTHING)
            return backend.locate(batch.ids, batch.bounds, rows[at], own) if len(at) else None

        result = Hits(*(np.zeros_like(numbers) for _ in range(4)))
        known = np.zeros(len(numbers), dtype=bool)
        for i, found in self._scatter(ask).items():
            if found is not None:
                at = held[i][0]
                known[at] = True
                for to, values in zip(result, self._renumbered(i, found), strict=True):
                    to[at] = values
        return Hits(*(values[known] for values in result)), rows[known]

    def _match(self, batch: Rows, counts: bool) -> tuple[Ints, Ints]:
        found = self._scatter(lambda _, b: b.matching_stats(batch.ids, batch.bounds, counts))
        lengths, numbers = merge_stats(list(found.values()))
        return lengths, lengths[:0] if numbers is None else numbers

    def _longest_prefix(self, batch: Rows) -> int:
        return int(self._match(batch, False)[0][0]) if len(batch.ids) else 0

    def _longest_suffix(self, batch: Rows) -> int:
        reach = np.arange(len(batch.ids)) + self._match(batch, False)[0]
        # Where matches end does not fall from start to start.
        return len(batch.ids) - int(np.searchsorted(reach, len(batch.ids)))

    def _maximal_spans(
        self,
        op: str,
        batch: Rows,
        min_len: int,
        max_count: int | None,
        word_start: npt.NDArray[np.bool_] | None,
        delimiters: npt.NDArray[Any] | None,
    ) -> tuple[Spans, Ints]:
        flat, bounds = batch.ids, batch.bounds
        keep = np.ones(len(flat), dtype=bool) if word_start is None else word_start
        if len(keep) != len(flat):
            raise ValueError(
                f"{op}: word_start must have one entry per token, {len(flat)}, got {len(keep)}"
            )
        stops = flat[:0] if delimiters is None else self._encode(op, "delimiters", delimiters).ids
        start = np.arange(len(flat))
        row = np.searchsorted(bounds, start, side="right") - 1
        end = start + self._match(batch, False)[0]
        coming = np.where(np.isin(flat, stops), start, len(flat))
        end = np.minimum(end, np.minimum.accumulate(coming[::-1])[::-1] + 1)
        if word_start is not None:
            before = np.maximum.accumulate(np.where(keep, start, 0))
            inside = end < bounds[row + 1]
            end = np.where(inside, before[np.where(inside, end, 0)], end)
        chosen = np.flatnonzero(keep & (end - start >= min_len))
        count: Ints | None = None
        if max_count is not None:
            count = self._count_spans(flat, chosen, end[chosen])
            chosen, count = chosen[count <= max_count], count[count <= max_count]
        # Kept are those that end after all before them in their row.
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
        return self._count(Rows(np.concatenate([flat[:0], *rows]), bounds))

    def _next_counts(self, context: Rows, cand: Rows) -> Ints:
        before = np.tile(context.ids, (len(cand.ids), 1))
        rows = np.concatenate([before, cand.ids[:, None]], axis=1)
        bounds = np.arange(len(cand.ids) + 1) * (len(context.ids) + 1)
        return self._count(Rows(rows.ravel(), bounds))

    def _next_dist(self, context: Rows) -> NextDist:
        found = self._scatter(lambda _, backend: backend.next_dist(context.ids))
        return merge_next(list(found.values()))

    def _next_tokens(self, context: Rows, numbers: Ints) -> Ints:
        held = self._held(context, np.zeros_like(numbers), numbers)

        def ask(i: int, backend: ShardBackend) -> Ints | None:
            at, own = held.get(i, _NOTHING)
            return backend.next_tokens(context.ids, own) if len(at) else None

        tokens = np.full_like(numbers, -1)  # also of backends that cannot be reached any more
        for i, found in self._scatter(ask).items():
            if found is not None:
                tokens[held[i][0]] = found
        return tokens

    def _eos_count(self, context: Rows) -> int:
        return sum(self._scatter(lambda _, backend: backend.eos_count(context.ids)).values())

    # Following text

    def matcher(
        self,
        allow: SpanIndex | DistributedIndex | None = None,
        *,
        batch: int = 1,
        max_match: int = MAX_MATCH,
        rule: MatchRule | None = None,
    ) -> DistributedMatcher:
        """What `SpanMatcher` does, with its arguments, over all parts of both indexes."""
        if isinstance(allow, SpanIndex):
            allow = DistributedIndex([LocalBackend([allow])])
        if not isinstance(allow, DistributedIndex | None):
            raise TypeError(
                "DistributedIndex: allow must be a SpanIndex or a DistributedIndex, got "
                f"{type(allow).__name__}"
            )
        for index in (self, allow):
            if index is not None and index._missing is not None:
                raise ValueError(
                    "DistributedIndex: a matcher needs all parts, got an index without some"
                )
        return DistributedMatcher(self, allow, batch, max_match, rule or MatchRule())


_NOTHING = np.empty(0, np.int64), np.empty(0, np.int64)
