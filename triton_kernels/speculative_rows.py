"""One read of the logits: what every row of a law is reduced to.

`tiles_kernel` reads a tile of 4096 ids of one row: its largest logit, and N_t and A_t of its
weights. `rows_kernel` merges the tiles of a row to its record, and finds the last id that top-k,
top-p and min-p keep: a radix select on (n, M, id), eight bits of the key per pass over the row.
Nothing of the size of the vocabulary is written.

Per id and read about 60 integer and float32 operations. Letters: B sequences, R rows (of all
sequences), V ids, T tiles. Source: arXiv 2211.17192; the definition is
`alignops.reference.speculative.laws`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_laws import (
    INFINITY,
    MANY,
    NEGLIGIBLE,
    NOWHERE,
    TILE,
    inverse_of,
    is_kept,
    probability,
    rate_of,
    units,
    weight_of_logit,
)

# Record of a row, int64: the law of its ids, the best id, and what is wrong with it.
TOP, TOTAL, BEST, ERROR, CUT_N, CUT_M, CUT_ID, PEAK = (tl.constexpr(i) for i in range(8))
RECORD = tl.constexpr(8)

OK, BAD_VALUE, NOTHING_POSSIBLE, OUT_OF_RANGE, BAD_ARGUMENT = (tl.constexpr(i) for i in range(5))

BINS = tl.constexpr(256)


# Where rows are


@triton.jit
def temperature_of(temperature, b):
    """The temperature of a sequence, 0: greedy; moved into the range where weights are defined."""
    warmth = tl.load(temperature + b)
    return tl.where(warmth > 0, tl.minimum(tl.maximum(warmth, 1e-5), 1e4), 0.0)


@triton.jit
def fault_of_warp(
    temperature, top_k, top_p, min_p, b,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """BAD_ARGUMENT if a sequence's temperature or filters are out of range, else 0."""
    warmth = tl.load(temperature + b)
    fine = (warmth == 0) | ((warmth >= 1e-5) & (warmth <= 1e4))
    if HAS_TOP_K:
        fine = fine & (tl.load(top_k + b) >= 0)
    if HAS_TOP_P:
        share = tl.load(top_p + b)
        fine = fine & (share > 0) & (share <= 1)
    if HAS_MIN_P:
        fraction = tl.load(min_p + b)
        fine = fine & (fraction >= 0) & (fraction <= 1)
    return tl.where(fine, 0, BAD_ARGUMENT)


@triton.jit
def row_start(x, b, i, cu, stride_b, stride_i, PACKED: tl.constexpr):
    """Pointer to row i of sequence b; of packed logits `stride_b` is the number of all rows."""
    if PACKED:
        row = tl.load(cu + b).to(tl.int64) + i
        return x + tl.maximum(tl.minimum(row, stride_b - 1), 0) * stride_i
    else:
        return x + b.to(tl.int64) * stride_b + i.to(tl.int64) * stride_i


