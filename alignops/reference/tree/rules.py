"""Scores by which a search chooses among the edges of a node.

One node at a time, float64, as the formulas stand: P priors, N finished visits, Q values, O visits
in flight, each one number per edge; `n` is the node's own count. The first of equal scores wins.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]


def filled(q: Array, visits: Array, unvisited: float) -> Array:
    """Q with the value of edges that were never visited replaced (first-play urgency)."""
    return np.where(visits > 0, q, unvisited)


def mean_visited(value: float, q: Array, visits: Array) -> float:
    """What LightZero takes for an unvisited edge: the mean of the node's value and visited Q."""
    seen = q[visits > 0]
    return float((value + seen.sum()) / (1 + len(seen)))


def rescaled(q: Array, low: float, high: float, floor: float = 0.0, add: float = 0.0) -> Array:
    """(Q - low) / width, width = max(high - low, floor) + add; 0 where the width is 0."""
    width = max(high - low, floor) + add
    return (q - low) / width if width > 0 else np.zeros_like(q)


def puct(
    q: Array, prior: Array, visits: Array, n: float, c1: float = 1.25, c2: float = 19652.0
) -> Array:
    """MuZero: q + P sqrt(n) / (1 + N) (c1 + ln((n + c2 + 1) / c2)), q already normalized."""
    return q + prior * math.sqrt(n) / (1 + visits) * (c1 + math.log((n + c2 + 1) / c2))


def puct_rain(q: Array, prior: Array, visits: Array, n: float, c: float = 2.0) -> Array:
    """RAIN (arXiv 2309.07124), Eq. 1: q + c P sqrt(n) / (1 + N)."""
    return q + c * prior * math.sqrt(n) / (1 + visits)


def uct(q: Array, visits: Array, n: float, c: float) -> Array:
    """Q + c sqrt(ln n / N); an edge without visits comes first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bonus = np.sqrt(math.log(max(n, 1)) / visits)
    return np.where(visits > 0, q + c * bonus, np.inf)


def wu_uct(
    q: Array, visits: Array, pending: Array, n: float, n_pending: float, beta: float
) -> Array:
    """WU-UCT: Q + beta sqrt(2 ln(n + O_n) / (N + O)): visits in flight count, values do not."""
    return uct(q, visits + pending, n + n_pending, beta * math.sqrt(2))


def virtual_loss(
    q: Array, visits: Array, pending: Array, m: float, loss: float
) -> tuple[Array, Array]:
    """Q and N as if each visit in flight had returned `loss`, m times (KataGo's form)."""
    lost = m * pending
    shift = np.where(lost > 0, (loss - q) * lost / (lost + np.maximum(0.25, visits)), 0.0)
    return q + shift, visits + lost


def boltzmann(q: Array, weight: Array, inverse_temperature: float) -> Array:
    """Probabilities proportional to w exp(lambda Q); an infinite lambda shares among the best."""
    alive = weight > 0
    best = q[alive].max()
    if math.isinf(inverse_temperature):
        mass = np.where(alive & (q == best), weight, 0.0)
    elif math.isinf(best):
        mass = weight
    else:
        mass = weight * np.exp(inverse_temperature * (q - best))
    return np.asarray(mass / mass.sum(), np.float64)


def mixed_value(raw: float, q: Array, prior: Array, visits: Array) -> float:
    """Gumbel MuZero's v_mix: the value of an edge that was never visited."""
    seen = visits > 0
    total = visits.sum()
    if not total:
        return raw
    known = float((prior * q)[seen].sum() / prior[seen].sum())
    return float((raw + total * known) / (1 + total))


def completed(
    raw: float,
    q: Array,
    prior: Array,
    visits: Array,
    c_visit: float = 50.0,
    c_scale: float = 0.1,
) -> Array:
    """sigma(q): completed Q rescaled to [0, 1], times (c_visit + max N) c_scale."""
    known = filled(q, visits, mixed_value(raw, q, prior, visits))
    unit = rescaled(known, float(known.min()), float(known.max()))
    return np.asarray((c_visit + visits.max()) * c_scale * unit, np.float64)


def improved_policy(logits: Array, sigma: Array) -> Array:
    """Gumbel MuZero's pi' = softmax(logits + sigma(q))."""
    x = logits + sigma
    x = np.exp(x - x.max())
    return np.asarray(x / x.sum(), np.float64)


def gumbel_inner(policy: Array, visits: Array) -> Array:
    """Gumbel MuZero inside the tree: pi' - N / (1 + sum N)."""
    return np.asarray(policy - visits / (1 + visits.sum()), np.float64)


def halving_table(considered: int, simulations: int) -> list[int]:
    """Sequential halving: the visits that the edge chosen by each simulation has so far."""
    if considered <= 1:
        return list(range(simulations))
    rounds = math.ceil(math.log2(considered))
    visits = [0] * considered
    table: list[int] = []
    left = considered
    while len(table) < simulations:
        for _ in range(max(1, simulations // (rounds * left))):
            table += visits[:left]
            visits[:left] = [v + 1 for v in visits[:left]]
        left = max(2, left // 2)
    return table[:simulations]


def widening(n: float, c: float, alpha: float) -> int:
    """Progressive widening: a node of n visits may have ceil(C n^alpha) children.

    A power that is a whole number but for its rounding counts as that number.
    """
    return math.ceil(c * math.pow(n, alpha) * (1 - 1e-12))
