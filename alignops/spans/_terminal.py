"""The trace in a terminal: text with coloured spans, then tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignops.spans._shades import LEVELS, level, segments, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from alignops.spans.report import TracedCompletion, TraceReport

# Background of each shade, for black text, in terminals of any colour.
_SHADES = ("#dbe8f4", "#bcd5ec", "#fdebc8", "#fbd79a", "#f5bb68", "#e89a45")
_FLAGGED, _EXCUSED = "bold #c2620e", "#6d8fb5"
_NAME = 24  # characters of the name of a document
_LINES = 12  # spans that are listed of each completion; the page has all


def render(report: TraceReport) -> Iterator[RenderableType]:
    """Title, legend and each completion."""
    from rich.text import Text

    yield Text(visible(report.title), "bold")
    yield _legend(report.threshold)
    for number, completion in enumerate(report.completions, 1):
        yield Text()
        yield _heading(completion, number)
        if completion.note:
            yield Text(visible(completion.note), "dim")
        yield _text(completion, report.threshold)
        yield Text()
        if completion.refused is not None:
            yield _risk(completion, report.threshold)
        if completion.spans:
            yield _spans(completion, report.threshold)


def _legend(threshold: float) -> Text:
    from rich.text import Text

    legend = Text.assemble(("BCI in nats: ", "dim"))
    names = [f" <= {LEVELS[0] * threshold:g} ", *(f" > {b * threshold:g} " for b in LEVELS)]
    for name, shade in zip(names, _SHADES, strict=True):
        legend.append(name, f"black on {shade}").append(" ")
    return legend.append(" flagged ", f"underline black on {_SHADES[3]}")


def _heading(completion: TracedCompletion, number: int) -> Text:
    from rich.text import Text

    heading = Text.assemble((f"{number}. {visible(completion.title)}  ", "bold"))
    if completion.refused:
        heading.append("▲ refused", _FLAGGED)
    elif completion.refused is not None:
        heading.append("○ passed", _EXCUSED)
    return heading.append(f" ({visible(completion.reason)})" if completion.reason else "")


def _text(completion: TracedCompletion, threshold: float) -> Text:
    from rich.text import Text

    text = Text()
    for start, end, over in segments(completion):
        style = "dim" if start < completion.prompt else ""
        if over:
            states = {completion.spans[i].state for i in over}
            shade = _SHADES[level(completion.spans[over[0]].score, threshold)]
            style = f"{'underline ' if 'flagged' in states else ''}black on {shade}"
        text.append(visible("".join(completion.pieces[start:end])), style)
    return text


def _risk(completion: TracedCompletion, threshold: float) -> Text:
    from rich.text import Text

    line = Text.assemble(("risk  ", "dim"))
    for category, value in completion.risk.items():
        style = _FLAGGED if value > threshold else ""
        line.append(f"{visible(category)} ").append(f"{value:.1f}   ", style)
    return line.append(f"threshold {threshold:g}", "dim")


def _spans(completion: TracedCompletion, threshold: float) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, expand=True)
    table.add_column("span", no_wrap=True, ratio=3, overflow="ellipsis")
    for name in ("tokens", "count", "BCI", "lift"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, max_width=24, overflow="ellipsis")
    table.add_column("first document", no_wrap=True, ratio=2, overflow="ellipsis")
    order = sorted(range(len(completion.spans)), key=lambda i: -completion.spans[i].score)
    for i in sorted(order[:_LINES]):
        span = completion.spans[i]
        words = " ".join("".join(completion.pieces[span.start : span.end]).split())
        style = {"flagged": _FLAGGED, "excused": _EXCUSED}.get(span.state, "dim")
        table.add_row(
            Text(visible(words)),
            str(span.end - span.start),
            f"{span.count:,}",
            Text(f"{span.bci:.1f}", f"black on {_SHADES[level(span.score, threshold)]}"),
            f"{span.lift:+.1f}",
            Text(f"{span.state} {visible(span.category)}", style),
            Text(_shortened(span.sources[0].name) if span.sources else "", "dim"),
        )
    hidden = max(len(order) - _LINES, 0) + completion.omitted
    if hidden:
        table.caption = f"{hidden} more of smaller BCI"
    return table


def _shortened(name: str) -> str:
    """The end of a name, which for a path says most."""
    name = visible(name)
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
