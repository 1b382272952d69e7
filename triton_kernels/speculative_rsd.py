"""Retries of the rule `rsd`: further tokens of the teacher at the draft that the student refuses.

Only the refused row is read: sums of the teacher's law by tiles, the tokens that are drawn from it
(or its most probable ones), their ranks in the student's law, and the first token that passes.

Letters: B sequences, K drafts, C retries, V ids (Vd of the teacher), T tiles of 4096. Source:
arXiv 2509.22230.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_chains import (
    IDLE,
    MODE,
    NOTHING,
    REQUEST,
    ROW,
    chance,
    rank_of_tile,
)
from .speculative_draw import find_in_tile, find_tile
from .speculative_laws import (
    MANY,
    NEGLIGIBLE,
    RETRY,
    TILE,
    fixed_point,
    is_kept,
    part_of,
    rate_of,
    word_of,
)
from .speculative_rows import (
    CUT_ID,
    CUT_M,
    CUT_N,
    ERROR,
    RECORD,
    TOP,
    key_of,
    load_weights,
    row_start,
    temperature_of,
)


@triton.jit
def teacher_sums_kernel(
    y, stride_yb, stride_yi, q_records, temperature, request, sums, Vd,
    IS_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, T): sums of the teacher's law of the refused row, in units of 2^-40."""
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    record = q_records + b * RECORD
    if tl.load(request + b * REQUEST + MODE) != NOTHING:
        if tl.load(record + ERROR) == 0:
            i = tl.load(request + b * REQUEST + ROW)
            k, factor = rate_of(temperature_of(temperature, b))
            total = tl.full((), 0, tl.int64)
            for begin in tl.static_range(0, TILE, BLOCK):
                ids = tile * TILE + begin + tl.arange(0, BLOCK)
                start = y + b * stride_yb + i * stride_yi
                q = chance(start, ids, Vd, k, factor, record, IS_PROBS)
                total += tl.sum(fixed_point(q), 0)
            tl.store(sums + b * tiles + tile, total)


@triton.jit(do_not_specialize=["T", "C"])
def candidates_kernel(
    y, stride_yb, stride_yi, q_records, temperature, request, sums, seeds, positions, candidates,
    Vd, T, C, IS_PROBS: tl.constexpr, T_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, C): the tokens that the words of the stream of retries draw from the teacher."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    record = q_records + b * RECORD
    token = tl.full((), -1, tl.int64)
    if tl.load(request + b * REQUEST + MODE) != NOTHING:
        if tl.load(record + ERROR) == 0:
            i = tl.load(request + b * REQUEST + ROW)
            k, factor = rate_of(temperature_of(temperature, b))
            start = y + b * stride_yb + i * stride_yi
            tile = tl.arange(0, T_PAD)
            total = tl.sum(tl.load(sums + b * T + tile, mask=tile < T, other=0), 0)
            word = word_of(tl.load(seeds + b), tl.load(positions + b) + i, RETRY, c)
            target = part_of(word, total)
            at, before = find_tile(sums + b * T, target, T, T_PAD)
            first = tl.full((), MANY, tl.int32)
            for begin in tl.static_range(0, TILE, BLOCK):
                ids = at * TILE + begin + tl.arange(0, BLOCK)
                q = chance(start, ids, Vd, k, factor, record, IS_PROBS)
                first, before = find_in_tile(fixed_point(q), ids, target, before, first)
            token = tl.where(total > 0, first.to(tl.int64), -1)
    tl.store(candidates + b * C + c, token)


