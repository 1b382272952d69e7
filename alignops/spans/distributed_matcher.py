"""The incremental matcher over the parts that several backends hold.

Shape letters as in `matcher`: B rows, K candidates per row.
"""

from __future__ import annotations

import copy
import math
import uuid as uuids
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from alignops.spans import scores
from alignops.spans.arrays import Ints, as_ids
from alignops.spans.backends import (
    Bools,
    MatcherLostError,
    MatcherSpec,
    RowText,
    ShardBackend,
    merge_pairs,
    merge_states,
)
from alignops.spans.index import SpanIndex
from alignops.spans.matcher import MatchRule, MatchState, Peek

if TYPE_CHECKING:
    from alignops.spans.distributed import DistributedIndex

__all__ = ["DistributedMatcher"]

T = TypeVar("T")


class DistributedMatcher:
    """`SpanMatcher` over all parts; `DistributedIndex.matcher` makes it.

    Every backend follows the text against its parts, and one exchange per call puts them together.
    The text itself is kept here: a backend that has lost it, or a replica that never had it, is
    given it again. One thread owns a matcher.

    Raises:
        ShardUnavailableError: a part does not answer. The call changed nothing and can be repeated.
    """

    def __init__(
        self,
        index: DistributedIndex,
        allow: SpanIndex | None,
        batch: int,
        max_match: int,
        rule: MatchRule,
    ) -> None:
        if rule.surprisal is None:
            table = scores.surprisal_table(index.unigram, scores.FLOOR, "DistributedMatcher")
            rule = replace(rule, surprisal=table)
        if rule.kind == "norm":  # the N of all parts
            scale = math.log(max(index.n_tokens, 2))
            rule = replace(rule, kind="bci", severity=rule.severity / scale)
        self._index = index
        self._spec = MatcherSpec(max_match, rule, allow)
        self._name = uuids.uuid4().hex
        self._step = 0
        self._rows = [RowText([], False) for _ in range(batch)]
        self._active = np.ones(batch, dtype=bool)
        self._state: MatchState | None = None

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return len(self._rows)

    @property
    def active(self) -> Bools:
        """See `SpanMatcher.active`."""
        mask: Bools = self._active.view()
        mask.flags.writeable = False
        return mask

    @active.setter
    def active(self, mask: Any) -> None:
        mask = np.array(mask, dtype=np.bool_)
        if mask.shape != self._active.shape:
            raise ValueError(
                f"DistributedMatcher: active must have shape {self._active.shape}, got {mask.shape}"
            )
        self._active = mask
        self._changed()

    def _changed(self) -> None:
        """What the backends have is of the past."""
        self._step += 2  # one step further is where a call that failed may have brought some
        self._state = None

    def _ask(self, call: Callable[[ShardBackend], T]) -> list[T]:
        def ask(_: int, backend: ShardBackend) -> T:
            try:
                return call(backend)
            except MatcherLostError:
                self._restore(backend)
                return call(backend)

        return list(self._index._scatter(ask).values())

    def _restore(self, backend: ShardBackend) -> MatchState:
        return backend.restore(self._name, self._step, self._spec, self._rows, self._active)

    def _merged(self, states: list[MatchState]) -> MatchState:
        return merge_states(states, self._spec.rule.max_count)

    def advance(self, tokens: Any, parent: Any = None) -> None:
        """See `SpanMatcher.advance`."""
        op = "DistributedMatcher.advance"
        ids = as_ids(tokens, op, "tokens")
        parents = None if parent is None else as_ids(parent, op, "parent")
        try:
            states = self._ask(
                lambda backend: backend.advance(self._name, self._step, ids, parents, self._active)
            )
        except BaseException:
            self._changed()
            raise
        self._step += 1
        origin = np.arange(self.batch) if parents is None else parents
        self._active = self._active[origin]
        self._rows = [
            RowText([*self._rows[p].tokens, t], False) if on else self._rows[p]
            for p, t, on in zip(origin.tolist(), ids.tolist(), self._active, strict=True)
        ]
        self._trim()
        self._state = self._merged(states)

    def extend_prompt(self, tokens: Any) -> None:
        """See `SpanMatcher.extend_prompt`."""
        op = "DistributedMatcher.extend_prompt"
        rows = list(tokens)
        if not rows or np.ndim(rows[0]) == 0:
            rows = [rows] * self.batch
        if len(rows) != self.batch:
            raise ValueError(f"{op}: tokens must have {self.batch} rows, got {len(rows)}")
        added = [as_ids(row, op, f"tokens[{b}]").tolist() for b, row in enumerate(rows)]
        self._rows = [
            RowText(row.tokens + new, row.prompt or bool(new))
            for row, new in zip(self._rows, added, strict=True)
        ]
        self._trim()
        self._changed()
        self.state()

    def _trim(self) -> None:
        """Drop tokens that are too far back to matter to a match or to what covers its tokens."""
        limit = self._spec.max_match
        self._rows = [
            RowText(row.tokens[-2 * limit :], row.prompt) if len(row.tokens) > 3 * limit else row
            for row in self._rows
        ]

    def reset(self, rows: Any = None) -> None:
        """See `SpanMatcher.reset`."""
        op = "DistributedMatcher.reset"
        chosen = range(self.batch) if rows is None else as_ids(rows, op, "rows").tolist()
        for b in chosen:
            if not 0 <= b < self.batch:
                raise IndexError(f"{op}: rows must lie in [0, {self.batch}), got {b}")
            self._rows[b] = RowText([], False)
            self._active[b] = True
        self._changed()

    def state(self) -> MatchState:
        """See `SpanMatcher.state`."""
        if self._state is None:
            found = self._index._scatter(lambda _, backend: self._restore(backend))
            self._state = self._merged(list(found.values()))
        return self._state

    @overload
    def peek(self, cand: Any, exact: Literal[False] = False) -> Bools: ...

    @overload
    def peek(self, cand: Any, exact: Literal[True]) -> Peek: ...

    def peek(self, cand: Any, exact: bool = False) -> Any:
        """See `SpanMatcher.peek`."""
        ids = as_ids(cand, "DistributedMatcher.peek", "cand", 2)
        name, step, most = self._name, self._step, self._spec.rule.max_count
        if exact or most is not None:
            found = merge_states(self._ask(lambda b: b.peek_exact(name, step, ids)), most)
            return found if exact else found.flag
        # Without a limit of the count, what one part flags is flagged.
        return np.any(self._ask(lambda b: b.peek(name, step, ids)), axis=0)

    def flagged(self) -> tuple[Ints, Ints]:
        """See `SpanMatcher.flagged`."""
        rows, tokens = merge_pairs(self._ask(lambda b: b.flagged(self._name, self._step)))
        if self._spec.rule.max_count is None or not len(rows):
            return rows, tokens
        # Parts may flag what is frequent over all of them.
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        cand = np.zeros((self.batch, int(place.max()) + 1), np.int64)
        cand[rows, place] = tokens
        flags = self.peek(cand)[rows, place]
        return rows[flags], tokens[flags]

    def copy(self) -> DistributedMatcher:
        """See `SpanMatcher.copy`."""
        other = copy.copy(self)
        other._name = uuids.uuid4().hex
        other._rows, other._active = list(self._rows), self._active.copy()
        return other

    def close(self) -> None:
        """Let the backends forget it now rather than when it has been idle."""

        def drop(_: int, backend: ShardBackend) -> bool:
            backend.drop(self._name)
            return True

        self._index._scatter(drop)
