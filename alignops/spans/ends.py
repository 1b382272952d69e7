"""For every end in a batch of texts: the longest suffix there that an index holds, and its score.

Why one suffix per end is enough: scores grow with the span, counts fall with it, and a span that
harmless text lacks has no extension there. So if any span that ends at t passes the filters, the
longest one does.

Symbols: x a row of tokens, MS[i] length of the longest match that starts at i, s[t] start of the
longest match that ends with token t. Everything is flat: rows lie one after the other, and matches
do not cross their bounds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from alignops.spans.arrays import Floats, Ints, as_ids

COVER_LENGTH = 8  # matches with harmless text from this length on excuse their tokens


@dataclass(frozen=True)
class Category:
    """One kind of unsafe text: its index, how severe it is, and -ln P of every token.

    `scale` turns nats into the unit of the score.
    """

    name: str
    index: Any
    severity: float
    surprisal: Floats
    scale: float


@dataclass(frozen=True)
class Filters:
    """What a span must have to pass, see `TraceShield`."""

    kind: str
    min_len: int
    max_count: int | None
    max_match: int
    allow: Any
    allow_mode: str


class Batch(NamedTuple):
    """Rows of tokens, and the place from which on spans may end, per row (all in `ids`)."""

    ids: Ints
    bounds: Ints
    first: Ints

    def rows_of(self, places: Ints) -> Ints:
        """The row of each place."""
        return np.searchsorted(self.bounds, places, side="right") - 1

    def select(self, rows: Ints) -> tuple[Batch, Ints]:
        """Some rows as a batch of their own, and the place of each of its tokens in this one."""
        if len(rows) == len(self.first):
            return self, np.arange(len(self.ids))
        lengths = np.diff(self.bounds)[rows]
        places = ranges(self.bounds[rows], lengths)
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        return Batch(self.ids[places], bounds, bounds[:-1]), places


class Ends(NamedTuple):
    """Passing spans ids[start:end], the longest at its end, ends ascending; score before severity.

    `count` is None unless a filter needed it.
    """

    row: Ints
    start: Ints
    end: Ints
    score: Floats
    count: Ints | None  # type: ignore[assignment]

    def pick(self, which: Any) -> Ends:
        """The spans at these indices, or where this mask is true."""
        return Ends(*(None if a is None else a[which] for a in self))  # type: ignore[arg-type]

    def outermost(self) -> Ends:
        """Those inside no other: starts do not fall, so of equal ones the last stays."""
        if not len(self.row):
            return self
        return self.pick(np.append(self.start[1:] != self.start[:-1], True))


def visible(
    flat: Ints, bounds: Ints, prompt_lengths: Any, scope: str, op: str
) -> tuple[Batch, Ints]:
    """What a scope shows of texts that begin with prompts, and how many tokens it cuts off each.

    Raises:
        TypeError: the lengths are not integers.
        ValueError: there are not as many as rows, or one is out of range.
    """
    lengths = np.diff(bounds)
    if prompt_lengths is None:
        return Batch(flat, bounds, bounds[:-1]), np.zeros_like(lengths)
    prompts = as_ids(prompt_lengths, op, "prompt_lengths")
    if len(prompts) != len(lengths) or (prompts < 0).any() or (prompts > lengths).any():
        raise ValueError(
            f"{op}: prompt_lengths must lie in [0, length of the row], one per row, got "
            f"{np.array2string(prompts, threshold=8)} for {len(lengths)} rows"
        )
    if scope == "prompt+completion" or not prompts.any():
        return Batch(flat, bounds, bounds[:-1] + prompts), np.zeros_like(prompts)
    kept = np.arange(len(flat)) >= np.repeat(bounds[:-1] + prompts, lengths)
    own = np.concatenate(([0], np.cumsum(lengths - prompts)))
    return Batch(flat[kept], own, own[:-1]), prompts


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The numbers starts[0], starts[0] + 1, ..., `lengths[i]` of them from each start."""
    before = np.cumsum(lengths) - lengths
    result: Ints = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return result


