"""Workers that write at the same time: boxes in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alignops.attention.workers import Piece, Step

STYLES = ("cyan", "magenta", "green", "yellow")
_LINES = 8  # of each box
_FINISHED = 3  # steps that are shown


class View:
    """Shows what workers write as they write it.

    In a terminal there is a box for each worker, two in a row, with the end of its unfinished step;
    below stand the last finished steps. Elsewhere finished steps are printed, one line each.

    Args:
        console: where to.
        names: of the workers.

    Example:
        >>> console = Console(width=40, force_terminal=False)
        >>> view = View(console, ["Ada", "Ben"])
        >>> with view:
        ...     view.on_step(Step("Ada", 1, "**Ada [1]:** Two and two", (), 0.1, 5))
        Ada 1  **Ada [1]:** Two and two
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._names = list(names)
        self._texts = dict.fromkeys(names, "")
        self._numbers = dict.fromkeys(names, 1)
        self._steps: list[Step] = []
        self._live: AbstractContextManager[Any] = nullcontext()
        if console.is_terminal:
            self._live = Live(self, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> View:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)
        if self._console.is_terminal:
            self._console.print(self)

    def stream(self, piece: Piece) -> None:
        """New text of a worker."""
        if piece.number != self._numbers[piece.worker]:
            self._numbers[piece.worker] = piece.number
            self._texts[piece.worker] = ""
        self._texts[piece.worker] += piece.text

    def on_step(self, step: Step) -> None:
        """A step is finished."""
        self._steps.append(step)
        if not self._console.is_terminal:
            self._console.print(self._line(step), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        boxes = Table.grid(expand=True)
        columns = min(2, len(self._names))
        for _ in range(columns):
            boxes.add_column(ratio=1)
        panels = [self._box(i, options.max_width // columns - 4) for i in range(len(self._names))]
        for at in range(0, len(panels), columns):
            boxes.add_row(*panels[at : at + columns])
        shown = [self._line(step, options.max_width - 4) for step in self._steps[-_FINISHED:]]
        title = f"finished steps: {len(self._steps)}"
        yield Group(boxes, Panel(Group(*shown), title=title, title_align="left"))

    def _box(self, index: int, width: int) -> Panel:
        name = self._names[index]
        text = Text(self._texts[name].strip())
        lines = text.wrap(self._console, max(1, width))[-_LINES:]
        return Panel(
            Text("\n").join(lines),
            height=_LINES + 2,
            title=f"{name}, step {self._numbers[name]}",
            title_align="left",
            border_style=STYLES[index % len(STYLES)],
        )

    def _line(self, step: Step, width: int | None = None) -> Text:
        index = self._names.index(step.worker)
        line = Text(f"{step.worker} {step.number}  ", STYLES[index % len(STYLES)])
        line.append(" ".join(step.text.split()), "default")
        if width is not None:
            line.truncate(max(1, width), overflow="ellipsis")
        return line
