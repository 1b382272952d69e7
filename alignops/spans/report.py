"""What a trace found, as plain data, and how it is shown: in a terminal, or as a page.

Nothing of tensors, indexes or tokenizers is left in it. `alignops.spans.trace` gathers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignops._files import replacing
from alignops.spans import _html, _terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["IndexIdentity", "Source", "TraceReport", "TracedCompletion", "TracedSpan"]


@dataclass(frozen=True)
class Source:
    """One place where a span occurs: a document, and the text around the place."""

    document: int
    offset: int  # token of the document at which the span begins
    meta: dict[str, Any]
    before: str
    match: str
    after: str
    byte_offset: int | None = None  # the same in bytes of the text, if the index knows

    @property
    def name(self) -> str:
        """The file that the document was read from, with its line or row, or its number."""
        source = self.meta.get("source")
        if not source:
            return f"document {self.document}"
        for key in ("line", "row"):
            if key in self.meta:
                return f"{source}, {key} {self.meta[key]}"
        return str(source)


@dataclass(frozen=True)
class TracedSpan:
    """A maximal span of a completion that an index contains word for word."""

    start: int  # tokens of prompt and completion: [start, end)
    end: int
    count: int  # occurrences in the index
    bci: float  # nats
    lift: float  # ln(occurrences / occurrences expected by chance)
    score: float  # what is compared with the threshold: severity x BCI, or another kind
    category: str
    state: str  # "flagged" by the filter, "excused" above its threshold, "below" it, or "found"
    sources: list[Source] = field(default_factory=list)


@dataclass(frozen=True)
class TracedCompletion:
    """A completion, what it shares with the indexes, and what the filter says."""

    title: str
    pieces: list[str]  # text of each token, of the prompt and then of the completion
    prompt: int  # how many of them are the prompt's
    spans: list[TracedSpan]  # by start, then category
    risk: dict[str, float]  # by category
    refused: bool | None  # None: nothing was judged
    reason: str = ""
    omitted: int = 0  # spans of smaller BCI that are not listed
    note: str = ""

    @property
    def text(self) -> str:
        """The completion without its prompt."""
        return "".join(self.pieces[self.prompt :])


@dataclass(frozen=True)
class IndexIdentity:
    """Which index was searched."""

    role: str  # a category, or "allow"
    path: str
    uuid: str
    tokens: int
    documents: int
    shards: int
    vocab_size: int
    fingerprint: str | None
    severity: float = 1.0


@dataclass(frozen=True)
class TraceReport:
    """Traced completions and everything that the result depends on.

    `rich` prints it in colour: `rich.print(report)`.
    """

    title: str
    completions: list[TracedCompletion]
    threshold: float
    parameters: dict[str, Any]  # of the filter and of the trace
    indexes: list[IndexIdentity]
    created: str  # date and time
    note: str = ""

    def html(self) -> str:
        """One page that needs nothing else: no scripts, no network."""
        return _html.render(self)

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all; an existing file is replaced."""
        text = self.html()
        with replacing(path) as file:
            file.write(text.encode())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[RenderableType]:
        return _terminal.render(self)
