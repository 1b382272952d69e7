"""Where a step of a worker ends: at a blank line behind a finished sentence.

Source: arXiv 2504.06261, section 3.3 (steps); which marks end a sentence is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignops._checks import check
from alignops.attention.tokens import Vocabulary

# Sentence terminals of Unicode in scripts that models write, and the ellipsis. The Greek question
# mark is a semicolon, which ends nothing.
ENDERS = (
    ".?!\u2026\u203c\u2047\u2048\u2049\u203d"
    "\u3002\uff61\uff0e\uff01\uff1f"  # Chinese, Japanese, Korean
    "\u0964\u0965"  # Devanagari and its neighbours
    "\u061f\u061e\u06d4"  # Arabic, Urdu
    "\u0589"  # Armenian
    "\u1362\u1367\u1368"  # Ethiopic
    "\u104a\u104b"  # Burmese
    "\u17d4\u17d5"  # Khmer
    "\u1803\u1809"  # Mongolian
    "\u0f0d\u0f0e"  # Tibetan
)
#: Marks that may stand behind the end of a sentence: quotes, brackets, emphasis.
CLOSERS = "\"'\u201d\u2019\u00bb\u203a)]}\uff09\uff3d\uff5d\u300d\u300f\u3011\u300b\u3009*_"

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


@dataclass(frozen=True)
class StepRule:
    r"""When a step ends.

    Attributes:
        separator: closes a step, if a finished sentence stands before it.
        enders: marks that finish a sentence; comma, colon and semicolon are not among them.
        closers: marks that may stand behind those.
        max_step_tokens: that many sampled tokens end a step whatever they are: the separator takes
            the place of the last one. None: no limit.

    Raises:
        ValueError: the separator is empty, or the limit is below 1.

    Example:
        >>> rule = StepRule()
        >>> rule.ends("So x is 4.\n\n"), rule.ends("There are two cases:\n\n")
        (True, False)
        >>> rule.ends("```python\nprint(1).\n\n")
        False
    """

    separator: str = "\n\n"
    enders: str = ENDERS
    closers: str = CLOSERS
    max_step_tokens: int | None = None

    def __post_init__(self) -> None:
        check(bool(self.separator), "StepRule: separator must not be empty")
        limit = self.max_step_tokens
        check(
            limit is None or limit >= 1,
            f"StepRule: max_step_tokens must be at least 1, got {limit}",
        )

    def ends(self, text: str) -> bool:
        """Whether a step with this text, whose end holds a separator, is finished there."""
        head = text[: text.rfind(self.separator)].rstrip()
        sentence = head.rstrip(self.closers + " \t\n")
        return sentence[-1:] in tuple(self.enders) and not _in_fence(head)


class StepEnds:
    """A rule for one vocabulary.

    Args:
        rule: when a step ends; None: never.
        vocabulary: that tokens are from.

    Attributes:
        separator_ids: tokens of the separator.

    Raises:
        ValueError: the tokenizer has no tokens for the separator.
    """

    def __init__(self, rule: StepRule | None, vocabulary: Vocabulary) -> None:
        self.rule = rule
        self._vocabulary = vocabulary
        separator = StepRule.separator if rule is None else rule.separator
        self.separator_ids = vocabulary.encode(separator)
        spelled = vocabulary.decode(self.separator_ids)
        check(
            separator in spelled,
            f"tokenizer must have tokens for the separator {separator!r}, got "
            f"{self.separator_ids}, which spell {spelled!r}",
        )
        # A token that holds the separator, or that may complete one which others have begun.
        self._holds = frozenset(vocabulary.containing(separator))
        begun = range(1, len(separator))
        parts = {i for k in begun for i in vocabulary.starting(separator[k:])}
        self._completes = frozenset(parts) - self._holds

    def ended(self, tokens: Sequence[int], new: int) -> bool:
        """Whether a step, of which `tokens` are known, ends with one more."""
        if self.rule is None or not (new in self._holds or new in self._completes):
            return False
        text = self._vocabulary.decode([*tokens, new])
        if new in self._completes:
            end = text.rfind(self.rule.separator) + len(self.rule.separator)
            if end <= max(len(self.rule.separator) - 1, len(self._vocabulary.decode(tokens))):
                return False
        return self.rule.ends(text)


def _in_fence(text: str) -> bool:
    """Whether a code fence is open at the end (CommonMark 0.31, section 4.5)."""
    fence = ""
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if match is None:
            continue
        mark, rest = match.groups()
        if not fence:
            fence = mark if mark[0] == "~" or "`" not in rest else ""
        elif mark[0] == fence[0] and len(mark) >= len(fence) and not rest.strip():
            fence = ""
    return bool(fence)
