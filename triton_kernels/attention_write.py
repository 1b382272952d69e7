"""Writes to the pages of the cache: new keys and values, and pages that move.

`append_kernel`: one program per new row stores all its heads, keys rotated by their storage index
where they arrive unrotated. `rewrite_kernel`: runs of slots move to other pages, keys rotated by a
constant; the layers of one launch are a tuple. Rotations are in float32 with one rounding; without
a rotation bytes are copied. Letters as in `attention_plan`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_plan import (
    LONGEST,
    ROPE,
    ROW,
    ROWS,
    SEGMENTS,
    STEP,
    WORKERS,
    number,
    rotated,
)


@triton.jit(do_not_specialize=["rope", "offset", "pages"])
def append_kernel(
    k_new, v_new, plan, reals, k, v,
    new_k_r, new_k_h, new_v_r, new_v_h, k_p, k_h, k_s, v_p, v_h, v_s, pages, rope, offset,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, P: tl.constexpr,
    H_PAD: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (R): H = Hkv heads."""
    row = tl.program_id(0).to(tl.int64)
    if row >= number(plan, ROWS):
        return
    entry = plan + tl.load(plan + ROW) + row * 4
    head = tl.arange(0, H_PAD).to(tl.int64)
    slot = tl.load(entry + 2) + tl.zeros_like(head)
    page = slot // P
    inside = (head < H) & (slot >= 0) & (page < pages)
    column = tl.arange(0, D_PAD)
    pairs = tl.full((), 0, tl.int32)
    turns = reals
    raw = number(plan, STEP) == 1
    if ROTARY:
        if raw:
            spec = plan + tl.load(plan + ROPE) + 2 * rope
            pairs = tl.load(spec).to(tl.int32)
            turns = reals + 2 * tl.load(spec + 1)
    before = number(plan, SEGMENTS).to(tl.int64) * number(plan, WORKERS) + number(plan, LONGEST)
    turn = before + row + tl.zeros_like(head)
    key = rotated(
        k_new, row * new_k_r + head * new_k_h, inside, column, turns, pairs, turn, turn, False,
        offset, D, ROTARY, INTERLEAVED,
    )  # fmt: skip
    at = (page * k_p + slot % P * k_s + head * k_h)[:, None] + column[None, :]
    tl.store(k + at, key.to(k.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])

    column = tl.arange(0, DV_PAD)
    real = inside[:, None] & (column < DV)[None, :]
    at = (row * new_v_r + head * new_v_h)[:, None] + column[None, :]
    value = tl.load(v_new + at, mask=real, other=0.0)
    at = (page * v_p + slot % P * v_s + head * v_h)[:, None] + column[None, :]
    tl.store(v + at, value.to(v.dtype.element_ty), mask=real)


@triton.jit
def _one_of(layers, index, COUNT: tl.constexpr):
    """A tensor of a tuple, by a number that is known when the kernel runs."""
    chosen = layers[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, layers[i], chosen)
    return chosen


@triton.jit(do_not_specialize=["pages", "pairs", "offset", "count"])
def rewrite_kernel(
    k, v, runs, rotations, k_p, k_h, k_s, v_p, v_h, v_s, run_stride, count, pages, pairs, offset,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, P: tl.constexpr, LAYERS: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Grid (runs, share of a run, layers): LINES pairs of token and head at a time."""
    keys = _one_of(k, tl.program_id(2), LAYERS)
    values = _one_of(v, tl.program_id(2), LAYERS)
    run = runs + tl.program_id(0).to(tl.int64) * run_stride
    source, target, tokens = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    turn = tl.load(run + 3)
    if (turn < 0) | (turn >= count):
        pairs = pairs * 0
    column, v_column = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    turns = tl.zeros((LINES,), tl.int64) + turn
    step = tl.num_programs(1) * LINES
    for first in range(tl.program_id(1) * LINES, tokens.to(tl.int32) * H, step):
        line = first + tl.arange(0, LINES).to(tl.int64)
        token, head = line // H, line % H
        here, there = source + token, target + token
        inside = (token < tokens) & (here >= 0) & (there >= 0)
        inside &= (here < pages * P) & (there < pages * P)
        key = rotated(
            keys, here // P * k_p + here % P * k_s + head * k_h, inside, column, rotations, pairs,
            turns, turns, False, offset, D, ROTARY, INTERLEAVED,
        )  # fmt: skip
        at = (there // P * k_p + there % P * k_s + head * k_h)[:, None] + column[None, :]
        real = inside[:, None] & (column < D)[None, :]
        tl.store(keys + at, key.to(keys.dtype.element_ty), mask=real)
        real = inside[:, None] & (v_column < DV)[None, :]
        at = (here // P * v_p + here % P * v_s + head * v_h)[:, None] + v_column[None, :]
        value = tl.load(values + at, mask=real, other=0.0)
        at = (there // P * v_p + there % P * v_s + head * v_h)[:, None] + v_column[None, :]
        tl.store(values + at, value, mask=real)
