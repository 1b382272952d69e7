"""Random problems for searches: what a path of edges is worth, and what follows it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from alignops.reference.tree.search import Leaf
from alignops.tree import TreeStore


class World:
    """Values in (-1, 1), random priors; `depth`: paths end there; `rewards`: edges have some."""

    def __init__(self, seed: int, width: int, depth: int = 100, rewards: bool = False) -> None:
        self.seed, self.width, self.depth, self.rewards = seed, width, depth, rewards
        self.evaluate = cache(self._evaluate)

    def _evaluate(self, path: tuple[int, ...]) -> Leaf:
        rng = np.random.default_rng([self.seed, *path])
        value = np.float32(rng.uniform(-1, 1))
        reward = np.float32(rng.uniform(-1, 1)) if self.rewards and path else np.float32(0)
        prior = rng.dirichlet(np.ones(self.width)).astype(np.float32)
        ends = len(path) >= self.depth
        return Leaf(float(value), [] if ends else list(prior), float(reward))


def path_of(store: TreeStore, tree: int, node: int) -> tuple[int, ...]:
    """Edges from the root to a node."""
    parents, slots = store.column("parent")[tree], store.column("parent_slot")[tree]
    path: list[int] = []
    while parents[node] >= 0:
        path.append(int(slots[node]))
        node = int(parents[node])
    return tuple(reversed(path))


class Driver:
    """Runs a store on one world per tree, as a search loop would."""

    def __init__(self, store: TreeStore, worlds: list[World]) -> None:
        self.store, self.worlds = store, worlds
        self.paths: list[dict[int, tuple[int, ...]]] = [{} for _ in worlds]

    def step(self, k: int = 1, order: np.random.Generator | None = None) -> int:
        leaves = self.store.select(k)
        tickets, values = [], []
        rows: list[tuple[int, int, list[float]]] = []
        seen: set[tuple[int, int]] = set()
        for i in range(len(leaves.tree)):
            t, node = int(leaves.tree[i]), int(leaves.node[i])
            parent = int(leaves.parent[i])
            path = () if parent < 0 else (*self.paths[t][parent], int(leaves.slot[i]))
            self.paths[t][node] = path
            leaf = self.worlds[t].evaluate(path)
            tickets.append(int(leaves.ticket[i]))
            values.append(leaf.value)
            if (t, node) in seen or bool(leaves.evaluated[i]):
                continue
            seen.add((t, node))
            if leaf.reward:
                self.store.set_rewards(
                    torch.tensor([t]), torch.tensor([node]), torch.tensor([leaf.reward])
                )
            if leaf.prior:
                rows.append((t, node, list(leaf.prior)))
            else:
                self.store.end(torch.tensor([t]), torch.tensor([node]))
        if rows:
            self.store.expand(
                torch.tensor([row[0] for row in rows]),
                torch.tensor([row[1] for row in rows]),
                torch.cat([torch.arange(len(row[2])) for row in rows]),
                torch.cat([torch.tensor(row[2]) for row in rows]),
                torch.tensor([0, *np.cumsum([len(row[2]) for row in rows])]),
                normalize=False,
            )
        turn = list(range(len(tickets)))
        if order is not None:
            order.shuffle(turn)
        self.store.backup(
            torch.tensor([tickets[i] for i in turn], dtype=torch.int64),
            torch.tensor([values[i] for i in turn], dtype=torch.float32),
        )
        return len(tickets)
