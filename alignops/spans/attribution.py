"""From attributed spans to documents."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from alignops.spans.arrays import Floats, Ints
from alignops.spans.results import Attribution


def belief_conflict(start: Ints, end: Ints, occurrences: Ints, n_tokens: int) -> Floats:
    """-sum ln P of the spans [start, end) of a text, P = occurrences / n_tokens of each token.

    Every token of a span occurs; what the others count does not matter.
    """
    surprisal = math.log(max(n_tokens, 1)) - np.log(np.maximum(occurrences, 1))
    scores = [surprisal[a:b].sum() for a, b in zip(start, end, strict=True)]
    return np.array(scores, dtype=np.float64)


def top_docs(attributions: Iterable[Attribution], k: int) -> list[tuple[int, float, int]]:
    """The k documents that hold most of the attributed spans.

    Returns:
        (document, summed BCI of its spans, number of its spans), best first; ties: more spans, then
        the smaller document.

    Example:
        >>> from alignops.testing import span_index
        >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
        >>> [document for document, _, _ in index.top_docs(index.attribute([2, 1]), 5)]
        [0, 1]
    """
    total: dict[int, tuple[float, int]] = {}
    for span in attributions:
        for d in span.documents:
            score, spans = total.get(d, (0.0, 0))
            total[d] = score + span.score, spans + 1
    ranked = sorted(total.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
    return [(d, score, spans) for d, (score, spans) in ranked[:k]]
