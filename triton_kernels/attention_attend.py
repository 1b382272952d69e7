"""Attention of all workers of a step over the pages of the cache: one read of keys and values.

A program has a KV head, a part of the axis of all keys (equal parts, across borders of segments)
and BM rows (row r of q and head j of the group are row r g + j). Of each segment it rotates its
queries by the plan's tables, in float32, and rounds them to the dtype of the product; every tile of
BN keys then serves all rows: S = Q K^T, online softmax in float32 and powers of two, A += P V.
Partial states (m, l, A) are merged by `reduce_kernel` in order of the parts, so results depend on
shapes and lengths only. With one part the first kernel writes the result.

Per program and tile: BN (D + Dv) elements read, 2 BM BN (D + Dv) operations. Columns come in two
pieces, a power of two and the rest padded to one (576 = 512 + 64). Source: "Hogwild! Inference",
arXiv 2504.06261. Letters as in `attention_plan`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_plan import (
    LONGEST,
    PAGE,
    PAIR,
    ROPE,
    ROW,
    ROWS,
    SEGMENT,
    SEGMENTS,
    STEP,
    TOKENS,
    WEIGHT,
    WORKERS,
    number,
    partition,
    rotated,
    seen,
    segment_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _tanh(x):
    """By its series near 0, where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = (series * square + 2.0 / 15) * square - 1.0 / 3
    large = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.25, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _product(a, b, acc):
    """Sum of acc and a b: float32 operands are multiplied as such."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _queries(
    q, at, planned, turns, pairs, turn, further, combine, offset, factor, turned,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Both pieces of the queries as a segment meets them: rotated, times `factor`, rounded.

    They pass through memory of the program, CHUNK columns at a time: rotations gather, and those
    of a whole tile would push the state out of the registers.
    """
    BM: tl.constexpr = factor.shape[0]
    source, line = q, at
    if ROTARY:
        source, line = turned, tl.arange(0, BM).to(tl.int64) * (D0 + D1)
        tl.debug_barrier()
        for first in range(0, D, CHUNK):
            column = first + tl.arange(0, CHUNK)
            x = rotated(
                q, at, planned, column, turns, pairs, turn, further, combine, offset, D, True,
                INTERLEAVED,
            )  # fmt: skip
            x = (x * factor[:, None]).to(ROUND)
            tl.store(source + line[:, None] + column[None, :], x, mask=(column < D)[None, :])
        tl.debug_barrier()
        factor = tl.full((BM,), 1.0, tl.float32)
    column = tl.arange(0, D0)
    inside = planned[:, None] & (column < D)[None, :]
    q0 = tl.load(source + line[:, None] + column[None, :], mask=inside, other=0.0)
    q0 = (q0 * factor[:, None]).to(ROUND).to(DOT)
    q1 = q0
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        inside = planned[:, None] & (column < D)[None, :]
        q1 = tl.load(source + line[:, None] + column[None, :], mask=inside, other=0.0)
        q1 = (q1 * factor[:, None]).to(ROUND).to(DOT)
    return q0, q1


