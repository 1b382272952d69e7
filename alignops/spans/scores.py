"""Belief Conflict Index: how unlikely it is that a span arose by chance.

Symbols: P unigram distribution of the pretraining text, M(s) occurrences of the span s in an index
of N tokens. Scores are in nats, float64. Source: TraceAlign, arXiv 2508.02063.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alignops.spans.arrays import Floats, as_floats, as_ids, as_ragged

KINDS = ("bci", "density", "kl", "max", "norm", "lift")
#: Probability of a token that the text does not hold.
FLOOR = 1e-9


def unigram_probs(counts: Any, alpha: float = 0.0) -> Floats:
    """Token probabilities (c + alpha) / (N + alpha V) of counts (V,), for the `probs` of scores.

    Args:
        counts: (V,) occurrences of each token, such as `SpanIndex.counts`.
        alpha: added to every count; 0 leaves unseen tokens to the floor of the scores.

    Returns:
        float64 (V,); zeros if there is nothing to count.

    Raises:
        ValueError: alpha or a count is negative.

    Example:
        >>> unigram_probs([3, 1, 0, 0], alpha=1.0).tolist()
        [0.5, 0.25, 0.125, 0.125]
    """
    c = as_floats(counts, "unigram_probs", "counts")
    if alpha < 0:
        raise ValueError(f"unigram_probs: alpha must not be negative, got {alpha}")
    if (c < 0).any():
        raise ValueError(f"unigram_probs: counts must not be negative, got {c.min():g}")
    total = c.sum() + alpha * len(c)
    result: Floats = (c + alpha) / (total or 1.0)
    return result


def token_surprisal(ids: Any, probs: Any, floor: float = FLOOR) -> Floats:
    """-ln max(P, floor) of each token, in nats.

    Args:
        ids: (n,) token ids.
        probs: (V,) probabilities of the tokens, such as `SpanIndex.unigram`.
        floor: the least probability; 1e-9 makes an unseen token count 20.72 nats.

    Returns:
        float64 (n,).

    Raises:
        TypeError: ids are not integers.
        IndexError: an id is outside [0, V).
        ValueError: floor is not in (0, 1], or probs are not probabilities.

    Example:
        >>> token_surprisal([1, 0], [0.1, 0.01]).round(6).tolist()
        [4.60517, 2.302585]
    """
    flat = as_ids(ids, "token_surprisal")
    table = surprisal_table(probs, floor, "token_surprisal")
    check_range(flat, len(table), "token_surprisal")
    return table[flat]


def bci(
    ids: Any,
    offsets: Any,
    probs: Any,
    kind: str = "bci",
    floor: float = FLOOR,
    *,
    n_tokens: int | None = None,
    counts: Any = None,
) -> Floats:
    """Belief conflict of each span of a ragged batch.

    | kind | formula |
    |---|---|
    | `bci` | - sum ln P: grows with the span |
    | `density` | bci / length: cross-entropy of the span's token frequencies q against P |
    | `kl` | sum q ln(q / P) = density - H(q) |
    | `max` | the largest - ln P |
    | `norm` | bci / ln N: above 1, chance explains less than one occurrence |
    | `lift` | ln M - ln N + bci = ln(observed / expected): memorised, not merely rare |

    Args:
        ids: tokens of all spans, one after the other; or a list of spans if offsets is None.
        offsets: (k + 1,) where each span begins, and the end; or None.
        probs: (V,) probabilities of the tokens, such as `SpanIndex.unigram`.
        kind: one of the table.
        floor: the least probability, see `token_surprisal`.
        n_tokens: N, for "norm" and "lift".
        counts: (k,) M of each span, for "lift".

    Returns:
        float64 (k,); an empty span scores 0 ("lift": ln M - ln N).

    Raises:
        TypeError: ids or offsets are not integers.
        IndexError: an id is outside [0, V).
        ValueError: unknown kind, missing or unfit n_tokens or counts, bad offsets, floor or probs.

    Source:
        arXiv 2508.02063 defines `bci`; its published code `density`, `kl` and `max`.

    Example:
        >>> probs = [0.1, 0.01, 0.001]
        >>> bci([0, 1, 1, 2], [0, 2, 4], probs).round(6).tolist()
        [6.907755, 11.512925]
        >>> bci([[0, 1]], None, probs, kind="kl").round(5).tolist()
        [2.76073]
    """
    if kind not in KINDS:
        raise ValueError(f"bci: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    flat, bounds = as_ragged(ids, offsets, "bci")
    w = surprisal_table(probs, floor, "bci")
    check_range(flat, len(w), "bci")
    surprisal, lengths = w[flat], np.diff(bounds)
    if kind == "max":
        return _reduce(np.maximum, surprisal, bounds)
    total = _reduce(np.add, surprisal, bounds)
    if kind == "bci":
        return total
    if kind in ("norm", "lift"):
        log_n = _log_tokens(n_tokens, kind)
        return (
            total / log_n if kind == "norm" else _log_counts(counts, len(lengths)) - log_n + total
        )
    density: Floats = total / np.maximum(lengths, 1)
    return density if kind == "density" else density - _entropy(flat, lengths)


def surprisal_table(probs: Any, floor: float, op: str) -> Floats:
    """-ln max(P, floor) of every token of the vocabulary, after checks."""
    p = as_floats(probs, op, "probs")
    if not 0 < floor <= 1:
        raise ValueError(f"{op}: floor must lie in (0, 1], got {floor}")
    if len(p) and not (p.min() >= 0 and p.max() <= 1):
        raise ValueError(f"{op}: probs must lie in [0, 1], got {p.min():g} to {p.max():g}")
    table: Floats = -np.log(np.maximum(p, floor))
    return table + 0.0  # no negative zeros


def check_range(ids: Any, vocab_size: int, op: str, argument: str = "ids") -> None:
    """IndexError unless all ids lie in [0, vocab_size)."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        place = int(((ids < 0) | (ids >= vocab_size)).argmax())
        raise IndexError(
            f"{op}: {argument} must lie in [0, {vocab_size}), got {ids.flat[place]} at {place}"
        )


