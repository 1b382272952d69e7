"""Shared by the pytest-benchmark cases: the measured limits, and what every case records.

pytest benchmarks/bench_ternary.py                       # measures
pytest benchmarks/bench_ternary.py --benchmark-disable   # runs every case once
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from alignops import testing
from benchmarks import roofline
from benchmarks.timing import Runner

THREADS = sorted({1, len(os.sched_getaffinity(0))})


@functools.cache
def limits(threads: int) -> roofline.Roofline:
    return roofline.measure(threads)


@functools.cache
def random_read() -> float:
    """Seconds per random read of one thread with many in flight."""
    return min(roofline.random_reads(roofline.BUFFER_BYTES // 8).values())


@pytest.fixture(params=THREADS, ids=lambda t: f"{t}t")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, threads: int) -> Callable[..., None]:
    """`measure(runner, cold=, lookups=, macs=, reads=, **info)`: records time, floor and ratio."""

    def run(
        runner: Runner,
        *,
        cold: bool,
        lookups: float = 0.0,
        macs: float = 0.0,
        reads: float = 0.0,
        **info: object,
    ) -> None:
        with torch.no_grad():
            benchmark.pedantic(runner.run, rounds=7, warmup_rounds=1)
        benchmark.extra_info.update(
            info,
            threads=threads,
            isa=testing.active_isa(),
            cold=cold,
            calls=runner.calls,
            bytes=runner.weight_bytes,
            ops=lookups or macs or reads,
        )
        if benchmark.disabled:
            return
        floor = limits(threads).floor(runner.weight_bytes if cold else 0, lookups, macs)
        floor = max(floor, reads * random_read() / threads)
        median = benchmark.stats.stats.median / runner.calls
        benchmark.extra_info.update(floor_s=floor, median_s=median, ratio=floor / median)

    return run
