"""Fake kernels of verification: the checks of the native code, and the shapes of the results.

Shape letters: B rows, K drafts, V ids, n nodes of a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignops._checks import check, check_float_dtype, check_layout

#: Numbers that each rule takes, by its code.
_COUNTS = (0, 0, 0, 0, 2, 3, 2, 5, 2, 0)
_MANY = 1 << 30
#: Names and ranges of these numbers.
_RANGES: dict[int, tuple[tuple[str, float, float], ...]] = {
    4: (("eps", 0, 1), ("delta", 0, 1e9)),
    5: (("m", 1, _MANY), ("r", 0, 1), ("delta", -1, 1)),
    6: (("t_single", 0, 1e9), ("t_acc", 0, 1e9)),
    7: (
        *(("p_th", 0, 1), ("top_n", 0, _MANY), ("trials", 1, 64), ("retry", 0, 2)),
        ("student_probs", 0, 1),
    ),
    8: (("gamma", 0, 1), ("eos_lookahead", 0, _MANY)),
}
_COUPLED, _RSD, _NUDGE, _SCRIPTED = 3, 7, 8, 9
_DRAWING = (1, 2, 6)
_TREE_RRS = 2
_MAX_EOS, _MAX_NODES, _LAW_STATS = 8, 64, 6


def _check_logits(t: Tensor, op: str, argument: str) -> int:
    check_float_dtype(t.dtype, op, argument)
    size = t.shape[-1]
    check(
        size <= 1 or t.stride(-1) == 1,
        f"{op}: {argument} must have stride 1 in the last dimension, got strides {t.stride()}",
    )
    check(
        0 < size < 2**31,
        f"{op}: {argument} must have 1 to 2^31 - 1 ids in the last dimension, got shape "
        f"{tuple(t.shape)}",
    )
    return size


def _check_draft(t: Tensor | None, b: int, n: int, size: int, op: str) -> None:
    if t is None:
        return
    check(
        t.dim() == 3 and t.shape[0] == b and t.shape[1] == n,
        f"{op}: draft must have shape ({b}, {n}, ids), got {tuple(t.shape)}",
    )
    own = _check_logits(t, op, "draft")
    check(own <= size, f"{op}: draft must have at most the {size} ids of target, got {own}")


def _check_optional(
    t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], op: str, argument: str
) -> None:
    if t is not None:
        check_layout(t, dtype, shape, op, argument)


def _check_warp(
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    b: int,
    is_probs: bool,
    op: str,
) -> None:
    _check_optional(temperature, torch.float32, (b,), op, "temperature")
    _check_optional(top_k, torch.int32, (b,), op, "top_k")
    _check_optional(top_p, torch.float32, (b,), op, "top_p")
    _check_optional(min_p, torch.float32, (b,), op, "min_p")
    for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        check(
            not is_probs or value is None,
            f"{op}: {name} must not be given for probabilities, got a tensor",
        )


def _check_seeds(
    seeds: Tensor | None, positions: Tensor | None, b: int, needed: bool, op: str
) -> None:
    check(seeds is not None or not needed, f"{op}: seeds must be given for this rule")
    check(
        (seeds is None) == (positions is None),
        f"{op}: positions must be given with seeds, and only then",
    )
    _check_optional(seeds, torch.int64, (b,), op, "seeds")
    _check_optional(positions, torch.int64, (b,), op, "positions")


def _check_params(rule: int, params: list[float], op: str) -> None:
    count = _COUNTS[rule]
    check(
        len(params) == count,
        f"{op}: params must be {count} numbers for this rule, got {len(params)}",
    )
    for value, (name, least, most) in zip(params, _RANGES.get(rule, ()), strict=True):
        check(
            least <= value <= most,
            f"{op}: params must have {name} in [{least}, {most}], got {value}",
        )


def _check_eos(eos_ids: list[int], op: str) -> None:
    check(
        len(eos_ids) <= _MAX_EOS,
        f"{op}: eos_ids must be at most {_MAX_EOS} ids, got {len(eos_ids)}",
    )


def _results(like: Tensor, b: int, width: int) -> tuple[Tensor, ...]:
    """accept_len to row_error of `VerifyOut`."""
    return (
        like.new_empty((b,), dtype=torch.int32),
        like.new_empty((b,), dtype=torch.int64),
        like.new_empty((b,), dtype=torch.int32),
        like.new_empty((b, width), dtype=torch.int64),
        like.new_empty((b + 1,), dtype=torch.int32),
        like.new_empty((b * width,), dtype=torch.int64),
        like.new_empty((b, width), dtype=torch.uint8),
        like.new_empty((b,), dtype=torch.uint8),
        like.new_empty((b,), dtype=torch.uint8),
    )


@torch.library.register_fake("alignops::speculative_verify")
def verify_outputs(
    target: Tensor,
    draft_ids: Tensor,
    draft: Tensor | None,
    draft_stats: Tensor | None,
    draft_lens: Tensor | None,
    cu: Tensor | None,
    rule: int,
    params: list[float],
    word_start: Tensor | None,
    given: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    eos_ids: list[int],
    remaining: Tensor | None,
    state: Tensor | None,
    active: Tensor | None,
    is_probs: bool,
) -> tuple[Tensor, ...]:
    """Results of `speculative_verify`, not yet filled."""
    op = "speculative_verify"
    check(
        draft_ids.dim() == 2,
        f"{op}: draft_ids must have shape (b, k), got {tuple(draft_ids.shape)}",
    )
    b, k = draft_ids.shape
    check_layout(draft_ids, torch.int64, (b, k), op, "draft_ids")
    check(0 <= rule < len(_COUNTS), f"{op}: rule must be 0 to {len(_COUNTS) - 1}, got {rule}")
    if cu is not None:
        fits, expected = target.dim() == 2, "(rows, ids)"
    else:
        fits = target.dim() == 3 and target.shape[0] == b and target.shape[1] == k + 1
        expected = f"({b}, {k + 1}, ids)"
    check(fits, f"{op}: target must have shape {expected}, got {tuple(target.shape)}")
    size = _check_logits(target, op, "target")
    _check_draft(draft, b, k, size, op)
    check(
        draft is not None or draft_stats is None,
        f"{op}: draft_stats must be given with draft only",
    )
    _check_optional(draft_stats, torch.int64, (b, k, _LAW_STATS), op, "draft_stats")
    _check_optional(draft_lens, torch.int32, (b,), op, "draft_lens")
    _check_optional(cu, torch.int32, (b + 1,), op, "cu")
    _check_params(rule, params, op)
    check(
        word_start is not None or rule != _NUDGE,
        f"{op}: word_start must be given for the rule nudge",
    )
    _check_optional(word_start, torch.bool, (size,), op, "word_start")
    check(
        given is not None or rule != _SCRIPTED,
        f"{op}: given must be given for the rule scripted",
    )
    _check_optional(given, torch.int32, (b,), op, "given")
    _check_optional(uniforms, torch.uint32, (b, k + 1, 2), op, "uniforms")
    needed = rule in (_COUPLED, _RSD) or (uniforms is None and rule in _DRAWING)
    _check_seeds(seeds, positions, b, needed, op)
    _check_warp(temperature, top_k, top_p, min_p, b, is_probs, op)
    _check_eos(eos_ids, op)
    _check_optional(remaining, torch.int32, (b,), op, "remaining")
    _check_optional(state, torch.uint8, (b,), op, "state")
    _check_optional(active, torch.bool, (b,), op, "active")
    return (
        *_results(target, b, k + 1),
        target.new_empty((b,), dtype=torch.uint8),
        target.new_empty((b,), dtype=torch.int32),
    )


@torch.library.register_fake("alignops::speculative_propose")
def propose_outputs(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    race: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `speculative_propose`, not yet filled."""
    op = "speculative_propose"
    check(logits.dim() == 2, f"{op}: logits must have shape (b, ids), got {tuple(logits.shape)}")
    b = logits.shape[0]
    _check_logits(logits, op, "logits")
    _check_seeds(seeds, positions, b, True, op)
    _check_warp(temperature, top_k, top_p, min_p, b, False, op)
    return (
        logits.new_empty((b,), dtype=torch.int64),
        logits.new_empty((b, _LAW_STATS), dtype=torch.int64),
        logits.new_empty((b,), dtype=torch.uint8),
    )


