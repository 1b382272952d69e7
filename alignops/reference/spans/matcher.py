"""The incremental matcher, which here starts anew at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops.reference.spans.methods import Category, Rule, passing_span, span_score


class MatchState(NamedTuple):
    """The longest suffix of each row that occurs.

    length, and count: M. bci: sum of the surprisals of its tokens that are not covered. risk:
    severity * score if it passes the rule, else 0. flag: risk > tau.
    """

    length: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]  # type: ignore[assignment]
    bci: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]
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
        self.in_prompt = np.zeros(batch, dtype=bool)

    def advance(self, tokens: Any, parent: Any = None) -> None:
        """Row b becomes row parent[b] (itself) and tokens[b]; finished rows stay as they are.

        There are as many rows afterwards as parents.
        """
        parents = list(range(len(self.rows))) if parent is None else [int(p) for p in parent]
        self.active = self.active[parents]
        self.in_prompt = self.in_prompt[parents] & ~self.active
        pairs = zip(parents, tokens, self.active, strict=True)
        self.rows = [[*self.rows[p], int(t)] if on else list(self.rows[p]) for p, t, on in pairs]

    def extend_prompt(self, tokens: Any) -> None:
        """Append tokens (n,) to all rows, or a list of as many prompts to each its own.

        What ends in a prompt is not flagged.
        """
        flat = all(np.ndim(t) == 0 for t in tokens)
        prompts = [tokens] * len(self.rows) if flat else tokens
        pairs = zip(self.rows, prompts, strict=True)
        self.rows = [[*row, *(int(t) for t in prompt)] for row, prompt in pairs]
        self.in_prompt |= [len(prompt) > 0 for prompt in prompts]

    def reset(self, rows: Any = None) -> None:
        """Empty the given rows, or all, and make them active."""
        for r in range(len(self.rows)) if rows is None else rows:
            self.rows[r] = []
            self.active[r], self.in_prompt[r] = True, False

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
        other.active, other.in_prompt = self.active.copy(), self.in_prompt.copy()
        return other

    def state(self) -> MatchState:
        """Of the longest suffixes, (rows,) each."""
        entries = [self._judge(row) for row in self.rows]
        hidden = zip(entries, self.in_prompt, strict=True)
        return _state([(*e[:3], 0.0) if hide else e for e, hide in hidden], self.rule.tau, None)

    def peek(self, cand: Any, exact: bool = False) -> Any:
        """The flags, or with `exact` the states, that candidates (rows, K) would lead to.

        All is 0 in rows that are not active.
        """
        entries = [
            self._judge([*row, int(c)]) if on else (0, 0, 0.0, 0.0)
            for row, cs, on in zip(self.rows, cand, self.active, strict=True)
            for c in cs
        ]
        state = _state(entries, self.rule.tau, np.shape(cand))
        return state if exact else state.flag

    def flagged(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All (row, token) that `peek` would flag, as two arrays, in order."""
        every = np.tile(np.arange(self.index.vocab_size), (len(self.rows), 1))
        rows, tokens = np.nonzero(self.peek(every))
        return rows, tokens

    def _judge(self, row: Sequence[int]) -> tuple[int, int, float, float]:
        length, count = 0, self.index.n_tokens
        while length < min(len(row), self.max_match):
            longer = self.index.count(row[len(row) - length - 1 :])
            if not longer:
                break
            length, count = length + 1, longer
        if not length:
            return 0, count, 0.0, 0.0
        start, category = len(row) - length, Category(self.index, self.rule, self.allow)
        plain = category._replace(rule=replace(self.rule, kind="bci"))
        span = passing_span(row, start, len(row), category, self.max_match)
        risk = 0.0 if span is None else self.rule.severity * span.score
        return length, count, span_score(row, start, len(row), plain), risk


def _state(
    entries: list[tuple[int, int, float, float]], tau: float, shape: tuple[int, ...] | None
) -> MatchState:
    length, count, bci, risk = zip(*entries, strict=True) if entries else ((),) * 4
    size = (len(entries),) if shape is None else shape
    risks = np.array(risk, np.float64).reshape(size)
    return MatchState(
        np.array(length, np.int64).reshape(size),
        np.array(count, np.int64).reshape(size),
        np.array(bci, np.float64).reshape(size),
        risks,
        risks > tau,
    )
