"""Attention over shared cache blocks and writes to them, over `torch.ops.alignops.attention_*`.

Shape letters: W workers of a plan, T_w new tokens of worker w, T the most of them, R their sum, Hq
query and Hkv KV heads, D and Dv columns of keys and values, P slots per page, B blocks of the plan,
L layers, F pairs of rotary dimensions.

New tokens come packed, (R, H, D) in worker order, or as a batch (W, H, T, D) whose valid tokens are
the last ones of each row. Nothing here is differentiable: gradients flow through
`alignops.reference.attention.concurrent_attention`.

Source: arXiv 2504.06261 (Hogwild! Inference), section 3: rotated queries instead of rotated keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignops._checks import (
    check,
    check_float_dtype,
    check_layout,
    dtype_name,
)

if TYPE_CHECKING:
    from alignops.attention.plan import Plan
    from alignops.attention.pool import KVPool

_op = torch.ops.alignops

#: The most columns of a head.
MAX_COLUMNS = 1024


def concurrent_attention(
    q: Tensor,
    pool: KVPool,
    layer: int,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of the new tokens of all workers over the blocks that each of them sees.

    A key is read once for all workers: it lies rotated by its index in its block, and the query is
    rotated by what is missing. With gain and bias of (worker, block) the score of a key is
    ``s = softcap(gain * scale * (R(delta) q) . k) + bias``, and one softmax runs over the view.

    Args:
        q: (R, Hq, D) or (W, Hq, T, D) in float32, bfloat16 or float16: unrotated, or rotated by the
            index in the worker's own block, as the plan's workspace expects it. Stride 1 in D.
        pool: keys and values, in the dtype of `q`, or 16 bits wide where `q` is float32.
        layer: number of the layer in the pool.
        plan: of the step.
        scale: factor of q . k, default D^-0.5.
        softcap: scores become ``softcap * tanh(s / softcap)``; None: they stay.
        window: a key is seen by queries less than `window` positions after it; None: by all.
        sinks: (Hq,) float32, one more logit per head, without a value.
        out: tensor for the result, (R, Hq, Dv) and contiguous; only with packed `q`.
        return_lse: also return the natural logarithm of the sum of the exponentials, sinks
            included.
        return_mass: also return which part of the probability fell on each block of `plan.blocks`.

    Returns:
        out: (R, Hq, Dv) or (W, Hq, T, Dv) in the dtype of `q`; then, if asked for, in this order,
        lse: (R, Hq) or (W, Hq, T) float32; mass: (R, Hq, B) or (W, Hq, T, B) float32. A token that
        sees nothing, and what is not a token, gives 0, -inf and 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: an argument requires a gradient.
        StalePlan: the plan has been committed or aborted, or a layout has changed.

    Source: arXiv 2504.06261, section 3.
    """
    op = "concurrent_attention"
    plan.require(layer, "attend")
    k, v = pool.k[layer], pool.v[layer]
    _refuse_gradients(op, q=q, sinks=sinks)
    packed = _packed(q, plan)
    rows, heads = packed.shape[:2]
    check(
        heads > 0 and heads % k.shape[1] == 0,
        f"{op}: q must have a multiple of {k.shape[1]} heads (those of the pool), got {heads}",
    )
    if out is None:
        out = packed.new_empty(rows, heads, v.shape[-1])
    else:
        check(q.dim() == 3, f"{op}: out must be None for q with 4 dimensions, got a tensor")
    lse = packed.new_empty(rows, heads, dtype=torch.float32) if return_lse else None
    mass = None
    if return_mass:
        mass = packed.new_empty(rows, heads, len(plan.blocks), dtype=torch.float32)
    _op.attention_concurrent_(
        packed,
        k,
        v,
        plan.data,
        sinks,
        *_rotary(pool, layer),
        q.shape[-1] ** -0.5 if scale is None else scale,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        out,
        lse,
        mass,
        plan.scratch(heads, k.shape[1], v.shape[-1], return_mass),
    )
    results = [t for t in (out, lse, mass) if t is not None]
    if q.dim() == 4:
        fills = (0.0, float("-inf"), 0.0) if return_lse else (0.0, 0.0)
        results = [
            plan.unpack(t, q.shape[2], fill) for t, fill in zip(results, fills, strict=False)
        ]
    return results[0] if len(results) == 1 else tuple(results)


