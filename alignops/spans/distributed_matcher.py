"""The incremental matcher over the parts that several backends hold.

Every backend follows the text against its parts, with an index of harmless text if it has one of
those; it knows lengths and counts. The text and its scores are kept here: what harmless text covers
is known only when all of its parts have answered.

Shape letters as in `matcher`: B rows, K candidates per row.
"""

from __future__ import annotations

import copy
import math
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from alignops.spans import ends, scores
from alignops.spans.arrays import Floats, Ints, as_floats, as_ids, check_same_tokenizer
from alignops.spans.backends import (
    Bools,
    MatcherLostError,
    MatcherSpec,
    RowText,
    ShardBackend,
    merge_pairs,
    merge_states,
)
from alignops.spans.matcher import MatchRule, MatchState, Peek, as_prompts

if TYPE_CHECKING:
    from alignops.spans.distributed import DistributedIndex

__all__ = ["DistributedMatcher"]

T = TypeVar("T")


@dataclass
class _Row:
    """The text of a row as far as it can matter.

    `sums`: running sums of surprisals before each token and after the last. `covered`: which tokens
    have lost theirs to harmless text.
    """

    tokens: list[int] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0])
    covered: list[bool] = field(default_factory=list)
    prompt: bool = False
    active: bool = True

    def copy(self) -> _Row:
        return replace(self, tokens=[*self.tokens], sums=[*self.sums], covered=[*self.covered])

    def append(self, token: int, surprisal: float) -> None:
        self.tokens.append(token)
        self.covered.append(False)
        self.sums.append(self.sums[-1] + surprisal)

    def cover(self, length: int) -> None:
        """The last tokens lose their surprisal; those before them that have lost it are known."""
        size = len(self.tokens)
        first = size
        while first > max(size - length, 0) and not self.covered[first - 1]:
            first -= 1
            self.covered[first] = True
        self.sums[first:] = [self.sums[first]] * (size - first + 1)

    def trim(self, limit: int) -> None:
        """Forget what is too far back to matter to a match or to what covers its tokens."""
        if len(self.tokens) > 3 * limit:
            drop = len(self.tokens) - 2 * limit
            del self.tokens[:drop], self.sums[:drop], self.covered[:drop]


class _Follower:
    """The backends of one index, following the same text."""

    def __init__(self, index: DistributedIndex, spec: MatcherSpec) -> None:
        self._index, self._spec = index, spec
        self.name = uuids.uuid4().hex
        self.step = 0

    def changed(self) -> None:
        """What the backends have is of the past."""
        self.step += 2  # one step further is where a call that failed may have brought some

    def ask(self, rows: list[_Row], call: Callable[[ShardBackend], T]) -> list[T]:
        """The answers of all backends, of which those that lost the text are given it again."""

        def once(_: int, backend: ShardBackend) -> T:
            try:
                return call(backend)
            except MatcherLostError:
                self._restore(rows, backend)
                return call(backend)

        return list(self._index._scatter(once).values())

    def restore(self, rows: list[_Row]) -> MatchState:
        states = self._index._scatter(lambda _, backend: self._restore(rows, backend))
        return merge_states(list(states.values()), self._spec.rule.max_count)

    def _restore(self, rows: list[_Row], backend: ShardBackend) -> MatchState:
        texts = [RowText(row.tokens, row.prompt) for row in rows]
        active = np.array([row.active for row in rows], dtype=bool)
        return backend.restore(self.name, self.step, self._spec, texts, active)

    def advance(self, rows: list[_Row], tokens: Ints, parents: Ints | None) -> MatchState:
        active = np.array([row.active for row in rows], dtype=bool)
        states = self.ask(rows, lambda b: b.advance(self.name, self.step, tokens, parents, active))
        self.step += 1
        return merge_states(states, self._spec.rule.max_count)

    def peek_exact(self, rows: list[_Row], cand: Ints) -> Peek:
        peeks = self.ask(rows, lambda b: b.peek_exact(self.name, self.step, cand))
        return merge_states(peeks, self._spec.rule.max_count)

    def drop(self) -> None:
        def drop(_: int, backend: ShardBackend) -> bool:
            backend.drop(self.name)
            return True

        self._index._scatter(drop)


