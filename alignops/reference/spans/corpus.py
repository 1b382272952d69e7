"""The corpus index by brute force: text, order of suffixes, counts, matches, next tokens.

Symbols: N tokens of all documents, V size of the vocabulary, M(s) occurrences of the span s, x a
query of n tokens. The text is the concatenation of the documents, each followed by a separator that
is larger than every token and that no query can hold.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import uuid
from bisect import bisect_left, bisect_right
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_SEPARATOR = chr(0x10FFFF)


# What queries return; alignops/spans/results.py says what the fields mean.
Hits = namedtuple("Hits", "shard position document offset")
Match = namedtuple("Match", "length count intervals")
Spans = namedtuple("Spans", "start end count")
NextDist = namedtuple("NextDist", "ids counts approx")
InfGram = namedtuple("InfGram", "prob length context_count count")
Attribution = namedtuple("Attribution", "start end count score documents")
Document = namedtuple("Document", "tokens meta label byte_offsets")


class NaiveIndex:
    """All answers of a corpus index in one shard, found by looking everywhere.

    Tokens become characters, so that Python's strings do the comparing: a token that occurs gets an
    odd code, one that does not the even code between its neighbours, which keeps the order.

    Args:
        docs: documents, each a sequence of ids in [0, vocab_size); they may be empty.
        vocab_size: V.
        max_match: no match is longer.

    Raises:
        IndexError: an id is outside the vocabulary.

    Example:
        >>> index = NaiveIndex([[1, 2, 1, 2], [2, 1]], vocab_size=4)
        >>> index.count([1, 2]), index.count([2, 1]), index.count([])
        (2, 2, 6)
        >>> index.matching_stats([2, 1, 2, 3]).tolist()
        [3, 2, 1, 0]
    """

    path = None
    fingerprint = None
    n_shards = 1

    def __init__(
        self, docs: Iterable[Sequence[int]], vocab_size: int, max_match: int = 4096
    ) -> None:
        self.docs = [[int(t) for t in doc] for doc in docs]
        self.vocab_size = vocab_size
        self.max_match = max_match
        for d, doc in enumerate(self.docs):
            for offset, t in enumerate(doc):
                if not 0 <= t < vocab_size:
                    raise IndexError(
                        f"NaiveIndex: docs must hold ids in [0, {vocab_size}), got {t} in document "
                        f"{d} at {offset}"
                    )
        tokens = [t for doc in self.docs for t in doc]
        self.n_tokens = len(tokens)
        self.n_docs = len(self.docs)
        self.counts: Ints = np.bincount(
            np.asarray(tokens, dtype=np.int64), minlength=vocab_size
        ).astype(np.int64)
        self.unigram = self.counts / max(self.n_tokens, 1)
        self._known = sorted(set(tokens))
        self._text = "".join(self._encode(doc) + _SEPARATOR for doc in self.docs)
        places = [p for p, c in enumerate(self._text) if c != _SEPARATOR]
        #: Positions sorted by the text from there on, int64 (N,).
        self.suffixes: Ints = np.array(sorted(places, key=lambda p: self._text[p:]), dtype=np.int64)
        lengths = [len(doc) + 1 for doc in self.docs]
        #: Position of each document, and the end of the text, int64 (n_docs + 1,).
        self.starts: Ints = np.cumsum([0, *lengths], dtype=np.int64)
        content = repr((vocab_size, self.docs)).encode()
        self.uuid = str(uuid.UUID(bytes=hashlib.sha256(content).digest()[:16]))

    def _encode(self, tokens: Any) -> str:
        codes = []
        for t in np.asarray(tokens, dtype=np.int64).tolist():
            if not 0 <= t < self.vocab_size:
                raise IndexError(f"query: ids must lie in [0, {self.vocab_size}), got {t}")
            codes.append(chr(bisect_left(self._known, t) + bisect_right(self._known, t)))
        return "".join(codes)

    def _decode(self, code: str) -> int:
        return self._known[ord(code) // 2]

    def _places(self, q: str) -> list[int]:
        """Positions of q, ascending; of the empty query, those of all tokens."""
        if not q:
            return sorted(self.suffixes.tolist())
        places, p = [], self._text.find(q)
        while p >= 0:
            places.append(p)
            p = self._text.find(q, p + 1)
        return places

    def __reduce__(self) -> tuple[Any, ...]:
        return NaiveIndex, (self.docs, self.vocab_size, self.max_match)

    # Counts and places

    def count(self, q: Any) -> int:
        """M(q); N for the empty query."""
        return len(self._places(self._encode(q)))

    def count_batch(self, ids: Any, offsets: Any) -> Ints:
        """M of each row of a ragged batch."""
        return np.array([self.count(q) for q in _rows(ids, offsets)], dtype=np.int64)

    def find(self, q: Any) -> Ints:
        """Ranks [[lo, hi)]: lo suffixes are smaller than q, hi smaller or begin with it."""
        code = self._encode(q)
        heads = [self._text[p : p + len(code)] for p in self.suffixes.tolist()]
        lo, hi = sum(h < code for h in heads), sum(h <= code for h in heads)
        return np.array([[lo, hi]], dtype=np.int64)

    def find_batch(self, ids: Any, offsets: Any) -> Ints:
        """`find` of each row, (rows, 1, 2)."""
        rows = [self.find(q) for q in _rows(ids, offsets)]
        return np.array(rows, dtype=np.int64).reshape(-1, 1, 2)

    def locate(self, q: Any, limit: int = 10) -> Hits:
        """The k = min(M, limit) occurrences at the ranks lo + floor((2 i + 1) M / (2 k))."""
        ((lo, hi),) = self.find(q).tolist()
        m, k = hi - lo, min(hi - lo, limit)
        ranks = [lo + (2 * i + 1) * m // (2 * k) for i in range(k)]
        position = self.suffixes[ranks] if k else np.empty(0, dtype=np.int64)
        document = np.searchsorted(self.starts, position, side="right") - 1
        return Hits(np.zeros(k, np.int64), position, document, position - self.starts[document])

    def document(self, d: int) -> Document:
        """Tokens of a document; nothing else is stored with it."""
        return Document(np.array(self.docs[d], dtype=np.int64), None, None, None)

    # Matches

    def longest_prefix(self, x: Any) -> Match:
        """The longest prefix of x that occurs."""
        x = list(x)
        length = max(
            k for k in range(min(len(x), self.max_match) + 1) if self.count(x[:k]) or not k
        )
        return Match(length, self.count(x[:length]), self.find(x[:length]))

    def longest_suffix(self, x: Any) -> Match:
        """The longest suffix of x that occurs."""
        x = list(x)
        length = 0
        while length < min(len(x), self.max_match) and self.count(x[len(x) - length - 1 :]):
            length += 1
        tail = x[len(x) - length :]
        return Match(length, self.count(tail), self.find(tail))

    def matching_stats(self, x: Any) -> Ints:
        """MS[i]: length of the longest prefix of x[i:] that occurs."""
        code = self._encode(x)
        stats = []
        for i in range(len(code)):
            k = 0
            while k < min(len(code) - i, self.max_match) and code[i : i + k + 1] in self._text:
                k += 1
            stats.append(k)
        return np.array(stats, dtype=np.int64)

    def matching_stats_batch(self, ids: Any, offsets: Any, counts: bool = False) -> Any:
        """`matching_stats` of each row, one after the other; with M of the matches if `counts`."""
        rows = list(_rows(ids, offsets))
        stats = [self.matching_stats(x) for x in rows]
        lengths = np.concatenate([np.empty(0, np.int64), *stats])
        if not counts:
            return lengths
        found = [
            self.count(x[i : i + k])
            for x, row in zip(rows, stats, strict=True)
            for i, k in enumerate(row.tolist())
        ]
        return lengths, np.array(found, dtype=np.int64)

    def maximal_spans(
        self,
        x: Any,
        min_len: int = 1,
        max_count: int | None = None,
        word_start: Any = None,
        delimiters: Any = None,
    ) -> Spans:
        """Matches that no kept match contains.

        From each start (only word starts, if given): the longest match, cut after its first
        delimiter, then backed off until a word starts after it; long and rare enough; kept if it
        ends after every kept one before it.
        """
        x = np.asarray(x, dtype=np.int64).tolist()
        n, stats = len(x), self.matching_stats(x).tolist()
        stops = set() if delimiters is None else {int(t) for t in delimiters}
        kept: list[tuple[int, int, int]] = []
        for i in range(n):
            if word_start is not None and not word_start[i]:
                continue
            end = i + stats[i]
            end = next((j + 1 for j in range(i, end) if x[j] in stops), end)
            while word_start is not None and i < end < n and not word_start[end]:
                end -= 1
            if end - i < max(min_len, 1):
                continue
            m = self.count(x[i:end])
            if (max_count is None or m <= max_count) and (not kept or end > kept[-1][1]):
                kept.append((i, end, m))
        return Spans(*np.array(kept, dtype=np.int64).reshape(-1, 3).T)

    def maximal_spans_batch(self, ids: Any, offsets: Any, **options: Any) -> tuple[Spans, Ints]:
        """`maximal_spans` of each row (places count from its start), and the row of each span."""
        found = [self.maximal_spans(x, **options) for x in _rows(ids, offsets)]
        row = np.repeat(np.arange(len(found)), [len(s.start) for s in found])
        empty = Spans(*(np.empty(0, np.int64),) * 3)
        return Spans(*map(np.concatenate, zip(empty, *found, strict=True))), row

    def attribute(
        self,
        x: Any,
        *,
        share: float = 0.05,
        documents: int = 10,
        preset: str | None = None,
        **options: Any,
    ) -> list[Attribution]:
        """The ceil(share n) maximal spans of largest BCI (ties: the earlier), by place."""
        if preset == "paper":
            options = {"max_count": 3, **options}
        x = list(x)
        spans = self.maximal_spans(x, **options)
        found = []
        for start, end, count in zip(*(a.tolist() for a in spans), strict=True):
            score = -sum(math.log(self.unigram[t]) for t in x[start:end])
            held = sorted(set(self.locate(x[start:end], documents).document.tolist()))
            found.append(Attribution(start, end, count, score, tuple(held)))
        found.sort(key=lambda a: (-a.score, a.start))
        return sorted(found[: math.ceil(share * len(x))])

    # Next tokens

    def next_counts(self, ctx: Any, cand: Any) -> Ints:
        """M(ctx + c) of each candidate c."""
        ctx = list(ctx)
        return np.array([self.count([*ctx, c]) for c in cand], dtype=np.int64)

    def next_dist(self, ctx: Any, max_support: int | None = None) -> NextDist:
        """All tokens that follow ctx. `max_support` is an economy that this index does not need."""
        code = self._encode(ctx)
        after: dict[int, int] = {}
        for p in self._places(code):
            c = self._text[p + len(code)]
            if c != _SEPARATOR:
                after[self._decode(c)] = after.get(self._decode(c), 0) + 1
        ids = sorted(after)
        counts = [after[t] for t in ids]
        return NextDist(np.array(ids, np.int64), np.array(counts, np.int64), False)

    def eos_count(self, ctx: Any) -> int:
        """How often ctx ends a document: M(ctx) minus the counts of all next tokens."""
        return self.count(ctx) - int(self.next_dist(ctx).counts.sum())

    def ngram_prob(self, ctx: Any, t: int) -> float:
        """M(ctx t) / M(ctx); NaN where ctx does not occur."""
        m = self.count(ctx)
        return self.count([*ctx, t]) / m if m else math.nan

    def infgram_prob(self, ctx: Any, t: int) -> InfGram:
        """P(t | longest suffix of ctx that occurs)."""
        ctx = list(ctx)
        length, m, _ = self.longest_suffix(ctx)
        both = self.count([*ctx[len(ctx) - length :], t])
        return InfGram(both / m if m else math.nan, length, m, both)


def top_docs(attributions: Iterable[Attribution], k: int) -> list[tuple[int, float, int]]:
    """Documents as (document, summed BCI of its spans, spans), best first.

    Order: larger sum, then more spans, then smaller number.
    """
    total: dict[int, tuple[float, int]] = {}
    for a in attributions:
        for d in a.documents:
            score, spans = total.get(d, (0.0, 0))
            total[d] = score + a.score, spans + 1
    ranked = sorted(total.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
    return [(d, score, spans) for d, (score, spans) in ranked[:k]]


def _rows(ids: Any, offsets: Any) -> Iterable[list[int]]:
    flat, bounds = np.asarray(ids).tolist(), np.asarray(offsets).tolist()
    for a, b in itertools.pairwise(bounds):
        yield flat[a:b]
