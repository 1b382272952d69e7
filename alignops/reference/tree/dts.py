"""Diffusion tree sampling (arXiv 2506.20701) on a plain tree: one simulation at a time.

The target is pi(x) ~ p(x) exp(lambda r(x)) for a chain p that starts in `root` and ends in terminal
states. A simulation descends by Boltzmann draws (DTS) or by UCT (DTS*), adds a child where
progressive widening allows one, rolls out from there to a terminal state, and backs up soft values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from alignops.reference.tree.backup import soft_value
from alignops.reference.tree.rules import boltzmann, uct, widening

MODES = ("separate", "merge", "enumerate")


class Chain(Protocol):
    """The process that is steered."""

    def terminal(self, state: Hashable) -> bool:
        """Whether the chain ends here."""
        ...

    def reward(self, state: Hashable) -> float:
        """Reward r of a terminal state."""
        ...

    def draw(self, state: Hashable, rng: np.random.Generator) -> Hashable:
        """The next state, by p: for the modes "separate" and "merge"."""
        ...

    def actions(self, state: Hashable) -> Sequence[tuple[Hashable, float]]:
        """All next states with their probabilities: for the mode "enumerate"."""
        ...


@dataclass(eq=False)
class SoftNode:
    """A state of the tree.

    `weights[i]` belongs to `children[i]`: how often it was drawn, or its probability.
    """

    state: Hashable
    n: int = 1
    value: float = 0.0  # of an unevaluated node: that of its parent when it was added
    evaluated: bool = False
    children: list[SoftNode] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and weights of the children; an unevaluated child is worth what its parent is."""
        q = [child.value if child.evaluated else self.value for child in self.children]
        return np.array(q), np.array(self.weights, float)


class DiffusionTree:
    """The tree of one sampler.

    `mode` says what a draw of the chain becomes: "separate", a node of its own (the paper);
    "merge", equal states share a node, whose weight is how often it was drawn; "enumerate", all
    next states are listed and weighed by their probability, nothing is drawn. `c_uct`: None for
    DTS, a constant for DTS*.
    """

    def __init__(
        self,
        chain: Chain,
        root: Hashable,
        *,
        mode: str = "separate",
        c: float = 2.0,
        alpha: float = 0.8,
        inverse_temperature: float = 1.0,
        c_uct: float | None = None,
        seed: int = 0,
    ) -> None:
        self.chain, self.mode = chain, mode
        self.c, self.alpha = c, alpha
        self.inverse_temperature, self.c_uct = inverse_temperature, c_uct
        self.rng = np.random.default_rng(seed)
        self.root = SoftNode(root)

    def step(self) -> None:
        """One simulation."""
        path = [self.root]
        rolling = False
        while not self.chain.terminal(path[-1].state):
            node = path[-1]
            if self.mode == "enumerate":
                if not node.children:
                    for state, probability in self.chain.actions(node.state):
                        node.children.append(SoftNode(state, value=node.value))
                        node.weights.append(probability)
                path.append(self.select(node))
            elif rolling or sum(node.weights) < widening(node.n, self.c, self.alpha):
                rolling = True
                path.append(self.draw(node))
            else:
                path.append(self.select(node))
        leaf = path[-1]
        leaf.value, leaf.evaluated = self.chain.reward(leaf.state), True
        for node in reversed(path[:-1]):
            self.backup(node)
            node.n += 1

    def draw(self, node: SoftNode) -> SoftNode:
        """A child drawn by the chain: a new one, or in the mode "merge" an equal one."""
        state = self.chain.draw(node.state, self.rng)
        if self.mode == "merge":
            for i, child in enumerate(node.children):
                if child.state == state:
                    node.weights[i] += 1
                    return child
        node.children.append(SoftNode(state, value=node.value))
        node.weights.append(1.0)
        return node.children[-1]

    def select(self, node: SoftNode) -> SoftNode:
        """A child by Boltzmann draw, or for DTS* by UCT."""
        q, weight = node.arrays()
        if self.c_uct is None:
            p = boltzmann(q, weight, self.inverse_temperature)
            return node.children[int(self.rng.choice(len(p), p=p))]
        visits = np.array([child.n for child in node.children], float)
        return node.children[int(np.argmax(uct(q, visits, node.n, self.c_uct)))]

    def backup(self, node: SoftNode) -> None:
        """The soft value over the children that an evaluation has reached."""
        known = [
            (child.value, weight)
            for child, weight in zip(node.children, node.weights, strict=True)
            if child.evaluated
        ]
        q, weight = np.array(known).T
        node.value = soft_value(q, weight, self.inverse_temperature)
        node.evaluated = True

    def readout(self, prior: Callable[[Hashable], dict[Hashable, float]]) -> dict[Hashable, float]:
        """Probability of each terminal state under Boltzmann descent; no model is called.

        Below a node without evaluated children the chain itself goes on: `prior(state)` are the
        terminal states that it reaches from there.
        """
        out: dict[Hashable, float] = {}

        def descend(node: SoftNode, mass: float) -> None:
            if self.chain.terminal(node.state):
                out[node.state] = out.get(node.state, 0.0) + mass
            elif not any(child.evaluated for child in node.children):
                for state, probability in prior(node.state).items():
                    out[state] = out.get(state, 0.0) + mass * probability
            else:
                p = boltzmann(*node.arrays(), self.inverse_temperature)
                for child, share in zip(node.children, p, strict=True):
                    descend(child, mass * float(share))

        descend(self.root, 1.0)
        return out

    def best(self) -> SoftNode:
        """DTS*: the end of the greedy descent over evaluated children."""
        node = self.root
        while node.children:
            node = max(
                node.children, key=lambda child: child.value if child.evaluated else -math.inf
            )
        return node
