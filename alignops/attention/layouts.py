"""Layouts: which blocks of the cache a worker sees, in which order, and where its steps go.

| layout | view of worker w (others in ascending order) | a finished step |
|---|---|---|
| contiguous | common, {own(u), pivot}..., own(w) | stays |
| interleaved | common, own(w) | moves to the end of common |
| combined | common, step_header, own(u), {pivot, own(u)}..., own_header, own(w) | as interleaved |

With nobody else at work the headers of the others are left out.

Source: arXiv 2504.06261, section 3.2; pivots between the others of three and more workers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignops.attention.errors import LayoutError

if TYPE_CHECKING:
    from alignops.attention.prompts import Texts
    from alignops.attention.workspace import Block


@dataclass(frozen=True)
class Cells:
    """The blocks that a layout puts in order.

    Attributes:
        common: the prompt, then what has been moved there.
        own: the block of each worker that others may see, by index in ascending order.
        extra: blocks that the layout has asked for, by name.
    """

    common: Block
    own: Mapping[int, Block]
    extra: Mapping[str, Block]

    def others(self, worker: int) -> list[Block]:
        """Blocks of all other workers, in ascending order."""
        return [block for index, block in self.own.items() if index != worker]


class Layout:
    """What a layout of your own overrides; the defaults are those of "interleaved".

    Workers are known by their index in the session. All methods are called again whenever a worker
    comes or goes, and must depend on their arguments only.

    Example:
        >>> class Pairs(Layout):
        ...     '''Workers 0 and 1 see each other, so do 2 and 3; nobody sees other pairs.'''
        ...
        ...     def view(self, worker, cells):
        ...         partner = cells.own.get(worker ^ 1)
        ...         return [cells.common, *([partner] if partner else []), cells.own[worker]]
        ...
        ...     def history(self, worker, cells):
        ...         return None
    """

    def blocks(self, names: Sequence[str], texts: Texts) -> Mapping[str, str]:
        """Blocks besides the common and the workers' own ones: name to text, which may be empty.

        Each text is encoded once; blocks of equal text share their keys and values.

        Args:
            names: of the workers that have a block, in order of their index.
            texts: of the session.
        """
        return {}

    def title(self, name: str, texts: Texts) -> str:
        """What a worker's own block begins with, once."""
        return ""

    def view(self, worker: int, cells: Cells) -> Sequence[Block]:
        """Blocks that a worker reads, in order, without repetition; the last is its own."""
        return [cells.common, cells.own[worker]]

    def history(self, worker: int, cells: Cells) -> Block | None:
        """Where finished steps of a worker go; None: they stay in its own block."""
        return cells.common


class Interleaved(Layout):
    """Workers see each other's finished steps only."""


class Contiguous(Layout):
    """Each worker's text stays together, and the others see it token by token."""

    def blocks(self, names: Sequence[str], texts: Texts) -> Mapping[str, str]:
        """A pivot behind each other worker."""
        return {_pivot(i): texts.pivot for i in range(len(names) - 1)}

    def title(self, name: str, texts: Texts) -> str:
        """The worker's name."""
        return texts.filled(texts.worker_title, name=name)

    def view(self, worker: int, cells: Cells) -> Sequence[Block]:
        """See the table above."""
        view = [cells.common]
        for i, other in enumerate(cells.others(worker)):
            view += [other, cells.extra[_pivot(i)]]
        return [*view, cells.own[worker]]

    def history(self, worker: int, cells: Cells) -> Block | None:
        """Nothing moves."""
        return None


class Combined(Layout):
    """Finished steps in one history, unfinished ones token by token. The default."""

    def blocks(self, names: Sequence[str], texts: Texts) -> Mapping[str, str]:
        """The headers, and pivots between the others."""
        if len(names) < 2:
            return {}
        pivots = {_pivot(i): texts.pivot for i in range(len(names) - 2)}
        own_header = texts.pivot + texts.own_header
        return {"step_header": texts.step_header, **pivots, "own_header": own_header}

    def view(self, worker: int, cells: Cells) -> Sequence[Block]:
        """See the table above."""
        others = cells.others(worker)
        if not others:
            return [cells.common, cells.own[worker]]
        view = [cells.common, cells.extra["step_header"], others[0]]
        for i, other in enumerate(others[1:]):
            view += [cells.extra[_pivot(i)], other]
        return [*view, cells.extra["own_header"], cells.own[worker]]


class _Function(Layout):
    """A function (worker, cells) -> blocks as a layout."""

    def __init__(self, function: Callable[[int, Cells], Sequence[Block]]) -> None:
        self._function = function

    def view(self, worker: int, cells: Cells) -> Sequence[Block]:
        return self._function(worker, cells)


LAYOUTS: dict[str, type[Layout]] = {
    "contiguous": Contiguous,
    "interleaved": Interleaved,
    "combined": Combined,
}


def as_layout(layout: str | Layout | Callable[[int, Cells], Sequence[Block]]) -> Layout:
    """A layout by its name, a layout, or a function (worker, cells) -> blocks.

    Raises:
        LayoutError: the name is unknown.
        TypeError: it is something else.

    Example:
        >>> type(as_layout("combined")).__name__
        'Combined'
    """
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise LayoutError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        return LAYOUTS[layout]()
    if callable(layout):
        return _Function(layout)
    raise TypeError(
        "layout must be a name, a Layout or a function (worker, cells) -> blocks, got "
        f"{type(layout).__name__}"
    )


def _pivot(number: int) -> str:
    return f"pivot {number + 1}"
