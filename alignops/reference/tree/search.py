"""Monte Carlo tree search with mean values on a plain tree, one leaf at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from alignops.reference.tree.backup import returns
from alignops.reference.tree.rules import (
    Array,
    filled,
    mean_visited,
    puct,
    puct_rain,
    rescaled,
    uct,
)


@dataclass(eq=False)
class Node:
    """A node that was selected at least once; `children[i]` is None until edge i is."""

    prior: Array
    reward: float = 0.0
    raw: float = math.nan
    value_sum: float = 0.0
    n: int = 0
    terminal: bool = False
    depth: int = 0
    children: list[Node | None] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The mean of what was backed up."""
        return self.value_sum / self.n if self.n else 0.0

    def edges(self, discount: float = 1.0) -> tuple[Array, Array]:
        """Q and N of the edges, Q = reward + discount * value."""
        q = [c.reward + discount * c.value if c and c.n else 0.0 for c in self.children]
        visits = [c.n if c else 0 for c in self.children]
        return np.array(q), np.array(visits, float)


@dataclass
class Bounds:
    """Smallest and largest value that the tree has seen."""

    low: float = math.inf
    high: float = -math.inf

    def see(self, value: float) -> None:
        """Widen the bounds to this value."""
        self.low, self.high = min(self.low, value), max(self.high, value)


Score = Callable[[Node, Bounds], Array]


def score_muzero(node: Node, bounds: Bounds, discount: float = 1.0) -> Array:
    """As mctx: q between the node's value and its visited siblings; unvisited at the smallest."""
    q, visits = node.edges(discount)
    known = np.append(q[visits > 0], node.value)
    low, high = float(known.min()), float(known.max())
    return puct(rescaled(filled(q, visits, low), low, high), node.prior, visits, node.n)


def score_lightzero(node: Node, bounds: Bounds, discount: float = 1.0) -> Array:
    """As LightZero: q between the bounds of the tree (at least 0.01 apart), clipped to [0, 1]."""
    q, visits = node.edges(discount)
    q = filled(q, visits, mean_visited(node.value, q, visits))
    if bounds.high > bounds.low:
        q = rescaled(q, bounds.low, bounds.high, floor=0.01)
    return puct(np.clip(q, 0.0, 1.0), node.prior, visits, node.n - 1)


def score_rain(node: Node, bounds: Bounds) -> Array:
    """As RAIN's code: q between the bounds, which start at -1 and 1; 0 for an unvisited edge."""
    q, visits = node.edges()
    low, high = min(bounds.low, -1.0), max(bounds.high, 1.0)
    q = np.where(visits > 0, rescaled(q, low, high, add=1e-5), 0.0)
    return puct_rain(q, node.prior, visits, node.n)


def score_uct(c: float) -> Score:
    """Plain UCT."""

    def score(node: Node, bounds: Bounds) -> Array:
        q, visits = node.edges()
        return uct(q, visits, node.n, c)

    return score


@dataclass
class Leaf:
    """What a model says of a new node; no priors: it is terminal."""

    value: float
    prior: Sequence[float]
    reward: float = 0.0


def search(
    evaluate: Callable[[tuple[int, ...]], Leaf],
    simulations: int,
    score: Score,
    discount: float = 1.0,
) -> tuple[Node, Bounds]:
    """The tree after so many simulations.

    Args:
        evaluate: of a path of edges from the root; () is the root, whose evaluation is its first
            visit and no simulation.
        simulations: how many leaves to add.
        score: of the edges of a node; the first of the best is taken.
        discount: of what lies one edge further.
    """
    bounds = Bounds()

    def arrive(path: tuple[int, ...]) -> Node:
        leaf = evaluate(path)
        prior = np.array(leaf.prior, float)
        return Node(
            prior,
            reward=leaf.reward,
            raw=leaf.value,
            terminal=len(prior) == 0,
            depth=len(path),
            children=[None] * len(prior),
        )

    def back(nodes: list[Node]) -> None:
        for node, g in zip(
            nodes, returns(nodes[-1].raw, [node.reward for node in nodes], discount), strict=True
        ):
            node.value_sum += g
            node.n += 1
            bounds.see(node.reward + discount * node.value)

    root = arrive(())
    back([root])
    for _ in range(simulations):
        nodes, path = [root], tuple[int, ...]()
        while not nodes[-1].terminal:
            edge = int(np.argmax(score(nodes[-1], bounds)))
            path = (*path, edge)
            child = nodes[-1].children[edge]
            if child is None:
                child = nodes[-1].children[edge] = arrive(path)
                nodes.append(child)
                break
            nodes.append(child)
        back(nodes)
    return root, bounds
