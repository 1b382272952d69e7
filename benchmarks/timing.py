"""Timing discipline: contestants alternate, medians count, thread pools settle between turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

COLD_BYTES = 256 << 20  # a ring of copies this large outlives the caches of any CPU we know
SETTLE_SECONDS = 0.01  # workers of an OpenMP pool spin for milliseconds after their last region


@dataclasses.dataclass
class Runner:
    """One contestant: `run()` performs `calls` equal operations of `weight_bytes` each."""

    name: str
    run: Callable[[], object]
    calls: int
    weight_bytes: int = 0

    def seconds(self, passes: int) -> float:
        """Seconds per operation over `passes` passes."""
        start = time.perf_counter()
        for _ in range(passes):
            self.run()
        return (time.perf_counter() - start) / (passes * self.calls)


def ring_length(weight_bytes: int, cold: bool) -> int:
    """How many distinct copies of a weight one pass visits: 256 MiB of them if cold."""
    return COLD_BYTES // weight_bytes + 1 if cold else 1


def alternate(
    runners: Sequence[Runner], rounds: int, seconds_per_turn: float = 0.05
) -> dict[str, float]:
    """Median seconds per operation of each runner, taken in `turns`."""
    found = turns(runners, rounds, seconds_per_turn)
    return {name: statistics.median(values) for name, values in found.items()}


def turns(
    runners: Sequence[Runner], rounds: int, seconds_per_turn: float = 0.05
) -> dict[str, list[float]]:
    """Seconds per operation of each runner in each round; who begins rotates from round to round.

    A turn is at least one pass and about `seconds_per_turn` long, after a pause and a pass that is
    not timed.
    """
    passes = {}
    for runner in runners:
        runner.run()
        once = runner.seconds(1) * runner.calls
        passes[runner.name] = max(1, round(seconds_per_turn / max(once, 1e-9)))
    samples: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for turn in range(rounds):
        for i in range(len(runners)):
            runner = runners[(i + turn) % len(runners)]
            time.sleep(SETTLE_SECONDS)
            runner.run()
            samples[runner.name].append(runner.seconds(passes[runner.name]))
    return samples
