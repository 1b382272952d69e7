"""Acceptance of drafted tokens: `verify` for chains, `verify_tree` for trees, `propose` for drafts.

Shape letters: B rows, K drafts, V ids, Vd ids of the drafter, n nodes of a tree.

Decisions are exact: the same bits of logits, the same ids and the same random words give the same
tokens on every device, instruction set and number of threads. Random words depend on the seed of
the row and on the position of the token that they decide, so tokens do not depend on the batch.
None of the functions is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative import verify_ops as _fakes  # noqa: F401 (registers the fake kernels)

_op = torch.ops.alignops

#: Codes of the rules, and their parameters with defaults in the order of the operator.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (0, {}),
    "lossless": (1, {}),
    "block": (2, {}),
    "coupled": (3, {}),
    "typical": (4, {"eps": 0.09, "delta": 0.3}),
    "relaxed": (5, {"m": 3, "r": 0.5, "delta": None}),
    "threshold": (6, {"t_single": 1.0, "t_acc": 1.0}),
    "rsd": (
        7,
        {"p_th": 0.01, "top_n": 20, "trials": 5, "retry": "resample", "student_probs": "raw"},
    ),
    "nudge": (8, {"gamma": 0.4, "eos_lookahead": 16, "word_start": None}),
    "scripted": (9, {"given": None}),
}
TREE_RULES = {"greedy": 0, "tree_target": 1, "tree_rrs": 2}
_CHOICES = {"retry": ("resample", "descend", "none"), "student_probs": ("raw", "warped")}
_TENSORS = ("word_start", "given")

#: What `VerifyOut.source` says of a token.
SOURCES = ("draft", "correction", "bonus", "teacher retry", "student", "nudge", "base")
_ERRORS = {
    1: "logits hold NaN or +inf, or a probability is outside [0, 1]",
    2: "no token is possible",
    3: "a draft is not an id of the vocabulary, or the nodes are not a tree",
    4: "temperature, top_k, top_p, min_p, state or statistics are out of range",
}


class _Rows:
    """What the results have in common."""

    row_error: Tensor

    def raise_errors(self) -> None:
        """Wait for the device, and raise ValueError with the rows that had no result, if any."""
        errors = self.row_error.tolist()
        bad = [f"row {b}: {_ERRORS[code]}" for b, code in enumerate(errors) if code]
        if bad:
            raise ValueError(f"verify: {'; '.join(bad[:8])}")


@dataclass(frozen=True)
class VerifyOut(_Rows):
    """What every row emits. A row that is not active, or has a `row_error`, emits nothing.

    Attributes:
        accept_len: int32 (B,), drafts that stand.
        next_token: int64 (B,), the emitted token behind them, which has no keys and values yet; -1:
            none.
        num_emitted: int32 (B,).
        tokens: int64 (B, K + 1), emitted tokens, then -1.
        cu_emitted: int32 (B + 1,), sums of `num_emitted`.
        flat: int64 (B (K + 1),), emitted tokens of all rows, then -1.
        source: uint8 (B, K + 1), where a token comes from: an index into `SOURCES`.
        finished: uint8 (B,), 0; 1: end of text; 2: `remaining` is used up.
        row_error: uint8 (B,), 0; 1: bad logits; 2: no token is possible; 3: a draft is no id; 4: an
            argument of the row is out of range. Only rows of logits that the rule reads count.
        state: uint8 (B,), of the rule "nudge": 0 base, 1 nudge.
        zero_q: int32 (B,), tested drafts that the drafter could not have drawn, but the target.
    """

    accept_len: Tensor
    next_token: Tensor
    num_emitted: Tensor
    tokens: Tensor
    cu_emitted: Tensor
    flat: Tensor
    source: Tensor
    finished: Tensor
    row_error: Tensor
    state: Tensor
    zero_q: Tensor


@dataclass(frozen=True)
class TreeOut(_Rows):
    """What every row emits along the accepted path of its tree; see `VerifyOut`.

    Attributes:
        path: int32 (B, n), accepted nodes, the root first, then -1.
        tokens, source: (B, n); flat: (B n,).
    """

    path: Tensor
    accept_len: Tensor
    next_token: Tensor
    num_emitted: Tensor
    tokens: Tensor
    cu_emitted: Tensor
    flat: Tensor
    source: Tensor
    finished: Tensor
    row_error: Tensor
    zero_q: Tensor


@dataclass(frozen=True)
class Proposal(_Rows):
    """One draft for every row.

    Attributes:
        ids: int64 (B,); -1 where `row_error` is set.
        stats: int64 (B, 6), what `verify(draft_stats=...)` needs of the law that was drawn from.
        row_error: uint8 (B,), as in `VerifyOut`.
    """

    ids: Tensor
    stats: Tensor
    row_error: Tensor


def verify(
    target: Tensor,
    draft_ids: Tensor,
    *,
    draft: Tensor | None = None,
    draft_stats: Tensor | None = None,
    draft_lens: Tensor | None = None,
    cu: Tensor | None = None,
    rule: str = "greedy",
    params: Mapping[str, Any] | None = None,
    seeds: Tensor | None = None,
    uniforms: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    eos_ids: Sequence[int] = (),
    remaining: Tensor | None = None,
    state: Tensor | None = None,
    active: Tensor | None = None,
    is_probs: bool = False,
    out: VerifyOut | None = None,
) -> VerifyOut:
    """Decide which drafts of every row stand, and which token follows them.

    Rows of logits are read in order, and only as far as a decision needs them. Then tokens behind
    the first end of text are cut, then those beyond `remaining`; drafts that are cut do not count
    as accepted.

    Args:
        target: (B, K + 1, V) logits of the model, float32, bfloat16, float16 or float64 (rounded to
            float32), outer strides free: row i is for the token behind draft i - 1. With `cu`:
            (rows, V).
        draft_ids: (B, K) int64 or int32; -1: no draft from here on.
        draft: (B, K, Vd <= V) logits that the drafts were drawn from, with the temperature and the
            cuts below; None: drafts are certain, as those of a lookup are.
        draft_stats: (B, K, 6) of `propose`, with which rows of `draft` are read only where a draft
            is rejected.
        draft_lens: (B,) drafts of each row; None: all.
        cu: (B + 1,) row b has the rows cu[b] .. cu[b + 1] - 1 of `target`, one more than drafts; a
            row without any is not active.
        rule: "greedy", "lossless", "block", "coupled", "typical", "relaxed", "threshold", "rsd",
            "nudge" or "scripted", see the guide.
        params: parameters of the rule, see `RULES`. "word_start": (V,) bool; "given": (B,) int32.
        seeds: (B,) int64, needed by rules that draw.
        uniforms: (B, K + 1, 2) uint32 random words instead of the generator's: of the test, and of
            the token that is drawn. For tests.
        positions: (B,) int64, of the token that the first row of logits decides: tokens of the
            sequence so far.
        temperature: one number or (B,); rows with 0 follow the rule "greedy", unless the rule is
            "scripted".
        top_k: ids kept; 0: all. One number or (B,), as the next two.
        top_p: the shortest sequence of falling probabilities that reaches this sum is kept.
        min_p: ids at least this fraction of the largest probability are kept.
        eos_ids: at most 8 ids that end a text.
        remaining: (B,) tokens that each row may still emit; None: any number.
        state: (B,) uint8, `VerifyOut.state` of the round before, for the rule "nudge".
        active: (B,) bool; of other rows nothing is read.
        is_probs: `target` and `draft` hold probabilities, which are taken as they are.
        out: receives the result, and is returned.

    Returns:
        What every row emits. Faults of values are reported there, so that nothing waits for a
        device: see `VerifyOut.raise_errors`.

    Raises:
        TypeError: an argument is of a wrong Python type.
        ValueError: shapes, dtypes or devices do not fit, a number is out of range, or the rule
            lacks something.

    Source: arXiv 2211.17192 and 2302.01318 (lossless), 2403.10444 (block), 2408.07978 (coupled),
    2401.10774 (typical), 2509.22230 (rsd), 2410.09300 (nudge).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
        >>> result = verify(logits, torch.tensor([[1]]))
        >>> result.tokens, result.accept_len
        (tensor([[1, 0]]), tensor([1], dtype=torch.int32))
    """
    op = "verify"
    _check_tensors(op, target=target, draft_ids=draft_ids)
    if rule not in RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    check(
        draft_ids.dim() == 2,
        f"{op}: draft_ids must have shape (b, k), got {tuple(draft_ids.shape)}",
    )
    rows = draft_ids.shape[0]
    numbers, tensors = _parameters(rule, params or {}, op)
    results = _op.speculative_verify(
        _logits(target),
        _as(draft_ids, torch.int64),
        None if draft is None else _logits(draft),
        None if draft_stats is None else draft_stats.contiguous(),
        _as(draft_lens, torch.int32),
        _as(cu, torch.int32),
        RULES[rule][0],
        numbers,
        tensors["word_start"],
        _as(tensors["given"], torch.int32),
        _as(seeds, torch.int64),
        _as(positions, torch.int64),
        uniforms,
        *_warp(temperature, top_k, top_p, min_p, rows, target, is_probs, op),
        list(eos_ids),
        _as(remaining, torch.int32),
        state,
        active,
        is_probs,
    )
    if out is None:
        return VerifyOut(*results)
    for field, result in zip(fields(out), results, strict=True):
        getattr(out, field.name).copy_(result)
    return out


def verify_tree(
    target: Tensor,
    tokens: Tensor,
    parent: Tensor,
    *,
    rule: str = "greedy",
    draft: Tensor | None = None,
    replacement: bool = False,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    eos_ids: Sequence[int] = (),
    remaining: Tensor | None = None,
    active: Tensor | None = None,
    is_probs: bool = False,
) -> TreeOut:
    """Decide which path of a tree of drafts stands, from the root down, and what follows it.

    Args:
        target: (B, n, V) logits, row i for the token behind node i; dtypes and strides as `verify`.
        tokens: (B, n) int64 or int32, n at most 64; node 0 is the last token of the sequence, -1 no
            node.
        parent: (B, n) int64 or int32, parent[b, i] < i; that of node 0 is not read.
        rule: "greedy"; "tree_target": children need not have been drawn (the best of the drafter);
            "tree_rrs": children were drawn from `draft`, each is tested against what the target has
            beyond those before it. Children are tried by rising node.
        draft: (B, n, Vd <= V) logits whose row i the children of node i were drawn from; for
            "tree_rrs".
        replacement: children of a node were drawn with replacement.
        seeds: as `verify`, like all that follow.
        positions: of the token behind the root.
        temperature: rows with 0 follow the rule "greedy".
        top_k: ids kept; 0: all.
        top_p: sum of the probabilities that are kept.
        min_p: smallest probability that is kept, relative to the largest one.
        eos_ids: at most 8 ids that end a text.
        remaining: (B,) tokens that each row may still emit.
        active: (B,) bool; of other rows nothing is read.
        is_probs: `target` and `draft` hold probabilities.

    Returns:
        The path, and what every row emits.

    Raises:
        TypeError, ValueError: as `verify`.

    Source: arXiv 2305.09781; without replacement, arXiv 2402.14160 (recursive rejection sampling).

    Example:
        >>> import torch
        >>> logits = torch.eye(4)[None]
        >>> out = verify_tree(logits, torch.tensor([[9, 3, 0, 2]]), torch.tensor([[-1, 0, 0, 2]]))
        >>> out.path, out.tokens
        (tensor([[ 0,  2,  3, -1]], dtype=torch.int32), tensor([[ 0,  2,  3, -1]]))
    """
    op = "verify_tree"
    _check_tensors(op, target=target, tokens=tokens, parent=parent)
    if rule not in TREE_RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(TREE_RULES)}, got {rule!r}")
    check(tokens.dim() == 2, f"{op}: tokens must have shape (b, n), got {tuple(tokens.shape)}")
    results = _op.speculative_verify_tree(
        _logits(target),
        _as(tokens, torch.int64),
        _as(parent, torch.int64),
        TREE_RULES[rule],
        None if draft is None else _logits(draft),
        replacement,
        _as(seeds, torch.int64),
        _as(positions, torch.int64),
        *_warp(temperature, top_k, top_p, min_p, tokens.shape[0], target, is_probs, op),
        list(eos_ids),
        _as(remaining, torch.int32),
        active,
        is_probs,
    )
    return TreeOut(*results)


def propose(
    logits: Tensor,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    race: bool = False,
) -> Proposal:
    """Draw one draft for every row.

    Args:
        logits: (B, Vd), dtypes and strides as `verify`.
        seeds: (B,) int64; needed unless `temperature` is the number 0.
        positions: (B,) int64, of the token that is drawn.
        temperature: as `verify` will be given, like all cuts; rows with 0 get the largest logit.
        top_k: ids kept; 0: all.
        top_p: sum of the probabilities that are kept.
        min_p: smallest probability that is kept, relative to the largest one.
        race: draw as the rule "coupled" does, with the noise that it shares with the target; then
            `stats` are zeros, because this rule needs none.

    Returns:
        The drafts, and the statistics that `verify` takes as `draft_stats`.

    Raises:
        TypeError, ValueError: as `verify`.

    Example:
        >>> import torch
        >>> propose(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0).ids
        tensor([1])
    """
    op = "propose"
    _check_tensors(op, logits=logits)
    check(logits.dim() == 2, f"{op}: logits must have shape (b, ids), got {tuple(logits.shape)}")
    rows = logits.shape[0]
    if seeds is None:
        greedy = not isinstance(temperature, Tensor) and temperature == 0
        check(greedy, f"{op}: seeds must be given where temperature is not 0")
        seeds = positions = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    if positions is None:
        raise ValueError(f"{op}: positions must be given with seeds")
    return Proposal(
        *_op.speculative_propose(
            _logits(logits),
            _as(seeds, torch.int64),
            _as(positions, torch.int64),
            *_warp(temperature, top_k, top_p, min_p, rows, logits, False, op),
            race,
        )
    )


def _check_tensors(op: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def _logits(t: Tensor) -> Tensor:
    if t.dtype == torch.float64:
        t = t.float()
    return t if t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Small tensors of any integer type, in the one that the operator takes."""
    if t is None or t.dtype == dtype or t.dtype.is_floating_point or t.dtype == torch.bool:
        return t
    return t.to(dtype)


