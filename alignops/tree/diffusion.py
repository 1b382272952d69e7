"""Diffusion tree sampling and search (arXiv 2506.20701) for the caller's sampler.

The target is p(x) exp(rate * r(x)), p the sampler's own distribution. A tree holds states of the
chain x_T, ..., x_0; a simulation descends to a node that may grow, draws one state after the other
down to x_0 there, and backs the reward of x_0 up as soft values. What is known of a sample then
costs no network call: samples are drawn from the tree.

How exact it is: with every draw a node of its own (continuous states) the distribution of the
samples tends to the target, but slowly, because children that begin unluckily are seldom visited
again; see the table in the documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignops._checks import check
from alignops.tree._progress import Bar
from alignops.tree.policies import Soft, dts, dts_star
from alignops.tree.store import Leaves, TreeStore


class Step(Protocol):
    """Denoises a batch of states from one time to an earlier one, by as many steps as it likes."""

    def __call__(self, x: Tensor, t_from: int, t_to: int, generator: torch.Generator) -> Tensor:
        """(M, ...) states at `t_from` -> (M, ...) states at `t_to`; 0 is the end."""
        ...


@dataclass(frozen=True)
class DtsResult:
    """A tree of states, and what it says.

    Attributes:
        store: one tree; node column `payload` is the row of `states`, -1 at the root.
        states: (rows, ...) every state that was drawn.
        rewards: (rows,) float32 of final states, NaN of others.
        rate: inverse temperature.
        log_z: ln E_p[exp(rate * r)] / rate, the soft value of the root.
        nfe: network calls, in rows.
    """

    store: TreeStore
    states: Tensor
    rewards: Tensor
    rate: float
    log_z: float
    nfe: int

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """(n, ...) samples by Boltzmann descent; no model is called.

        Raises:
            ValueError: `n` is negative.
        """
        ends = self.store.sample(0, n, rate=self.rate, seed=seed)
        rows = self.store.gather("payload", torch.zeros(n, dtype=torch.int32), ends)
        return self.states[rows.long()]

    @property
    def best(self) -> tuple[Tensor, float]:
        """The final state of the largest reward, and the reward."""
        row = int(self.rewards.nan_to_num(-torch.inf).argmax())
        return self.states[row], float(self.rewards[row])

    @property
    def greedy(self) -> Tensor:
        """DTS*: the state at the end of the descent along the largest values."""
        end = self.store.sample(0, 1, rate=math.inf)
        return self.states[int(self.store.gather("payload", torch.zeros(1).int(), end)[0])]


def dts_sample(
    init: Callable[[int, torch.Generator], Tensor],
    step: Step,
    reward: Callable[[Tensor], Tensor],
    *,
    times: Sequence[int],
    nfe_budget: int,
    mode: str = "dts",
    width: float = 2.0,
    growth: float = 0.8,
    rate: float = 1.0,
    c_uct: float = 1.0,
    batch_leaves: int = 16,
    seed: int = 0,
    nfe_of: Callable[[int, int], int] = lambda t_from, t_to: t_from - t_to,
    progress: bool = False,
) -> DtsResult:
    """Grow a tree of states until a budget of network calls is spent.

    Args:
        init: (n, generator) -> (n, ...) draws of the initial noise, states at `times[0]`.
        step: the sampler.
        reward: (n, ...) final states -> (n,) rewards.
        times: falling, above 0: where the tree branches. The paper's: 100, 80, 60, 40, 20 for 100
            steps in two dimensions; 50, 40, 30, 20, 10 for images; 64, 54, 44, 34, 24, 14 for text.
        nfe_budget: network calls, one per state and step; a simulation that has begun is finished.
        mode: "dts" samples, "dts*" looks for the best.
        width: C of the widening: a node of n visits may have ceil(C n^growth) children.
        growth: alpha; 0.8 in the paper, 0.7 for text.
        rate: lambda, inverse temperature of the target.
        c_uct: exploration of "dts*"; the paper does not give it.
        batch_leaves: simulations that go down together.
        seed: of draws and of the generator that `init` and `step` get.
        nfe_of: (t_from, t_to) -> network calls per state of a step.
        progress: show a bar.

    Raises:
        ValueError: an argument is out of range, or a callback returns a wrong shape.
    """
    check(mode in ("dts", "dts*"), f"dts_sample: mode must be 'dts' or 'dts*', got {mode!r}")
    check(nfe_budget >= 0, f"dts_sample: nfe_budget must be at least 0, got {nfe_budget}")
    check(batch_leaves >= 1, f"dts_sample: batch_leaves must be at least 1, got {batch_leaves}")
    check(
        len(times) > 0 and all(a > b for a, b in zip(times, [*times[1:], 0], strict=True)),
        f"dts_sample: times must fall and be above 0, got {list(times)}",
    )
    policy = dts(rate, width, growth) if mode == "dts" else dts_star(c_uct, width, growth)
    store = TreeStore(1, policy, Soft(rate), capacity=1 << 22, seed=seed)
    sampler = _Sampler(init, step, reward, [*times, 0], store, seed, nfe_of)
    with Bar(progress, "dts", "nfe", nfe_budget) as bar:
        while sampler.nfe < nfe_budget:
            sampler.simulate(batch_leaves)
            bar.at(sampler.nfe)
    log_z = float(store.gather("value", torch.zeros(1).int(), store.trees().root)[0])
    states, rewards = sampler.states.rows(), sampler.rewards.rows()
    return DtsResult(store, states, rewards, rate, log_z, sampler.nfe)


class _Rows:
    """Rows that are appended, in memory that doubles."""

    def __init__(self) -> None:
        self.count = 0
        self._memory: Tensor | None = None

    def append(self, rows: Tensor) -> Tensor:
        """Ids of the new rows."""
        end = self.count + len(rows)
        if self._memory is None:
            self._memory = rows.new_empty((max(64, end), *rows.shape[1:]))
        if end > len(self._memory):
            grown = rows.new_empty((max(end, 2 * len(self._memory)), *rows.shape[1:]))
            grown[: self.count] = self._memory[: self.count]
            self._memory = grown
        self._memory[self.count : end] = rows
        ids = torch.arange(self.count, end)
        self.count = end
        return ids

    def __getitem__(self, ids: Tensor) -> Tensor:
        assert self._memory is not None
        return self._memory[ids]

    def __setitem__(self, ids: Tensor, rows: Tensor) -> None:
        assert self._memory is not None
        self._memory[ids] = rows

    def rows(self) -> Tensor:
        """All of them."""
        return torch.empty(0) if self._memory is None else self._memory[: self.count]


class _Sampler:
    def __init__(
        self,
        init: Callable[[int, torch.Generator], Tensor],
        step: Step,
        reward: Callable[[Tensor], Tensor],
        times: list[int],
        store: TreeStore,
        seed: int,
        nfe_of: Callable[[int, int], int],
    ) -> None:
        self.init, self.step, self.reward = init, step, reward
        self.times, self.store, self.nfe_of = times, store, nfe_of
        self.generator = torch.Generator().manual_seed(seed)
        self.states, self.rewards = _Rows(), _Rows()
        self.nfe = 0

    def simulate(self, k: int) -> None:
        """K selections, each grown to an end; rows of equal depth go through the model together."""
        leaves = self.store.select(k)
        try:
            for depth in range(len(self.times)):
                self._grow(leaves, depth)
            self._finish(leaves)
        except BaseException:
            self.store.cancel(leaves.ticket)
            raise

    def _grow(self, leaves: Leaves, depth: int) -> None:
        """New children of the leaves at this depth; their columns are replaced."""
        rows = (leaves.depth == depth).nonzero()[:, 0]
        if not len(rows):
            return
        if depth == 0:
            states = self.init(len(rows), self.generator)
        else:
            before, after = self.times[depth - 1], self.times[depth]
            parents = self.store.gather("payload", leaves.tree[rows], leaves.node[rows])
            states = self.step(self.states[parents.long()], before, after, self.generator)
            self.nfe += len(rows) * self.nfe_of(before, after)
        check(
            len(states) == len(rows),
            f"dts_sample: {'init' if depth == 0 else 'step'} must return {len(rows)} states, got "
            f"{len(states)}",
        )
        ids = self.states.append(states)
        self.rewards.append(torch.full((len(rows),), torch.nan))
        grown = self.store.grow(leaves.ticket[rows], ids)
        self.store.set_payloads(grown.tree, grown.node, ids)
        for column, new in zip(leaves, grown, strict=True):
            column[rows] = new

    def _finish(self, leaves: Leaves) -> None:
        ids = self.store.gather("payload", leaves.tree, leaves.node).long()
        rewards = self.rewards[ids]
        new = rewards.isnan()
        if bool(new.any()):
            found = self.reward(self.states[ids[new]])
            check(
                tuple(found.shape) == (int(new.sum()),),
                f"dts_sample: reward must return shape {(int(new.sum()),)}, got "
                f"{tuple(found.shape)}",
            )
            rewards[new] = found.detach().cpu().float()
            self.rewards[ids[new]] = rewards[new]
            self.store.end(leaves.tree[new], leaves.node[new])
        self.store.backup(leaves.ticket, rewards)