@triton.jit(do_not_specialize=["K", "C"])
def descend_kernel(
    y, stride_yb, stride_yi, q_records, temperature, request, ids, candidates, K, Vd, C,
    IS_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B): the teacher's most probable tokens but the refused one, in falling order."""
    b = tl.program_id(0).to(tl.int64)
    record = q_records + b * RECORD
    runs = (tl.load(request + b * REQUEST + MODE) != NOTHING) & (tl.load(record + ERROR) == 0)
    if runs:
        i = tl.load(request + b * REQUEST + ROW)
        refused = tl.load(ids + b * K + i)
        k, factor = rate_of(temperature_of(temperature, b))
        start = y + b * stride_yb + i * stride_yi
        top = tl.load(record + TOP).to(tl.int32)
        cut_n = tl.load(record + CUT_N).to(tl.int32)
        cut_m = tl.load(record + CUT_M).to(tl.int32)
        cut_id = tl.load(record + CUT_ID).to(tl.int32)
        last_key = tl.full((), -1, tl.int64)
        last_id = tl.full((), -1, tl.int32)
        for c in range(0, C):
            best = tl.full((), 1 << 62, tl.int64)
            where = tl.full((), -1, tl.int32)
            for first in range(0, Vd, BLOCK):
                places = first + tl.arange(0, BLOCK)
                _, m, n = load_weights(start, places, Vd, k, factor, IS_PROBS)
                key = key_of(m, n, top)
                behind = (key > last_key) | ((key == last_key) & (places > last_id))
                listed = is_kept(places, m, n, cut_n, cut_m, cut_id) & behind & (places != refused)
                if IS_PROBS == 0:
                    listed = listed & (top - n <= NEGLIGIBLE)
                least = tl.min(tl.where(listed, key, 1 << 62), 0)
                at = tl.min(tl.where(listed & (key == least), places, MANY), 0)
                where = tl.where(least < best, at, where)
                best = tl.minimum(best, least)
            tl.store(candidates + b * C + c, where.to(tl.int64))
            last_key, last_id = best, where
    else:
        for c in range(0, C):
            tl.store(candidates + b * C + c, tl.full((), -1, tl.int64))


@triton.jit(do_not_specialize=["K", "C"])
def candidate_ranks_kernel(
    x, cu, stride_b, stride_i, records, temperature, request, candidates, ranks, K, V, C,
    PACKED: tl.constexpr, IS_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * C, T): how many ids of the tile come before the candidate in the student's law."""
    at, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b = (at // C).to(tl.int64)
    token = tl.load(candidates + at).to(tl.int32)
    if token >= 0:
        i = tl.load(request + b * REQUEST + ROW).to(tl.int32)
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        k, factor = rate_of(temperature_of(temperature, b))
        record = records + (b * (K + 1) + i) * RECORD
        count = rank_of_tile(start, tile * TILE, token, V, k, factor, record, IS_PROBS, BLOCK)
        tl.store(ranks + at.to(tl.int64) * tiles + tile, count)


@triton.jit(do_not_specialize=["K", "C", "T", "top_n"])
def choose_kernel(
    x, cu, stride_b, stride_i, records, q_records, temperature, request, candidates, ranks,
    following, accept_len, row_error, retries, K, V, C, T, p_th, top_n,
    PACKED: tl.constexpr, IS_PROBS: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (B): the first candidate that the student accepts, or -1."""
    b = tl.program_id(0).to(tl.int64)
    found = tl.full((), -1, tl.int64)
    if tl.load(request + b * REQUEST + MODE) != NOTHING:
        error = tl.load(q_records + b * RECORD + ERROR)
        if error != 0:
            tl.store(row_error + b, error.to(tl.uint8))
            tl.store(request + b * REQUEST + MODE, tl.full((), NOTHING, tl.int64))
            tl.store(following + b, tl.full((), IDLE, tl.int64))
            tl.store(accept_len + b, tl.full((), 0, tl.int32))
        else:
            i = tl.load(request + b * REQUEST + ROW).to(tl.int32)
            start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
            k, factor = rate_of(temperature_of(temperature, b))
            record = records + (b * (K + 1) + i) * RECORD
            tile = tl.arange(0, T_PAD)
            for c in range(0, C):
                token = tl.load(candidates + b * C + c)
                if (found < 0) & (token >= 0):
                    p = chance(start, token, V, k, factor, record, IS_PROBS)
                    at = ranks + (b * C + c) * T + tile
                    rank = tl.sum(tl.load(at, mask=tile < T, other=0), 0)
                    passes = (p > 0) & (p >= p_th) & ((top_n == 0) | (rank < top_n))
                    found = tl.where(passes, token, found)
    tl.store(retries + b, found)