@triton.jit
def count_drafts(
    ids, lens, cu, active, b, K,
    HAS_LENS: tl.constexpr, PACKED: tl.constexpr, HAS_ACTIVE: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Drafts k of sequence b: up to the first id -1; -1 if the sequence is not active.

    Without ids (K_PAD = 0) all K.
    """
    k = tl.full((), 0, tl.int32) + K
    if K_PAD > 0:
        j = tl.arange(0, K_PAD)
        d = tl.load(ids + b.to(tl.int64) * K + j, mask=j < K, other=-1)
        k = tl.min(tl.where(d == -1, tl.minimum(j, K), K), 0)
    if HAS_LENS:
        k = tl.minimum(k, tl.maximum(tl.load(lens + b).to(tl.int32), 0))
    if PACKED:
        k = tl.minimum(k, (tl.load(cu + b + 1) - tl.load(cu + b)).to(tl.int32) - 1)
    if HAS_ACTIVE:
        k = tl.where(tl.load(active + b) != 0, k, -1)
    return k


@triton.jit
def load_weights(x, ids, V, k, factor, IS_PROBS: tl.constexpr):
    """(value, M, n) of ids of the row at x, which may lie behind its end."""
    value = tl.load(x + ids, mask=ids < V, other=0.0 if IS_PROBS else -INFINITY).to(tl.float32)
    if IS_PROBS:
        bits = value.to(tl.int32, bitcast=True)
        m = tl.where(value > 0, (bits & 0x7FFFFF) | 0x800000, 0)
        n = bits >> 23
    else:
        m, n = weight_of_logit(value, k, factor)
    return value, m, n


# A tile


@triton.jit
def sum_of_tile(
    x, first, V, k, factor, cut_n, cut_m, cut_id, IS_PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """(N_t, A_t, largest M of N_t) of the ids from `first` on that are kept."""
    top = tl.full((), NOWHERE, tl.int32)
    peak = tl.full((), 0, tl.int32)
    for begin in tl.static_range(0, TILE, BLOCK):
        ids = first + begin + tl.arange(0, BLOCK)
        _, m, n = load_weights(x, ids, V, k, factor, IS_PROBS)
        kept = is_kept(ids, m, n, cut_n, cut_m, cut_id)
        here = tl.max(tl.where(kept, n, NOWHERE), 0)
        largest = tl.max(tl.where(kept & (n == here), m, 0), 0)
        peak = tl.where(here > top, largest, tl.where(here == top, tl.maximum(peak, largest), peak))
        top = tl.maximum(top, here)
    total = tl.full((), 0, tl.int64)
    for begin in tl.static_range(0, TILE, BLOCK):
        if BLOCK < TILE:  # else the tile is still there
            ids = first + begin + tl.arange(0, BLOCK)
            _, m, n = load_weights(x, ids, V, k, factor, IS_PROBS)
            kept = is_kept(ids, m, n, cut_n, cut_m, cut_id)
        total += tl.sum(tl.where(kept, units(m, n, top, IS_PROBS), 0), 0)
    return top, total, peak


@triton.jit
def best_of_tile(x, first, V, low, high, BLOCK: tl.constexpr):
    """(value, id) of the largest logit of a tile, the lowest id of equals.

    +inf if one is NaN, +inf, or outside of [low, high].
    """
    best = tl.full((), -INFINITY, tl.float32)
    where = tl.full((), 0, tl.int32)
    for begin in tl.static_range(0, TILE, BLOCK):
        ids = first + begin + tl.arange(0, BLOCK)
        value = tl.load(x + ids, mask=ids < V, other=-INFINITY).to(tl.float32)
        fine = (ids >= V) | ((value >= low) & (value <= high))
        value = tl.where(fine, value, INFINITY)
        largest, at = tl.max(value, 0, return_indices=True)
        where = tl.where(largest > best, first + begin + at, where)
        best = tl.maximum(best, largest)
    return best, where


@triton.jit(do_not_specialize=["K", "ROWS", "EXTRA"])
def tiles_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, at_row, temperature,
    tops, sums, peaks, values, best,
    ROWS, EXTRA, K, V,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_AT: tl.constexpr,
    IS_PROBS: tl.constexpr, SUMS: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * ROWS, T). Of the rows of a sequence with k drafts the first k + EXTRA are real."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, i = row // ROWS, row % ROWS
    if HAS_AT:
        i = tl.load(at_row + b)
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    if (drafts >= 0) & (i < drafts + EXTRA):
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        warmth = temperature_of(temperature, b)
        low = tl.full((), -INFINITY, tl.float32)
        high = tl.full((), INFINITY, tl.float32)
        if IS_PROBS and SUMS:
            if warmth > 0:
                low = tl.full((), 0.0, tl.float32)
                high = tl.full((), 1.0, tl.float32)
        value, at = best_of_tile(start, tile * TILE, V, low, high, BLOCK)
        place = row.to(tl.int64) * tiles + tile
        tl.store(values + place, value)
        tl.store(best + place, at)
        if SUMS:
            if warmth > 0:
                k, factor = rate_of(warmth)
                top, total, peak = sum_of_tile(
                    start, tile * TILE, V, k, factor, NOWHERE, 0, MANY, IS_PROBS, BLOCK
                )
                tl.store(tops + place, top)
                tl.store(sums + place, total)
                tl.store(peaks + place, peak)


# Filters


@triton.jit
def key_of(m, n, top):
    """Depth below the top and the complement of M: rises as the weight falls; 54 bits."""
    return ((top - n).to(tl.int64) << 24) | ((0xFFFFFF - m).to(tl.int64) << 1)


@triton.jit
def weight_of_key(key, top):
    """(M, n) of a key."""
    m = 0xFFFFFF - ((key & 0xFFFFFF) >> 1).to(tl.int32)
    return m, top - (key >> 24).to(tl.int32)


@triton.jit
def histogram(
    x, bins, V, k, factor, top, cut_n, cut_m, cut_id, prefix, low,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is kept and has `prefix` above the 8 bits of its key from `low` on, by these bits.

    Counts ids, or sums units.
    """
    digits = tl.arange(0, BINS)
    tl.store(bins + digits, tl.zeros((BINS,), tl.int64))
    tl.debug_barrier()
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        _, m, n = load_weights(x, ids, V, k, factor, False)
        key = key_of(m, n, top)
        kept = is_kept(ids, m, n, cut_n, cut_m, cut_id) & ((key >> (low + 8)) == prefix)
        if WEIGHTED:
            count = units(m, n, top, False)
            kept = kept & (count > 0)
        else:
            count = tl.full((BLOCK,), 1, tl.int64)
        tl.atomic_add(bins + tl.where(kept, (key >> low) & 255, 0), count, mask=kept)
    tl.debug_barrier()
    return tl.load(bins + digits, cache_modifier=".cg")


@triton.jit
def find_bin(counts, need):
    """The first bin at which the counts reach `need`, and what is still needed inside of it."""
    digits = tl.arange(0, BINS)
    reached = tl.cumsum(counts, 0)
    at = tl.minimum(tl.sum((reached < need).to(tl.int64), 0), BINS - 1)
    before = tl.sum(tl.where(digits < at, counts, 0), 0)
    return at, need - before


@triton.jit
def select(
    x, bins, V, k, factor, top, cut_n, cut_m, cut_id, need,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cut behind the shortest part of the order that reaches `need` ids, or units.

    None if it is not reached within 2^-255 of the largest weight.
    """
    prefix = tl.full((), 0, tl.int64)
    low = tl.full((), 24, tl.int64)
    reached = tl.full((), 1, tl.int32)
    while low >= 0:
        counts = histogram(
            x, bins, V, k, factor, top, cut_n, cut_m, cut_id, prefix, low, WEIGHTED, BLOCK
        )
        if tl.sum(counts, 0) < need:
            reached = tl.full((), 0, tl.int32)
            low = tl.full((), -8, tl.int64)
        else:
            digit, need = find_bin(counts, need)
            prefix = (prefix << 8) | digit
            low -= 8
    if reached == 1:
        m_at, n_at = weight_of_key(prefix, top)
        if WEIGHTED:
            each = tl.maximum(units(m_at, n_at, top, False), 1)
            need = (need + each - 1) // each
        # Equals: by id.
        last = tl.full((), MANY, tl.int32)
        seen = tl.full((), 0, tl.int64)
        for first in range(0, V, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            _, m, n = load_weights(x, ids, V, k, factor, False)
            same = is_kept(ids, m, n, cut_n, cut_m, cut_id) & (m == m_at) & (n == n_at)
            rank = seen + tl.cumsum(same.to(tl.int64), 0)
            last = tl.minimum(last, tl.min(tl.where(same & (rank == need), ids, MANY), 0))
            seen += tl.sum(same.to(tl.int64), 0)
        cut_n, cut_m, cut_id = n_at, m_at, last
    return cut_n, cut_m, cut_id


@triton.jit
def depth_of(tile_top, top, IS_PROBS: tl.constexpr):
    """By how much sums of tiles are shifted to become those of the row, int64."""
    if IS_PROBS:
        return tile_top.to(tl.int64) * 0
    return tl.minimum(top.to(tl.int64) - tile_top.to(tl.int64), 63)


@triton.jit
def sum_of_row(x, V, k, factor, top, cut_n, cut_m, cut_id, BLOCK: tl.constexpr):
    """A of what is kept."""
    total = tl.full((), 0, tl.int64)
    for first in range(0, V, TILE):
        tile_top, part, _ = sum_of_tile(x, first, V, k, factor, cut_n, cut_m, cut_id, False, BLOCK)
        total += part >> depth_of(tile_top, top, False)
    return total


@triton.jit
def needed_units(top_p, total):
    """The least integer that is at least round(top_p 2^32) / 2^32 * total."""
    # To the nearest integer, ties to even: at 2^52 a float64 has no digits behind the point.
    steady = tl.full((), 4503599627370496.0, tl.float64)
    share = (((top_p.to(tl.float64) * 4294967296.0) + steady) - steady).to(tl.int64)
    low = share.to(tl.uint64) * (total & 0xFFFFFFFF).to(tl.uint64)
    up = (low & 0xFFFFFFFF) != 0
    need = share * (total >> 32) + (low >> 32).to(tl.int64) + up.to(tl.int64)
    return tl.maximum(need, 1)


@triton.jit
def cut_min_p(min_p, top, peak, total, cut_n, cut_m, cut_id):
    """The cut behind the last weight whose probability is min_p of the largest one, or more."""
    inverse = inverse_of(total)
    bound = min_p.to(tl.float32) * probability(peak, top, top, inverse, False)
    if bound > 0:
        low = tl.full((), 0, tl.int64)  # the largest key known to be kept, halved
        high = tl.full((), (NEGLIGIBLE + 1) << 23, tl.int64)
        while high - low > 1:
            middle = (low + high) // 2
            m, n = weight_of_key(middle << 1, top)
            if probability(m, n, top, inverse, False) >= bound:
                low = middle
            else:
                high = middle
        m, n = weight_of_key(low << 1, top)
        if (n > cut_n) | ((n == cut_n) & (m > cut_m)):
            cut_n, cut_m, cut_id = n, m, tl.full((), MANY, tl.int32)
    return cut_n, cut_m, cut_id


@triton.jit(do_not_specialize=["K", "ROWS", "EXTRA", "T"])
def rows_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, at_row, temperature, top_k, top_p, min_p,
    tops, sums, peaks, values, best, bins, records,
    ROWS, EXTRA, K, V, T,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_AT: tl.constexpr,
    IS_PROBS: tl.constexpr, SUMS: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr, K_PAD: tl.constexpr, T_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * ROWS): the record of a row."""
    row = tl.program_id(0)
    b, i = row // ROWS, row % ROWS
    if HAS_AT:
        i = tl.load(at_row + b)
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    if (drafts >= 0) & (i < drafts + EXTRA):
        tile = tl.arange(0, T_PAD)
        place = row.to(tl.int64) * T + tile
        value = tl.load(values + place, mask=tile < T, other=-INFINITY)
        largest, at = tl.max(value, 0, return_indices=True)
        record = records + row.to(tl.int64) * RECORD
        nothing = largest <= (0.0 if IS_PROBS else -INFINITY)
        error = tl.where(nothing, NOTHING_POSSIBLE, OK)
        error = tl.where(largest == INFINITY, BAD_VALUE, error)
        tl.store(record + ERROR, error.to(tl.int64))
        tl.store(record + BEST, tl.load(best + row.to(tl.int64) * T + at).to(tl.int64))
        if SUMS:
            warmth = tl.load(temperature + b)
            if (warmth > 0) & (error == OK):
                tile_top = tl.load(tops + place, mask=tile < T, other=NOWHERE)
                part = tl.load(sums + place, mask=tile < T, other=0)
                high = tl.load(peaks + place, mask=tile < T, other=0)
                top = tl.max(tile_top, 0)
                peak = tl.max(tl.where(tile_top == top, high, 0), 0)
                total = tl.sum(part >> depth_of(tile_top, top, IS_PROBS), 0)
                cut_n = tl.full((), NOWHERE, tl.int32)
                cut_m = tl.full((), 0, tl.int32)
                cut_id = tl.full((), MANY, tl.int32)
                start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
                k, factor = rate_of(warmth)
                if HAS_TOP_K:
                    keep = tl.load(top_k + b).to(tl.int64)
                    if (keep > 0) & (keep < V):
                        cut_n, cut_m, cut_id = select(
                            start, bins + row.to(tl.int64) * BINS, V, k, factor, top,
                            cut_n, cut_m, cut_id, keep, False, BLOCK,
                        )  # fmt: skip
                        total = sum_of_row(start, V, k, factor, top, cut_n, cut_m, cut_id, BLOCK)
                if HAS_TOP_P:
                    share = tl.load(top_p + b)
                    if share < 1:
                        need = needed_units(share, total)
                        cut_n, cut_m, cut_id = select(
                            start, bins + row.to(tl.int64) * BINS, V, k, factor, top,
                            cut_n, cut_m, cut_id, need, True, BLOCK,
                        )  # fmt: skip
                        total = sum_of_row(start, V, k, factor, top, cut_n, cut_m, cut_id, BLOCK)
                if HAS_MIN_P:
                    fraction = tl.load(min_p + b)
                    if fraction > 0:
                        cut_n, cut_m, cut_id = cut_min_p(
                            fraction, top, peak, total, cut_n, cut_m, cut_id
                        )
                        total = sum_of_row(start, V, k, factor, top, cut_n, cut_m, cut_id, BLOCK)
                if IS_PROBS:
                    error = tl.where(total == 0, NOTHING_POSSIBLE, OK)
                    tl.store(record + ERROR, error.to(tl.int64))
                tl.store(record + TOP, top.to(tl.int64))
                tl.store(record + TOTAL, total)
                tl.store(record + CUT_N, cut_n.to(tl.int64))
                tl.store(record + CUT_M, cut_m.to(tl.int64))
                tl.store(record + CUT_ID, cut_id.to(tl.int64))
                tl.store(record + PEAK, peak.to(tl.int64))