def _warp(
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    rows: int,
    like: Tensor,
    is_probs: bool,
    op: str,
) -> list[Tensor | None]:
    """Values of each row; None: the neutral one everywhere."""
    check(
        isinstance(temperature, Tensor)
        or temperature == 0
        or (not is_probs and 1e-5 <= temperature <= 1e4)
        or temperature == 1,
        f"{op}: temperature must be 0 or in [1e-5, 1e4], and of probabilities 0 or 1, got "
        f"{temperature}",
    )
    check(
        isinstance(top_k, Tensor) or 0 <= top_k < 2**31,
        f"{op}: top_k must be at least 0, got {top_k}",
    )
    check(
        isinstance(top_p, Tensor) or 0 < top_p <= 1, f"{op}: top_p must be in (0, 1], got {top_p}"
    )
    check(
        isinstance(min_p, Tensor) or 0 <= min_p <= 1, f"{op}: min_p must be in [0, 1], got {min_p}"
    )
    out: list[Tensor | None] = []
    for value, neutral, dtype in (
        (temperature, 1, torch.float32),
        (top_k, 0, torch.int32),
        (top_p, 1, torch.float32),
        (min_p, 0, torch.float32),
    ):
        if isinstance(value, Tensor):
            out.append(value.to(dtype))
        elif value == neutral:
            out.append(None)
        else:
            out.append(torch.full((rows,), value, dtype=dtype, device=like.device))
    return out


def _parameters(
    rule: str, given: Mapping[str, Any], op: str
) -> tuple[list[float], dict[str, Tensor | None]]:
    """Numbers in the order of the operator, and tensors."""
    defaults = RULES[rule][1]
    for name in given:
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"{op}: params of the rule {rule} are {known}, got {name!r}")
    numbers: list[float] = []
    tensors: dict[str, Tensor | None] = dict.fromkeys(_TENSORS)
    for name, default in defaults.items():
        value = given.get(name, default)
        if name in _TENSORS:
            if value is None:
                raise ValueError(f"{op}: params must hold {name} for the rule {rule}")
            _check_tensors(op, **{name: value})
            tensors[name] = value
        elif name in _CHOICES:
            choices = _CHOICES[name]
            if value not in choices:
                raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")
            numbers.append(choices.index(value))
        elif value is None:  # delta of the rule relaxed
            numbers.append(-1.0)
        elif isinstance(value, (int, float)) and not math.isnan(value):
            check(value >= 0, f"{op}: {name} must not be negative, got {value}")
            numbers.append(value)
        else:
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return numbers, tensors