@torch.library.register_fake("alignops::speculative_verify_tree")
def verify_tree_outputs(
    target: Tensor,
    tokens: Tensor,
    parent: Tensor,
    rule: int,
    draft: Tensor | None,
    replacement: bool,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    eos_ids: list[int],
    remaining: Tensor | None,
    active: Tensor | None,
    is_probs: bool,
) -> tuple[Tensor, ...]:
    """Results of `speculative_verify_tree`, not yet filled."""
    op = "speculative_verify_tree"
    check(
        tokens.dim() == 2 and 1 <= tokens.shape[1] <= _MAX_NODES,
        f"{op}: tokens must have shape (b, n), n from 1 to {_MAX_NODES}, got {tuple(tokens.shape)}",
    )
    b, n = tokens.shape
    check_layout(tokens, torch.int64, (b, n), op, "tokens")
    check_layout(parent, torch.int64, (b, n), op, "parent")
    check(0 <= rule <= _TREE_RRS, f"{op}: rule must be 0 to {_TREE_RRS}, got {rule}")
    check(
        target.dim() == 3 and target.shape[0] == b and target.shape[1] == n,
        f"{op}: target must have shape ({b}, {n}, ids), got {tuple(target.shape)}",
    )
    size = _check_logits(target, op, "target")
    check(
        (draft is not None) == (rule == _TREE_RRS),
        f"{op}: draft must be given for the rule tree_rrs, and only then",
    )
    _check_draft(draft, b, n, size, op)
    _check_seeds(seeds, positions, b, rule != 0, op)
    _check_warp(temperature, top_k, top_p, min_p, b, is_probs, op)
    _check_eos(eos_ids, op)
    _check_optional(remaining, torch.int32, (b,), op, "remaining")
    _check_optional(active, torch.bool, (b,), op, "active")
    return (
        target.new_empty((b, n), dtype=torch.int32),
        *_results(target, b, n),
        target.new_empty((b,), dtype=torch.int32),
    )
