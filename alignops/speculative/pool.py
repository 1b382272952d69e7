"""The sequences of a job: they wait, run in a row of the session, are parked, or have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alignops.speculative.rows import ParkedSequence, Round
from alignops.speculative.session import SpecSession


@dataclass
class Job:
    """One sequence.

    Attributes:
        index: its place in the input.
        prompt: (c,).
        limit: most new tokens.
        seed: of its random words.
        row: of the session; None: it waits, is parked, or has ended.
        parked: what `SpecSession.park` returned.
        tokens: prompt and generated tokens, when it has ended.
        reason: why it has ended: "eos", "length" or "stop"; "" before.
        age: rounds since it took part in one.
    """

    index: int
    prompt: Tensor
    limit: int
    seed: int
    row: int | None = None
    parked: ParkedSequence | None = None
    tokens: Tensor | None = None
    reason: str = ""
    age: int = 0

    @property
    def started(self) -> bool:
        """Whether it has keys and values."""
        return self.row is not None or self.parked is not None


class Pool:
    """Sequences and the session that they run in.

    Args:
        session: without sequences.
        jobs: in the order in which they are to begin.

    Attributes:
        unfinished: jobs that have not ended, in that order.
    """

    def __init__(self, session: SpecSession, jobs: Sequence[Job]) -> None:
        self.session = session
        self.jobs = list(jobs)
        self.unfinished = list(jobs)

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not begun."""
        return [job for job in self.unfinished if not job.started]

    @property
    def running(self) -> list[Job]:
        """Jobs that have a row."""
        return [job for job in self.unfinished if job.row is not None]

    def aligned(self, job: Job) -> int:
        """Slot behind the last token: jobs that share it form a rectangle."""
        if job.row is not None:
            return self.session.aligned(job.row)
        return len(job.prompt) if job.parked is None else job.parked.aligned

    def start(self, jobs: Sequence[Job]) -> None:
        """Put jobs into free rows: parked ones go on, new ones are prefilled together."""
        for job in jobs:
            if job.parked is not None:
                job.row = self.session.free[0]
                self.session.resume(job.row, job.parked)
                job.parked = None
        new = [job for job in jobs if job.row is None]
        if new:
            rows = self.session.prefill(
                [job.prompt for job in new], [job.limit for job in new], [job.seed for job in new]
            )
            for job, row in zip(new, rows, strict=True):
                job.row = row

    def park(self, job: Job) -> None:
        """Take a job out of its row."""
        assert job.row is not None
        job.parked, job.row = self.session.park(job.row), None

    def pack(self) -> None:
        """Move jobs to lower rows, so that a round has no rows without a job."""
        for job in sorted(self.running, key=lambda job: -(job.row or 0)):
            free = self.session.free
            if not free or job.row is None or free[0] > job.row:
                return
            self.session.move(job.row, free[0])
            job.row = free[0]

    def after(self, done: Round) -> list[tuple[Job, list[int]]]:
        """Take note of a round: jobs that took part, and what they have emitted."""
        served = []
        for job in self.running:
            row = job.row
            assert row is not None
            job.reason = done.finished[row]
            served.append((job, done.tokens[row]))
            if job.reason:
                job.tokens = self.session.tokens_of(row)
                self.session.remove(row)
                job.row = None
        if any(job.reason for job, _ in served):
            self.unfinished = [job for job in self.unfinished if not job.reason]
        return served