class DistributedMatcher:
    """`SpanMatcher` over all parts; `DistributedIndex.matcher` makes it.

    A call goes to all backends of both indexes at once, in two rounds at most. A backend that has
    lost the text, or a replica that never had it, is given it again. One thread owns a matcher.

    Raises:
        ShardUnavailableError: a part does not answer. The call changed nothing and can be repeated.
    """

    def __init__(
        self,
        index: DistributedIndex,
        allow: DistributedIndex | None,
        batch: int,
        max_match: int,
        rule: MatchRule,
    ) -> None:
        op = "DistributedMatcher"
        if allow is not None:
            check_same_tokenizer(op, "index", index, "allow", allow)
        self._surprisal: Floats = (
            scores.surprisal_table(index.unigram, scores.FLOOR, op)
            if rule.surprisal is None
            else as_floats(rule.surprisal, op, "surprisal")
        )
        rule = replace(rule, surprisal=self._surprisal)
        if rule.kind == "norm":  # the N of all parts
            scale = math.log(max(index.n_tokens, 2))
            rule = replace(rule, kind="bci", severity=rule.severity / scale)
        self._rule, self._max_match, self._allowed = rule, max_match, allow
        self._unsafe = _Follower(index, MatcherSpec(max_match, rule))
        # Only lengths are asked of harmless text, in which nothing is surprising.
        plain = MatchRule(surprisal=np.zeros(index.vocab_size), tau=0.0, min_len=1)
        self._allow = None if allow is None else _Follower(allow, MatcherSpec(max_match, plain))
        self._rows = [_Row() for _ in range(batch)]
        self._states: tuple[MatchState, MatchState | None] | None = None

    @property
    def _followers(self) -> list[_Follower]:
        return [f for f in (self._unsafe, self._allow) if f is not None]

    @property
    def _covers(self) -> bool:
        return self._allow is not None and self._rule.allow_mode == "cover"

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return len(self._rows)

    @property
    def active(self) -> Bools:
        """See `SpanMatcher.active`."""
        mask: Bools = np.array([row.active for row in self._rows], dtype=bool)
        mask.flags.writeable = False
        return mask

    @active.setter
    def active(self, mask: Any) -> None:
        mask = np.array(mask, dtype=np.bool_)
        if mask.shape != (self.batch,):
            raise ValueError(
                f"DistributedMatcher: active must have shape {(self.batch,)}, got {mask.shape}"
            )
        for row, on in zip(self._rows, mask.tolist(), strict=True):
            row.active = on
        self._changed()

    def _changed(self) -> None:
        for follower in self._followers:
            follower.changed()
        self._states = None

    def advance(self, tokens: Any, parent: Any = None) -> None:
        """See `SpanMatcher.advance`."""
        op = "DistributedMatcher.advance"
        ids = as_ids(tokens, op, "tokens")
        parents = None if parent is None else as_ids(parent, op, "parent")
        try:
            states = [f.advance(self._rows, ids, parents) for f in self._followers]
        except BaseException:
            self._changed()
            raise
        origin = range(self.batch) if parents is None else parents.tolist()
        rows = [self._rows[p].copy() for p in origin]
        for b, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if not row.active:
                continue
            row.append(token, float(self._surprisal[token]))
            row.prompt = False
            if self._covers and states[1].length[b] >= ends.COVER_LENGTH:
                row.cover(int(states[1].length[b]))
            row.trim(self._max_match)
        self._rows = rows
        self._states = states[0], states[1] if len(states) > 1 else None

    def extend_prompt(self, tokens: Any) -> None:
        """See `SpanMatcher.extend_prompt`."""
        added = as_prompts(tokens, self.batch, "DistributedMatcher.extend_prompt")
        for part in added:
            scores.check_range(
                part, len(self._surprisal), "DistributedMatcher.extend_prompt", "tokens"
            )
        rows = [row.copy() for row in self._rows]
        covers = self._covered_by_prompts(added)
        for row, part, lengths in zip(rows, added, covers, strict=True):
            for token, length in zip(part.tolist(), lengths.tolist(), strict=True):
                row.append(token, float(self._surprisal[token]))
                if length >= ends.COVER_LENGTH:
                    row.cover(length)
            row.prompt = row.prompt or bool(len(part))
            row.trim(self._max_match)
        self._rows = rows
        self._changed()
        self.state()

    def _covered_by_prompts(self, added: list[Ints]) -> list[Ints]:
        """After each added token the longest suffix that harmless text has, if that covers."""
        if not self._covers:
            return [np.zeros_like(part) for part in added]
        whole = [
            np.concatenate([np.array(row.tokens, np.int64), part])
            for row, part in zip(self._rows, added, strict=True)
        ]
        bounds = np.cumsum([0, *map(len, whole)])
        batch = ends.Batch(np.concatenate([bounds[:0], *whole]), bounds, bounds[:-1])
        first = ends.longest_suffixes(self._allowed, batch, self._max_match)
        lengths = np.arange(len(batch.ids)) + 1 - first
        return [lengths[e - len(part) : e] for e, part in zip(bounds[1:], added, strict=True)]

    def reset(self, rows: Any = None) -> None:
        """See `SpanMatcher.reset`."""
        op = "DistributedMatcher.reset"
        chosen = list(range(self.batch)) if rows is None else as_ids(rows, op, "rows").tolist()
        for b in chosen:
            if not 0 <= b < self.batch:
                raise IndexError(f"{op}: rows must lie in [0, {self.batch}), got {b}")
        for b in chosen:
            self._rows[b] = _Row()
        self._changed()

    # Scores

    def state(self) -> MatchState:
        """See `SpanMatcher.state`."""
        if self._states is None:
            states = [follower.restore(self._rows) for follower in self._followers]
            self._states = states[0], states[1] if len(states) > 1 else None
        state, allowed = self._states
        if allowed is None:
            return state
        if not self._covers:
            return _excused(state, allowed.length)
        no_token = np.zeros((self.batch, 1))
        judged = self._judged(state.length[:, None], state.count[:, None], no_token)
        risk = np.where([row.prompt for row in self._rows], 0.0, judged[1][:, 0])
        return state._replace(bci=judged[0][:, 0], risk=risk, flag=risk > self._rule.tau)

    def _judged(
        self, length: Ints, count: Ints, next_: Floats, cover: Ints | None = None
    ) -> tuple[Floats, Floats]:
        """BCI and risk of the last tokens of rows, (B, K).

        With `cover` a candidate of surprisal `next_` is the last one of `length`, and harmless text
        then covers so many tokens, itself included.
        """
        bci, risk = np.zeros(length.shape), np.zeros(length.shape)
        ahead = 0 if cover is None else 1
        for b, k in zip(*np.nonzero(length), strict=True):
            row = self._rows[b]
            if ahead and not row.active:
                continue
            size = len(row.tokens)
            begin = size - int(length[b, k]) + ahead
            end = size - max(int(cover[b, k]) - 1, 0) if cover is not None else size
            own = 0.0 if cover is not None and cover[b, k] else float(next_[b, k])
            if begin <= end:
                bci[b, k] = row.sums[end] + own - row.sums[begin]
            rare = self._rule.max_count is None or count[b, k] <= self._rule.max_count
            if length[b, k] >= self._rule.min_len and rare:
                score = bci[b, k]
                if self._rule.kind == "max":
                    left = (t for t in range(begin, end) if not row.covered[t])
                    score = max([own, *(float(self._surprisal[row.tokens[t]]) for t in left)])
                risk[b, k] = self._rule.severity * score
        return bci, risk

    @overload
    def peek(self, cand: Any, exact: Literal[False] = False) -> Bools: ...

    @overload
    def peek(self, cand: Any, exact: Literal[True]) -> Peek: ...

    def peek(self, cand: Any, exact: bool = False) -> Any:
        """See `SpanMatcher.peek`."""
        ids = as_ids(cand, "DistributedMatcher.peek", "cand", 2)
        unsafe, rows = self._unsafe, self._rows
        if not exact and self._rule.max_count is None:
            # What one part flags is flagged, unless harmless text excuses it.
            flags = np.any(
                unsafe.ask(rows, lambda b: b.peek(unsafe.name, unsafe.step, ids)), axis=0
            )
            if self._allow is None or not flags.any():
                return flags
        found = unsafe.peek_exact(rows, ids)
        if self._allow is not None:
            allowed = self._allow.peek_exact(rows, ids).length
            if not self._covers:
                found = _excused(found, allowed)
            else:
                cover = np.where(allowed >= ends.COVER_LENGTH, allowed, 0)
                next_ = self._surprisal[np.where(self.active[:, None], ids, 0)]
                bci, risk = self._judged(found.length, found.count, next_, cover)
                found = found._replace(bci=bci, risk=risk, flag=risk > self._rule.tau)
        return found if exact else found.flag

    def flagged(self) -> tuple[Ints, Ints]:
        """See `SpanMatcher.flagged`."""
        unsafe = self._unsafe
        found = unsafe.ask(self._rows, lambda b: b.flagged(unsafe.name, unsafe.step))
        rows, tokens = merge_pairs(found)
        if not len(rows) or (self._rule.max_count is None and self._allow is None):
            return rows, tokens
        # Parts may flag what is frequent over all of them, or excused.
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        cand = np.zeros((self.batch, int(place.max()) + 1), np.int64)
        cand[rows, place] = tokens
        flags = self.peek(cand)[rows, place]
        return rows[flags], tokens[flags]

    def copy(self) -> DistributedMatcher:
        """See `SpanMatcher.copy`."""
        other = copy.copy(self)
        other._unsafe, other._allow = copy.copy(self._unsafe), copy.copy(self._allow)
        for follower in other._followers:
            follower.name = uuids.uuid4().hex
        other._rows = [row.copy() for row in self._rows]
        return other

    def close(self) -> None:
        """Let the backends forget it now rather than when it has been idle."""
        for follower in self._followers:
            follower.drop()


State = TypeVar("State", MatchState, Peek)


def _excused(state: State, allowed: Ints) -> State:
    """Without risk where harmless text has the whole match, too."""
    own = allowed < state.length
    return state._replace(risk=np.where(own, state.risk, 0.0), flag=state.flag & own)