def append_kv(pool: KVPool, layer: int, plan: Plan, k: Tensor, v: Tensor) -> None:
    """New keys and values of a layer go to the slots that the plan has reserved.

    All of a step's keys and values of a layer are appended before anything attends to them. Keys
    that arrive unrotated are rotated by their index in their block, in float32, and rounded once.

    Args:
        pool: is written.
        layer: number of the layer in the pool.
        plan: of the step.
        k: (R, Hkv, D) or (W, Hkv, T, D) in the pool's dtype or float32.
        v: (R, Hkv, Dv) or (W, Hkv, T, Dv).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: an argument requires a gradient.
        StalePlan: the plan has been committed or aborted, or a layout has changed.
        StepError: the layer has been appended in this step, or one before it has not.

    Source: arXiv 2504.06261, section 3.
    """
    op = "append_kv"
    _refuse_gradients(op, k=k, v=v)
    plan.require(layer, "append")
    _op.attention_append_(
        _packed(k, plan),
        _packed(v, plan),
        plan.data,
        *_rotary(pool, layer),
        pool.k[layer],
        pool.v[layer],
    )


def rewrite_kv(pool: KVPool, runs: Tensor, rotations: Sequence[Tensor]) -> None:
    """Runs of slots move to other pages, in every layer, their keys rotated by a constant.

    Args:
        pool: is written.
        runs: (N, 4) int64 on the device of the pool: source slot, target slot, tokens, row of
            `rotations` or -1. A slot is P times the page plus the place in it. A run stays inside
            one page on either side; no page is source and target in one call, and no slot is a
            target twice. Without a rotation, keys are copied bit by bit; values always are.
        rotations: for each rope type of the pool (rows, F, 2) float32, cosines and sines.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, a run leaves its page.

    Source: arXiv 2504.06261, section 3; the paper rotates keys of finished steps once.
    """
    spec_of = [-1 if i is None else i for i in pool.layer_spec]
    specs = [None if i < 0 else pool.specs[i] for i in spec_of]
    _op.attention_rewrite_(
        list(pool.k),
        list(pool.v),
        runs,
        list(rotations),
        spec_of,
        [0 if s is None else s.offset for s in specs],
        [s is not None and s.interleaved for s in specs],
    )


def _refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{op}: {name} must not require a gradient, got one; "
                "alignops.reference.attention.concurrent_attention is differentiable"
            )


def _rotary(pool: KVPool, layer: int) -> tuple[int, int, bool]:
    """Rope type, first rotary dimension and pair order of a layer."""
    index = pool.layer_spec[layer]
    if index is None:
        return -1, 0, False
    spec = pool.specs[index]
    return index, spec.offset, spec.interleaved


def _packed(x: Tensor, plan: Plan) -> Tensor:
    """(R, H, D) of either form."""
    return x if x.dim() == 3 else plan.rows_of(x)


# --------------------------------------------------------------------------------------------------
# Fake kernels: the checks that do not need the numbers of a plan


def _check_cache(t: Tensor, op: str, argument: str) -> None:
    check_float_dtype(t.dtype, op, argument)
    check(t.dim() == 4, f"{op}: {argument} must have 4 dimensions, got shape {tuple(t.shape)}")
    columns = t.shape[3]
    check(
        1 <= columns <= MAX_COLUMNS,
        f"{op}: {argument} must have 1..{MAX_COLUMNS} columns, got {columns}",
    )
    check(
        t.stride(3) == 1 and t.stride(2) == columns,
        f"{op}: {argument} must have contiguous slots, got strides {t.stride()}",
    )


def _check_caches(k: Tensor, v: Tensor, op: str) -> None:
    _check_cache(k, op, "k")
    _check_cache(v, op, "v")
    check(
        v.dtype == k.dtype,
        f"{op}: v must be {dtype_name(k.dtype)} (as k), got {dtype_name(v.dtype)}",
    )
    check(
        v.shape[:3] == k.shape[:3],
        f"{op}: v must have pages, heads and slots of k, {tuple(k.shape)}, got shape "
        f"{tuple(v.shape)}",
    )
    check(k.shape[1] >= 1, f"{op}: k must have at least one head, got shape {tuple(k.shape)}")


