"""Which sequences take part in a round.

Source: arXiv 2510.22876: `static` is EQSPEC, `exspec` is EXSPEC with a limit to how long a sequence
may wait, and with groups that may be smaller than the batch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

from alignops._checks import check
from alignops.speculative.pool import Job, Pool

#: Sequences that take part in the choice of `exspec`.
WINDOW = 32


class Scheduler(Protocol):
    """Decides who is in a row."""

    def arrange(self, pool: Pool) -> None:
        """Called before every round: park, start and move jobs; one at least must run."""
        ...


class Static:
    """A batch runs until all its sequences have ended; then the next one begins."""

    def arrange(self, pool: Pool) -> None:
        """Start the next batch if none runs."""
        if not pool.running:
            pool.start(pool.waiting[: pool.session.rows])


class Refill:
    """A row that becomes free is given to the next sequence that waits."""

    def arrange(self, pool: Pool) -> None:
        """Fill free rows; when none waits any more, close the gaps."""
        free = pool.session.free
        if not free:
            return
        waiting = pool.waiting
        if waiting:
            pool.start(waiting[: len(free)])
        elif not pool.session.stable:
            pool.pack()


class Exspec:
    """Each round takes sequences of a window whose rows end at the same slot, if there are enough.

    Args:
        window: sequences to choose from, at least one batch.
        max_age: a sequence that has waited for so many rounds is in the next one.
        min_fill: share of a batch that a group must have; else rows are brought to one length.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, window: int = WINDOW, max_age: int = 8, min_fill: float = 0.75) -> None:
        check(window >= 1, f"Exspec: window must be at least 1, got {window}")
        check(max_age >= 1, f"Exspec: max_age must be at least 1, got {max_age}")
        check(0 < min_fill <= 1, f"Exspec: min_fill must be in (0, 1], got {min_fill}")
        self.window = window
        self.max_age = max_age
        self.min_fill = min_fill

    def arrange(self, pool: Pool) -> None:
        """Choose the batch, park who is not in it, and start who is."""
        window = pool.unfinished[: self.window]
        chosen = self.choose(window, pool)
        serving = {id(job) for job in chosen}
        for job in window:
            job.age = 0 if id(job) in serving else job.age + 1
        for job in pool.running:
            if id(job) not in serving:
                pool.park(job)
        pool.start([job for job in chosen if job.row is None])
        if not pool.session.stable:
            pool.pack()

    def choose(self, window: list[Job], pool: Pool) -> list[Job]:
        """The next batch: a group, or the first ones; those that have waited too long first."""
        rows = pool.session.rows
        if len(window) <= rows:
            return window
        overdue = [job for job in window if job.age >= self.max_age]
        if overdue:
            overdue = sorted(overdue, key=lambda job: -job.age)[:rows]
            target = pool.aligned(overdue[0])
            rest = [job for job in window if all(job is not other for other in overdue)]
            rest.sort(key=lambda job: (abs(pool.aligned(job) - target), not job.started))
            return [*overdue, *rest[: rows - len(overdue)]]
        groups: dict[tuple[int, bool], list[Job]] = defaultdict(list)
        for job in window:
            group = groups[pool.aligned(job), job.started]
            group.append(job)
            if len(group) == rows:
                return group
        largest = max(groups.values(), key=len)
        return largest if len(largest) >= self.min_fill * rows else window[:rows]