@triton.jit
def _addresses(table, first, keys, real, stride, slot_stride, pages, P: tl.constexpr):
    """Offsets of keys in a pool tensor; pages are clamped to those that exist."""
    slot = first + keys
    page = tl.load(table + slot // P, mask=real, other=0)
    page = tl.minimum(tl.maximum(page, 0), pages - 1)
    return page * stride + (slot % P).to(tl.int64) * slot_stride


@triton.jit
def _one_by_one(
    acc, p, v, table, first, start, stop, lo, hi, v_p, v_s, pages, column, DV: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sum of acc and p v where v holds Inf or NaN that not all rows see: 0 times these is not 0."""
    for j in range(0, tl.minimum(stop - start, BN)):
        key = start + j
        at = _addresses(table, first, key, key < stop, v_p, v_s, pages, P)
        value = tl.load(v + at + column, mask=column < DV, other=0.0).to(tl.float32)
        share = tl.sum(tl.where(tl.arange(0, BN)[None, :] == j, p, 0.0), 1)
        sees = (key >= lo) & (key < hi)
        acc += tl.where(sees[:, None], share[:, None] * value[None, :], 0.0)
    return acc


@triton.jit
def _absorb(
    q0, q1, acc0, acc1, m, norm, of_block, k, v, table, first, start, stop, lo, hi, bias, softcap,
    k_p, k_s, v_p, v_s, pages,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    SOFTCAP: tl.constexpr, MASS: tl.constexpr, BORDER: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state with keys start <= i < stop, at most BN; all rows see them unless BORDER."""
    keys = start + tl.arange(0, BN)
    real = keys < stop
    at = _addresses(table, first, keys, real, k_p, k_s, pages, P)
    column = tl.arange(0, D0)
    if D0 > D:
        inside = (column < D)[:, None] & real[None, :]
    else:
        inside = real[None, :]
    tile = tl.load(k + at[None, :] + column[:, None], mask=inside, other=0.0)
    s = _product(q0, tile.to(DOT), tl.zeros((q0.shape[0], BN), tl.float32))
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        inside = (column < D)[:, None] & real[None, :]
        tile = tl.load(k + at[None, :] + column[:, None], mask=inside, other=0.0)
        s = _product(q1, tile.to(DOT), s)
    if SOFTCAP:
        s = softcap * LOG2E * _tanh(s / softcap)
    s += bias[:, None]
    if BORDER:
        visible = real[None, :] & (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        s = tl.where(visible, s, float("-inf"))
    else:
        s = tl.where(real[None, :], s, float("-inf"))

    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(m - base)
    p = tl.exp2(s - base[:, None])
    total = tl.sum(p, 1)
    norm = norm * shrink + total
    if MASS:
        of_block = of_block * shrink + total

    at = _addresses(table, first, keys, real, v_p, v_s, pages, P)
    column = tl.arange(0, DV0)
    if DV0 > DV:
        inside = real[:, None] & (column < DV)[None, :]
    else:
        inside = real[:, None]
    value = tl.load(v + at[:, None] + column[None, :], mask=inside, other=0.0)
    p = p.to(ROUND).to(DOT)
    acc0 = acc0 * shrink[:, None]
    finite = True
    if BORDER:
        finite = tl.max((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1) == 0
    if finite:
        acc0 = _product(p, value.to(DOT), acc0)
    elif BORDER:
        acc0 = _one_by_one(
            acc0, p.to(tl.float32), v, table, first, start, stop, lo, hi, v_p, v_s, pages, column,
            DV, BN, P,
        )  # fmt: skip
    if DV1 > 0:
        column = DV0 + tl.arange(0, DV1)
        inside = real[:, None] & (column < DV)[None, :]
        value = tl.load(v + at[:, None] + column[None, :], mask=inside, other=0.0)
        acc1 = acc1 * shrink[:, None]
        if BORDER:
            finite = tl.max((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1) == 0
        if finite:
            acc1 = _product(p, value.to(DOT), acc1)
        elif BORDER:
            acc1 = _one_by_one(
                acc1, p.to(tl.float32), v, table, first, start, stop, lo, hi, v_p, v_s, pages,
                column, DV, BN, P,
            )  # fmt: skip
    return acc0, acc1, top, norm, of_block


@triton.jit
def _finish(m, norm, sink):
    """(factor of A, log2 of the sum) with one more logit, all of them in powers of two."""
    top = tl.maximum(m, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(m - base)
    total = norm * shrink + tl.exp2(sink - base)
    empty = total == 0
    factor = tl.where(empty, 0.0, shrink / tl.where(empty, 1.0, total))
    return factor, tl.where(empty, float("-inf"), base + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def _flush(at, m, of_block, mine):
    """Stores log2 of the sum of a block; returns that of the next one, nothing."""
    tl.store(at, m + tl.log2(of_block), mask=mine)
    return tl.zeros_like(of_block)


@triton.jit
def _share(part, total):
    """Share of the sum that one part of it has, both as log2."""
    return tl.where(part == float("-inf"), 0.0, tl.exp2(part - total))


@triton.jit(do_not_specialize=["rows", "blocks", "splits", "rope", "offset", "window", "pages"])
def attend_kernel(
    q, k, v, plan, reals, sinks, out, lse, mass, partial, turned,
    q_r, q_h, k_p, k_h, k_s, v_p, v_h, v_s, out_r, out_h,
    rows, blocks, splits, pages, rope, offset, window, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, MASS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, splits, ceil(R g / BM))."""
    size, parts = partition(plan, splits, BN)
    part = tl.program_id(1)
    if part >= parts:
        return
    line = tl.program_id(2) * BM + tl.arange(0, BM)
    row = (line // G).to(tl.int64)
    head = tl.program_id(0) * G + line % G
    heads = tl.num_programs(0) * G
    mine = row < rows
    planned = mine & (row < number(plan, ROWS))
    of_plan = plan + tl.load(plan + ROW) + row * 4
    worker = tl.load(of_plan, mask=planned, other=0)
    t = tl.load(of_plan + 1, mask=planned, other=0)
    # Rows of the outputs and of the partial states.
    state = row * heads + head
    first_state = part.to(tl.int64) * rows * heads

    workers, segments = number(plan, WORKERS), number(plan, SEGMENTS)
    pairs = tl.full((), 0, tl.int32)
    turns = reals
    if ROTARY:
        entry = plan + tl.load(plan + ROPE) + 2 * rope
        pairs = tl.load(entry).to(tl.int32)
        turns = reals + 2 * tl.load(entry + 1)
    combine = (number(plan, STEP) == 1) & (number(plan, LONGEST) > 1)
    further = segments.to(tl.int64) * workers + t
    table = plan + tl.load(plan + SEGMENT)
    page_table = plan + tl.load(plan + PAGE)
    pair_table = plan + tl.load(plan + PAIR)
    weights = reals + 2 * tl.load(plan + WEIGHT)
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + part
    turned += (program * tl.num_programs(0) + tl.program_id(0)) * BM * (D0 + D1)
    k += tl.program_id(0).to(tl.int64) * k_h
    v += tl.program_id(0).to(tl.int64) * v_h
    of_row = row * q_r + head.to(tl.int64) * q_h
    ROUND: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else k.dtype.element_ty

    parts_of_mass = mass
    if MASS:
        if parts > 1:
            states = splits.to(tl.int64) * rows * heads
            parts_of_mass = partial + states * (DV + 2) + first_state * blocks
    m = tl.full((BM,), float("-inf"), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    of_block = tl.zeros((BM,), tl.float32)
    acc0 = tl.zeros((BM, DV0), tl.float32)
    acc1 = tl.zeros((BM, DV1 if DV1 > 0 else 16), tl.float32)
    block = tl.full((), 0, tl.int32)

    begin = part * size
    end = tl.minimum(begin + size, number(plan, TOKENS))
    last = tl.full((), -1, tl.int32)
    if begin < end:
        last = segment_of(table, segments, end - 1)
    for index in range(segment_of(table, segments, begin), last + 1):
        s = tl.full((), 0, tl.int64) + index  # interpreted, index is a number of Python
        entry = table + s * 8
        if MASS:
            this = tl.load(entry).to(tl.int32)
            while block < tl.minimum(this, blocks):
                of_block = _flush(parts_of_mass + state * blocks + block, m, of_block, mine)
                block += 1
        n = tl.load(entry + 1)
        token = tl.load(entry + 6).to(tl.int32)
        pair = s * workers + worker
        lo, hi, bias, gain = seen(pair_table, weights, pair, t, n, window, planned, WINDOW)
        left = tl.maximum(begin - token, 0)
        right = tl.minimum(end - token, n.to(tl.int32))
        lo = tl.maximum(lo, left)
        hi = tl.minimum(hi, right)
        sees = planned & (lo < hi)
        start = tl.min(tl.where(sees, lo, MOST), 0)
        stop = tl.max(tl.where(sees, hi, 0), 0)
        if start < stop:
            # Keys that all rows see; the others are at the borders.
            all_lo = tl.max(tl.where(planned, lo, 0), 0)
            all_hi = tl.min(tl.where(planned, hi, MOST), 0)
            blind = tl.max((planned & (lo >= hi)).to(tl.int32), 0)
            if (blind == 1) | (all_lo >= all_hi):
                all_lo = start
                all_hi = start
            factor = gain * scale
            if not SOFTCAP:
                factor *= LOG2E
            q0, q1 = _queries(
                q, of_row, planned, turns, pairs, pair, further, combine, offset, factor, turned,
                D, D0, D1, ROTARY, INTERLEAVED, CHUNK, ROUND, DOT,
            )  # fmt: skip
            bias *= LOG2E
            pages_of = page_table + tl.load(entry + 2)
            first = tl.load(entry + 3).to(tl.int32)
            for key in range(all_lo, all_hi, BN):
                acc0, acc1, m, norm, of_block = _absorb(
                    q0, q1, acc0, acc1, m, norm, of_block, k, v, pages_of, first, key, all_hi,
                    lo, hi, bias, softcap, k_p, k_s, v_p, v_s, pages,
                    D, D0, D1, DV, DV0, DV1, SOFTCAP, MASS, False, BN, P, ROUND, DOT,
                )  # fmt: skip
            before = (all_lo - start + BN - 1) // BN
            behind = (stop - all_hi + BN - 1) // BN
            for tile in range(0, before + behind):
                key = tl.where(tile < before, start + tile * BN, all_hi + (tile - before) * BN)
                border = tl.where(tile < before, all_lo, stop)
                acc0, acc1, m, norm, of_block = _absorb(
                    q0, q1, acc0, acc1, m, norm, of_block, k, v, pages_of, first, key, border,
                    lo, hi, bias, softcap, k_p, k_s, v_p, v_s, pages,
                    D, D0, D1, DV, DV0, DV1, SOFTCAP, MASS, True, BN, P, ROUND, DOT,
                )  # fmt: skip
    if MASS:
        while block < blocks:
            of_block = _flush(parts_of_mass + state * blocks + block, m, of_block, mine)
            block += 1

    # Rows behind those of the plan see nothing.
    m = tl.where(planned, m, float("-inf"))
    norm = tl.where(planned, norm, 0.0)
    column0 = tl.arange(0, DV0)
    column1 = DV0 + tl.arange(0, DV1 if DV1 > 0 else 16)
    inside0 = mine[:, None] & (column0 < DV)[None, :]
    inside1 = mine[:, None] & (column1 < DV)[None, :]
    if parts == 1:
        sink = tl.full((BM,), float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks + head, mask=planned, other=float("-inf")).to(tl.float32) * LOG2E
        factor, total = _finish(m, norm, sink)
        result = out + (row * out_r + head.to(tl.int64) * out_h)[:, None]
        acc0 = tl.where(planned[:, None], acc0 * factor[:, None], 0.0)
        tl.store(result + column0[None, :], acc0.to(out.dtype.element_ty), mask=inside0)
        if DV1 > 0:
            acc1 = tl.where(planned[:, None], acc1 * factor[:, None], 0.0)
            tl.store(result + column1[None, :], acc1.to(out.dtype.element_ty), mask=inside1)
        if LSE:
            tl.store(lse + state, total * LN2, mask=mine)
        if MASS:
            tl.debug_barrier()
            for b in range(0, blocks):
                of_one = mass + state * blocks + b
                held = tl.load(of_one, mask=planned, other=float("-inf"))
                tl.debug_barrier()
                tl.store(of_one, _share(held, total), mask=mine)
    else:
        sums = partial + (first_state + state)[:, None] * DV
        tl.store(sums + column0[None, :], acc0, mask=inside0)
        if DV1 > 0:
            tl.store(sums + column1[None, :], acc1, mask=inside1)
        record = partial + splits.to(tl.int64) * rows * heads * DV + 2 * (first_state + state)
        tl.store(record, m, mask=mine)
        tl.store(record + 1, norm, mask=mine)


@triton.jit(do_not_specialize=["rows", "blocks", "splits"])
def reduce_kernel(
    plan, sinks, out, lse, mass, partial, out_r, out_h, rows, blocks, splits,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    MASS: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Grid (R, Hq): merges the parts, BP at a time, in their order. One part is ready already."""
    _, parts = partition(plan, splits, BN)
    if parts == 1:
        return
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    states = rows.to(tl.int64) * heads
    state = row * heads + head
    records = partial + splits * states * DV + 2 * state
    column = tl.arange(0, DV_PAD)
    m = tl.full((), float("-inf"), tl.float32)
    norm = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((DV_PAD,), tl.float32)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP).to(tl.int64)
        here = part < parts
        of_part = tl.load(records + 2 * part * states, mask=here, other=float("-inf"))
        sums = tl.load(records + 2 * part * states + 1, mask=here, other=0.0)
        top = tl.maximum(m, tl.max(of_part, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(m - base)
        weight = tl.exp2(of_part - base)
        # Where a row saw nothing its A may hold what other rows saw.
        filled = here & (sums != 0)
        at = partial + (part * states + state)[:, None] * DV + column[None, :]
        value = tl.load(at, mask=filled[:, None] & (column < DV)[None, :], other=0.0)
        acc = acc * shrink + tl.sum(value * weight[:, None], 0)
        norm = norm * shrink + tl.sum(sums * weight, 0)
        m = top
    sink = tl.full((), float("-inf"), tl.float32)
    if SINKS:
        if row < number(plan, ROWS):
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
    factor, total = _finish(m, norm, sink)
    result = out + row * out_r + head.to(tl.int64) * out_h + column
    tl.store(result, (acc * factor).to(out.dtype.element_ty), mask=column < DV)
    if LSE:
        tl.store(lse + state, total * LN2)
    if MASS:
        held = partial + splits * states * (DV + 2) + state * blocks
        for first in range(0, blocks, BB):
            block = first + tl.arange(0, BB)
            shares = tl.zeros((BB,), tl.float32)
            for part in range(0, parts):
                log = tl.load(
                    held + part * states * blocks + block, mask=block < blocks, other=float("-inf")
                )
                shares += _share(log, total)
            if row >= number(plan, ROWS):
                shares = tl.zeros((BB,), tl.float32)
            tl.store(mass + state * blocks + block, shares, mask=block < blocks)
