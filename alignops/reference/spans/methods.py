"""Belief conflict, filter, loss and decoding by their formulas.

Symbols: P probability of a token in the pretraining text, M(s) occurrences of the span s in the
index, N tokens of the index, x a text of n tokens, tau a threshold. Logarithms are natural.

Source: TraceAlign, arXiv 2508.02063 (belief conflict, TraceShield, CBD, Prov-Decode); what the
paper leaves open is settled in the definitions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

COVER_LENGTH = 8  # matches with harmless text from this length on excuse their tokens
PENALTY_CAP = 100.0


@dataclass(frozen=True)
class Rule:
    """When a span counts: severity * score > tau, long enough, rare enough, not excused.

    kind: "bci", "norm" or "max", which grow with the span. surprisal: -ln P by token; None: from
    the counts of the index.
    """

    kind: str = "bci"
    tau: float = 20.0
    min_len: int = 8
    max_count: int | None = None
    severity: float = 1.0
    allow_mode: str = "exact"
    surprisal: npt.NDArray[np.float64] | None = None


class Category(NamedTuple):
    """An index of unsafe text, optionally one of harmless text, and the rule for its spans."""

    index: Any
    rule: Rule
    allow: Any = None


class Span(NamedTuple):
    """A matched span x[start:end], its score before severity, and M."""

    start: int
    end: int
    score: float
    count: int  # type: ignore[assignment]


# Belief conflict


def token_surprisal(probs: Any, floor: float = 1e-9) -> npt.NDArray[np.float64]:
    """-ln max(P, floor)."""
    values: npt.NDArray[np.float64] = -np.log(np.maximum(np.asarray(probs, np.float64), floor))
    return values


def bci(
    span: Sequence[int],
    probs: Any,
    kind: str = "bci",
    floor: float = 1e-9,
    n_tokens: int = 0,
    count: int = 0,
) -> float:
    """Belief conflict of one span; `n_tokens` for "norm" and "lift", `count` for "lift".

    bci: -sum ln P. density: bci / length. kl: sum q ln(q / P), q the frequencies in the span.
    max: the largest -ln P. norm: bci / ln N. lift: ln(M / expected occurrences).
    """
    if not len(span):
        return 0.0
    w = token_surprisal(probs, floor)
    total = float(sum(w[t] for t in span))
    if kind == "density":
        return total / len(span)
    if kind == "kl":
        q = {t: list(span).count(t) / len(span) for t in span}
        return sum(f * (math.log(f) + float(w[t])) for t, f in q.items())
    if kind == "max":
        return float(max(w[t] for t in span))
    if kind == "norm":
        return total / math.log(n_tokens)
    if kind == "lift":
        return math.log(count) - math.log(n_tokens) + total
    return total


# The filter: all spans, one by one


def span_score(x: Sequence[int], start: int, end: int, category: Category) -> float:
    """Score of x[start:end]; in mode "cover", tokens of harmless matches until its end count 0."""
    index, rule, allow = category
    w = token_surprisal(index.unigram) if rule.surprisal is None else rule.surprisal
    covered: set[int] = set()
    if allow is not None and rule.allow_mode == "cover":
        # A longer match is the union of its windows, which all occur.
        for last in range(COVER_LENGTH, end + 1):
            if allow.count(x[last - COVER_LENGTH : last]):
                covered.update(range(last - COVER_LENGTH, last))
    values = [0.0 if i in covered else float(w[x[i]]) for i in range(start, end)]
    if rule.kind == "max":
        return max(values)
    return sum(values) / (math.log(index.n_tokens) if rule.kind == "norm" else 1.0)


def passing_span(
    x: Sequence[int], start: int, end: int, category: Category, max_match: int = 4096
) -> Span | None:
    """The span x[start:end] if it occurs, is long and rare enough and not excused."""
    index, rule, allow = category
    length, span = end - start, x[start:end]
    if not max(rule.min_len, 1) <= length <= max_match:
        return None
    count = index.count(span)
    if not count or (rule.max_count is not None and count > rule.max_count):
        return None
    if allow is not None and rule.allow_mode == "exact" and allow.count(span):
        return None
    return Span(start, end, span_score(x, start, end, category), count)


def spans_ending(
    x: Sequence[int], end: int, category: Category, max_match: int = 4096
) -> list[Span]:
    """All passing spans of x that end at `end`."""
    found = (passing_span(x, start, end, category, max_match) for start in range(end))
    return [span for span in found if span is not None]


def risk(
    x: Sequence[int], categories: Iterable[Category], first: int = 0, max_match: int = 4096
) -> float:
    """Largest severity * score over the passing spans with their last token at `first` or later."""
    return max(
        (
            c.rule.severity * span.score
            for c in categories
            for end in range(first + 1, len(x) + 1)
            for span in spans_ending(x, end, c, max_match)
        ),
        default=0.0,
    )


def vetoed(
    x: Sequence[int], token: int, categories: Iterable[Category], max_match: int = 4096
) -> bool:
    """Whether `token` after x completes a passing span with severity * score > tau."""
    longer = [*x, token]
    return any(
        c.rule.severity * span.score > c.rule.tau
        for c in categories
        for span in spans_ending(longer, len(longer), c, max_match)
    )


# The loss


def cbd_weights(
    x: Sequence[int], categories: Iterable[Category], first: int = 0
) -> npt.NDArray[np.float64]:
    """a_t: the largest h(s) / length(s) over the flagged maximal matches s that contain t.

    h(s) = min(max(0, severity * score - tau), 100). Tokens before `first`, which belong to the
    prompt, weigh nothing.
    """
    a = np.zeros(len(x))
    for category in categories:
        rule = category.rule
        for start, end, _ in zip(*category.index.maximal_spans(x), strict=True):
            span = passing_span(x, int(start), int(end), category)
            if span is not None and end > first:
                h = min(max(0.0, rule.severity * span.score - rule.tau), PENALTY_CAP)
                a[start:end] = np.maximum(a[start:end], h / (end - start))
    a[:first] = 0
    return a


def cbd_penalty(
    logps: Tensor, mask: Tensor, weights: Tensor, carrier: str = "unlikelihood"
) -> Tensor:
    """Sum over tokens of a_t u_t, u_t = -ln(1 - p_t) with ln p_t clamped to -1e-6.

    logps, mask, weights: (B, T). carrier "logp": u_t = max(ln p_t, -20). Returns (B,).
    """
    if carrier == "logp":
        u = logps.clamp(min=-20)
    else:
        value = logps.clamp(max=-1e-6)
        # The gradient is taken at the clamped value instead of vanishing there.
        value = logps + (value - logps).detach()
        near = value > -math.log(2)
        u = torch.where(
            near,
            -torch.log(-torch.expm1(torch.where(near, value, -1.0))),
            -torch.log1p(-torch.exp(torch.where(near, -1.0, value))),
        )
    used = mask.bool() & (weights != 0)
    return torch.where(used, weights * u, 0.0).sum(-1)


# Decoding


class Hypothesis(NamedTuple):
    """Generated tokens without the end of text, their score, and whether they ended."""

    tokens: tuple[int, ...]
    score: float
    ended: bool


def prov_decode(
    logprobs: Callable[[tuple[int, ...]], Sequence[float]],
    flagged: Callable[[tuple[int, ...], int], bool],
    eos: int | None,
    *,
    max_new_tokens: int,
    beams: int = 4,
    candidates: int = 8,
    rescans: int = 3,
    length_power: float = 1.0,
    gamma: float | None = None,
) -> Hypothesis | None:
    """Beam search that drops flagged tokens, or lowers them by `gamma` nats; None: all vetoed."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[Hypothesis] = []
    for step in range(max_new_tokens):
        options = []
        for beam, (x, score) in enumerate(live):
            lp = logprobs(x)
            order = sorted(range(len(lp)), key=lambda c: (-lp[c], c))
            order = [c for c in order if lp[c] > -math.inf]
            for scan in range(rescans + 1):
                block = order[scan * candidates : (scan + 1) * candidates]
                flags = [c != eos and flagged(x, c) for c in block]
                if gamma is not None:
                    survivors = [
                        (score + lp[c] - gamma * f, beam, c)
                        for c, f in zip(block, flags, strict=True)
                    ]
                else:
                    survivors = [
                        (score + lp[c], beam, c) for c, f in zip(block, flags, strict=True) if not f
                    ]
                if survivors:
                    options += survivors
                    break
        options.sort(key=lambda o: (-o[0], o[1], o[2]))
        chosen = [((*live[beam][0], c), score) for score, beam, c in options[:beams]]
        norm = (step + 1) ** length_power
        finished += [Hypothesis(x[:-1], s / norm, True) for x, s in chosen if x[-1] == eos]
        live = [(x, s) for x, s in chosen if x[-1] != eos]
        if not live or len(finished) >= beams:
            break
    norm = max(len(live[0][0]) if live else 1, 1) ** length_power
    results = finished + [Hypothesis(x, s / norm, False) for x, s in live]
    return max(results, key=lambda h: h.score) if results else None
