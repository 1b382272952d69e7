"""Prov-Decode: beam search that never writes a span which `TraceShield` would refuse.

Symbols: B beams, b of them alive, K candidates of each, V size of the vocabulary, lp a natural
log-probability. Source: TraceAlign, arXiv 2508.02063 (veto of expansions that complete spans of
large BCI); the search around it is ours. `alignops.spans.veto` is the same for samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignops.losses import widen
from alignops.spans.arrays import Floats, Ints, as_ids
from alignops.spans.shield import TraceShield
from alignops.spans.stream import Bools, ShieldMatcher

MODES = ("hard", "soft")
#: Prediction looks up matches that occur at most so often.
LOOKAHEAD_COUNT = 16

#: Tokens (rows, new) and the rows of the last call that they follow (None: the prompt, one row),
#: to the scores (rows, V) of the next token.
Step = Callable[[Tensor, Tensor | None], Tensor]


class Hypothesis(NamedTuple):
    """Generated tokens without the end of text, score / length^power, and whether they ended."""

    tokens: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True)
class ProvResult:
    """What `prov_decode` wrote.

    Attributes:
        tokens: of the best hypothesis, without the end of text; empty if refused.
        score: its log-probability / length^power; -inf if refused.
        reason: "eos", "length" (max_new_tokens reached), "all-vetoed" or "index-unavailable".
        refused: there is no text: the reason is one of the last two.
        hypotheses: all that were kept, best first.
        vetoed: candidates that were flagged.
        steps: calls of the model.
    """

    tokens: tuple[int, ...]
    score: float
    reason: str
    refused: bool
    hypotheses: tuple[Hypothesis, ...]
    vetoed: int
    steps: int


def prov_decode(
    step: Step,
    prompt: Any,
    shield: TraceShield,
    beams: int = 4,
    candidates: int | None = None,
    mode: str = "hard",
    gamma: float = 1.0,
    lookahead: int = 0,
    *,
    max_new_tokens: int = 128,
    eos: int | Sequence[int] | None = None,
    rescans: int = 3,
    length_power: float = 1.0,
) -> ProvResult:
    """Beam search in which tokens that complete a flagged span are vetoed.

    Each step takes the K best tokens of each beam, asks the matcher about all of them at once, and
    keeps the B best expansions by score / length^power (ties: the lower beam, then the lower
    token). A beam all of whose candidates are vetoed takes its next K, at most `rescans` times, and
    then dies. Hypotheses that end are set aside; the search stops when there are B of them.

    Hard mode promises: the text is never refused by `shield.check(prompt + text, len(prompt))`.
    The end of text is never vetoed, and not part of the text. Token ids beyond the vocabulary of
    the index, as padded models have them, match nothing.

    Args:
        step: the model. Called as step(tokens, None) with the prompt, int64 (1, L), then as
            step(tokens, parents) with int64 (b, 1) and (b,): row i extends row parents[i] of the
            last call. Returns logits or log-probabilities (b, V) for the next token.
            `alignops.integrations.spans.ModelStep` makes one of a transformers model.
        prompt: (L,) token ids.
        shield: gives indexes, filters, threshold and scope.
        beams: B.
        candidates: K; None: 2 B.
        mode: "hard" vetoes; "soft" lowers the log-probability of flagged tokens by `gamma` before
            the ranking.
        gamma: in nats.
        lookahead: k > 0 also vetoes tokens from which the text of the index goes on over the
            threshold within k tokens, for matches that occur at most 16 times.
        max_new_tokens: most tokens to write.
        eos: id or ids of the end of text; None: none.
        rescans: see above.
        length_power: 0 ranks by log-probability, 1 by its mean per token.

    Returns:
        The best hypothesis and what happened. An index that cannot be read refuses, unless the
        shield fails open: then decoding goes on without veto.

    Raises:
        ValueError: an argument is out of range, or the model returns NaN.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, TraceShield, build_index, prov_decode
        >>> def step(tokens, parents):  # prefers to count, then to repeat
        ...     last = tokens[:, -1]
        ...     logits = torch.zeros(len(last), 16)
        ...     logits.scatter_(1, ((last + 1) % 16)[:, None], 4.0)
        ...     return logits.scatter_(1, last[:, None], 2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index([range(10)], f"{folder}/u", vocab_size=16, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
        ...         shield = TraceShield(index, tau=6.0, min_len=3)
        ...         prov_decode(step, [2], shield, beams=1, max_new_tokens=6).tokens
        (3, 4, 4, 5, 5, 6)
    """
    k = 2 * beams if candidates is None else candidates
    _check(beams=(beams, 1), candidates=(k, 1), lookahead=(lookahead, 0), rescans=(rescans, 0))
    _check(max_new_tokens=(max_new_tokens, 1), gamma=(gamma, 0.0), length_power=(length_power, 0.0))
    if mode not in MODES:
        raise ValueError(f"prov_decode: mode must be one of {MODES}, got {mode!r}")
    if lookahead and shield.kind == "max":
        raise ValueError("prov_decode: lookahead must be 0 for kind 'max', whose score no sum is")
    ids = as_ids(prompt, "prov_decode", "prompt")
    if not len(ids):
        raise ValueError("prov_decode: prompt must hold a token, got none")
    search = _Search(step, ids, shield, beams, k, gamma if mode == "soft" else None, lookahead)
    search.end = end_tokens(eos)
    search.rescans, search.power = rescans, length_power
    return search.run(max_new_tokens)


class _Search:
    """The state of one search."""

    def __init__(
        self,
        step: Step,
        prompt: Ints,
        shield: TraceShield,
        beams: int,
        k: int,
        gamma: float | None,
        lookahead: int,
    ) -> None:
        self.step, self.shield = step, shield
        self.beams, self.k, self.gamma, self.lookahead = beams, k, gamma, lookahead
        self.end: Ints
        self.rescans: int
        self.power: float
        self.prompt = prompt
        self.seen = prompt if shield.scope == "prompt+completion" else prompt[:0]
        self.matcher: ShieldMatcher | None = None
        self.written = np.empty((1, 0), dtype=np.int64)
        self.scores = np.zeros(1)
        self.finished: list[Hypothesis] = []
        self.vetoed = 0

    def run(self, max_new_tokens: int) -> ProvResult:
        steps, reason = 0, "all-vetoed"
        try:
            self._open()
            tokens, parents = torch.from_numpy(self.prompt)[None], None
            while steps < max_new_tokens:
                steps += 1
                logits = self.step(tokens, parents)
                chosen = self._expand(logits)
                if not len(self.scores) or len(self.finished) >= self.beams:
                    break
                tokens, parents = (torch.from_numpy(a).to(logits.device) for a in chosen)
                tokens = tokens[:, None]
        except _UnavailableError:
            return ProvResult((), -np.inf, "index-unavailable", True, (), self.vetoed, steps)
        norm = max(self.written.shape[1], 1) ** self.power
        live = [
            Hypothesis(tuple(row), score / norm, False)
            for row, score in zip(self.written.tolist(), self.scores.tolist(), strict=True)
        ]
        # The sort is stable: of equal scores, what ended first or the lower beam comes first.
        kept = sorted(self.finished + live, key=lambda h: -h.score)
        if not kept:
            return ProvResult((), -np.inf, reason, True, (), self.vetoed, steps)
        best, reason = kept[0], "eos" if kept[0].ended else "length"
        return ProvResult(best.tokens, best.score, reason, False, tuple(kept), self.vetoed, steps)

    def _expand(self, logits: Tensor) -> tuple[Ints, Ints]:
        """One step of the search, given the scores of the next tokens; new tokens and parents."""
        values, ids = top_candidates(logits, self.k)
        flags = self._flags(ids)
        if self.gamma is None:
            for scan in range(1, self.rescans + 1):
                stuck = np.flatnonzero((flags | (values == -np.inf)).all(axis=1))
                if not len(stuck) or scan * self.k >= logits.shape[1]:
                    break
                more = top_candidates(logits[torch.from_numpy(stuck)], (scan + 1) * self.k)
                further = slice(more[1].shape[1] - scan * self.k)  # fewer at the end
                values[stuck] = -np.inf
                values[stuck, further], ids[stuck, further] = (a[:, scan * self.k :] for a in more)
                flags = self._flags(ids)
        total = self.scores[:, None] + values
        if self.gamma is None:
            total[flags] = -np.inf
        else:
            total -= self.gamma * flags
        beam = np.repeat(np.arange(len(ids)), ids.shape[1])
        flat, token = total.ravel(), ids.ravel()
        best = np.lexsort((token, beam, -flat))[: self.beams]
        best = best[flat[best] > -np.inf]
        parent, token, score = beam[best], token[best], flat[best]
        written = np.concatenate((self.written[parent], token[:, None]), axis=1)
        ended = np.isin(token, self.end)
        if ended.any():
            norm = written.shape[1] ** self.power
            for row, value in zip(written[ended, :-1].tolist(), score[ended].tolist(), strict=True):
                self.finished.append(Hypothesis(tuple(row), value / norm, True))
            parent, token = parent[~ended], token[~ended]
            written, score = written[~ended], score[~ended]
        self.written, self.scores = written, score
        if len(token):
            self._guard(lambda m: m.advance(token, parent))
        return token, parent

    def _flags(self, ids: Ints) -> Bools:
        found = self._guard(lambda m: m.peek(ids))
        flags: Bools = np.zeros(ids.shape, dtype=bool) if found is None else found
        if self.lookahead:
            ahead = self._guard(lambda m: self._predict(m, ids, flags))
            flags = flags if ahead is None else flags | ahead
        if len(self.end):
            flags = flags & ~np.isin(ids, self.end)
        self.vetoed += int(np.count_nonzero(flags))
        return flags

    def _predict(self, matcher: ShieldMatcher, ids: Ints, flags: Bools) -> Bools:
        """Which candidates lead to a span over the threshold if the index is followed."""
        result = np.zeros_like(flags)
        shield = self.shield
        for category, part in zip(shield.categories, matcher.matchers, strict=True):
            ahead = part.peek(ids, exact=True)
            weight = category.severity / category.scale
            reach = ahead.bci + self.lookahead * category.surprisal.max(initial=0.0)
            likely = (ahead.length > 0) & (ahead.count <= LOOKAHEAD_COUNT) & ~flags
            likely &= (ahead.length + self.lookahead >= shield.min_len) & (
                weight * reach > shield.tau
            )
            for b, j in np.argwhere(likely).tolist():
                before = np.concatenate((self.seen, self.written[b]))
                length = int(ahead.length[b, j])
                span = np.append(before[len(before) - length + 1 :], ids[b, j])
                room = (shield.tau / weight) - float(ahead.bci[b, j])
                result[b, j] |= self._goes_over(category, span, room)
        return result

    def _goes_over(self, category: Any, span: Ints, room: float) -> bool:
        """Whether the index continues a span by more than `room` nats within the lookahead."""
        shield = self.shield
        hits = category.index.locate(span, LOOKAHEAD_COUNT)
        for d, offset in zip(hits.document.tolist(), hits.offset.tolist(), strict=True):
            begin = offset + len(span)
            after = np.asarray(category.index.document(d).tokens)[begin : begin + self.lookahead]
            longer = np.concatenate((span, after))
            if (
                category.surprisal[after].sum() > room
                and len(longer) >= shield.min_len
                and not (
                    shield.allow is not None
                    and shield.allow_mode == "exact"
                    and shield.allow.count(longer)
                )
            ):
                return True
        return False

    def _open(self) -> None:
        try:
            self.matcher = self.shield.matcher()
            if len(self.seen):
                self.matcher.extend_prompts([self.seen])
        except OSError as error:
            self._lost(error)

    def _guard(self, call: Callable[[ShieldMatcher], Any]) -> Any:
        """The result of a call of the matcher; None without one, from its first failure on."""
        try:
            return None if self.matcher is None else call(self.matcher)
        except OSError as error:
            self._lost(error)
            return None

    def _lost(self, error: OSError) -> None:
        self.matcher = None
        if not self.shield.fail_open:
            raise _UnavailableError from error


class _UnavailableError(Exception):
    """An index cannot be read and the filter is closed."""


def top_candidates(logits: Tensor, k: int) -> tuple[Floats, Ints]:
    """The k largest log-probabilities of each row and their tokens; ties: the lower token first.

    Args:
        logits: (b, V), normalised or not.
        k: more than V gives V.

    Returns:
        float64 (b, k) and int64 (b, k), largest first.

    Raises:
        ValueError: a row holds NaN or +inf, or nothing but -inf.
    """
    logits = logits.detach()
    width = min(k + 1, logits.shape[1])
    top, ids = logits.topk(width)
    lp = widen(logits).log_softmax(-1)
    best = lp.gather(-1, ids).double().cpu().numpy()
    if not np.isfinite(best[:, 0]).all():
        row = int(np.flatnonzero(~np.isfinite(best[:, 0]))[0])
        raise ValueError(f"prov_decode: step must return finite scores, got bad ones in row {row}")
    values, tokens = top.double().cpu().numpy(), ids.cpu().numpy()
    if width > k:
        # Of several tokens at the edge, topk keeps any.
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -np.inf)
        for row in np.flatnonzero(tied).tolist():
            above = int((values[row] > values[row, k]).sum())
            same = (logits[row] == top[row, k]).nonzero().flatten()[: k - above]
            tokens[row, above:k] = same.cpu().numpy()
        values, tokens, best = values[:, :k], tokens[:, :k], best[:, :k]
    order = np.lexsort((tokens, -values), axis=-1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(tokens, order, 1)


def end_tokens(eos: int | Sequence[int] | None) -> Ints:
    """Ids of the end of text as an array."""
    return as_ids(() if eos is None else np.atleast_1d(np.asarray(eos)), "prov_decode", "eos")


def _check(**limits: tuple[float, float]) -> None:
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"prov_decode: {name} must be at least {least}, got {value}")