def _check_apart(t: Tensor, op: str, argument: str) -> None:
    size, apart = t.shape[2] * t.shape[3], True
    for stride, count in sorted((t.stride(d), t.shape[d]) for d in (0, 1)):
        if count > 1:
            apart = apart and stride >= size
            size += (count - 1) * stride
    check(apart, f"{op}: {argument} must not overlap itself, got strides {t.stride()}")


def _check_packed(t: Tensor, op: str, argument: str) -> None:
    check_float_dtype(t.dtype, op, argument)
    check(t.dim() == 3, f"{op}: {argument} must have 3 dimensions, got shape {tuple(t.shape)}")
    check(
        t.shape[2] <= 1 or t.stride(2) == 1 or t.shape[0] == 0,
        f"{op}: {argument} must have stride 1 in the last dimension, got strides {t.stride()}",
    )


def _check_plan(plan: Tensor, op: str) -> None:
    check(plan.dtype == torch.int64, f"{op}: plan must be int64, got {dtype_name(plan.dtype)}")
    check(
        plan.dim() == 1 and plan.is_contiguous(),
        f"{op}: plan must be contiguous with one dimension, got shape {tuple(plan.shape)}",
    )


@torch.library.register_fake("alignops::attention_concurrent_")
def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sinks: Tensor | None,
    rope: int,
    rotary_offset: int,
    interleaved: bool,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
    lse: Tensor | None,
    mass: Tensor | None,
    scratch: Tensor,
) -> None:
    """Raise unless shapes, dtypes and layouts are those that the operator takes."""
    op = "attention_concurrent_"
    _check_packed(q, op, "q")
    _check_caches(k, v, op)
    check(
        k.dtype == q.dtype or q.dtype == torch.float32,
        f"{op}: k must be {dtype_name(q.dtype)} (as q), got {dtype_name(k.dtype)}",
    )
    rows, heads, columns = q.shape
    check(
        columns == k.shape[3],
        f"{op}: q must have {k.shape[3]} columns (as k), got shape {tuple(q.shape)}",
    )
    check(
        heads >= 1 and heads % k.shape[1] == 0,
        f"{op}: q must have a multiple of {k.shape[1]} heads (those of k), got {heads}",
    )
    check(softcap >= 0, f"{op}: softcap must be 0 (none) or positive, got {softcap}")
    check(window >= 0, f"{op}: window must be 0 (none) or positive, got {window}")
    if sinks is not None:
        check_layout(sinks, torch.float32, (heads,), op, "sinks")
    check_layout(out, q.dtype, (rows, heads, v.shape[3]), op, "out")
    if lse is not None:
        check_layout(lse, torch.float32, (rows, heads), op, "lse")
    check(
        scratch.dtype == torch.uint8 and scratch.dim() == 1 and scratch.is_contiguous(),
        f"{op}: scratch must be contiguous uint8 with one dimension, got "
        f"{dtype_name(scratch.dtype)} of shape {tuple(scratch.shape)}",
    )
    _check_plan(plan, op)
    if mass is not None:
        blocks = mass.shape[2] if mass.dim() == 3 else 0
        check_layout(mass, torch.float32, (rows, heads, blocks), op, "mass")
    check(rope >= -1, f"{op}: rope must be -1 or a type of plan, got {rope}")
    check(
        0 <= rotary_offset <= columns,
        f"{op}: rotary_offset must be in 0..{columns}, got {rotary_offset}",
    )


@torch.library.register_fake("alignops::attention_scratch")
def _(plan: Tensor, q_heads: int, kv_heads: int, v_head_dim: int, mass: bool) -> int:
    op = "attention_scratch"
    check(
        kv_heads >= 1 and q_heads >= kv_heads and q_heads % kv_heads == 0,
        f"{op}: q_heads must be a multiple of kv_heads={kv_heads}, got {q_heads}",
    )
    check(
        1 <= v_head_dim <= MAX_COLUMNS,
        f"{op}: v_head_dim must be in 1..{MAX_COLUMNS}, got {v_head_dim}",
    )
    _check_plan(plan, op)
    return torch.library.get_ctx().new_dynamic_size()  # type: ignore[return-value]


