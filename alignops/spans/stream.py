"""The filter token by token: a matcher over all categories, and the text that is being written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Ints, as_ids
from alignops.spans.scores import check_range

if TYPE_CHECKING:
    from alignops.spans.distributed_matcher import DistributedMatcher
    from alignops.spans.matcher import SpanMatcher
    from alignops.spans.shield import TraceShield, Verdict

Bools = npt.NDArray[np.bool_]


class ShieldMatcher:
    """One matcher per category, moved together; a flag is set if any category sets it.

    `TraceShield.matcher` makes it, with B rows. Ids beyond the vocabulary of the indexes, as models
    with padded vocabularies have them, are legal here: they match nothing. Not for use by several
    threads at once.
    """

    def __init__(
        self, matchers: Iterable[SpanMatcher | DistributedMatcher], vocab_size: int
    ) -> None:
        self.matchers = tuple(matchers)
        self.vocab_size = vocab_size

    def advance(self, tokens: Ints, parent: Ints | None = None) -> None:
        """Row b becomes row parent[b] (None: b) followed by tokens[b]; B follows `parent`."""
        outside = self._outside(tokens)
        if outside is not None:
            tokens = np.where(outside, 0, tokens)
        for matcher in self.matchers:
            matcher.advance(tokens, parent)
            if outside is not None:
                matcher.reset(np.flatnonzero(outside))

    def extend_prompts(self, prompts: Sequence[Ints]) -> None:
        """Append a prompt to each row; spans may begin in it, but none ends there."""
        rows = []
        for prompt in prompts:
            outside = self._outside(prompt)
            start = 0 if outside is None else int(np.flatnonzero(outside)[-1]) + 1
            rows.append(prompt[start:])
        for matcher in self.matchers:
            matcher.extend_prompt(rows)

    def flags(self) -> Bools:
        """Which rows end with a flagged span: bool (B,)."""
        return self._any([matcher.state().flag for matcher in self.matchers])

    def peek(self, cand: Ints) -> Bools:
        """Which of the candidates (B, K) would end a flagged span as next token: bool (B, K)."""
        outside = self._outside(cand)
        if outside is None:
            return self._any([matcher.peek(cand) for matcher in self.matchers])
        cand = np.where(outside, 0, cand)
        return self._any([matcher.peek(cand) for matcher in self.matchers]) & ~outside

    def flagged(self) -> tuple[Ints, Ints]:
        """All (row, token) whose token would end a flagged span, as two arrays."""
        found = [matcher.flagged() for matcher in self.matchers]
        rows, tokens = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows, tokens

    def _outside(self, tokens: Ints) -> Bools | None:
        """Where ids lie beyond the vocabulary; None if nowhere."""
        outside: Bools = tokens >= self.vocab_size
        return outside if outside.any() else None

    def _any(self, flags: list[Bools]) -> Bools:
        result = flags[0]
        for more in flags[1:]:
            result = result | more
        return result


class ShieldStream:
    """A text that is being written, and whether the filter would refuse it by now.

    `TraceShield.stream` makes it. What `push` says equals what `TraceShield.check` would say about
    the text so far: once refused, always refused. It costs a few microseconds per token.

    Attributes:
        refused: whether a flagged span ended by now, or an index failed and the filter is closed.
        tokens: prompt and completion so far.
    """

    def __init__(self, shield: TraceShield, prompt: Sequence[int] = ()) -> None:
        self._shield = shield
        given = as_ids(prompt, "TraceShield.stream", "prompt")
        self._prompt_length = len(given)
        self.tokens: list[int] = given.tolist()
        self.refused = False
        self._matcher: ShieldMatcher | None = None
        try:
            self._matcher = shield.matcher()
            if len(given) and shield.scope == "prompt+completion":
                self._matcher.extend_prompts([given])
        except OSError:
            self._fail()

    def push(self, tokens: Any) -> bool:
        """Append one token or several to the completion; returns `refused`.

        Raises:
            IndexError: a token is outside the vocabulary.
        """
        new = as_ids(np.atleast_1d(tokens), "ShieldStream.push", "tokens")
        check_range(new, self._shield.vocab_size, "ShieldStream.push", "tokens")
        for i in range(len(new)):
            if self._matcher is not None:
                try:
                    self._matcher.advance(new[i : i + 1])
                    self.refused = self.refused or bool(self._matcher.flags()[0])
                except OSError:
                    self._fail()
        self.tokens += new.tolist()
        return self.refused

    def _fail(self) -> None:
        self._matcher = None
        self.refused = self.refused or not self._shield.fail_open

    def verdict(self) -> Verdict:
        """Risk and spans of the text so far; see `TraceShield.check`."""
        return self._shield.check(self.tokens, self._prompt_length)
