"""The formulas of the tree core against the golden vectors of the papers and their code."""

import itertools

import numpy as np
import pytest

from alignops.reference.tree import backup, rules

P = np.array([0.5, 0.3, 0.15, 0.05])
N = np.array([3.0, 1.0, 0.0, 2.0])
Q = np.array([0.2, 0.6, 0.0, -0.1])
SEEN = [0, 1, 3]


def close(got: object, expected: list[float]) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5, rtol=0)


def test_puct() -> None:
    close(rules.puct(Q, P, N, 6), [0.582842, 1.059410, 0.459410, -0.048954])


def test_puct_of_rain_as_released_and_as_published() -> None:
    unit = np.where(N > 0, rules.rescaled(Q, -1, 1, add=1e-5), 0.0)
    close(rules.puct_rain(unit, P, N, 7), [1.261435, 1.593721, 0.793725, 0.538189])
    close(rules.puct_rain(Q, P, N, 6), [0.812372, 1.334847, 0.734847, -0.018350])


def test_uct() -> None:
    close(rules.uct(Q[SEEN], N[SEEN], 6, 0.1), [0.277282, 0.733857, -0.005349])
    close(rules.uct(Q[SEEN], N[SEEN], 6, 1.0), [0.972822, 1.938566, 0.846509])
    assert rules.uct(Q, N, 6, 1.0)[2] == np.inf


def test_visits_in_flight() -> None:
    pending = np.array([1.0, 0.0, 2.0])
    close(rules.wu_uct(Q[SEEN], N[SEEN], pending, 6, 3, 1.0), [1.248147, 2.696294, 0.948147])
    q, n = rules.virtual_loss(Q[SEEN], N[SEEN], pending, 1.0, -1.0)
    close(q, [0.2 - 1.2 / 4, 0.6, -0.1 - 0.9 * 2 / 4])
    close(n, [4, 1, 4])


def test_boltzmann_and_soft_values() -> None:
    close(rules.boltzmann(Q[SEEN], np.ones(3), 1.0), [0.309344, 0.461488, 0.229168])
    close(rules.boltzmann(Q[SEEN], np.ones(3), np.inf), [0, 1, 0])
    close(rules.boltzmann(np.full(2, -np.inf), np.array([1.0, 3.0]), 1.0), [0.25, 0.75])
    soft = backup.soft_value
    close(soft(Q[SEEN], np.ones(3), 1.0), 0.274688)
    close(soft(Q[SEEN], np.ones(3), 5.0), 0.410913)
    close(soft(Q[SEEN], np.array([0.5, 0.3, 0.2]), 1.0), 0.291404)
    close(soft(Q[SEEN], np.ones(3), 0.0), Q[SEEN].mean())
    close(soft(Q[SEEN], np.ones(3), np.inf), 0.6)


def test_soft_values_lie_between_mean_and_largest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        q, w = rng.normal(size=5), rng.uniform(0.1, 1, 5)
        values = [backup.soft_value(q, w, rate) for rate in (0.0, 1e-4, 0.1, 1.0, 10.0, 1e4)]
        assert values == sorted(values)
        assert values[1] == pytest.approx(values[0], abs=1e-3)
        assert q.max() - values[-1] <= -np.log(w[q.argmax()] / w.sum()) / 1e4 + 1e-12


@pytest.mark.parametrize(
    ("alpha", "children"),
    [(0.8, [2, 4, 5, 13, 80, 503]), (0.7, [2, 4, 5, 11, 51, 252])],
)
def test_widening(alpha: float, children: list[int]) -> None:
    assert [rules.widening(n, 2.0, alpha) for n in (1, 2, 3, 10, 100, 1000)] == children


def test_a_whole_power_is_not_rounded_up() -> None:
    assert 2 * 32**0.8 > 32  # in floating point
    assert rules.widening(32, 2.0, 0.8) == 32


@pytest.mark.parametrize(
    ("considered", "simulations", "table"),
    [
        (4, 16, "0000111122334455"),
        (3, 8, "00011223"),
        (2, 5, "00112"),
        (8, 24, "000000001111222233445566"),
        (1, 4, "0123"),
    ],
)
def test_sequential_halving(considered: int, simulations: int, table: str) -> None:
    assert rules.halving_table(considered, simulations) == [int(c) for c in table]


def test_gumbel_inside_the_tree() -> None:
    assert rules.mixed_value(0.1, Q, P, N) == pytest.approx(0.291597, abs=1e-6)
    sigma = rules.completed(0.1, Q, P, N)
    close(sigma, [2.271429, 5.3, 2.964946, 0])
    policy = rules.improved_policy(np.log(P), sigma)
    close(policy, [0.071372, 0.885053, 0.042839, 0.000736])
    close(rules.gumbel_inner(policy, N), [-0.357200, 0.742196, 0.042839, -0.284978])


def test_the_improved_policy_improves() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        prior, q = rng.dirichlet(np.ones(6)), rng.normal(size=6)
        policy = rules.improved_policy(np.log(prior), rules.completed(0.0, q, prior, np.ones(6)))
        assert policy @ q >= prior @ q - 1e-12


def test_similarity_sharing_of_rain() -> None:
    assert backup.shared(0.0, 0.0, 1 * 0.5, -1.0) == (-1.0, 0.5)
    value, n = backup.shared(0.4, 3.0, 0.2 * 0.97, -1.0)
    assert (value, n) == (pytest.approx(0.314966, abs=1e-6), pytest.approx(3.194))


def test_value_of_p_aligner() -> None:
    q = np.array([backup.subtree_mean(0.3, [0.9, 0.1]), 0.5])
    close(q, [0.433333, 0.5])
    close(rules.uct(q, np.array([3.0, 1.0]), 4, 0.1), [0.501311, 0.617741])


def test_cost_of_astar() -> None:
    h = [1 - r for r in (0.5, 0.7, 0.4, 0.6)]
    g = [0.0]
    for before, after in itertools.pairwise(h):
        g.append(backup.astar_cost(g[-1], before, after, "h_rise"))
    close(g, [0, 0, 0.3, 0.3])
    close(np.add(g, h), [0.5, 0.3, 0.9, 0.7])


def test_returns_of_a_path() -> None:
    assert backup.returns(1.0, [9.0, 2.0, 4.0], 0.5) == [2 + 0.5 * (4 + 0.5), 4 + 0.5, 1.0]
