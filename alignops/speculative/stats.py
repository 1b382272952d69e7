"""What happened during speculative generation, and where the time went.

The loop records tensors of each round as they are; nothing is read from a device until a figure is
asked for.

Shape letters: B rows of a round, K drafts.

Source: arXiv 2510.22876 section 5 (grouping rate, split of the time).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from alignops._checks import check

#: What the time of a job is split into; the rest of it is "other". `host` waits for the device.
PHASES = ("draft", "target", "verify", "compact", "schedule", "host")
_OVERHEAD = ("verify", "compact", "schedule", "host")


class Clock:
    """Splits time into phases; a phase inside another one interrupts it.

    On a GPU the marks are CUDA events, which are read when a figure is asked for.

    Args:
        device: whose time is measured.
        phases: their names.

    Example:
        >>> clock = Clock()
        >>> with clock.job():
        ...     with clock.phase("target"):
        ...         _ = sum(range(1000))
        >>> 0 < clock.seconds()["target"] <= clock.total()
        True
    """

    def __init__(self, device: torch.device | str = "cpu", phases: Sequence[str] = PHASES) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._seconds = dict.fromkeys((*phases, "other"), 0.0)
        self._stack: list[str] = []
        self._mark: Any = None

    @contextmanager
    def job(self) -> Iterator[None]:
        """The time that is split: all that is inside and in no phase is "other"."""
        with self._inside("other"):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time of this phase.

        Raises:
            ValueError: the name is unknown.
        """
        check(
            name in self._seconds,
            f"phase: name must be one of {', '.join(self._seconds)}, got {name!r}",
        )
        with self._inside(name):
            yield

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        """Give the time since the last mark to the phase on top."""
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        if self._stack and not self._cuda:
            self._seconds[self._stack[-1]] += mark - self._mark
        elif self._stack:
            self._spans.append((self._stack[-1], self._mark, mark))
        self._mark = mark

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and of "other"."""
        if self._spans:
            torch.cuda.synchronize()
        for name, begin, end in self._spans:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._spans.clear()
        return dict(self._seconds)

    def total(self) -> float:
        """Seconds of the job."""
        return sum(self.seconds().values())


class SpecStats:
    """Statistics of a job of speculative generation.

    The loop calls `record_round` once per round, `record_move` when it moves keys and values, and
    works inside `clock.job()` and `clock.phase(name)`. Rows that are not active are not counted.

    Attributes:
        clock: splits the time.
        rounds: rounds so far.
        fallbacks: rounds whose rows had to be brought to one length first.
        grouped: rounds of rows that had one length already.
        bytes_moved: read and written by moves of keys and values, appended ones included.
        bytes_floor: of them what the layout cannot do without.
        prompts, finished: sequences that began, that ended.

    Args:
        device: where the loop runs.

    Example:
        >>> stats = SpecStats()
        >>> stats.record_round(
        ...     offered=torch.tensor([4, 4]),
        ...     accept_len=torch.tensor([4, 1]),
        ...     num_emitted=torch.tensor([5, 2]),
        ...     finished=torch.tensor([0, 0]),
        ...     active=torch.tensor([True, True]),
        ...     slots=2,
        ... )
        >>> stats.acceptance, stats.tokens_per_round, stats.acceptance_by_position
        (0.625, 3.5, [1.0, 0.5, 1.0, 1.0])
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.clock = Clock(device)
        self.rounds = 0
        self.fallbacks = 0
        self.grouped = 0
        self.bytes_moved = 0
        self.bytes_floor = 0
        self.prompts = 0
        self.finished = 0
        self._slots = 0
        self._pending: list[Tensor] = []
        self._row_rounds = 0
        self._tokens = 0
        self._offered = 0
        self._accepted = 0
        self._zero_q = 0
        # Drafts of each position that were tested, and that were accepted.
        self._tested_at: list[int] = []
        self._accepted_at: list[int] = []

    def record_round(
        self,
        *,
        offered: Tensor,
        accept_len: Tensor,
        num_emitted: Tensor,
        finished: Tensor,
        active: Tensor,
        slots: int,
        zero_q: Tensor | None = None,
        grouping: Literal["grouped", "fallback"] | None = None,
    ) -> None:
        """One round, without reading from the device. The tensors are copied.

        Args:
            offered: (B,) integers, drafts of each row, k_b.
            accept_len: (B,), drafts that were emitted, as `verify` returned it.
            num_emitted: (B,), tokens that were.
            finished: (B,), not 0: the row ended.
            active: (B,) bool, rows that took part.
            slots: rows that the round had room for; at least the active ones.
            zero_q: (B,), drafts of probability 0.
            grouping: whether the rows had one length; None: the layout does not ask for it.
        """
        zeros = torch.zeros_like(accept_len) if zero_q is None else zero_q
        columns = (offered, accept_len, num_emitted, finished, active, zeros)
        self._pending.append(torch.stack([c.to(torch.int32) for c in columns]))
        self.rounds += 1
        self._slots += slots
        self.grouped += grouping == "grouped"
        self.fallbacks += grouping == "fallback"

    def record_move(self, moved: int, floor: int) -> None:
        """Bytes that a move of keys and values read and wrote, and how many it could not avoid."""
        self.bytes_moved += moved
        self.bytes_floor += floor

    def _fold(self) -> None:
        if not self._pending:
            return
        columns = torch.cat(self._pending, dim=1).cpu()
        self._pending.clear()
        offered, accepted, emitted, finished, _, zeros = columns[:, columns[4] != 0].long()
        # Drafts behind the end of the text or behind the limit were never tested.
        offered = torch.where(finished != 0, torch.minimum(offered, emitted), offered)
        self._row_rounds += offered.numel()
        self._tokens += int(emitted.sum())
        self._offered += int(offered.sum())
        self._accepted += int(accepted.sum())
        self._zero_q += int(zeros.sum())
        tested = torch.minimum(offered, accepted + 1)
        for i in range(int(tested.max()) if tested.numel() else 0):
            if i == len(self._tested_at):
                self._tested_at.append(0)
                self._accepted_at.append(0)
            self._tested_at[i] += int((tested > i).sum())
            self._accepted_at[i] += int((accepted > i).sum())

    @property
    def tokens(self) -> int:
        """Tokens that were emitted."""
        self._fold()
        return self._tokens

    @property
    def offered(self) -> int:
        """Drafts, without those that the end of the text or the limit cut off."""
        self._fold()
        return self._offered

    @property
    def accepted(self) -> int:
        """Drafts that were emitted."""
        self._fold()
        return self._accepted

    @property
    def acceptance(self) -> float:
        """The quotient accepted / offered; 0 if nothing was offered."""
        return _ratio(self.accepted, self.offered)

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each position: the share of accepted drafts among those whose predecessors were."""
        self._fold()
        pairs = zip(self._accepted_at, self._tested_at, strict=True)
        return [_ratio(accepted, tested) for accepted, tested in pairs]

    @property
    def tokens_per_round(self) -> float:
        """Tokens that an active row emitted per round, on average."""
        return _ratio(self.tokens, self._row_rounds)

    @property
    def slot_fill(self) -> float:
        """Active rows / slots, over all rounds."""
        self._fold()
        return _ratio(self._row_rounds, self._slots)

    @property
    def grouping_rate(self) -> float:
        """Grouped rounds / (grouped + fallback rounds); 0 for layouts without groups."""
        return _ratio(self.grouped, self.grouped + self.fallbacks)

    @property
    def zero_q(self) -> int:
        """Drafts that their own distribution called impossible: a fault of the drafter."""
        self._fold()
        return self._zero_q

    @property
    def overhead(self) -> float:
        """Share of the time for verify, compact, schedule and host."""
        seconds = self.clock.seconds()
        return _ratio(sum(seconds[name] for name in _OVERHEAD), sum(seconds.values()))

    @property
    def tokens_per_second(self) -> float:
        """Tokens / seconds of the job."""
        return _ratio(self.tokens, self.clock.total())

    def to_dict(self) -> dict[str, Any]:
        """All figures: numbers, and lists and dicts of numbers."""
        names = [
            *("rounds", "tokens", "prompts", "finished", "offered", "accepted", "acceptance"),
            *("acceptance_by_position", "tokens_per_round", "slot_fill", "grouped", "fallbacks"),
            *("grouping_rate", "bytes_moved", "bytes_floor", "zero_q", "overhead"),
            "tokens_per_second",
        ]
        seconds = self.clock.seconds()
        figures: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**figures, "seconds": seconds, "total_seconds": sum(seconds.values())}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> list[tuple[str, str]]:
        """Names and values, formatted for reading."""
        by_position = " ".join(f"{share:.2f}" for share in self.acceptance_by_position)
        rows = [
            ("tokens", f"{self.tokens} in {self.rounds} rounds"),
            ("tokens per row and round", f"{self.tokens_per_round:.2f}"),
            ("acceptance", f"{self.acceptance:.1%} ({self.accepted} of {self.offered})"),
            ("acceptance by position", by_position or "-"),
            ("slot fill", f"{self.slot_fill:.1%}"),
            ("keys and values moved", f"{self.bytes_moved} B (floor {self.bytes_floor} B)"),
        ]
        if self.grouped + self.fallbacks:
            rows.append(("grouping rate", f"{self.grouping_rate:.1%} ({self.fallbacks} fallbacks)"))
        if self.zero_q:
            rows.append(("drafts of probability 0", str(self.zero_q)))
        seconds = self.clock.seconds()
        total = sum(seconds.values())
        if total:
            rows.append(("time", f"{total:.3f} s, {self.tokens / total:.1f} tokens/s"))
            split = [f"{name} {part / total:.1%}" for name, part in seconds.items()]
            rows += [("split", ", ".join(split)), ("overhead", f"{self.overhead:.1%}")]
        return rows

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def __rich__(self) -> Any:
        """What `rich.print` shows."""
        from rich.table import Table

        table = Table(title="speculative generation", show_header=False)
        for row in self.table():
            table.add_row(*row)
        return table


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
