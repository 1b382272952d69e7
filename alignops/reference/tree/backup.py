"""Values of a node from those of its children and from what evaluations returned."""

from __future__ import annotations

import math

import numpy as np

from alignops.reference.tree.rules import Array


def soft_value(q: Array, weight: Array, inverse_temperature: float) -> float:
    """DTS (arXiv 2506.20701): (1 / lambda) ln(sum w exp(lambda v) / sum w).

    lambda = 0 is the weighted mean, lambda = inf the largest value of positive weight.
    """
    alive = weight > 0
    q, weight = q[alive], weight[alive]
    best = float(q.max())
    if math.isinf(inverse_temperature) or math.isinf(best):
        return best
    if inverse_temperature == 0:
        return float((weight * q).sum() / weight.sum())
    mass = (weight * np.exp(inverse_temperature * (q - best))).sum() / weight.sum()
    return best + math.log(mass) / inverse_temperature


def returns(value: float, rewards: list[float], discount: float) -> list[float]:
    """What each node of a path receives, root first, when its leaf is worth `value`.

    `rewards[i]` is the reward of the edge into node i of the path (that of the root counts
    nothing); g = reward + discount * g climbing from the leaf.
    """
    g = value
    out = [g]
    for reward in reversed(rewards[1:]):
        g = reward + discount * g
        out.append(g)
    return out[::-1]


def subtree_mean(local: float, children: list[float]) -> float:
    """P-Aligner (arXiv 2508.04626), as released: the mean of the own score and the children's Q."""
    return (local + sum(children)) / (1 + len(children))


def shared(value: float, n: float, weight: float, score: float) -> tuple[float, float]:
    """RAIN, Eq. 2: value and visits of a sibling that a score reaches with this weight."""
    return (value * n + weight * score) / (n + weight), n + weight


def astar_cost(g: float, h_parent: float, h: float, rule: str, logprob: float = 0.0) -> float:
    """A*-decoding (arXiv 2505.13672): g of a state from that of its parent; h = 1 - r.

    `h_rise` adds what h rose, `h_drop` what it fell, `steps` one per step, `neg_logprob` the
    negative log-probability of the continuation, `zero` nothing.
    """
    added = {
        "h_rise": max(0.0, h - h_parent),
        "h_drop": max(0.0, h_parent - h),
        "steps": 1.0,
        "neg_logprob": -logprob,
        "zero": 0.0,
    }
    return g + added[rule]