def longest_suffixes(index: Any, batch: Batch, max_match: int) -> Ints:
    """s[t] of every token; t + 1 where not even the token occurs.

    Matches may be cut to their first `max_match` tokens, since MS[i + 1] >= MS[i] - 1 still holds.
    So the places where matches end do not fall from start to start, and the first start whose match
    reaches past t is found by bisection.
    """
    stats = index.matching_stats_batch(batch.ids, batch.bounds)
    places = np.arange(len(stats))
    reach = places + np.minimum(stats, max_match)
    return np.minimum(np.searchsorted(reach, places, side="right"), places + 1)


def passing_ends(category: Category, filters: Filters, batch: Batch) -> Ends:
    """The longest match at every end where it passes the filters. A threshold is not among them."""
    lengths = np.arange(1, len(batch.ids) + 1) - longest_suffixes(
        category.index, batch, filters.max_match
    )
    last = np.flatnonzero(lengths >= filters.min_len)  # few, in most texts none
    row = batch.rows_of(last)
    inside = last >= batch.first[row]
    last, row = last[inside], row[inside]
    length, count = lengths[last], None
    # The rest looks only at rows that have such an end.
    part, places = batch.select(np.unique(row))
    at = np.searchsorted(places, last)
    harmless = None
    if filters.allow is not None and len(last):
        harmless = longest_suffixes(filters.allow, part, filters.max_match)
        if filters.allow_mode == "exact":
            keep = harmless[at] > at + 1 - length
            row, at, length = row[keep], at[keep], length[keep]
            harmless = None
    if filters.max_count is not None:
        count = count_spans(category.index, part.ids, at + 1 - length, length)
        keep = count <= filters.max_count
        row, at, length, count = row[keep], at[keep], length[keep], count[keep]
    score = _scores(category, filters.kind, part, at, length, harmless) / category.scale
    end = places[at] + 1
    return Ends(row, end - length, end, score, count)


def count_spans(index: Any, ids: Ints, start: Ints, length: Ints) -> Ints:
    """M of each span of `ids`."""
    offsets = np.concatenate(([0], np.cumsum(length)))
    counts: Ints = index.count_batch(ids[ranges(start, length)], offsets)
    return counts


def _scores(
    category: Category, kind: str, part: Batch, at: Ints, length: Ints, harmless: Ints | None
) -> Floats:
    """Score in nats of the spans that end with the tokens `at`.

    Harmless matches that end by then take their tokens out. Their longest ones start later and
    later, so token u is taken out for good by the first one of 8 tokens that ends at u or after it,
    or never. Before `border`, the last end of such a match, what is taken out no longer depends on
    the span; from there on nothing is.
    """
    surprisal = category.surprisal[part.ids]
    start, end = at + 1 - length, at + 1
    if harmless is None:
        return _reduce(kind, surprisal, part, start, end)
    places = np.arange(len(part.ids))
    covers = places + 1 - harmless >= COVER_LENGTH
    coming = np.minimum.accumulate(np.where(covers, places, len(places))[::-1])[::-1]
    taken = np.zeros(len(places), dtype=bool)
    known = coming < len(places)
    taken[known] = harmless[coming[known]] <= places[known]
    ended = np.maximum.accumulate(np.where(covers, places, -1))[at]
    border = np.clip(ended + 1, start, end)
    older = _reduce(kind, np.where(taken, 0.0, surprisal), part, start, border)
    newer = _reduce(kind, surprisal, part, border, end)
    return np.maximum(older, newer) if kind == "max" else older + newer


def _reduce(kind: str, values: Floats, part: Batch, start: Ints, end: Ints) -> Floats:
    """Sum (of kind "max": maximum) of values[start:end], 0 where that is empty."""
    result = np.zeros(len(start))
    filled = np.flatnonzero(start < end)
    if not len(filled):
        return result
    a, b = start[filled], end[filled]
    if kind == "max":
        pairs = np.stack((a, b), 1).ravel()
        result[filled] = np.maximum.reduceat(np.append(values, 0.0), pairs)[::2]
        return result
    # Sums from the start of the row on, as the incremental matcher keeps them: equal to the bit.
    sums = np.concatenate([np.cumsum(values[x:y]) for x, y in itertools.pairwise(part.bounds)])
    before = np.where(a > part.bounds[part.rows_of(a)], sums[a - 1], 0.0)
    result[filled] = sums[b - 1] - before
    return result
