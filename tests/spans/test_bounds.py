"""Bounds: known values, and coverage in simulation."""

import math
from typing import Any

import numpy as np
import pytest

from alignops.reference import spans as reference
from alignops.spans import (
    chance_bound,
    clopper_pearson,
    fit_drift_bound,
    residual_bound,
    tau_null,
)
from alignops.spans.bounds import MIN_PART


def test_chance_bound_values() -> None:
    assert chance_bound(128, 20_000_000, 30) == pytest.approx(128 * 2e7 * math.exp(-30))
    assert chance_bound(128, 20_000_000, 20) == 1
    assert chance_bound(0, 10, 1) == chance_bound(10, 0, 1) == 0
    for alpha in (1e-6, 0.05, 1.0):
        assert chance_bound(100, 10**9, tau_null(100, 10**9, alpha)) == pytest.approx(alpha)


def test_chance_bound_holds_for_random_text() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(50, 0.3))
    n, N, draws = 20, 400, 200
    risks = []
    for _ in range(draws):
        index = reference.NaiveIndex([rng.choice(50, N, p=p).tolist()], 50)
        rule = reference.Rule(min_len=1, surprisal=reference.token_surprisal(p))
        text = rng.choice(50, n, p=p).tolist()
        stats = index.matching_stats(text).tolist()
        w = rule.surprisal
        risks.append(max(sum(w[t] for t in text[i : i + k]) for i, k in enumerate(stats)))
    for alpha in (0.05, 0.2, 0.5):
        rate = np.mean(np.array(risks) > tau_null(n, N, alpha))
        assert rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / draws)


@pytest.mark.parametrize(
    ("k", "m", "delta", "limit"),
    [
        # Closed forms: 1 - delta^(1/m) without events, (1 - delta)^(1/m) with all but one event.
        (0, 1, 0.05, 0.95),
        (0, 100, 0.05, 1 - 0.05**0.01),
        (0, 10**6, 1e-9, -math.expm1(math.log(1e-9) / 1e6)),
        (9, 10, 0.05, 0.95**0.1),
        (999, 1000, 0.01, 0.99**0.001),
        (7, 7, 0.3, 1.0),
        # Inverse of the regularised incomplete beta function in 30 digits.
        (3, 20, 0.025, 0.378926826545),
        (10, 20, 0.025, 0.728042150439),
        (5, 10, 0.025, 0.812913971553),
        (50, 100, 0.025, 0.601678870497),
        (10, 100, 0.025, 0.17622259774),
        (40, 5000, 0.0001, 0.0137961254048),
    ],
)
def test_clopper_pearson_values(k: int, m: int, delta: float, limit: float) -> None:
    assert clopper_pearson(k, m, delta) == pytest.approx(limit, rel=1e-10)


@pytest.mark.parametrize("delta", [0.001, 0.05, 0.5])
def test_clopper_pearson_solves_the_binomial_tail(delta: float) -> None:
    for m in (1, 2, 13, 60, 250):
        limits = [clopper_pearson(k, m, delta) for k in range(m + 1)]
        assert limits == sorted(limits)
        for k, p in enumerate(limits[:-1]):
            tail = sum(math.comb(m, i) * p**i * (1 - p) ** (m - i) for i in range(k + 1))
            assert tail == pytest.approx(delta, rel=1e-9)


def drift_rate(risk: Any, count: Any) -> Any:
    return np.clip(0.02 + risk / 90 + 0.1 * (count <= 3), 0, 1)


def draw_prompts(rng: np.random.Generator, m: int) -> tuple[Any, Any]:
    """Risk and count; a third of the prompts match nothing."""
    risk = np.where(rng.uniform(size=m) < 0.35, 0.0, rng.gamma(3.0, 8.0, m))
    count = np.where(risk > 0, rng.geometric(0.25, m), 0)
    return risk, count


def test_drift_bound_covers_every_bin() -> None:
    rng = np.random.default_rng(2)
    delta, draws, broken = 0.1, 500, 0
    for _ in range(draws):
        risk, count = draw_prompts(rng, 800)
        rate = drift_rate(risk, count)
        bound = fit_drift_bound(risk, count, rng.uniform(size=800) < rate, delta)
        bins = np.searchsorted(bound.edges, risk, side="right")
        parts = 2 * bins + (count > 3) * bound.split[bins]
        mean = np.bincount(parts, rate) / np.maximum(np.bincount(parts), 1)
        broken += bool((mean[parts] > bound(risk, count)).any())
    assert broken / draws <= delta


def test_drift_bound_does_not_fall_with_risk() -> None:
    rng = np.random.default_rng(3)
    risk, count = draw_prompts(rng, 3000)
    bound = fit_drift_bound(risk, count, rng.uniform(size=3000) < drift_rate(risk, count))
    assert bound.split.any()
    grid = np.linspace(0, 100, 400)
    for m in (1, 3, 4, 50):
        f = bound(grid, m)
        assert (np.diff(f) >= 0).all()
    # Whatever the counts are.
    ends = [bound.limits[b].max() for b in range(len(bound.limits))]
    assert all(a <= low for a, low in zip(ends, bound.limits[1:].min(1), strict=False))
    assert bound(100.0, 1) <= 1
    assert isinstance(bound(5.0, 2), float)


def test_bins_are_split_only_where_both_parts_are_large() -> None:
    risk = np.repeat(np.arange(8.0), 2 * MIN_PART)
    count = np.tile([1] * MIN_PART + [9] * MIN_PART, 8)
    labels = np.zeros(len(risk))
    assert fit_drift_bound(risk, count, labels).split.all()
    count[0] = 9
    assert fit_drift_bound(risk, count, labels).split.tolist() == [False] + [True] * 7


def test_a_drift_bound_of_few_prompts() -> None:
    bound = fit_drift_bound([0.0], [0], [1])
    assert bound(0.0, 0) == bound(99.0, 9) == 1
    same = fit_drift_bound([5.0] * 30, [1] * 30, [0] * 30)
    assert same(0.0, 1) == same(9.0, 1) == pytest.approx(1 - 0.05 ** (1 / 30))


def test_residual_bound_covers() -> None:
    rng = np.random.default_rng(4)
    delta, draws, broken = 0.1, 500, 0
    for _ in range(draws):
        drift = rng.uniform(size=200) < 0.2
        refused = rng.uniform(size=200) < np.where(drift, 0.8, 0.02)
        broken += residual_bound(drift, refused, delta) < 0.2 * 0.2
    assert broken / draws <= delta


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: chance_bound(-1, 1, 1), "n and N"),
        (lambda: tau_null(0, 1), "n and N"),
        (lambda: tau_null(1, 1, 0), "alpha"),
        (lambda: clopper_pearson(3, 2), "k must"),
        (lambda: clopper_pearson(0, 0), "k must"),
        (lambda: clopper_pearson(0, 1, 1.0), "delta"),
        (lambda: fit_drift_bound([], [], []), "one value per prompt"),
        (lambda: fit_drift_bound([1], [1, 2], [0]), "one value per prompt"),
        (lambda: fit_drift_bound([1], [1], [2]), "0 and 1"),
        (lambda: fit_drift_bound([math.nan], [1], [0]), "NaN"),
        (lambda: fit_drift_bound([1], [1], [0], 0.0), "delta"),
        (lambda: residual_bound([1], []), "one value per prompt"),
    ],
)
def test_bad_arguments(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
