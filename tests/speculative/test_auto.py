"""The choice of K against machines whose costs and texts whose acceptance are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from alignops.speculative.auto import AutoK, expected_tokens

KMAX = 7


class Machine:
    """Costs in seconds, a text of given acceptance, and what a choice of K did with them."""

    def __init__(
        self,
        forward: Callable[[int], float],
        draft: float,
        alpha: float,
        rows: int = 8,
        offering: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        self.forward, self.draft, self.rows, self.noise = forward, draft, rows, noise
        self.alpha, self.offering = alpha, offering
        self.rng = np.random.default_rng(1)
        self.seconds, self.tokens = 0.0, 0
        self.chosen, self.widths = list[int](), list[int]()

    def run(self, auto: AutoK, rounds: int) -> None:
        for _ in range(rounds):
            k = auto.choose(self.rows)
            has = self.rng.random(self.rows) < self.offering
            offered = [k if h else 0 for h in has]
            lucky = self.rng.random((self.rows, k)) < self.alpha
            accepted = [
                int(np.cumprod(row[:n]).sum()) for row, n in zip(lucky, offered, strict=True)
            ]
            width = max(offered)
            emitted = [a + 1 for a in accepted]
            if auto.trims:
                width = auto.width(self.rows, offered)
                emitted = [min(a, width) + 1 for a in accepted]
                # The token behind what was computed tells about one more draft.
                offered = [min(n, count) for n, count in zip(offered, emitted, strict=True)]
                accepted = [min(a, width + 1) for a in accepted]
            noise = np.exp(self.noise * self.rng.standard_normal())
            target, draft = self.forward(width + 1) * noise, self.draft * k
            auto.observe(
                rows=self.rows,
                asked=k,
                width=width,
                offered=offered,
                accepted=accepted,
                draft_seconds=draft,
                target_seconds=target,
            )
            self.seconds += target + draft
            self.tokens += sum(emitted)
            self.chosen.append(k)
            self.widths.append(width)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def line(slope: float) -> Callable[[int], float]:
    return lambda q: 1 + slope * (q - 1)


def test_expected_tokens_are_a_geometric_sum() -> None:
    for alpha in (0.0, 0.3, 0.99, 1.0):
        for k in range(6):
            assert expected_tokens(alpha, k) == pytest.approx(sum(alpha**i for i in range(k + 1)))


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("draft", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 0.95])
def test_speed_is_near_that_of_the_best_fixed_k(slope: float, draft: float, alpha: float) -> None:
    best = max(
        8 * expected_tokens(alpha, k) / (line(slope)(k + 1) + draft * k) for k in range(KMAX + 1)
    )
    machine = Machine(line(slope), draft, alpha, noise=0.05)
    machine.run(AutoK(KMAX), 400)
    assert machine.speed > 0.93 * best


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("offering", [0.2, 1.0])
def test_hopeless_drafts_cost_little(rows: int, offering: float) -> None:
    plain = rows / 1.0
    machine = Machine(line(0.25), 0.01, 0.05, rows=rows, offering=offering, noise=0.05)
    machine.run(AutoK(KMAX), 128)
    assert machine.speed > 0.97 * plain
    # Alone, a row that seldom has drafts may be asked for them: mostly that costs nothing.
    if rows > 1 or offering == 1:
        assert machine.chosen[64:].count(0) > 55


def test_no_drafts_is_left_when_the_text_becomes_easy() -> None:
    machine, auto = Machine(line(0.25), 0.01, 0.05), AutoK(KMAX)
    machine.run(auto, 150)
    assert machine.chosen[-8:] == [0] * 8
    machine.alpha = 0.95
    machine.run(auto, 200)
    assert min(machine.chosen[-40:]) >= 3


def test_drafts_stop_when_the_text_becomes_hard() -> None:
    machine, auto = Machine(line(0.2), 0.02, 0.95), AutoK(KMAX)
    machine.run(auto, 60)
    assert min(machine.chosen[-20:]) >= 3
    machine.alpha = 0.02
    machine.run(auto, 40)
    assert machine.chosen[-10:].count(0) >= 9


def test_rows_without_drafts_count() -> None:
    # One row in ten has drafts: the other nine pay for the columns.
    machine = Machine(line(0.2), 0.0, 0.95, rows=8, offering=0.1)
    machine.run(AutoK(KMAX), 200)
    assert machine.chosen[-100:].count(0) > 80


def test_one_row_pays_only_for_columns_that_were_computed() -> None:
    # Alone, a row without drafts is a round of one column.
    machine = Machine(line(0.1), 0.0, 0.95, rows=1, offering=0.3)
    machine.run(AutoK(KMAX), 300)
    assert np.mean(machine.chosen[-100:]) > 4


@pytest.mark.parametrize("offering", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.9])
def test_columns_of_free_drafts_are_chosen_by_who_has_some(offering: float, alpha: float) -> None:
    # Best on average: for each set of rows with drafts, the width of most tokens per second.
    free, forward = 1e-4, line(0.25)
    best = Machine(forward, free, alpha, offering=offering)
    for _ in range(400):
        count = int((best.rng.random(8) < offering).sum())
        width = max(
            range(8), key=lambda w: (8 + count * (expected_tokens(alpha, w) - 1)) / forward(w + 1)
        )
        width = width if count else 0
        best.seconds += forward(width + 1)
        best.tokens += 8 + count * (expected_tokens(alpha, width) - 1)
    machine = Machine(forward, free, alpha, offering=offering, noise=0.05)
    machine.run(AutoK(KMAX, trims=True), 400)
    assert machine.speed > 0.95 * best.speed
    whole = Machine(forward, free, alpha, offering=offering, noise=0.05)
    whole.run(AutoK(KMAX), 400)
    assert machine.speed > 0.97 * whole.speed
    assert machine.speed > 0.97 * 8


@pytest.mark.parametrize("offering", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("slope", [0.6, 1.0])
def test_a_short_job_on_a_busy_machine_loses_little(
    slope: float, alpha: float, offering: float
) -> None:
    # A forward of two columns costs nearly twice one of one: as 8 rows on two cores do.
    machine = Machine(line(slope), 1e-4, alpha, offering=offering, noise=0.05)
    machine.run(AutoK(KMAX, trims=True), 96)
    assert machine.speed > 0.97 * 8


def test_trimmed_to_nothing_is_left_when_the_text_becomes_easy() -> None:
    machine, auto = Machine(line(0.25), 1e-4, 0.02), AutoK(KMAX, trims=True)
    machine.run(auto, 150)
    assert machine.widths[-8:] == [0] * 8
    machine.alpha = 0.95
    machine.run(auto, 200)
    assert min(machine.widths[-40:]) >= 3


def test_kinds_of_drafts_are_told_apart() -> None:
    auto, forward = AutoK(KMAX, trims=True), line(0.25)
    rng = np.random.default_rng(2)
    for _ in range(60):
        kinds = rng.integers(0, 2, 4).tolist()
        width = auto.width(4, [5] * 4, kinds)
        accepted = [5 if kind else 0 for kind in kinds]
        auto.observe(
            rows=4,
            asked=5,
            width=width,
            offered=[width] * 4,
            accepted=[min(a, width) for a in accepted],
            kinds=kinds,
            draft_seconds=1e-5,
            target_seconds=forward(width + 1),
        )
    assert auto.acceptance_of(1) > 0.9
    assert auto.acceptance_of(0) < 0.2
    assert auto.width(4, [5] * 4, [1, 1, 1, 1]) == 5
    assert auto.width(4, [5] * 4, [0, 0, 0, 0]) == 0
    assert auto.acceptance_of(7) == pytest.approx(auto.acceptance)  # never seen


def test_cost_of_another_number_of_rows_is_taken_over() -> None:
    machine, auto = Machine(line(0.02), 0.0, 0.9), AutoK(KMAX)
    machine.run(auto, 50)
    assert auto.choose(7) >= 5


def test_a_slow_first_forward_says_nothing() -> None:
    machine, auto = Machine(line(0.02), 0.0, 0.9), AutoK(KMAX)
    forward = machine.forward
    machine.forward = lambda q: 50.0
    machine.run(auto, 1)
    machine.forward = forward
    machine.run(auto, 20)
    assert min(machine.chosen[5:]) >= 4


def test_max_drafts_is_checked() -> None:
    with pytest.raises(ValueError, match="AutoK: max_drafts must be at least 1, got 0"):
        AutoK(0)
