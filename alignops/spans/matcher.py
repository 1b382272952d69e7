"""The incremental matcher: the longest suffix of each growing row that occurs in an index.

Shape letters: B rows, K candidates per row, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops._native import library
from alignops.spans.arrays import as_floats, as_ids, check_same_tokenizer
from alignops.spans.scores import FLOOR, surprisal_table

if TYPE_CHECKING:
    from alignops.spans.index import SpanIndex

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MatchRule:
    """When a match is flagged: severity * score > tau, if it is long and rare enough.

    Attributes:
        kind: the score, which grows with the match. "bci": sum of the surprisals of its tokens;
            "norm": the same / ln N, N tokens of the index; "max": the largest surprisal.
        tau: the threshold.
        min_len: fewest tokens.
        max_count: most occurrences in the index, or None.
        severity: factor of the score.
        allow_mode: what an allow index excuses. "exact": a match that also occurs there. "cover":
            tokens inside a suffix of 8 tokens or more that occurs there; from then on they have no
            surprisal.
        surprisal: float64 (V,), -ln P of each token; None: of the unigram distribution of the
            index, with P at least 1e-9.
    """

    kind: str = "bci"
    tau: float = 20.0
    min_len: int = 8
    max_count: int | None = None
    severity: float = 1.0
    allow_mode: str = "exact"
    surprisal: Any = None


class MatchState(NamedTuple):
    """The longest suffix of each row that occurs, (B,) each.

    length: tokens. count: occurrences; of the empty suffix, all tokens of the index. bci: sum of
    surprisals in nats. risk: severity * score where the rule lets the match count, else 0. flag:
    it counts, and risk > tau.
    """

    length: Ints
    count: Ints  # type: ignore[assignment]
    bci: Floats
    risk: Floats
    flag: Bools


class Peek(NamedTuple):
    """`MatchState` after each candidate, (B, K) each; zeros in rows that are not active."""

    flag: Bools
    length: Ints
    count: Ints  # type: ignore[assignment]
    bci: Floats
    risk: Floats


class SpanMatcher:
    """Follows B rows token by token.

    One thread owns a matcher (another that uses it meanwhile gets a RuntimeError); the index may be
    shared. Searches release the GIL. A call that fails changes nothing. The matcher keeps the files
    of the index open, also after `SpanIndex.close`.

    Args:
        index: of unsafe text.
        allow: index of harmless text with the same tokens, or None.
        batch: B, at first.
        max_match: no match is longer.
        rule: what is flagged.

    Raises:
        ValueError: an argument is out of its range; TokenizerMismatchError (ValueError): the two
            indexes differ in vocabulary or fingerprint.

    Source: arXiv 2508.02063 (TraceShield, Prov-Decode).

    Example:
        >>> import tempfile
        >>> from alignops.spans import MatchRule, SpanIndex, SpanMatcher, build_index
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index([range(20)], f"{folder}/u", vocab_size=32, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
        ...         matcher = SpanMatcher(index, rule=MatchRule(tau=5, min_len=3))
        ...         for token in (7, 8):
        ...             matcher.advance([token])
        ...         matcher.state().length.tolist(), matcher.peek([[9, 10]]).tolist()
        ([2], [[True, False]])
    """

    def __init__(
        self,
        index: SpanIndex,
        allow: SpanIndex | None = None,
        *,
        batch: int = 1,
        max_match: int = 4096,
        rule: MatchRule | None = None,
    ) -> None:
        rule = MatchRule() if rule is None else rule
        if allow is not None:
            check_same_tokenizer("SpanMatcher", "index", index, "allow", allow)
        self.rule = rule
        self.vocab_size = index.vocab_size
        surprisal = (
            surprisal_table(index.unigram, FLOOR, "SpanMatcher")
            if rule.surprisal is None
            else as_floats(rule.surprisal, "SpanMatcher", "surprisal")
        )
        self._native = library.SpanMatcher(
            index._store,
            None if allow is None else allow._store,
            batch,
            max_match,
            rule.kind,
            rule.tau,
            rule.min_len,
            rule.max_count,
            rule.severity,
            rule.allow_mode,
            surprisal,
        )

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self._native.batch

    @property
    def active(self) -> Bools:
        """Which rows take tokens and candidates, bool (B,). Assign a mask to change it."""
        mask = self._native.active
        mask.flags.writeable = False
        return mask

    @active.setter
    def active(self, mask: Any) -> None:
        self._native.active = np.ascontiguousarray(mask, dtype=np.bool_)

    def advance(self, tokens: Any, parent: Any = None) -> None:
        """Append tokens[b] to row b, or to what row parent[b] was.

        Args:
            tokens: (B,) ids. In rows that are not active they are ignored, whatever they are.
            parent: (B',) rows of beams that go on: row b becomes a copy of row parent[b], its
                activity included, before it takes tokens[b], with tokens (B',). B becomes B'.

        Raises:
            IndexError: a token or a parent does not exist.
            ValueError: another number of tokens than of rows.
            IndexCorruptError: a file of an index is damaged or has changed its size.
        """
        op = "SpanMatcher.advance"
        parents = None if parent is None else as_ids(parent, op, "parent")
        self._native.advance(as_ids(tokens, op, "tokens"), parents)

    def extend_prompt(self, tokens: Any) -> None:
        """Append several tokens: (n,) to all rows, or B sequences, one to each.

        Matches may begin in a prompt, but must end after it: `state` flags none before the next
        `advance`. Rows need not be active.

        Raises:
            IndexError, ValueError, IndexCorruptError: as `advance`.
        """
        parts = as_prompts(tokens, self.batch, "SpanMatcher.extend_prompt")
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._native.extend(np.concatenate([np.empty(0, np.int64), *parts]), offsets)

    def state(self) -> MatchState:
        """Of the longest suffixes, (B,) each."""
        return MatchState(*self._native.state())

    def peek(self, cand: Any, exact: bool = False) -> Any:
        """What candidates for the next token would lead to; changes nothing.

        Args:
            cand: (B, K) ids.
            exact: also lengths, counts and scores, which takes longer.

        Returns:
            bool (B, K), whether the candidate would end a flagged match; with `exact`, a `Peek`.

        Raises:
            IndexError: a candidate of an active row does not exist.
            ValueError, IndexCorruptError: as `advance`.
        """
        candidates = as_ids(cand, "SpanMatcher.peek", "cand", 2)
        if not exact:
            return self._native.peek(candidates)
        length, count, bci, risk, flag = self._native.peek_exact(candidates)
        return Peek(flag, length, count, bci, risk)

    def flagged(self) -> tuple[Ints, Ints]:
        """All pairs (row, token) that `peek` would flag, ascending, without asking for all of V.

        Returns:
            rows and tokens, int64 (n,) each.
        """
        return self._native.flagged()

    def reset(self, rows: Any = None) -> None:
        """Empty the given rows, or all, and make them active.

        Raises:
            IndexError: a row does not exist.
        """
        self._native.reset(None if rows is None else as_ids(rows, "SpanMatcher.reset", "rows"))

    def copy(self) -> SpanMatcher:
        """An independent matcher in the same state, over the same index."""
        other = object.__new__(SpanMatcher)
        other.rule, other.vocab_size = self.rule, self.vocab_size
        other._native = self._native.copy()
        return other

    def save(self) -> dict[str, npt.NDArray[Any]]:
        """The state of all rows as arrays, for `restore`.

        Also of a matcher over the same documents in other shards or on another machine: the state
        holds tokens, not places in the index.
        """
        return self._native.save()

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Become what a matcher with the same documents, rule and max_match was when it saved.

        Raises:
            ValueError: the arrays are not those of a state; IndexError: a token does not exist.
        """
        names = ("tokens", "offsets", "covered", "sums", "active", "prompt")
        if not isinstance(state, dict) or set(state) != set(names):
            raise ValueError(f"SpanMatcher.restore: state must hold {', '.join(names)}")
        self._native.restore(*(state[name] for name in names))


def as_prompts(tokens: Any, batch: int, op: str) -> list[Ints]:
    """What `extend_prompt` appends to each row: (n,) ids for all of them, or one sequence each."""
    if _is_flat(tokens):
        return [as_ids(tokens, op, "tokens")] * batch
    parts = [as_ids(row, op, f"tokens[{b}]") for b, row in enumerate(tokens)]
    if len(parts) != batch:
        raise ValueError(f"{op}: tokens must have {batch} rows, got {len(parts)}")
    return parts


def _is_flat(tokens: Any) -> bool:
    if hasattr(tokens, "ndim"):
        return bool(tokens.ndim == 1)
    first = next(iter(tokens), None) if isinstance(tokens, Iterable) else None
    return first is None or np.ndim(first) == 0
