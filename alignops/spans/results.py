"""What queries return. Arrays are int64 (k,) unless noted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Ints


class Hits(NamedTuple):
    """Occurrences of a span: shard, position in its text, document, offset in the document.

    Documents are numbered over all shards.
    """

    shard: Ints
    position: Ints
    document: Ints
    offset: Ints


class Match(NamedTuple):
    """A longest match: its length, its count, its ranks [lo, hi) in each shard, (n_shards, 2)."""

    length: int
    count: int  # type: ignore[assignment]
    intervals: Ints


class Spans(NamedTuple):
    """Matched spans x[start:end] and how often each occurs."""

    start: Ints
    end: Ints
    count: Ints  # type: ignore[assignment]


class NextDist(NamedTuple):
    """Tokens that follow a context, ascending, with counts; `approx`: estimated from a sample."""

    ids: Ints
    counts: Ints
    approx: bool


class InfGram(NamedTuple):
    """P(token | u), u the longest suffix of a context that occurs; its length, M(u), M(u token)."""

    prob: float
    length: int
    context_count: int
    count: int  # type: ignore[assignment]


class Attribution(NamedTuple):
    """A span x[start:end], how often it occurs, its BCI in nats, and documents that hold it."""

    start: int
    end: int
    count: int  # type: ignore[assignment]
    score: float
    documents: tuple[int, ...]


class Document(NamedTuple):
    """A document: tokens int64 (n,), and what was stored with it, else None.

    `byte_offsets` is uint32 (n,), one per token.
    """

    tokens: Ints
    meta: Any
    label: int | None
    byte_offsets: npt.NDArray[np.uint32] | None
