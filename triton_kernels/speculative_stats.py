"""One draft step, and what it keeps of its law so that verification need not read the row again.

Statistics of a row, int64 (6,): N, A, M and n of the draft, and the last key and id that the
filters keep, a key being (n + 2^31) << 24 | M, or 0 and -1. Letters: B rows, T tiles of 4096.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_chains import chance, winner_of
from .speculative_draw import find_in_tile, find_tile
from .speculative_laws import MANY, NOWHERE, PROPOSE, TILE, fixed_point, part_of, rate_of, word_of
from .speculative_rows import (
    BAD_ARGUMENT,
    BEST,
    CUT_ID,
    CUT_M,
    CUT_N,
    ERROR,
    OK,
    RECORD,
    TOP,
    TOTAL,
    fault_of_warp,
    load_weights,
    temperature_of,
)

STATS = tl.constexpr(6)


@triton.jit
def restore_kernel(stats, records, IS_PROBS: tl.constexpr):
    """Grid (rows): the record of a row from its statistics, which say nothing of probabilities."""
    row = tl.program_id(0).to(tl.int64)
    at = stats + row * STATS
    top, total = tl.load(at), tl.load(at + 1)
    mantissa, exponent = tl.load(at + 2), tl.load(at + 3)
    key, cut_id = tl.load(at + 4), tl.load(at + 5)
    fine = (total != 0) & (top >= NOWHERE) & (top <= MANY) & (exponent >= NOWHERE)
    fine = fine & (exponent <= top) & (mantissa >= 0) & ((mantissa >> 24) == 0)
    record = records + row * RECORD
    if IS_PROBS:
        fine = row >= 0
        key = key * 0
    tl.store(record + TOP, top)
    tl.store(record + TOTAL, total)
    tl.store(record + ERROR, tl.where(fine, OK, BAD_ARGUMENT).to(tl.int64))
    tl.store(record + CUT_N, (key >> 24) + NOWHERE)
    tl.store(record + CUT_M, key & 0xFFFFFF)
    tl.store(record + CUT_ID, tl.minimum(tl.maximum(cut_id, -1), MANY))


@triton.jit
def sums_of_law_kernel(x, stride, records, temperature, sums, V, BLOCK: tl.constexpr):
    """Grid (B, T): sums of a law by tiles, in units of 2^-40."""
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    record = records + b * RECORD
    warmth = temperature_of(temperature, b)
    if (warmth > 0) & (tl.load(record + ERROR) == 0):
        k, factor = rate_of(warmth)
        total = tl.full((), 0, tl.int64)
        for begin in tl.static_range(0, TILE, BLOCK):
            ids = tile * TILE + begin + tl.arange(0, BLOCK)
            p = chance(x + b * stride, ids, V, k, factor, record, False)
            total += tl.sum(fixed_point(p), 0)
        tl.store(sums + b * tiles + tile, total)


@triton.jit(do_not_specialize=["T"])
def propose_kernel(
    x, stride, records, temperature, top_k, top_p, min_p, seeds, positions, sums, ratios, winners,
    out, stats, row_error, V, T,
    RACE: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    T_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B): the draft, and the statistics of its law unless it has won a race or is greedy."""
    b = tl.program_id(0).to(tl.int64)
    record = records + b * RECORD
    error = fault_of_warp(temperature, top_k, top_p, min_p, b, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P)
    error = tl.where(error == 0, tl.load(record + ERROR).to(tl.int32), error)
    warmth = temperature_of(temperature, b)
    token = tl.full((), -1, tl.int64)
    j = tl.arange(0, 8)
    kept = tl.zeros((8,), tl.int64)
    if error == 0:
        token = tl.load(record + BEST)
        if warmth > 0:
            if RACE:
                token = winner_of(ratios, winners, b, T, T_PAD)
            else:
                k, factor = rate_of(warmth)
                tile = tl.arange(0, T_PAD)
                total = tl.sum(tl.load(sums + b * T + tile, mask=tile < T, other=0), 0)
                word = word_of(tl.load(seeds + b), tl.load(positions + b), PROPOSE, 0)
                target = part_of(word, total)
                at, before = find_tile(sums + b * T, target, T, T_PAD)
                first = tl.full((), MANY, tl.int32)
                for begin in tl.static_range(0, TILE, BLOCK):
                    ids = at * TILE + begin + tl.arange(0, BLOCK)
                    p = chance(x + b * stride, ids, V, k, factor, record, False)
                    first, before = find_in_tile(fixed_point(p), ids, target, before, first)
                token = first.to(tl.int64)
                _, m, n = load_weights(x + b * stride, first, V, k, factor, False)
                cut_n = tl.load(record + CUT_N)
                cut_id = tl.load(record + CUT_ID)
                whole = cut_n == NOWHERE
                key = ((cut_n - NOWHERE) << 24) | tl.load(record + CUT_M)
                last = tl.where(cut_id == MANY, 0x7FFFFFFFFFFFFFFF, cut_id)
                kept = tl.where(j == 0, tl.load(record + TOP), kept)
                kept = tl.where(j == 1, tl.load(record + TOTAL), kept)
                kept = tl.where(j == 2, m.to(tl.int64), kept)
                kept = tl.where(j == 3, n.to(tl.int64), kept)
                kept = tl.where(j == 4, tl.where(whole, 0, key), kept)
                kept = tl.where(j == 5, tl.where(whole, -1, last), kept)
    tl.store(out + b, token)
    tl.store(stats + b * STATS + j, kept, mask=j < STATS)
    tl.store(row_error + b, error.to(tl.uint8))
