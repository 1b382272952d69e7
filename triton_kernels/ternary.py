"""Triton kernels of the ternary core: matmul for many tokens, fake quantization.

y^T = T x^T for tiles of BN rows and BM tokens: T is decoded in registers to int8, {-1, 0, 1}, and
multiplied on tensor cores, by int8 tokens with int32 sums (exact) or by bfloat16 / float16 tokens
with float32 sums (products are exact). float32 tokens are cut into three bfloat16 parts of 8
mantissa bits. The dense int8 weight of the head takes the same path without decoding. Scales are
applied to the sums, at every K step where there are scale groups. Per tile and K step: 5 BN BK / 32
bytes of weight, about 8 integer operations per weight to decode, shared by BM tokens.

Weights lie in the layout of csrc/ternary/cuda/layout.h, which the C++ kernels for few tokens read
too. In Triton because one source serves the tensor-core tiles of all dtypes. Source: arXiv
2601.07892, section 3. A token that holds Inf or NaN may give NaN in all its outputs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning

ACT_NONE, ACT_A8, ACT_A8G = 0, 1, 2
ACT_GROUP = 256  # columns that share an activation scale in mode a8g

# Value plus one of lane p of a code: bits 2 idx and 2 idx + 1 of the p-th constant.
LANE_0 = tl.constexpr(0xAAAAAA55 - (1 << 32))
LANE_1 = tl.constexpr(0x222255AA)
LANE_2 = tl.constexpr(0x0A552222)
LANE_3 = tl.constexpr(0x550A0A0A)


@triton.jit
def _ternary_tile(packed, rows, inside, first, column_tiles, BN: tl.constexpr, BK: tl.constexpr):
    """T of BN rows and BK columns from `first` on, int8. A cell is 32 columns of one row."""
    cells = first // 32 + tl.arange(0, BK // 32)
    tiles = (rows // 32).to(tl.int64)[:, None] * column_tiles + (cells // 4)[None, :]
    lanes = 4 * (rows % 8)[:, None] + (cells % 4)[None, :]
    w = (rows % 32 // 8)[:, None]
    words = packed + tiles * 160
    idx = tl.load(words + 4 * lanes + w, mask=inside[:, None], other=0)
    sign = tl.load(words + 128 + lanes, mask=inside[:, None], other=0) >> (2 * w)

    column = tl.arange(0, 32)[None, None, :]
    block, lane = column // 4, column % 4
    nibble = (idx[:, :, None] >> (4 * block)) & 15
    negative = (sign[:, :, None] >> (8 * (block // 2) + block % 2)) & 1
    table = tl.where(
        lane < 2, tl.where(lane == 0, LANE_0, LANE_1), tl.where(lane == 2, LANE_2, LANE_3)
    )
    value = ((table >> (2 * nibble)) & 3) - 1
    value = tl.where(negative == 1, -value, value)
    return tl.reshape(value.to(tl.int8), (BN, BK))


@triton.jit
def _upper(x):
    """float32 with the lower 16 mantissa bits cleared: a bfloat16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


