"""Queries to a corpus index.

Symbols: N tokens of all documents, V size of the vocabulary, M(s) occurrences of the span s, x a
text of n tokens. Token ids come as any sequence of integers, NumPy array or CPU tensor; ragged
batches as flat ids and offsets (rows + 1,), row i being ids[offsets[i]:offsets[i + 1]].

Source: suffix array search after Manber and Myers 1993; maximal spans as in OLMoTrace
(arXiv 2504.07096); infinity-grams as in infini-gram (arXiv 2401.17377); belief conflict index as in
TraceAlign (arXiv 2508.02063).
"""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from alignops._native import library
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
from alignops.spans.store import Manifest, open_store

__all__ = ["SpanIndex"]

# Options of `attribute` that the paper names: only rare spans are attributed.
_PRESETS = {"paper": {"max_count": 3}}


class SpanIndex:
    """An opened index: exact counts, places, longest matches and next tokens of a corpus.

    Open one with `SpanIndex.open`. It is immutable: one object serves any number of threads, and
    processes that were forked after opening it. Pickling stores the path and the UUID; unpickling
    opens the index again. Calls release the GIL and use torch's threads; no answer depends on the
    number of threads or shards, or on the instruction set.

    All queries raise IndexError for an id outside [0, V), TypeError for ids that are not integers,
    ValueError for a wrong shape or offsets that decrease, and IndexCorruptError when they meet a
    damaged file: a count is right or missing, never wrong. Matches do not cross documents.

    Attributes:
        path: folder of the index.
        uuid: identity of the build, in hexadecimal.
        fingerprint: of the tokenizer, as given to `build_index`, or None.
        vocab_size: V.
        token_bits: width of a stored token, 8, 16 or 32.
        n_tokens: N, over all shards.
        n_docs: documents of all shards.
        n_shards: parts of the index.
        max_match: no longest match is longer, 4096.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, build_index
        >>> folder = tempfile.mkdtemp() + "/index"
        >>> _ = build_index([[1, 2, 1, 2], [2, 1]], folder, vocab_size=4, fingerprint="toy")
        >>> with SpanIndex.open(folder, fingerprint="toy") as index:
        ...     index.n_tokens, index.n_docs, index.count([1, 2])
        (6, 2, 2)
    """

    max_match = 4096

    def __init__(
        self,
        store: library.SpanStore,
        manifest: Manifest,
        path: Path,
        mode: str,
        verify: str,
    ) -> None:
        self.path = path
        self.uuid = str(manifest.uuid)
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.vocab_size
        self.token_bits = manifest.token_bits
        self.n_tokens = store.tokens
        self.n_docs = store.documents
        self.n_shards = store.shards
        self._how = mode, verify
        self._opened: tuple[library.SpanStore, library.SpanIndex] | None = (
            store,
            library.SpanIndex(store),
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["mmap", "ram"] = "mmap",
        verify: Literal["quick", "lazy", "full"] = "lazy",
        fingerprint: str | None = None,
    ) -> SpanIndex:
        """Open the folder of a finished index.

        Args:
            path: what `build_index` wrote.
            mode: "mmap" maps the files, so that opening takes milliseconds and processes share
                memory; "ram" reads them into memory.
            verify: "quick" checks headers, sizes, and a sample of blocks and of neighbours in the
                suffix array; "lazy" also checks each block of 64 KiB when a query first reads it;
                "full" checks every block now.
            fingerprint: of the caller's tokenizer, compared with the stored one.

        Raises:
            FileNotFoundError: there is no such folder.
            IndexIncompleteError: the folder holds no finished index.
            NotAnIndexError: something else.
            IndexVersionError: an index of another major version.
            IndexCorruptError: a check failed.
            TokenizerMismatchError: another fingerprint.
            ValueError: unknown mode or verify.
        """
        store, manifest = open_store(path, mode, verify, fingerprint)
        return cls(store, manifest, Path(path), mode, verify)

    # Life

    def close(self) -> None:
        """Release the files. Queries raise ValueError from now on; running ones end normally."""
        self._opened = None

    def verify(self, level: str = "full") -> None:
        """Check the files now, "quick" or "full", see `open`. Raises IndexCorruptError."""
        self._store.verify(level)

    def __enter__(self) -> SpanIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (os.fspath(self.path), self.uuid, *self._how)

    def __repr__(self) -> str:
        state = "" if self._opened else ", closed"
        return (
            f"SpanIndex({str(self.path)!r}, {self.n_tokens} tokens, {self.n_docs} documents, "
            f"{self.n_shards} shards{state})"
        )

    def _open(self) -> tuple[library.SpanStore, library.SpanIndex]:
        opened = self._opened  # another thread may close the index
        if opened is None:
            raise ValueError(f"SpanIndex: the index {self.path} is closed")
        return opened

    @property
    def _store(self) -> library.SpanStore:
        return self._open()[0]

    @property
    def _index(self) -> library.SpanIndex:
        return self._open()[1]

    def _one(self, op: str, argument: str, ids: Any) -> library.SpanBatch:
        """Ids of one row, checked, in the form that the native code takes."""
        return self._index.encode(op, argument, as_tokens(ids, op, argument))

    def _rows(self, op: str, ids: Any, offsets: Any) -> library.SpanBatch:
        bounds = as_ids(offsets, op, "offsets")
        return self._index.encode(op, "ids", as_tokens(ids, op), bounds)

    # The corpus

    @cached_property
    def counts(self) -> Ints:
        """Occurrences c_t of each token, int64 (V,)."""
        ids, counts = self._store.counts()
        if ids is None:
            dense: Ints = counts
        else:
            dense = np.zeros(self.vocab_size, np.int64)
            dense[ids] = counts
        dense.flags.writeable = False
        return dense

    @cached_property
    def unigram(self) -> npt.NDArray[np.float64]:
        """P(t) = c_t / N, float64 (V,); zeros for an empty corpus."""
        probs: npt.NDArray[np.float64] = self.counts / max(self.n_tokens, 1)
        probs.flags.writeable = False
        return probs

    def document(self, d: int) -> Document:
        """Tokens of document d, and what was stored with it.

        Raises:
            IndexError: there is no document d.

        Example:
            >>> from alignops.testing import span_index
            >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).document(1).tokens.tolist()
            [2, 1]
        """
        store = self._store
        if not 0 <= as_int(d, "document", "d") < self.n_docs:
            raise IndexError(f"document: d must lie in [0, {self.n_docs}), got {d}")
        return Document(
            store.document_tokens(d).astype(np.int64),
            json.loads(store.meta(d)) if store.has("meta") else None,
            store.label(d) if store.has("lab") else None,
            store.byte_offsets(d) if store.has("boff") else None,
        )

    # Counts and places

    def count(self, q: Any) -> int:
        """M(q); N for the empty query.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.count([1, 2]), index.count([2, 1]), index.count([3]), index.count([])
            (2, 2, 0, 6)
        """
        return int(self._index.count(self._one("count", "q", q))[0])

    def count_batch(self, ids: Any, offsets: Any) -> Ints:
        """M of each row of a ragged batch, int64 (rows,)."""
        counts: Ints = self._index.count(self._rows("count_batch", ids, offsets))
        return counts

    def find(self, q: Any) -> Ints:
        """Ranks [lo, hi) of the suffixes that start with q in each shard, int64 (n_shards, 2).

        Where q does not occur, lo = hi is the rank at which it would stand.
        """
        intervals: Ints = self._index.find(self._one("find", "q", q))[0]
        return intervals

    def find_batch(self, ids: Any, offsets: Any) -> Ints:
        """`find` of each row of a ragged batch, int64 (rows, n_shards, 2)."""
        intervals: Ints = self._index.find(self._rows("find_batch", ids, offsets))
        return intervals

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
        return Hits(*self._index.locate(self._one("locate", "q", q), limit)[:4])

    def hits(self, shard: int, ranks: Any) -> Hits:
        """Where the suffixes at these ranks of a shard begin; `find` gives ranks.

        Raises:
            IndexError: there is no such shard or rank.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> (lo, hi), = index.find([1])
            >>> hits = index.hits(0, range(lo, hi))
            >>> sorted(zip(hits.document.tolist(), hits.offset.tolist()))
            [(0, 0), (0, 2), (1, 1)]
        """
        return Hits(*self._index.hits(shard, as_ids(ranks, "hits", "ranks")))

    # Matches

    def _match(self, x: Any) -> Match:
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
        return self._match(x[: self._index.longest_prefix(batch, self.max_match)[0]])

    def longest_suffix(self, x: Any) -> Match:
        """The longest suffix of x that occurs."""
        x = as_tokens(x, "longest_suffix", "x")
        batch = self._one("longest_suffix", "x", x)
        return self._match(x[len(x) - self._index.longest_suffix(batch, self.max_match)[0] :])

    def matching_stats(self, x: Any) -> Ints:
        """MS[i]: length of the longest prefix of x[i:] that occurs, int64 (n,).

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> index.matching_stats([2, 1, 2, 3]).tolist()
            [3, 2, 1, 0]
        """
        batch = self._one("matching_stats", "x", x)
        lengths: Ints = self._index.match(batch, self.max_match, False)[0]
        return lengths

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
        lengths, numbers = self._index.match(batch, self.max_match, counts)
        return (lengths, numbers) if counts else lengths

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
        batch = self._one("maximal_spans", "x", x)
        options = _filter("maximal_spans", min_len, max_count, word_start, delimiters)
        return Spans(
            *self._index.maximal_spans("maximal_spans", batch, self.max_match, *options)[:3]
        )

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
        *spans, row = self._index.maximal_spans(op, batch, self.max_match, *options)
        return Spans(*spans), row

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
        native = self._index
        batch = self._one("attribute", "x", tokens)
        options = _filter("attribute", min_len, max_count, word_start, delimiters)
        start, end, count, _ = native.maximal_spans("attribute", batch, self.max_match, *options)
        empty = native.encode("attribute", "x", tokens[:0])
        occurrences = native.next_counts(empty, batch)
        score = belief_conflict(start, end, occurrences, self.n_tokens)
        kept = np.sort(np.lexsort((start, -score))[: math.ceil(share * len(tokens))])
        spans = [tokens[start[i] : end[i]] for i in kept]
        offsets = np.cumsum([0, *(len(s) for s in spans)], dtype=np.int64)
        flat = np.concatenate([tokens[:0], *spans])
        hits = native.locate(native.encode("attribute", "x", flat, offsets), documents)
        held: list[set[int]] = [set() for _ in spans]
        for row, document in zip(hits[4].tolist(), hits[2].tolist(), strict=True):
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
        counts: Ints = self._index.next_counts(
            self._one("next_counts", "ctx", ctx), self._one("next_counts", "cand", cand)
        )
        return counts

    def next_dist(self, ctx: Any, max_support: int | None = None) -> NextDist:
        """All tokens that follow ctx, with their counts.

        Args:
            ctx: tokens; after the empty context come all tokens of the corpus.
            max_support: if ctx occurs more often, only this many of its occurrences, evenly spread
                over their ranks, are counted, and the result says approx=True.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> [a.tolist() for a in index.next_dist([2])[:2]]
            [[1], [2]]
        """
        if max_support is not None:
            max_support = as_int(max_support, "next_dist", "max_support")
        return NextDist(*self._index.next_dist(self._one("next_dist", "ctx", ctx), max_support))

    def eos_count(self, ctx: Any) -> int:
        """How often ctx ends a document: M(ctx) minus the counts of all next tokens."""
        return int(self._index.eos_count(self._one("eos_count", "ctx", ctx)))

    def _next(self, op: str, ctx: Any, t: int) -> tuple[int, int]:
        """M(ctx) and M(ctx t)."""
        context = self._one(op, "ctx", ctx)
        after = self._index.next_counts(context, self._one(op, "t", [as_int(t, op, "t")]))
        return int(self._index.count(context)[0]), int(after[0])

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
        length = int(self._index.longest_suffix(batch, self.max_match)[0])
        whole, part = self._next("infgram_prob", ctx[len(ctx) - length :], t)
        return InfGram(part / whole if whole else math.nan, length, whole, part)


def _reopen(path: str, uuid: str, mode: Any, verify: Any) -> SpanIndex:
    index = SpanIndex.open(path, mode, verify)
    if index.uuid != uuid:
        raise ValueError(
            f"SpanIndex: the index {path} must be the pickled one, uuid {uuid}, got {index.uuid}: "
            "it was replaced"
        )
    return index


def _filter(
    op: str, min_len: int, max_count: int | None, word_start: Any, delimiters: Any
) -> tuple[Any, ...]:
    """Arguments of the native maximal_spans."""
    min_len = as_int(min_len, op, "min_len")
    max_count = None if max_count is None else as_int(max_count, op, "max_count")
    mask = None if word_start is None else as_mask(word_start, op, "word_start")
    stops = None if delimiters is None else as_tokens(delimiters, op, "delimiters")
    return min_len, max_count, mask, stops
