"""The incremental matcher, which here starts anew at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops.reference.spans.methods import Category, Rule, passing_span, span_score


class MatchState(NamedTuple):
    """Longest suffix of each row that occurs: length, M, score, and whether it is flagged."""

    length: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]  # type: ignore[assignment]
    bci: npt.NDArray[np.float64]
    flag: npt.NDArray[np.bool_]


class NaiveMatcher:
    """Rows of tokens and, for each, its longest suffix that occurs in the index.

    Args:
        index: of unsafe text.
        allow: index of harmless text, or None.
        batch: rows.
        max_match: longer suffixes are not looked at.
        rule: what flags a suffix; severity * score > tau.
    """

    def __init__(
        self,
        index: Any,
        allow: Any = None,
        *,
        batch: int = 1,
        max_match: int = 4096,
        rule: Any = None,
    ) -> None:
        self.index, self.allow = index, allow
        self.rule = Rule() if rule is None else rule
        self.max_match = max_match
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.active = np.ones(batch, dtype=bool)

    def advance(self, tokens: Any, parent: Any = None) -> None:
        """Row b becomes row parent[b] (itself) and tokens[b]; finished rows stay as they are."""
        rows = self.rows if parent is None else [self.rows[p] for p in parent]
        pairs = zip(rows, tokens, self.active, strict=True)
        self.rows = [[*row, int(t)] if on else list(row) for row, t, on in pairs]

    def extend_prompt(self, tokens: Any) -> None:
        """Append the same tokens to all rows."""
        self.rows = [[*row, *(int(t) for t in tokens)] for row in self.rows]

    def reset(self, rows: Any = None) -> None:
        """Empty the given rows, or all."""
        for r in range(len(self.rows)) if rows is None else rows:
            self.rows[r] = []

    def copy(self) -> NaiveMatcher:
        """An independent matcher in the same state."""
        other = NaiveMatcher(
            self.index,
            self.allow,
            batch=len(self.rows),
            max_match=self.max_match,
            rule=self.rule,
        )
        other.rows = [list(row) for row in self.rows]
        other.active = self.active.copy()
        return other

    def state(self) -> MatchState:
        """Of the longest suffixes, (rows,) each."""
        return _state([self._judge(row) for row in self.rows], (len(self.rows),))

    def peek(self, cand: Any, exact: bool = False) -> Any:
        """The flags, or with `exact` all, that candidates (rows, K) would have as next tokens."""
        table = [
            [self._judge([*row, int(c)]) for c in cs]
            for row, cs in zip(self.rows, cand, strict=True)
        ]
        state = _state([entry for line in table for entry in line], np.shape(cand))
        return state if exact else state.flag

    def _judge(self, row: Sequence[int]) -> tuple[int, int, float, bool]:
        length, count = 0, self.index.n_tokens
        while length < min(len(row), self.max_match):
            longer = self.index.count(row[len(row) - length - 1 :])
            if not longer:
                break
            length, count = length + 1, longer
        if not length:
            return 0, count, 0.0, False
        start, category = len(row) - length, Category(self.index, self.rule, self.allow)
        score = span_score(row, start, len(row), category)
        passes = passing_span(row, start, len(row), category, self.max_match) is not None
        return length, count, score, passes and self.rule.severity * score > self.rule.tau


def _state(entries: list[tuple[int, int, float, bool]], shape: tuple[int, ...]) -> MatchState:
    length, count, score, flag = zip(*entries, strict=True) if entries else ((), (), (), ())
    return MatchState(
        np.array(length, np.int64).reshape(shape),
        np.array(count, np.int64).reshape(shape),
        np.array(score, np.float64).reshape(shape),
        np.array(flag, np.bool_).reshape(shape),
    )
