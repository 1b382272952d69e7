"""What the host knows of a sequence in a row of a session, and of one that waits elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alignops.speculative.placement import Parked


@dataclass(frozen=True)
class Round:
    """What a round has committed; rows without a sequence have emitted nothing.

    Attributes:
        tokens: of each of the first n rows, as many as it has emitted.
        accepted: how many of them were drafts.
        offered: how many drafts there were, without those behind the end of the text.
        finished: "eos", "length", "stop", or "" for a row that goes on.
    """

    tokens: list[list[int]]
    accepted: list[int]
    offered: list[int]
    finished: list[str]


@dataclass
class Row:
    """What the host knows of a row.

    Attributes:
        length: committed tokens; 1 for a row without a sequence.
        remaining: tokens that it may still emit.
        active: whether the sequence goes on.
        occupied: whether there is one, also if it has ended.
        tail: its last generated tokens, as many as the longest stop sequence has.
    """

    length: int = 1
    remaining: int = 0
    active: bool = False
    occupied: bool = False
    tail: list[int] = field(default_factory=list)

    def after(self, tokens: list[int], runs: bool, stop: Sequence[list[int]]) -> Row:
        """The row when it has emitted tokens."""
        longest = max(map(len, stop), default=0)
        return Row(
            self.length + len(tokens),
            self.remaining - len(tokens),
            self.active and runs,
            self.occupied,
            (self.tail + tokens)[-longest:] if longest else [],
        )

    def stop_at(self, tokens: list[int], stop: Sequence[list[int]]) -> int | None:
        """How many of the new tokens stay if the text ends with a stop sequence in them."""
        text = self.tail + tokens
        for count in range(len(self.tail) + 1, len(text) + 1):
            for sequence in stop:
                if text[max(0, count - len(sequence)) : count] == sequence:
                    return count - len(self.tail)
        return None


@dataclass(frozen=True)
class ParkedSequence:
    """A sequence that waits outside of the batch."""

    tokens: Tensor
    row: Row
    seed: int
    state: Tensor
    cache: Parked
    draft: Any

    @property
    def aligned(self) -> int:
        """Slot behind the last token where it lay."""
        return self.cache.pad + self.cache.length
