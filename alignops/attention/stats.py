"""What happened in a session: tokens and steps of each worker, who attended to whom, time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignops.speculative.stats import Clock

#: What the time is split into; "move" is all work on views and blocks.
PHASES = ("prefill", "forward", "sample", "move")


@dataclass
class WorkerStats:
    """Counts of one worker.

    Attributes:
        sampled: tokens that it has chosen.
        given: tokens that were put into its text: prefixes, openings, questions, injections.
        steps: finished ones.
        forced: of them those that the limit of their length ended.
        checks: questions whether work is done twice.
    """

    sampled: int = 0
    given: int = 0
    steps: int = 0
    forced: int = 0
    checks: int = 0


class Mass:
    """How much of each worker's attention goes where, on average over the forwards measured.

    Example:
        >>> mass = Mass()
        >>> mass.add("Ada", ["common", "Ben", "Ada"], torch.tensor([0.5, 0.2, 0.3]))
        >>> mass.add("Ada", ["common", "Ben", "Ada"], torch.tensor([0.7, 0.2, 0.1]))
        >>> {source: round(share, 2) for source, share in mass.table()["Ada"].items()}
        {'common': 0.6, 'Ben': 0.2, 'Ada': 0.2}
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, float]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reader: str, sources: list[str], shares: Tensor) -> None:
        """One forward: shares (B,) of the reader's attention; sources may come several times."""
        self._counts[reader] = self._counts.get(reader, 0) + 1
        sums = self._sums.setdefault(reader, {})
        for source, share in zip(sources, shares.tolist(), strict=True):
            sums[source] = sums.get(source, 0.0) + share

    def fork(self) -> Mass:
        """Another one with the same sums."""
        twin = Mass()
        twin._sums = {reader: dict(sums) for reader, sums in self._sums.items()}
        twin._counts = dict(self._counts)
        return twin

    def table(self) -> dict[str, dict[str, float]]:
        """Reader to source to mean share. A worker's own name is its own unfinished text."""
        return {
            reader: {source: total / self._counts[reader] for source, total in dict(sums).items()}
            for reader, sums in dict(self._sums).items()
        }


class HogwildStats:
    """Statistics of a session.

    Attributes:
        workers: counts of each worker by name.
        mass: who attended to whom.
        forwards: of the model, without those for prompts and headers. In lockstep one serves all
            workers.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.workers: dict[str, WorkerStats] = {}
        self.mass = Mass()
        self.forwards = 0
        self._device = device
        self._clocks: list[Clock] = []
        self._thread = threading.local()  # each thread has its own clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time of this phase, see `PHASES`."""
        clock = getattr(self._thread, "clock", None)
        if clock is None:
            clock = self._thread.clock = Clock(self._device, PHASES)
            self._clocks.append(clock)
        with clock.phase(name):
            yield

    @property
    def sampled(self) -> int:
        """Tokens that workers have chosen."""
        return sum(worker.sampled for worker in list(self.workers.values()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, added up over threads."""
        parts = [clock.seconds() for clock in self._clocks]
        return {name: sum(part[name] for part in parts) for name in PHASES}

    def fork(self) -> HogwildStats:
        """Another one with the same counts, whose time begins now."""
        twin = HogwildStats(self._device)
        twin.workers = {name: replace(worker) for name, worker in self.workers.items()}
        twin.mass = self.mass.fork()
        twin.forwards = self.forwards
        return twin

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second that was not spent on prompts and headers; 0 before any."""
        seconds = self.seconds()
        spent = sum(seconds.values()) - seconds["prefill"]
        return self.sampled / spent if spent else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures: numbers, and dicts of numbers."""
        workers: Mapping[str, Any] = {name: asdict(w) for name, w in self.workers.items()}
        return {
            "forwards": self.forwards,
            "sampled": self.sampled,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds(),
            "workers": workers,
            "mass": self.mass.table(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)