@torch.library.register_fake("alignops::attention_append_")
def check_append(
    k_new: Tensor,
    v_new: Tensor,
    plan: Tensor,
    rope: int,
    rotary_offset: int,
    interleaved: bool,
    k: Tensor,
    v: Tensor,
) -> None:
    """Raise unless shapes, dtypes and layouts are those that the operator takes."""
    op = "attention_append_"
    _check_packed(k_new, op, "k_new")
    _check_packed(v_new, op, "v_new")
    _check_caches(k, v, op)
    _check_apart(k, op, "k")
    _check_apart(v, op, "v")
    rows = k_new.shape[0]
    for name, t, cache in (("k_new", k_new, k), ("v_new", v_new, v)):
        check(
            t.dtype in (k.dtype, torch.float32),
            f"{op}: {name} must be float32 or {dtype_name(k.dtype)} (as k), got "
            f"{dtype_name(t.dtype)}",
        )
        shape = (rows, k.shape[1], cache.shape[3])
        check(
            t.shape == shape,
            f"{op}: {name} must have shape {shape}, got {tuple(t.shape)}",
        )
    _check_plan(plan, op)
    check(rope >= -1, f"{op}: rope must be -1 or a type of plan, got {rope}")
    check(
        0 <= rotary_offset <= k.shape[3],
        f"{op}: rotary_offset must be in 0..{k.shape[3]}, got {rotary_offset}",
    )


@torch.library.register_fake("alignops::attention_rewrite_")
def check_rewrite(
    k: list[Tensor],
    v: list[Tensor],
    runs: Tensor,
    rotations: list[Tensor],
    rope: list[int],
    rotary_offset: list[int],
    interleaved: list[bool],
) -> None:
    """Raise unless shapes, dtypes and layouts are those that the operator takes."""
    op = "attention_rewrite_"
    layers = len(k)
    check(len(v) == layers, f"{op}: v must have {layers} tensors (as k), got {len(v)}")
    for name, count in (
        ("rope", len(rope)),
        ("rotary_offset", len(rotary_offset)),
        ("interleaved", len(interleaved)),
    ):
        check(
            count == layers,
            f"{op}: {name} must have {layers} entries (one per layer), got {count}",
        )
    check(runs.dtype == torch.int64, f"{op}: runs must be int64, got {dtype_name(runs.dtype)}")
    check(
        runs.dim() == 2 and runs.shape[1] == 4 and runs.is_contiguous(),
        f"{op}: runs must be contiguous with shape (N, 4), got {tuple(runs.shape)}",
    )
    for t in rotations:
        check(
            t.dtype == torch.float32, f"{op}: rotations must be float32, got {dtype_name(t.dtype)}"
        )
        check(
            t.dim() == 3 and t.shape[2] == 2 and t.is_contiguous(),
            f"{op}: rotations must be contiguous with shape (rows, F, 2), got {tuple(t.shape)}",
        )
    for keys, vals, index, offset in zip(k, v, rope, rotary_offset, strict=True):
        _check_caches(keys, vals, op)
        _check_apart(keys, op, "k")
        _check_apart(vals, op, "v")
        check(
            keys.shape[0] == k[0].shape[0] and keys.shape[2] == k[0].shape[2],
            f"{op}: k must have the same pages in all layers, got shapes {tuple(k[0].shape)} and "
            f"{tuple(keys.shape)}",
        )
        check(
            -1 <= index < len(rotations),
            f"{op}: rope must be -1 or one of {len(rotations)} rotations, got {index}",
        )
        pairs = 0 if index < 0 else rotations[index].shape[1]
        columns = keys.shape[3]
        check(
            offset >= 0 and 2 * pairs <= columns - offset,
            f"{op}: rotary_offset must leave room for {2 * pairs} of {columns} columns, got "
            f"{offset}",
        )


@torch.library.register_fake("alignops::attention_rotations")
def _(inv_freq: Tensor, positions: Tensor) -> Tensor:
    op = "attention_rotations"
    check(
        inv_freq.dtype == torch.float32,
        f"{op}: inv_freq must be float32, got {dtype_name(inv_freq.dtype)}",
    )
    check(
        inv_freq.dim() == 1 and inv_freq.is_contiguous(),
        f"{op}: inv_freq must be contiguous with one dimension, got shape {tuple(inv_freq.shape)}",
    )
    check(
        positions.dtype == torch.int64,
        f"{op}: positions must be int64, got {dtype_name(positions.dtype)}",
    )
    return inv_freq.new_empty((*positions.shape, inv_freq.shape[0], 2))
