"""Statistics against counts by hand over random rounds, and the split of the time."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignops.speculative.stats import PHASES, Clock, SpecStats

ROW = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2), st.booleans())


def record(stats: SpecStats, rows: list[tuple[int, int, int, bool]], slots: int) -> None:
    """Rows of (k_b, accepted, finished, active); an unfinished row emits one more token."""
    k, a, finished, active = (torch.tensor(column) for column in zip(*rows, strict=True))
    a = torch.minimum(k, a)
    emitted = torch.where(finished != 0, a.clamp(min=1), a + 1) * active
    stats.record_round(
        offered=k,
        accept_len=a * active,
        num_emitted=emitted,
        finished=finished,
        active=active,
        slots=slots,
    )


@given(rounds=st.lists(st.lists(ROW, min_size=1, max_size=4), max_size=6))
def test_figures_are_those_of_counting(rounds: list[list[tuple[int, int, int, bool]]]) -> None:
    stats = SpecStats()
    offered = accepted = tokens = active_rows = 0
    tested_at, accepted_at = [0] * 6, [0] * 6
    for rows in rounds:
        record(stats, rows, slots=5)
        for k, a, finished, active in rows:
            if not active:
                continue
            a = min(a, k)
            emitted = max(a, 1) if finished else a + 1
            count = min(k, emitted) if finished else k
            active_rows += 1
            tokens += emitted
            offered += count
            accepted += a
            for i in range(count):
                tested_at[i] += a >= i
                accepted_at[i] += a > i
    assert (stats.offered, stats.accepted, stats.tokens) == (offered, accepted, tokens)
    assert stats.acceptance == (accepted / offered if offered else 0)
    assert stats.tokens_per_round == (tokens / active_rows if active_rows else 0)
    assert stats.slot_fill == (active_rows / (5 * len(rounds)) if rounds else 0)
    shares = [a / t for a, t in zip(accepted_at, tested_at, strict=True) if t]
    assert stats.acceptance_by_position == shares


def test_figures_may_be_asked_for_between_rounds() -> None:
    stats = SpecStats()
    record(stats, [(3, 1, 0, True)], 1)
    assert stats.acceptance == 1 / 3
    record(stats, [(3, 3, 0, True)], 1)
    assert stats.acceptance == 4 / 6
    assert stats.acceptance_by_position == [1, 0.5, 1]


def test_tensors_of_a_round_may_be_written_again() -> None:
    stats = SpecStats()
    accepted = torch.tensor([2], dtype=torch.int32)
    ones = torch.ones(1, dtype=torch.int32)
    stats.record_round(
        offered=ones * 3,
        accept_len=accepted,
        num_emitted=ones * 3,
        finished=ones * 0,
        active=ones.bool(),
        slots=1,
    )
    accepted.zero_()
    assert stats.accepted == 2


def test_groups_moves_and_impossible_drafts() -> None:
    stats = SpecStats()
    one = torch.ones(1, dtype=torch.int32)
    for grouping in ("grouped", "grouped", "fallback"):
        stats.record_round(
            offered=one,
            accept_len=one * 0,
            num_emitted=one,
            finished=one * 0,
            active=one.bool(),
            slots=1,
            zero_q=one,
            grouping=grouping,  # type: ignore[arg-type]
        )
    stats.record_move(100, 60)
    stats.record_move(10, 6)
    assert stats.grouping_rate == 2 / 3
    assert stats.fallbacks == 1
    assert (stats.bytes_moved, stats.bytes_floor, stats.zero_q) == (110, 66, 3)
    assert json.loads(stats.to_json())["grouping_rate"] == 2 / 3
    assert "grouping rate" in str(stats)
    assert "drafts of probability 0" in str(stats)


def test_time_is_split_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    with clock.job():
        now += 1
        with clock.phase("target"):
            now += 2
            with clock.phase("compact"):
                now += 4
            now += 8
        now += 16
        with contextlib.suppress(RuntimeError), clock.phase("draft"):
            now += 32
            raise RuntimeError
    now += 64  # after the job
    with clock.job():
        now += 128
    seconds = clock.seconds()
    assert (seconds["target"], seconds["compact"], seconds["draft"]) == (10, 4, 32)
    assert seconds["other"] == 17 + 128
    assert clock.total() == sum(2**i for i in range(8)) - 64


def test_overhead_is_what_neither_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    stats = SpecStats()
    with stats.clock.job():
        for name in PHASES:
            with stats.clock.phase(name):
                now += 1
        now += 2
    assert stats.overhead == 4 / 8
    assert json.loads(stats.to_json())["total_seconds"] == 8


def test_unknown_phase() -> None:
    with pytest.raises(ValueError, match=r"phase: name must be one of draft.*got 'drafts'"):
        SpecStats().clock.phase("drafts").__enter__()


def test_statistics_are_shown_by_rich() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=100, record=True)
    stats = SpecStats()
    record(stats, [(3, 1, 0, True)], 1)
    console.print(stats)
    assert "33.3% (1 of 3)" in console.export_text()
