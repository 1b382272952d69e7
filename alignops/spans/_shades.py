"""What the terminal and the page share: shades, segments, and text that cannot act."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignops.spans.report import TracedCompletion

#: Lower bounds of the shades above the palest, in thresholds.
LEVELS = (0.5, 1.0, 2.0, 3.0, 5.0)

# Characters that would act instead of being seen: controls, also those of writing direction.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)
_VISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def visible(text: str) -> str:
    r"""Text whose control characters are replaced by signs; line feeds and tabs stay.

    Example:
        >>> visible("a\x1b[1m\n")
        'a␛[1m\n'
    """
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def level(score: float, threshold: float) -> int:
    """The shade of a score: how many of `LEVELS`, times the threshold, it exceeds."""
    return sum(score > bound * threshold for bound in LEVELS)


def segments(completion: TracedCompletion) -> list[tuple[int, int, list[int]]]:
    """The completion cut where spans begin and end: (start, end, spans over it) in order.

    The spans are indices into `completion.spans`, the highest score first; prompt and completion
    are never in one segment.
    """
    size = len(completion.pieces)
    cuts = {0, completion.prompt, size}
    cuts |= {c for span in completion.spans for c in (span.start, span.end)}
    bounds = sorted(c for c in cuts if c <= size)
    found = []
    for start, end in pairwise(bounds):
        over = [i for i, s in enumerate(completion.spans) if s.start <= start and end <= s.end]
        found.append((start, end, sorted(over, key=lambda i: -completion.spans[i].score)))
    return found
