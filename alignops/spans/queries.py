"""The queries that an index answers, wherever its shards are.

Here are their arguments, and what follows from a few searches: `SpanIndex` searches files,
`DistributedIndex` asks backends.

Symbols: N tokens of all documents, V size of the vocabulary, M(s) occurrences of the span s, x a
text of n tokens. Token ids come as any sequence of integers, NumPy array or CPU tensor; ragged
batches as flat ids and offsets (rows + 1,), row i being ids[offsets[i]:offsets[i + 1]].

Source: suffix array search after Manber and Myers 1993; maximal spans as in OLMoTrace
(arXiv 2504.07096); infinity-grams as in infini-gram (arXiv 2401.17377); belief conflict index as in
TraceAlign (arXiv 2508.02063).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Ints, as_ids, as_int, as_mask, as_tokens
from alignops.spans.attribution import belief_conflict, top_docs
from alignops.spans.results import (
    Attribution,
    Document,
    Hits,
    InfGram,
    Match,
    NextDist,
    Spans,
)

__all__ = ["MAX_MATCH", "Queries"]

#: No longest match is longer.
MAX_MATCH = 4096
# Options of `attribute` that the paper names: only rare spans are attributed.
_PRESETS = {"paper": {"max_count": 3}}

#: Checked token ids of one row or of many, as an index searches for them.
Batch = TypeVar("Batch")
Mask = npt.NDArray[np.bool_]


class Queries(Generic[Batch]):
    """What `SpanIndex` and `DistributedIndex` answer, out of the searches at the end of the class.

    All queries raise IndexError for an id outside [0, V), TypeError for ids that are not integers,
    ValueError for a wrong shape or offsets that decrease.
    """

    max_match = MAX_MATCH
    vocab_size: int
    removed: Ints
    n_tokens: int
    n_docs: int
    n_shards: int

    # The corpus

    @property
    def counts(self) -> Ints:
        """Occurrences c_t of each token, int64 (V,)."""
        raise NotImplementedError

    @cached_property
    def unigram(self) -> npt.NDArray[np.float64]:
        """P(t) = c_t / N, float64 (V,); zeros for an empty corpus."""
        probs: npt.NDArray[np.float64] = self.counts / max(self.n_tokens, 1)
        probs.flags.writeable = False
        return probs

    def document(self, d: int) -> Document:
        """Tokens of document d, and what was stored with it.

        Raises:
            IndexError: there is no document d, or it was removed.

        Example:
            >>> from alignops.testing import span_index
            >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).document(1).tokens.tolist()
            [2, 1]
        """
        d = as_int(d, "document", "d")
        if not 0 <= d < self.n_docs:
            raise IndexError(f"document: d must lie in [0, {self.n_docs}), got {d}")
        if d in self.removed:
            raise IndexError(f"document: d must not be a removed document, got {d}")
        return self._document(d)

    # Counts and places

    def count(self, q: Any) -> int:
        """M(q); N for the empty query.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.count([1, 2]), index.count([2, 1]), index.count([3]), index.count([])
            (2, 2, 0, 6)
        """
        return int(self._count(self._one("count", "q", q))[0])

    def count_batch(self, ids: Any, offsets: Any) -> Ints:
        """M of each row of a ragged batch, int64 (rows,)."""
        return self._count(self._rows("count_batch", ids, offsets))

    def find(self, q: Any) -> Ints:
        """Ranks [lo, hi) of the suffixes that start with q in each shard, int64 (n_shards, 2).

        Where q does not occur, lo = hi is the rank at which it would stand.
        """
        intervals: Ints = self._find(self._one("find", "q", q))[0]
        return intervals

    def find_batch(self, ids: Any, offsets: Any) -> Ints:
        """`find` of each row of a ragged batch, int64 (rows, n_shards, 2)."""
        return self._find(self._rows("find_batch", ids, offsets))

    def locate(self, q: Any, limit: int = 10) -> Hits:
        """Where q occurs: k = min(M, limit) of its occurrences, evenly spread over their ranks.

        The chosen ones are those at floor((2 i + 1) M / (2 k)) in the order of the suffixes, shard
        after shard.

        Example:
            >>> from alignops.testing import span_index
            >>> hits = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).locate([1])
            >>> sorted(zip(hits.document.tolist(), hits.offset.tolist()))
            [(0, 0), (0, 2), (1, 1)]
        """
        limit = as_int(limit, "locate", "limit")
        if limit < 0:
            raise ValueError(f"locate: limit must not be negative, got {limit}")
        return self._locate(self._one("locate", "q", q), limit)[0]

    def _locate(self, batch: Batch, limit: int) -> tuple[Hits, Ints]:
        """`locate` of each row, one after the other, and the row of each hit."""
        totals = self._count(batch)
        kept = np.minimum(totals, limit)
        row = np.repeat(np.arange(len(totals)), kept)
        place = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
        return self._occurrences(batch, row, _spread(place, kept[row], totals[row]))

    # Matches

    def _found(self, x: Any) -> Match:
        """The match x, which occurs."""
        intervals = self.find(x)
        return Match(len(x), int((intervals[:, 1] - intervals[:, 0]).sum()), intervals)

    def longest_prefix(self, x: Any) -> Match:
        """The longest prefix of x that occurs.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.longest_prefix([2, 1, 2, 3])[:2], index.longest_suffix([3, 1, 2])[:2]
            ((3, 1), (2, 2))
        """
        x = as_tokens(x, "longest_prefix", "x")
        batch = self._one("longest_prefix", "x", x)
        return self._found(x[: self._longest_prefix(batch)])

    def longest_suffix(self, x: Any) -> Match:
        """The longest suffix of x that occurs."""
        x = as_tokens(x, "longest_suffix", "x")
        batch = self._one("longest_suffix", "x", x)
        return self._found(x[len(x) - self._longest_suffix(batch) :])

    def matching_stats(self, x: Any) -> Ints:
        """MS[i]: length of the longest prefix of x[i:] that occurs, int64 (n,).

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.matching_stats([2, 1, 2, 3]).tolist()
            [3, 2, 1, 0]
        """
        batch = self._one("matching_stats", "x", x)
        return self._match(batch, False)[0]

    @overload
    def matching_stats_batch(
        self, ids: Any, offsets: Any, counts: Literal[False] = False
    ) -> Ints: ...

    @overload
    def matching_stats_batch(
        self, ids: Any, offsets: Any, counts: Literal[True]
    ) -> tuple[Ints, Ints]: ...

    def matching_stats_batch(self, ids: Any, offsets: Any, counts: bool = False) -> Any:
        """`matching_stats` of each row, one after the other, int64 (len(ids),).

        With `counts` also the count of each of these matches, N where the length is 0.
        """
        batch = self._rows("matching_stats_batch", ids, offsets)
        found = self._match(batch, counts)
        return found if counts else found[0]

    def maximal_spans(
        self,
        x: Any,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> Spans:
        """The matches that no other kept match contains, by place.

        From each token: the longest match that starts there; it is kept if it is long and rare
        enough and ends after every kept one before it.

        Args:
            x: tokens (n,).
            min_len: shorter spans are dropped.
            max_count: spans that occur more often are dropped.
            word_start: booleans (n,), whether a word starts at the token. Then spans start at words
                and are shortened until a word starts behind them.
            delimiters: token ids; spans end with the first one inside.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> [a.tolist() for a in index.maximal_spans([2, 1, 2, 3, 1, 2])]
            [[0, 4], [3, 6], [1, 2]]
        """
        op = "maximal_spans"
        batch = self._one(op, "x", x)
        options = _filter(op, min_len, max_count, word_start, delimiters)
        return self._maximal_spans(op, batch, *options)[0]

    def maximal_spans_batch(
        self,
        ids: Any,
        offsets: Any,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> tuple[Spans, Ints]:
        """`maximal_spans` of each row, places counted from its start, and the row of each span.

        `word_start` has one entry per token of the batch.
        """
        op = "maximal_spans_batch"
        batch = self._rows(op, ids, offsets)
        options = _filter(op, min_len, max_count, word_start, delimiters)
        return self._maximal_spans(op, batch, *options)

    def attribute(
        self,
        x: Any,
        *,
        share: float = 0.05,
        documents: int = 10,
        preset: Literal["paper"] | None = None,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> list[Attribution]:
        """The ceil(share n) maximal spans of x with the largest BCI, by place.

        BCI = -sum ln P over the tokens of the span, P the unigram distribution of the index: the
        spans that are least likely by chance.

        Args:
            x: tokens (n,).
            share: kept spans per token.
            documents: at most this many occurrences of each span, evenly spread over all, are
                looked up; a span lists their documents.
            preset: "paper" takes max_count=3 unless given.
            min_len: see `maximal_spans`.
            max_count: see `maximal_spans`.
            word_start: see `maximal_spans`.
            delimiters: see `maximal_spans`.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> (best,) = index.attribute([3, 2, 1, 2])
            >>> best.start, best.end, round(best.score, 3), best.documents
            (1, 4, 2.079, (0,))
        """
        if preset is not None and preset not in _PRESETS:
            raise ValueError(f"attribute: preset must be paper or None, got {preset!r}")
        if not 0 <= share < math.inf:
            raise ValueError(f"attribute: share must not be negative, got {share}")
        documents = as_int(documents, "attribute", "documents")
        if documents < 0:
            raise ValueError(f"attribute: documents must not be negative, got {documents}")
        if max_count is None and preset is not None:
            max_count = _PRESETS[preset]["max_count"]
        tokens = as_tokens(x, "attribute", "x")
        batch = self._encode("attribute", "x", tokens)
        options = _filter("attribute", min_len, max_count, word_start, delimiters)
        start, end, count = self._maximal_spans("attribute", batch, *options)[0]
        occurrences = self._next_counts(self._encode("attribute", "x", tokens[:0]), batch)
        score = belief_conflict(start, end, occurrences, self.n_tokens)
        kept = np.sort(np.lexsort((start, -score))[: math.ceil(share * len(tokens))])
        spans = [tokens[start[i] : end[i]] for i in kept]
        offsets = np.cumsum([0, *(len(s) for s in spans)], dtype=np.int64)
        flat = np.concatenate([tokens[:0], *spans])
        hits, rows = self._locate(self._encode("attribute", "x", flat, offsets), documents)
        held: list[set[int]] = [set() for _ in spans]
        for row, document in zip(rows.tolist(), hits.document.tolist(), strict=True):
            held[row].add(document)
        return [
            Attribution(
                int(start[i]), int(end[i]), int(count[i]), float(score[i]), tuple(sorted(found))
            )
            for i, found in zip(kept, held, strict=True)
        ]

    top_docs = staticmethod(top_docs)

    # Next tokens

    def next_counts(self, ctx: Any, cand: Any) -> Ints:
        """M(ctx + c) of each candidate token c, int64 (len(cand),).

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.next_counts([1], [0, 1, 2]).tolist()
            [0, 0, 2]
        """
        context = self._one("next_counts", "ctx", ctx)
        return self._next_counts(context, self._one("next_counts", "cand", cand))

    def next_dist(self, ctx: Any, max_support: int | None = None) -> NextDist:
        """All tokens that follow ctx, with their counts.

        Args:
            ctx: tokens; after the empty context come all tokens of the corpus.
            max_support: if ctx occurs more often, only this many of its occurrences, evenly spread
                over their ranks, are looked at, and the result says approx=True. Each stands for
                the ranks around it, so that counts remain estimates of M(ctx + token): they and
                that of the ends of documents sum up to M(ctx). Rare tokens may be missing.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> [a.tolist() for a in index.next_dist([2])[:2]]
            [[1], [2]]
        """
        context = self._one("next_dist", "ctx", ctx)
        if max_support is None:
            return self._next_dist(context)
        most = as_int(max_support, "next_dist", "max_support")
        if most < 1:
            raise ValueError(f"next_dist: max_support must be at least 1, got {most}")
        total = int(self._count(context)[0])
        if total <= most:
            return self._next_dist(context)
        place = np.arange(most + 1)
        stands_for = np.diff(_share(place, most, total))
        tokens = self._next_tokens(context, _spread(place[:-1], most, total))
        inside = tokens >= 0
        ids, where = np.unique(tokens[inside], return_inverse=True)
        counts = np.zeros(len(ids), np.int64)
        np.add.at(counts, where, stands_for[inside])
        return NextDist(ids, counts, True)

    def eos_count(self, ctx: Any) -> int:
        """How often ctx ends a document: M(ctx) minus the counts of all next tokens."""
        return self._eos_count(self._one("eos_count", "ctx", ctx))

    def _next(self, op: str, ctx: Any, t: int) -> tuple[int, int]:
        """M(ctx) and M(ctx t)."""
        context = self._one(op, "ctx", ctx)
        after = self._next_counts(context, self._one(op, "t", [as_int(t, op, "t")]))
        return int(self._count(context)[0]), int(after[0])

    def ngram_prob(self, ctx: Any, t: int) -> float:
        """M(ctx t) / M(ctx); NaN where ctx does not occur.

        Example:
            >>> from alignops.testing import span_index
            >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).ngram_prob([2], 1)
            0.6666666666666666
        """
        whole, part = self._next("ngram_prob", ctx, t)
        return part / whole if whole else math.nan

    def infgram_prob(self, ctx: Any, t: int) -> InfGram:
        """P(t | u) = M(u t) / M(u), u the longest suffix of ctx that occurs.

        Example:
            >>> from alignops.testing import span_index
            >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).infgram_prob([3, 3, 1, 2], 1)
            InfGram(prob=0.5, length=2, context_count=2, count=1)
        """
        ctx = as_tokens(ctx, "infgram_prob", "ctx")
        batch = self._one("infgram_prob", "ctx", ctx)
        length = self._longest_suffix(batch)
        whole, part = self._next("infgram_prob", ctx[len(ctx) - length :], t)
        return InfGram(part / whole if whole else math.nan, length, whole, part)

    # Searches. Batches are those of `_encode`.

    def _one(self, op: str, argument: str, ids: Any) -> Batch:
        return self._encode(op, argument, as_tokens(ids, op, argument))

    def _rows(self, op: str, ids: Any, offsets: Any) -> Batch:
        bounds = as_ids(offsets, op, "offsets")
        return self._encode(op, "ids", as_tokens(ids, op), bounds)

    def _encode(
        self, op: str, argument: str, ids: npt.NDArray[Any], offsets: Ints | None = None
    ) -> Batch:
        """Rows of ids, or one, after a check of them and of the offsets."""
        raise NotImplementedError

    def _document(self, d: int) -> Document:
        raise NotImplementedError

    def _count(self, batch: Batch) -> Ints:
        """M of each row."""
        raise NotImplementedError

    def _find(self, batch: Batch) -> Ints:
        """Ranks of each row in each shard, (rows, shards, 2)."""
        raise NotImplementedError

    def _occurrences(self, batch: Batch, rows: Ints, numbers: Ints) -> tuple[Hits, Ints]:
        """Occurrences of rows, numbered in the order of the ranks, shard after shard; their rows.

        Called after `_count` of the batch.
        """
        raise NotImplementedError

    def _longest_prefix(self, batch: Batch) -> int:
        """Of the only row."""
        raise NotImplementedError

    def _longest_suffix(self, batch: Batch) -> int:
        """Of the only row."""
        raise NotImplementedError

    def _match(self, batch: Batch, counts: bool) -> tuple[Ints, Ints]:
        """Matching statistics, and the count of each match if `counts`."""
        raise NotImplementedError

    def _maximal_spans(
        self,
        op: str,
        batch: Batch,
        min_len: int,
        max_count: int | None,
        word_start: Mask | None,
        delimiters: npt.NDArray[Any] | None,
    ) -> tuple[Spans, Ints]:
        """Spans and their rows."""
        raise NotImplementedError

    def _next_counts(self, context: Batch, cand: Batch) -> Ints:
        """M(context + c) of each token of `cand`."""
        raise NotImplementedError

    def _next_dist(self, context: Batch) -> NextDist:
        """All tokens that follow."""
        raise NotImplementedError

    def _next_tokens(self, context: Batch, numbers: Ints) -> Ints:
        """What follows these occurrences, -1 at the end of a document."""
        raise NotImplementedError

    def _eos_count(self, context: Batch) -> int:
        """How often the context ends a document."""
        raise NotImplementedError


def _share(i: Any, k: Any, m: Any) -> Ints:
    """floor(i m / k), also where i m does not fit into 64 bits."""
    result: Ints = i * (m // k) + i * (m % k) // k
    return result


def _spread(i: Any, k: Any, m: Any) -> Ints:
    """Number i of k that are spread evenly over m: floor((2 i + 1) m / (2 k))."""
    return _share(2 * i + 1, 2 * k, m)


def _filter(
    op: str, min_len: int, max_count: int | None, word_start: Any, delimiters: Any
) -> tuple[int, int | None, Mask | None, npt.NDArray[Any] | None]:
    """Checked arguments of maximal_spans."""
    min_len = as_int(min_len, op, "min_len")
    max_count = None if max_count is None else as_int(max_count, op, "max_count")
    if min_len < 1:
        raise ValueError(f"{op}: min_len must be at least 1, got {min_len}")
    if max_count is not None and max_count < 0:
        raise ValueError(f"{op}: max_count must not be negative, got {max_count}")
    mask = None if word_start is None else as_mask(word_start, op, "word_start")
    stops = None if delimiters is None else as_tokens(delimiters, op, "delimiters")
    return min_len, max_count, mask, stops