def _reduce(ufunc: np.ufunc, values: Floats, bounds: Any) -> Floats:
    """Reduction of each row; 0 for an empty one."""
    result = np.zeros(len(bounds) - 1)
    filled = np.diff(bounds) > 0  # reduceat would give an empty row its neighbour's value
    if filled.any():
        result[filled] = ufunc.reduceat(values, bounds[:-1][filled])
    return result


def _entropy(ids: Any, lengths: Any) -> Floats:
    """H(q) of the token frequencies of each row."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((ids, row))
    row, ids = row[order], ids[order]
    first = np.flatnonzero(np.r_[True, (np.diff(row) != 0) | (np.diff(ids) != 0)][: len(ids)])
    q = np.diff(np.r_[first, len(ids)]) / lengths[row[first]]
    entropy: Floats = np.bincount(row[first], -q * np.log(q), len(lengths)).astype(np.float64)
    return entropy


def _log_tokens(n_tokens: int | None, kind: str) -> float:
    if n_tokens is None or n_tokens < 2:
        raise ValueError(f"bci: n_tokens must be at least 2 for kind {kind!r}, got {n_tokens}")
    return math.log(n_tokens)


def _log_counts(counts: Any, spans: int) -> Floats:
    if counts is None:
        raise ValueError("bci: counts must be given for kind 'lift', got None")
    m = as_floats(counts, "bci", "counts")
    if len(m) != spans or (m < 0).any():
        raise ValueError(
            f"bci: counts must be {spans} numbers >= 0, one per span, got {len(m)}"
            + (f" and {m.min():g} among them" if len(m) else "")
        )
    with np.errstate(divide="ignore"):
        result: Floats = np.log(m)
    return result
