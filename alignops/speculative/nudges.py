"""Who speaks in a nudged text, and when its nudges end it.

Source: Nudging, arXiv 2410.09300.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Values of `Text.sources`: who spoke.
NUDGE, BASE = 5, 6
#: Pieces of a vocabulary that begin a word begin with one of these.
SPACES = ("Ġ", "▁", " ")
# The same nudge so many times running ends a text.
_REPEATS = 3


def word_starts(tokenizer: Any, vocab_size: int) -> Tensor:
    """Which ids begin a word (V,) bool: their piece begins with the mark of a space.

    Args:
        tokenizer: one of transformers.
        vocab_size: V.
    """
    starts = torch.zeros(vocab_size, dtype=torch.bool)
    for piece, token in tokenizer.get_vocab().items():
        if token < vocab_size:
            starts[token] = piece.startswith(SPACES)
    return starts


@dataclass
class Nudges:
    """The nudges of one text, and whether they are to be the last.

    Example:
        >>> nudges = Nudges(limit=2)
        >>> [nudges.see(word, nudged) for word, nudged in [("a", True), ("b", False), ("c", True)]]
        ['', '', '']
        >>> nudges.see("d", False)
        'nudges'
    """

    limit: int
    count: int = 0
    words: list[Any] = field(default_factory=list)
    last: list[Any] = field(default_factory=list)
    repeats: int = 0

    def see(self, word: Any, nudged: bool) -> str:
        """The next token of the text: "" or why the text ends before it."""
        if nudged:
            self.words.append(word)
            return ""
        if self.words:
            self.count += 1
            self.repeats = self.repeats + 1 if self.words == self.last else 1
            self.last, self.words = self.words, []
            if self.count >= self.limit:
                return "nudges"
            if self.repeats >= _REPEATS:
                return "repeat"
        return ""
