"""What a session knows of a worker, and what it tells of one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from alignops.attention.tokens import Detokenizer

if TYPE_CHECKING:
    from alignops.attention.workspace import Block

#: What becomes of the unfinished step of a worker that leaves: it joins the finished ones, stays
#: visible where it is, or is forgotten.
Keep = Literal["history", "frozen", "drop"]


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        worker: its writer; "" for what the caller injected.
        number: of the writer's step, from 1.
        text: with its prefix, without the separator.
        tokens: as they lie in the cache: what closed the writer's step before, then the step. The
            token that closes it is the first one of the next step.
        seconds: since the session began, when it was finished.
        forwards: of the session until then.
        forced: the limit of its length ended it.
    """

    worker: str
    number: int
    text: str
    tokens: tuple[int, ...]
    seconds: float
    forwards: int
    forced: bool = False


@dataclass(frozen=True)
class Piece:
    """New text of one worker, for streams.

    Attributes:
        worker: who writes.
        number: of the step that it writes.
        text: new characters; those of an incomplete one are held back until it is complete.
        tokens: new ids.
        given: they were put into the worker's text, not chosen by it.
    """

    worker: str
    number: int
    text: str
    tokens: tuple[int, ...]
    given: bool


@dataclass
class Worker:
    """State of a worker.

    Attributes:
        name: its name.
        id: its number in the workspace.
        own: the block that it writes.
        seed: of its random words.
        detokenizer: of its text.
        number: of the step that it writes.
        step: tokens of that step that lie in its block.
        lead: how many of `step` and `pending` come before the step's prefix.
        pending: tokens that are not fed yet.
        tokens: all of its tokens, from its first step on.
        tail: its last characters.
        remarks: tokens that the caller wants it to read next.
        chosen: sampled tokens of the step.
        logits: (V,) of its next token, if it was fed and nothing was sampled yet.
        closing: tokens that have closed the step, which has not been moved yet.
        leaving: it stops, and what becomes of its step.
        active: takes part in forwards.
        visible: its block is.
    """

    name: str
    id: int
    own: Block
    seed: int
    detokenizer: Detokenizer
    number: int = 0
    step: list[int] = field(default_factory=list)
    lead: int = 0
    pending: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    remarks: list[list[int]] = field(default_factory=list)
    tail: str = ""
    chosen: int = 0
    logits: Tensor | None = None
    closing: list[int] | None = None
    leaving: Keep | None = None
    active: bool = True
    visible: bool = True

    @property
    def written(self) -> list[int]:
        """Tokens of the step, without what closed the one before."""
        return [*self.step, *self.pending][self.lead :]

    def fork(self, own: Block) -> Worker:
        """The same worker, with this block and with lists of its own."""
        return replace(
            self,
            own=own,
            detokenizer=self.detokenizer.fork(),
            step=list(self.step),
            pending=list(self.pending),
            tokens=list(self.tokens),
            remarks=list(self.remarks),
        )
