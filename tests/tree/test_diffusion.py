"""Diffusion tree sampling of chains whose tilted distribution is known."""

from __future__ import annotations

import math

import pytest
import torch

from alignops import tree
from alignops.tree import DtsResult, TreeStore
from tests.tree.test_soft import FIRST_LEAF, LOG_Z, PRIORS, REWARDS, TARGET, WIDTH


class KnownChain:
    """The chain of tests/tree/test_soft.py: depth 3, four next states everywhere."""

    def __init__(self) -> None:
        self.calls = 0

    def init(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return self.step(torch.zeros(n).long(), 3, 2, generator)

    def step(
        self, x: torch.Tensor, t_from: int, t_to: int, generator: torch.Generator
    ) -> torch.Tensor:
        self.calls += len(x)
        edge = torch.multinomial(torch.from_numpy(PRIORS[x.numpy()]), 1, generator=generator)[:, 0]
        return WIDTH * x + 1 + edge

    def reward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(REWARDS[x.numpy() - FIRST_LEAF])


def sampled(nfe: int, k: int = 1, **options: object) -> DtsResult:
    chain = KnownChain()
    return tree.dts_sample(
        chain.init,
        chain.step,
        chain.reward,
        times=[2, 1],
        nfe_budget=nfe,
        batch_leaves=k,
        **options,  # type: ignore[arg-type]
    )


def distance(result: DtsResult, n: int = 20_000) -> float:
    got = torch.bincount(result.sample(n, seed=1) - FIRST_LEAF, minlength=len(TARGET)) / n
    return float(0.5 * (got - torch.from_numpy(TARGET)).abs().sum())


@pytest.mark.parametrize("k", [1, 8])
def test_samples_tend_to_the_target(k: int) -> None:
    far, near = (distance(sampled(nfe, k, seed=4)) for nfe in (150, 6000))
    assert near < min(0.25, far)


def test_the_root_is_the_log_of_the_normalizer() -> None:
    result = sampled(12_000, 8, seed=2)
    assert result.log_z == pytest.approx(LOG_Z, abs=0.6)  # separate children stay low
    result.store.validate()
    assert result.rewards.isfinite().sum() > 1000
    x, r = result.best
    assert r == pytest.approx(REWARDS.max())
    assert int(x) - FIRST_LEAF == REWARDS.argmax()


def test_the_search_finds_the_best_state() -> None:
    result = sampled(1500, 4, mode="dts*", rate=math.inf, seed=0)
    assert int(result.greedy) - FIRST_LEAF == REWARDS.argmax()


def test_network_calls_are_counted_and_bounded() -> None:
    chain = KnownChain()
    result = tree.dts_sample(
        chain.init, chain.step, chain.reward, times=[2, 1], nfe_budget=500, batch_leaves=16
    )
    made = int(result.store.trees().nodes[0]) - 1
    assert chain.calls == made == len(result.states)
    first = int(result.store.edges(0, 0).action.numel())
    assert result.nfe == chain.calls - first  # init is not a call
    assert 500 <= result.nfe < 500 + 2 * 16
    before = chain.calls
    result.sample(100)
    assert chain.calls == before


def test_a_tilted_gaussian() -> None:
    """X ~ N(0, 1) as a Brownian path in four steps, r(x) = x: the target is N(1, 1)."""
    variances = {4: 1.0, 3: 0.75, 2: 0.5, 1: 0.25, 0: 0.0}

    def init(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(n, 1) + 0 * torch.randn(n, 1, generator=generator)

    def step(x: torch.Tensor, t_from: int, t_to: int, generator: torch.Generator) -> torch.Tensor:
        spread = math.sqrt(variances[t_from] - variances[t_to])
        return x + spread * torch.randn(x.shape, generator=generator)

    result = tree.dts_sample(
        init, step, lambda x: x[:, 0], times=[4, 3, 2, 1], nfe_budget=40_000, batch_leaves=32
    )
    x = result.sample(4000)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.3)
    assert 0.1 < result.log_z < 0.6  # 0.5, but separate children stay low


def test_misuse() -> None:
    chain = KnownChain()
    arguments = {"times": [2, 1], "nfe_budget": 10}

    def call(**changes: object) -> None:
        functions = {"init": chain.init, "step": chain.step, "reward": chain.reward}
        tree.dts_sample(**(functions | arguments | changes))  # type: ignore[arg-type]

    for changes, text in [
        ({"mode": "mcts"}, "mode must be 'dts' or 'dts\\*', got 'mcts'"),
        ({"times": [1, 2]}, "times must fall and be above 0"),
        ({"times": [2, 0]}, "times must fall and be above 0"),
        ({"times": []}, "times must fall"),
        ({"nfe_budget": -1}, "nfe_budget must be at least 0"),
        ({"batch_leaves": 0}, "batch_leaves must be at least 1"),
        ({"growth": 1.0}, "growth must be between 0 and 1"),
        ({"step": lambda x, a, b, g: x[:0]}, "step must return 16 states, got 0"),
        ({"reward": lambda x: x[:, None]}, r"reward must return shape \(\d+,\), got"),
    ]:
        with pytest.raises(ValueError, match=text):
            call(**changes)


def test_no_budget_no_calls() -> None:
    result = sampled(0)
    assert isinstance(result.store, TreeStore)
    assert result.nfe == 0
    assert len(result.states) == 0
