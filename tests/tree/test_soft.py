"""Soft values and Boltzmann draws on a chain whose target is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignops import tree
from alignops.reference.tree.backup import soft_value
from alignops.tree import TreeStore

WIDTH, DEPTH = 4, 3
LEAVES = WIDTH**DEPTH
FIRST_LEAF = (LEAVES - 1) // (WIDTH - 1)


def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(123)
    return rng.dirichlet([1.5] * WIDTH, size=FIRST_LEAF), rng.normal(0, 1.5, LEAVES)


PRIORS, REWARDS = problem()


def prior_of_leaves() -> np.ndarray:
    p = np.ones(1)
    for depth in range(DEPTH):
        first = (WIDTH**depth - 1) // (WIDTH - 1)
        p = (p[:, None] * PRIORS[first : first + len(p)]).reshape(-1)
    return p


TARGET = prior_of_leaves() * np.exp(REWARDS)
LOG_Z = math.log(TARGET.sum())
TARGET /= TARGET.sum()


def distance(p: np.ndarray) -> float:
    return float(0.5 * np.abs(p - TARGET).sum())


def test_the_problem_is_the_one_that_was_measured() -> None:
    assert distance(prior_of_leaves()) == pytest.approx(0.5713, abs=1e-4)
    assert pytest.approx(1.2110, abs=1e-4) == LOG_Z


class Sampler:
    """B runs of DTS on the known chain, in one store."""

    def __init__(self, mode: str, seeds: int, policy: tree.Policy, rule: tree.Backup) -> None:
        self.mode = mode
        self.store = TreeStore(seeds, policy, rule, capacity=200_000, seed=7)
        self.states = [{0: 0} for _ in range(seeds)]
        self.rng = np.random.default_rng(5)

    def run(self, simulations: int) -> None:
        for _ in range(simulations):
            leaves = self.store.select()
            while True:
                state = self.note(leaves)
                open_ = state < FIRST_LEAF
                if not open_.any():
                    break
                leaves = self.further(leaves, state)
            self.store.end(leaves.tree, leaves.node)
            self.store.backup(leaves.ticket, torch.from_numpy(REWARDS[state - FIRST_LEAF]))

    def note(self, leaves: tree.Leaves) -> np.ndarray:
        rows = zip(*(x.tolist() for x in leaves[:4]), strict=True)
        out = []
        for t, node, parent, slot in rows:
            if node not in self.states[t]:
                edge = slot
                if self.mode != "enumerate":
                    edge = int(self.store.edges(t, parent).action[slot]) % WIDTH
                self.states[t][node] = WIDTH * self.states[t][parent] + 1 + edge
            out.append(self.states[t][node])
        return np.array(out)

    def further(self, leaves: tree.Leaves, state: np.ndarray) -> tree.Leaves:
        """One step on for all selections that have not reached an end."""
        deep = np.where(state < FIRST_LEAF)[0]
        part = tree.Leaves(*(x[deep] for x in leaves))
        if self.mode == "enumerate":
            bare = self.store.column("n_edges")[part.tree.long(), part.node.long()] == 0
            new = bare.nonzero()[:, 0].numpy()
            self.store.expand(
                part.tree[new],
                part.node[new],
                torch.arange(WIDTH).expand(len(new), WIDTH),
                torch.from_numpy(PRIORS[state[deep[new]]]),
            )
            part = self.store.descend(part.ticket)
        else:
            draws = [int(self.rng.choice(WIDTH, p=PRIORS[s])) for s in state[deep]]
            part = self.store.grow(part.ticket, torch.tensor(draws), merge=self.mode == "merge")
        for whole, new_part in zip(leaves, part, strict=True):
            whole[deep] = new_part
        return leaves

    def readout(self, t: int) -> np.ndarray:
        out = np.zeros(LEAVES)

        def descend(node: int, mass: float) -> None:
            state = self.states[t][node]
            if state >= FIRST_LEAF:
                out[state - FIRST_LEAF] += mass
                return
            edges = self.store.edges(t, node)
            q = edges.q.double().numpy().copy()
            if np.isnan(q).all():
                below(state, mass)
                return
            q[np.isnan(q)] = float(self.value[t, node])
            w = edges.prior.double().numpy() * np.exp(q - q.max())
            for slot, (child, share) in enumerate(
                zip(edges.child.tolist(), w / w.sum(), strict=True)
            ):
                if child >= 0:
                    descend(child, mass * share)
                else:
                    below(WIDTH * state + 1 + slot, mass * share)

        def below(state: int, mass: float) -> None:
            if state >= FIRST_LEAF:
                out[state - FIRST_LEAF] += mass
                return
            for edge in range(WIDTH):
                below(WIDTH * state + 1 + edge, mass * PRIORS[state][edge])

        self.value = self.store.column("value")
        descend(0, 1.0)
        return out


def test_enumerated_actions_reach_the_target() -> None:
    sampler = Sampler("enumerate", 8, tree.Boltzmann(), tree.Soft())
    sampler.run(1000)
    assert np.mean([distance(sampler.readout(t)) for t in range(8)]) <= 0.08
    sampler.run(9000)
    sampler.store.validate()
    assert np.mean([distance(sampler.readout(t)) for t in range(8)]) <= 0.006
    roots = sampler.store.column("value")[:, 0]
    assert abs(float(roots.mean()) - LOG_Z) <= 0.01


def test_merged_draws_come_near() -> None:
    sampler = Sampler("merge", 8, tree.dts(), tree.Soft())
    sampler.run(10_000)
    sampler.store.validate()
    assert np.mean([distance(sampler.readout(t)) for t in range(8)]) <= 0.06


def test_separate_draws_get_better() -> None:
    sampler = Sampler("separate", 4, tree.dts(), tree.Soft())
    distances = []
    for simulations in (100, 900, 4000):
        sampler.run(simulations)
        distances.append(np.mean([distance(sampler.readout(t)) for t in range(4)]))
    sampler.store.validate()
    assert distances == sorted(distances, reverse=True)
    assert 0.1 < distances[-1] <= 0.2


@pytest.mark.parametrize("rate", [0.3, 1.0, 20.0, math.inf])
def test_soft_values_are_what_the_children_say(rate: float) -> None:
    sampler = Sampler("merge", 3, tree.dts(), tree.Soft(rate))
    sampler.run(700)
    value = sampler.store.column("value")
    for t in range(3):
        for node in range(int(sampler.store.trees().nodes[t])):
            edges = sampler.store.edges(t, node)
            known = ~edges.q.isnan()
            if bool(known.any()):
                want = soft_value(
                    edges.q[known].double().numpy(), edges.prior[known].double().numpy(), rate
                )
                assert float(value[t, node]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "least"), [("mean", 0.2), ("max", 0.15), ("without_priors", 0.25), ("sum", 0.1)]
)
def test_wrong_rules_miss_the_target(name: str, least: float) -> None:
    """Readouts of the same chain with all leaves known: what the right rule must not be."""

    def value(state: int) -> float:
        if state >= FIRST_LEAF:
            return float(REWARDS[state - FIRST_LEAF])
        v = np.array([value(WIDTH * state + 1 + edge) for edge in range(WIDTH)])
        p = PRIORS[state]
        return {
            "mean": float(p @ v),
            "max": float(v.max()),
            "without_priors": math.log(float(p @ np.exp(v))),
            "sum": math.log(float(np.exp(v).sum())),
        }[name]

    out = np.zeros(LEAVES)

    def descend(state: int, mass: float) -> None:
        if state >= FIRST_LEAF:
            out[state - FIRST_LEAF] = mass
            return
        v = np.array([value(WIDTH * state + 1 + edge) for edge in range(WIDTH)])
        w = np.exp(v) * (1 if name == "without_priors" else PRIORS[state])
        for edge, share in enumerate(w / w.sum()):
            descend(WIDTH * state + 1 + edge, mass * share)

    descend(0, 1.0)
    assert distance(out) >= least
