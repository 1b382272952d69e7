"""Who takes part in a round, and how many rounds that makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from alignops.speculative.generate import speculative_generate
from alignops.speculative.pool import Job
from alignops.speculative.schedule import Exspec
from tests.speculative.models import generated, model, oracle, prompts, texts


class _Pool:
    """Sequences by their aligned lengths alone."""

    def __init__(self, ends: dict[int, int], rows: int) -> None:
        self.session = SimpleNamespace(rows=rows)
        self.ends = ends

    def aligned(self, job: Job) -> int:
        return self.ends[job.index]


def _choose(ends: list[int], rows: int, **options: Any) -> list[int]:
    started = options.pop("started", [True] * len(ends))
    ages = options.pop("ages", [0] * len(ends))
    jobs = [Job(i, torch.zeros(1), 1, 0, row=0 if s else None) for i, s in enumerate(started)]
    for job, age in zip(jobs, ages, strict=True):
        job.age = age
    pool: Any = _Pool(dict(enumerate(ends)), rows)
    return [job.index for job in Exspec(**options).choose(jobs, pool)]


def test_the_first_full_group_is_taken() -> None:
    assert _choose([5, 7, 7, 5, 7, 5], rows=3) == [1, 2, 4]


def test_a_group_that_is_large_enough_is_taken_else_the_first() -> None:
    ends = [1, 2, 3, 3, 3, 4]
    assert _choose(ends, rows=4) == [2, 3, 4]
    assert _choose(ends, rows=4, min_fill=1.0) == [0, 1, 2, 3]
    assert _choose([1, 2, 3], rows=4) == [0, 1, 2]  # the tail


def test_new_sequences_make_groups_of_their_own() -> None:
    started = [True, False, True, False]
    assert _choose([4, 4, 4, 4], rows=2, started=started) == [0, 2]
    assert _choose([4, 4, 5, 4], rows=2, started=started) == [1, 3]


def test_who_has_waited_too_long_is_served_with_the_nearest() -> None:
    ages = [0, 0, 8, 0, 0]
    assert _choose([5, 5, 9, 10, 7], rows=2, ages=ages) == [2, 3]
    assert _choose([5, 5, 9, 10, 7], rows=2, ages=[8] * 5) == [0, 1]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.integers(1, 6), min_size=200, max_size=200),
    rows=st.integers(1, 4),
    count=st.integers(1, 9),
)
def test_nobody_starves(steps: list[int], rows: int, count: int) -> None:
    jobs = [Job(i, torch.zeros(1), 1, 0, row=0) for i in range(count)]
    scheduler, ends = Exspec(window=count, max_age=3), {i: i for i in range(count)}
    pool: Any = _Pool(ends, rows)
    for turn in range(40):
        chosen = {job.index for job in scheduler.choose(jobs, pool)}
        assert len(chosen) <= rows
        for job in jobs:
            job.age = 0 if job.index in chosen else job.age + 1
            if job.index in chosen:
                ends[job.index] += steps[(turn * 7 + job.index) % 200]
        # One round more for every batch of others that are overdue as well.
        assert max(job.age for job in jobs) <= 3 + -(-count // rows)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"window": 0}, "window"), ({"max_age": 0}, "age"), ({"min_fill": 0}, "fill")],
)
def test_options_that_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Exspec(**options)


def _run(scheduler: Any, count: int = 16, **options: Any) -> Any:
    """Prompts of mixed lengths, whose texts end at different places."""
    net = model()
    asked = prompts([1 + (7 * i) % 13 for i in range(count)], seed=1)
    alone = texts(net, asked, 24)
    eos = alone[0][7]
    out = speculative_generate(
        net,
        oracle(asked, alone, 0.7, seed=3),
        asked,
        max_new_tokens=24,
        batch_size=4,
        scheduler=scheduler,
        eos_token_id=eos,
        return_stats=True,
        **options,
    )
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in alone]
    assert generated(out, asked) == cut
    return out.stats


def test_refill_needs_fewer_rounds_than_static() -> None:
    static, refill = _run("static"), _run("refill")
    assert refill.rounds < static.rounds
    assert refill.slot_fill > static.slot_fill
    assert refill.tokens == static.tokens


@pytest.mark.parametrize("layout", ["ragged", "realign"])
def test_groups_are_counted(layout: str) -> None:
    stats = _run("exspec", layout=layout, window_size=16)
    assert stats.finished == 16
    if layout == "realign":
        assert stats.grouped + stats.fallbacks == stats.rounds
        assert stats.grouped > 0
        assert stats.fallbacks > 0


def test_a_scheduler_of_ones_own() -> None:
    class Reversed:
        def arrange(self, pool: Any) -> None:
            free = pool.session.free
            pool.start(pool.waiting[::-1][: len(free)])

    _run(Reversed(), count=5)