# A compilation per kind of product, not per shape: only n, k and ldx decide about vector accesses.
@triton.jit(do_not_specialize=["m", "ld_scale", "group", "groups", "act_groups", "column_tiles"])
def linear_kernel(
    x, weight, weight_scale, act_scale, bias, y,
    m, n, k, ldx, ld_scale, group, groups, act_groups, column_tiles,
    TERNARY: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr, INT8: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Computes x W^T; x (m, k) is int8 with act_scale (m, act_groups), or float."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    row_inside, token_inside = rows < n, tokens < m
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    total = tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BN, BM), SUM)
    for first in range(0, k, BK):
        columns = first + tl.arange(0, BK)
        column_inside = columns < k
        if TERNARY:
            w = _ternary_tile(weight, rows, row_inside, first, column_tiles, BN, BK)
        else:
            at = weight + rows.to(tl.int64)[:, None] * k + columns[None, :]
            w = tl.load(at, mask=row_inside[:, None] & column_inside[None, :], other=0)
        at = x + tokens.to(tl.int64)[None, :] * ldx + columns[:, None]
        part = tl.load(at, mask=column_inside[:, None] & token_inside[None, :], other=0)
        if INT8:
            acc = tl.dot(w, part, acc, out_dtype=tl.int32)
        elif part.dtype == tl.float32:
            w = w.to(DOT)
            high = _upper(part)
            rest = tl.where(tl.abs(high) == float("inf"), 0.0, part - high)
            middle = _upper(rest)
            acc = tl.dot(w, high.to(DOT), acc)
            acc = tl.dot(w, middle.to(DOT), acc)
            acc = tl.dot(w, (rest - middle).to(DOT), acc)
        else:
            acc = tl.dot(w.to(DOT), part.to(DOT), acc)
        if GROUPED:
            g = tl.minimum(first // group, groups - 1)
            scale = tl.load(weight_scale + g * ld_scale + rows, mask=row_inside, other=0.0)[:, None]
            if INT8:
                at = act_scale + tokens * act_groups + tl.minimum(first // 256, act_groups - 1)
                scale = scale * tl.load(at, mask=token_inside, other=0.0)[None, :]
            total += acc.to(tl.float32) * scale
            acc = tl.zeros((BN, BM), SUM)
    if not GROUPED:
        scale = tl.load(weight_scale + rows, mask=row_inside, other=0.0)[:, None]
        if INT8:
            scale = scale * tl.load(act_scale + tokens, mask=token_inside, other=0.0)[None, :]
        total = acc.to(tl.float32) * scale
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    at = y + tokens.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=row_inside[:, None] & token_inside[None, :])


@triton.jit
def stage_kernel(x, q, scale, k, ldx, group, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One token and scale group: q = rint(x * (127 / amax)) in block order, scale = amax / 127."""
    token, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = g * group
    end = tl.minimum(begin + group, k)
    amax = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.abs(
            tl.load(x + token * ldx + columns, mask=columns < end, other=0.0).to(tl.float32)
        )
        amax = tl.maximum(amax, tl.where(value <= 3.402823466e38, value, float("inf")))
    top = tl.max(amax, 0)
    finite = top < float("inf")
    zero = (top <= 1e-30) | (top == float("inf"))
    safe = tl.where(zero, 1.0, top)
    inverse = tl.where(zero, 0.0, tl.div_rn(127.0, safe))
    unit = tl.where(finite, tl.where(zero, 0.0, tl.div_rn(safe, 127.0)), float("nan"))
    tl.store(scale + token * tl.num_programs(1) + g, unit)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        column = place if STRIDE == 1 else place // 64 * 64 + place % 64 // 4 + 16 * (place % 4)
        value = tl.load(x + token * ldx + column, mask=place < end, other=0.0).to(tl.float32)
        value = tl.where(zero, 0.0, value) * inverse
        # To the nearest integer, ties to even: 1.5 * 2^23 has no bits below 1.
        value = (value + 12582912.0) - 12582912.0
        value = tl.minimum(tl.maximum(value, -127.0), 127.0)
        tl.store(q + token * k + place, value.to(tl.int8), mask=place < end)


@triton.jit
def _ternary_chunk(w, rows, inside, chunk, begin, end, ld, STRIDE: tl.constexpr):
    """64 columns as blocks (ROWS, 16, 4): values, columns, which are real, which are kept."""
    j, p = tl.arange(0, 16)[None, :, None], tl.arange(0, 4)[None, None, :]
    columns = chunk + (4 * j + p if STRIDE == 1 else j + 16 * p)
    real = (columns >= begin) & (columns < end)
    mask = real & inside[:, None, None]
    value = tl.load(w + rows[:, None, None] * ld + columns, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.where(real, tl.abs(value), -1.0)  # padding lanes lose first
    zero = tl.argmin(magnitude, 2, tie_break_left=True)
    return value, columns, mask, mask & (p != zero[:, :, None])


@triton.jit
def fake_quant_kernel(w, lam, out, n, k, ld, group, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Stores scale * T + lam * w for ROWS rows of one scale group; sums as in the CPU quantizer."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n
    begin = tl.program_id(1) * group
    end = tl.minimum(begin + group, k)
    partial = tl.zeros((ROWS, 16), tl.float64)
    for chunk in range(begin // 64 * 64, end, 64):
        value, columns, mask, keep = _ternary_chunk(w, rows, inside, chunk, begin, end, ld, STRIDE)
        partial += tl.sum(tl.where(keep, tl.abs(value), 0.0).to(tl.float64), 2)
    partial = tl.sum(tl.reshape(partial, (ROWS, 2, 8)), 1)
    partial = tl.sum(tl.reshape(partial, (ROWS, 2, 4)), 1)
    partial = tl.sum(tl.reshape(partial, (ROWS, 2, 2)), 1)
    kept = 3 * ((end - begin) // 4) + (end - begin) % 4
    scale = (tl.sum(partial, 1) / kept.to(tl.float64)).to(tl.float32)[:, None, None]
    strength = tl.load(lam)
    for chunk in range(begin // 64 * 64, end, 64):
        value, columns, mask, keep = _ternary_chunk(w, rows, inside, chunk, begin, end, ld, STRIDE)
        ternary = tl.where(keep, tl.where(value < 0, -scale, scale), 0.0)
        effective = ternary + strength * value
        tl.store(
            out + rows[:, None, None] * k + columns, effective.to(out.dtype.element_ty), mask=mask
        )


def _device(t: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _stage(x: Tensor, act: int, stride: int) -> tuple[Tensor, Tensor | None, int]:
    """Tokens in block order, their scales, and the number of these per token (0: x itself)."""
    m, k = x.shape
    if act == ACT_NONE:
        if stride != 1:
            x = x.unflatten(1, (-1, 4, stride)).transpose(2, 3).reshape(m, k)
        return x if x.stride(1) == 1 else x.contiguous(), None, 0
    group = ACT_GROUP if act == ACT_A8G else k
    groups = triton.cdiv(k, group)
    q = x.new_empty((m, k), dtype=torch.int8)
    scale = x.new_empty((m, groups), dtype=torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    block = min(1024, triton.next_power_of_2(group))
    stage_kernel[(m, groups)](
        x, q, scale, k, x.stride(0), group, STRIDE=stride, BLOCK=block, enable_fp_fusion=False
    )
    return q, scale, groups


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    k: int,
    group: int,
    stride: int,
    act: int,
    config: _tuning.Config | None = None,
) -> None:
    """Fills y (..., n) as the operator `ternary_linear` of x (..., k). Arguments are not checked.

    packed is in the layout for CUDA, scale (groups, at least n). `config` fixes the tile sizes.
    """
    _matmul(x, packed.view(torch.int32), scale, bias, y, k, group, stride, act, True, config)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    act: int,
    config: _tuning.Config | None = None,
) -> None:
    """Fills y (..., n) as `ternary_int8_linear` of x (..., k). Arguments are not checked."""
    k = weight.shape[1]
    _matmul(x, weight, scale[None], bias, y, k, k, 1, act, False, config)


def fake_quant(w: Tensor, lam: Tensor, out: Tensor, group: int, stride: int, rows: int = 8) -> None:
    """Fills out (n, k) as `ternary_fake_quant` of w (n, k). Arguments are not checked."""
    n, k = w.shape
    if out.numel() == 0:
        return
    w = w if w.stride(1) == 1 else w.contiguous()
    with _device(w):
        fake_quant_kernel[(triton.cdiv(n, rows), triton.cdiv(k, group))](
            w, lam, out, n, k, w.stride(0), group, STRIDE=stride, ROWS=rows, enable_fp_fusion=False
        )


def _device(t: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _stage(x: Tensor, act: int, stride: int) -> tuple[Tensor, Tensor | None, int]:
    """Tokens in block order, their scales, and the number of these per token (0: x itself)."""
    m, k = x.shape
    if act == ACT_NONE:
        if stride != 1:
            x = x.unflatten(1, (-1, 4, stride)).transpose(2, 3).reshape(m, k)
        return x if x.stride(1) == 1 else x.contiguous(), None, 0
    group = ACT_GROUP if act == ACT_A8G else k
    groups = triton.cdiv(k, group)
    q = x.new_empty((m, k), dtype=torch.int8)
    scale = x.new_empty((m, groups), dtype=torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    block = min(1024, triton.next_power_of_2(group))
    stage_kernel[(m, groups)](
        x, q, scale, k, x.stride(0), group, STRIDE=stride, BLOCK=block, enable_fp_fusion=False
    )
    return q, scale, groups


def _matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    k: int,
    group: int,
    stride: int,
    act: int,
    ternary: bool,
    config: _tuning.Config | None,
) -> None:
    n = y.shape[-1]
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0 or n == 0:
        return
    with _device(x):
        tokens, act_scale, act_groups = _stage(rows, act, stride)
        groups = weight_scale.shape[0]
        # A K step lies in one scale group: groups are multiples of 32 columns, those of tokens 256.
        limit = ACT_GROUP if groups == 1 else min(group & -group, ACT_GROUP)
        # The interpreter cannot multiply bfloat16.
        dot = tl.float16 if x.dtype == torch.float16 else tl.bfloat16 if x.is_cuda else tl.float32

        def launch(c: _tuning.Config) -> None:
            grid = (triton.cdiv(n, c["BN"]), triton.cdiv(m, c["BM"]))
            linear_kernel[grid](
                tokens, weight, weight_scale, act_scale, bias, y,
                m, n, k, tokens.stride(0), weight_scale.stride(0), group, groups,
                act_groups, triton.cdiv(k, 128),
                TERNARY=ternary, GROUPED=groups > 1 or act_groups > 1, INT8=act_groups > 0,
                HAS_BIAS=bias is not None, DOT=dot, BM=c["BM"], BN=c["BN"], BK=min(c["BK"], limit),
                num_warps=c["num_warps"], num_stages=c["num_stages"], enable_fp_fusion=False,
            )  # fmt: skip

        name = "ternary_linear" if ternary else "ternary_int8_linear"
        name += "_grouped" if groups > 1 or act_groups > 1 else ""
        launch(config or _tuning.config(name, tokens, n, launch))
