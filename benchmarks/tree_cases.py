"""Searches whose model is a table: what is left is bookkeeping."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from alignops import tree
from alignops.tree import TreeStore

ROWS = 4096  # of the tables of priors and values
SHAPES = (  # trees, edges per node, simulations
    (64, 8, 200),
    (256, 64, 200),
    (64, 64, 200),
    (1, 8, 200),
    (1024, 8, 200),
    (64, 8, 800),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """B trees, A edges per node, so many simulations."""

    trees: int
    edges: int
    simulations: int

    def __str__(self) -> str:
        return f"B={self.trees}, A={self.edges}, {self.simulations} simulations"

    @property
    def total(self) -> int:
        """Simulations of all trees."""
        return self.trees * self.simulations


class Model:
    """Random priors and values by table, the same for every contestant that can read it."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        self.priors = rng.dirichlet(np.ones(case.edges), ROWS).astype(np.float32)
        self.values = rng.uniform(-1, 1, ROWS).astype(np.float32)
        self.actions = np.tile(np.arange(case.edges, dtype=np.int32), case.trees)

    def rows(self, iteration: int) -> slice:
        """A row per tree; they wander through the table."""
        start = iteration * 37 % (ROWS - self.case.trees)
        return slice(start, start + self.case.trees)


def new_store(case: Case) -> TreeStore:
    """Trees of MuZero's policy."""
    return TreeStore(case.trees, tree.muzero(), capacity=case.simulations + 2)


def bookkeeping(model: Model) -> TreeStore:
    """One search at the boundary of the native code: NumPy arrays in and out."""
    store = new_store(model.case)
    native = store._native
    for iteration in range(model.case.simulations + 1):
        trees, nodes, *_, tickets = native.select(1)
        rows = model.rows(iteration)
        width = model.case.edges
        native.expand(trees, nodes, None, width, model.actions, model.priors[rows].ravel(), False)
        native.backup(tickets, model.values[rows])
    return store


def through_tensors(model: Model) -> TreeStore:
    """One search by the public functions."""
    store = new_store(model.case)
    actions = torch.from_numpy(model.actions).reshape(model.case.trees, -1)
    priors, values = torch.from_numpy(model.priors), torch.from_numpy(model.values)
    for iteration in range(model.case.simulations + 1):
        leaves = store.select()
        rows = model.rows(iteration)
        store.expand(leaves.tree, leaves.node, actions, priors[rows], normalize=False)
        store.backup(leaves.ticket, values[rows])
    return store


def mctx(case: Case) -> dict[str, Callable[[], Any]] | None:
    """Searches of mctx on the CPU, compiled, with the same kind of table; None without mctx."""
    try:
        peer: Any = importlib.import_module("mctx")
        jax: Any = importlib.import_module("jax")
    except ImportError:
        return None
    model = Model(case)
    priors, values = jax.numpy.log(model.priors), jax.numpy.asarray(model.values)

    def step(params: Any, key: Any, action: Any, embedding: Any) -> Any:
        row = (embedding * 37 + action + 1) % ROWS
        out = peer.RecurrentFnOutput(
            reward=jax.numpy.zeros(case.trees),
            discount=jax.numpy.ones(case.trees),
            prior_logits=priors[row],
            value=values[row],
        )
        return out, row

    first = jax.numpy.arange(case.trees) % ROWS
    root = peer.RootFnOutput(prior_logits=priors[first], value=values[first], embedding=first)

    def compiled(policy: Any) -> Callable[[], Any]:
        run = jax.jit(
            lambda key: (
                policy(
                    params=(),
                    rng_key=key,
                    root=root,
                    recurrent_fn=step,
                    num_simulations=case.simulations,
                ).action_weights
            )
        )
        key = jax.random.PRNGKey(0)
        return lambda: run(key).block_until_ready()

    return {
        "mctx gumbel": compiled(peer.gumbel_muzero_policy),
        "mctx muzero": compiled(peer.muzero_policy),
    }
