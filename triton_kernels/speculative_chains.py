"""Acceptance rules of chains: which drafts stand, and which token follows.

`decide_kernel` walks the drafts of a sequence with the records of its rows. Rules that need more
than a record and single probabilities get it from a second read of the rows, one integer or float64
per tile: the race of `coupled`, the entropy of `typical`, the rank for `relaxed` and `rsd`, the
residuals of `block`. A token that is drawn costs one more read, of one row per sequence: sums of
tiles first, then the one tile that the random word points into.

Letters: B sequences, K drafts, V ids (Vd of the drafter), T tiles of 4096. Source: arXiv 2211.17192
(lossless), 2403.10444 (block), 2401.10774 (typical), 2408.07978 (coupled), 2509.22230 (rsd),
2410.09300 (nudge); the definition is `alignops.reference.speculative.rules`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_laws import (
    INFINITY,
    SAMPLE,
    TILE,
    fixed_point,
    inverse_of,
    is_kept,
    probability,
    race_noise,
    race_weight,
    rate_of,
    word_of,
)
from .speculative_rows import (
    CUT_ID,
    CUT_M,
    CUT_N,
    PEAK,
    RECORD,
    TOP,
    TOTAL,
    count_drafts,
    load_weights,
    row_start,
    temperature_of,
)

RULES = (
    "greedy",
    "lossless",
    "block",
    "coupled",
    "typical",
    "relaxed",
    "threshold",
    "rsd",
    "nudge",
    "scripted",
)
(
    GREEDY,
    LOSSLESS,
    BLOCK_RULE,
    COUPLED,
    TYPICAL,
    RELAXED,
    THRESHOLD,
    RSD,
    NUDGE_RULE,
    SCRIPTED,
) = (tl.constexpr(i) for i in range(10))

# Where tokens come from.
DRAFT, CORRECTION, BONUS, TEACHER_RETRY, STUDENT, NUDGE, BASE = (tl.constexpr(i) for i in range(7))
STATE_BASE, STATE_NUDGE = tl.constexpr(0), tl.constexpr(1)

# What is drawn: request, int64: mode, row, id that is left out (or -1), bits of the ratio.
MODE, ROW, REMOVED, RATIO = (tl.constexpr(i) for i in range(4))
REQUEST = tl.constexpr(4)
NOTHING, FROM_P, FROM_REST = (tl.constexpr(i) for i in range(3))

IDLE = tl.constexpr(-2)  # instead of the token that follows: the sequence says nothing


# Laws


@triton.jit
def chance(x, ids, V, k, factor, record, IS_PROBS: tl.constexpr):
    """Probabilities float32 of ids (a block or one) of the row at x; 0 behind its end."""
    _, m, n = load_weights(x, ids, V, k, factor, IS_PROBS)
    top = tl.load(record + TOP).to(tl.int32)
    inverse = inverse_of(tl.load(record + TOTAL))
    cut_n = tl.load(record + CUT_N).to(tl.int32)
    cut_m = tl.load(record + CUT_M).to(tl.int32)
    cut_id = tl.load(record + CUT_ID).to(tl.int32)
    kept = is_kept(ids, m, n, cut_n, cut_m, cut_id)
    return tl.where(kept, probability(m, n, top, inverse, IS_PROBS), 0.0)


@triton.jit
def best_chance(record, IS_PROBS: tl.constexpr):
    """The largest probability of a row."""
    top = tl.load(record + TOP).to(tl.int32)
    peak = tl.load(record + PEAK).to(tl.int32)
    return probability(peak, top, top, inverse_of(tl.load(record + TOTAL)), IS_PROBS)


@triton.jit
def rest_of(p, q, ids, ratio, removed):
    """max(ratio p - q, 0), and 0 at the id that is left out."""
    r = tl.maximum(ratio * p - q, 0.0)
    return tl.where(ids == removed, 0.0, r)


@triton.jit
def random_word(words, seeds, positions, b, i, K, STREAM: tl.constexpr, HAS_WORDS: tl.constexpr):
    """The random word of place i: of the generator, or given (B, K + 1, 2)."""
    if HAS_WORDS:
        which = 1 if STREAM == SAMPLE else 0
        return tl.load(words + (b.to(tl.int64) * (K + 1) + i) * 2 + which).to(tl.int64)
    else:
        return word_of(tl.load(seeds + b), tl.load(positions + b) + i, STREAM, 0)


@triton.jit
def is_end(token, EOS: tl.constexpr):
    """Whether tokens (a block or one) end the text, int32."""
    ends = (token != token).to(tl.int32)
    for e in tl.static_range(len(EOS)):
        ends = ends | ((token == EOS[e]) & (token >= 0)).to(tl.int32)
    return ends


# Second reads


@triton.jit
def rank_of_tile(
    x, first, token, V, k, factor, record, IS_PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many ids of a tile come before `token` in the order of the row."""
    cut_n = tl.load(record + CUT_N).to(tl.int32)
    cut_m = tl.load(record + CUT_M).to(tl.int32)
    cut_id = tl.load(record + CUT_ID).to(tl.int32)
    _, m_at, n_at = load_weights(x, token, V, k, factor, IS_PROBS)
    possible = is_kept(token, m_at, n_at, cut_n, cut_m, cut_id)
    count = tl.full((), 0, tl.int32)
    for begin in tl.static_range(0, TILE, BLOCK):
        ids = first + begin + tl.arange(0, BLOCK)
        _, m, n = load_weights(x, ids, V, k, factor, IS_PROBS)
        kept = is_kept(ids, m, n, cut_n, cut_m, cut_id)
        equal = (m == m_at) & (ids < token)
        above = (n > n_at) | ((n == n_at) & ((m > m_at) | equal))
        # Ids that are possible come before all others, which are in the order of ids.
        before = (possible & kept & above) | ((possible == 0) & (kept | (ids < token)))
        count += tl.sum((before & (ids < V)).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["K"])
def rank_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, temperature, records, out, K, V,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, IS_PROBS: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, T): how many ids of the tile come before draft i, int32."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, i = row // K, row % K
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    token = tl.load(ids + row).to(tl.int32)
    record = records + (b.to(tl.int64) * (K + 1) + i) * RECORD
    warmth = temperature_of(temperature, b)
    if (i < drafts) & (warmth > 0) & (token >= 0) & (token < V):
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        k, factor = rate_of(warmth)
        count = rank_of_tile(start, tile * TILE, token, V, k, factor, record, IS_PROBS, BLOCK)
        tl.store(out + row.to(tl.int64) * tiles + tile, count)


@triton.jit(do_not_specialize=["K"])
def entropy_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, temperature, records, out, K, V,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, IS_PROBS: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, T): -sum p ln p of the tile, float64."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, i = row // K, row % K
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    record = records + (b.to(tl.int64) * (K + 1) + i) * RECORD
    warmth = temperature_of(temperature, b)
    if (i < drafts) & (warmth > 0):
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        k, factor = rate_of(warmth)
        total = tl.full((), 0.0, tl.float64)
        for begin in tl.static_range(0, TILE, BLOCK):
            places = tile * TILE + begin + tl.arange(0, BLOCK)
            p = chance(start, places, V, k, factor, record, IS_PROBS).to(tl.float64)
            total -= tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)
        tl.store(out + row.to(tl.int64) * tiles + tile, total)


@triton.jit
def race_of_tile(
    x, first, V, k, factor, record, seed, position, IS_PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """(ratio, id) of the smallest noise / weight of a tile, the lowest id of equals."""
    top = tl.load(record + TOP).to(tl.int32)
    cut_n = tl.load(record + CUT_N).to(tl.int32)
    cut_m = tl.load(record + CUT_M).to(tl.int32)
    cut_id = tl.load(record + CUT_ID).to(tl.int32)
    best = tl.full((), INFINITY, tl.float32)
    where = tl.full((), 0, tl.int32)
    for begin in tl.static_range(0, TILE, BLOCK):
        ids = first + begin + tl.arange(0, BLOCK)
        _, m, n = load_weights(x, ids, V, k, factor, IS_PROBS)
        weight = race_weight(m, n, top, IS_PROBS)
        runs = is_kept(ids, m, n, cut_n, cut_m, cut_id) & (weight > 0)
        noise = race_noise(seed, position, first + begin, BLOCK)
        ratio = tl.where(runs, tl.div_rn(noise, tl.where(runs, weight, 1.0)), INFINITY)
        least, at = tl.min(ratio, 0, return_indices=True)
        where = tl.where(least < best, first + begin + at, where)
        best = tl.minimum(best, least)
    return best, where


@triton.jit(do_not_specialize=["K"])
def race_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, temperature, records, seeds, positions,
    ratios, winners, K, V,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, IS_PROBS: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * (K + 1), T): the winner of each tile."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, i = row // (K + 1), row % (K + 1)
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    warmth = temperature_of(temperature, b)
    if (i <= drafts) & (warmth > 0):
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        k, factor = rate_of(warmth)
        ratio, winner = race_of_tile(
            start, tile * TILE, V, k, factor, records + row.to(tl.int64) * RECORD,
            tl.load(seeds + b), tl.load(positions + b) + i, IS_PROBS, BLOCK,
        )  # fmt: skip
        tl.store(ratios + row.to(tl.int64) * tiles + tile, ratio)
        tl.store(winners + row.to(tl.int64) * tiles + tile, winner)


@triton.jit
def winner_of(ratios, winners, row, T, T_PAD: tl.constexpr):
    """Winner of a race from those of the tiles."""
    tile = tl.arange(0, T_PAD)
    ratio = tl.load(ratios + row * T + tile, mask=tile < T, other=INFINITY)
    _, at = tl.min(ratio, 0, return_indices=True)
    return tl.load(winners + row * T + at).to(tl.int64)


@triton.jit
def draft_chance(
    y, stride_yb, stride_yi, Vd, q_records, b, i, ids, token, k, factor, K,
    HAS_DRAFT: tl.constexpr, IS_PROBS: tl.constexpr,
):  # fmt: skip
    """q_i of ids (a block or one); without laws of the drafter 1 at the draft `token`."""
    if HAS_DRAFT:
        start = y + b.to(tl.int64) * stride_yb + i.to(tl.int64) * stride_yi
        record = q_records + (b.to(tl.int64) * K + i) * RECORD
        return chance(start, ids, Vd, k, factor, record, IS_PROBS)
    else:
        return (ids == token).to(tl.float32)


@triton.jit
def next_ratio(ratio, p, q):
    """The running ratio of `block` behind one more draft, float64."""
    q = q.to(tl.float64)
    reached = ratio * p.to(tl.float64)
    one = tl.full((), 1.0, tl.float64)
    certain = tl.where(reached > 0, one, 0.0)
    return tl.where(q > 0, tl.minimum(one, reached / tl.where(q > 0, q, 1.0)), certain)


@triton.jit(do_not_specialize=["K"])
def block_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, temperature, records,
    y, stride_yb, stride_yi, q_records, out, K, V, Vd,
    PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr, IS_PROBS: tl.constexpr,
    HAS_DRAFT: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, T): sum of max(r_i p_i - q_i, 0) of the tile in units of 2^-40, 0 < i < k."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, i = row // K, row % K
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    warmth = temperature_of(temperature, b)
    if (i > 0) & (i < drafts) & (warmth > 0):
        k, factor = rate_of(warmth)
        ratio = tl.full((), 1.0, tl.float64)
        for j in range(0, i):
            token = tl.load(ids + b.to(tl.int64) * K + j).to(tl.int32)
            at = row_start(x, b, tl.zeros((), tl.int32) + j, cu, stride_b, stride_i, PACKED)
            record = records + (b.to(tl.int64) * (K + 1) + j) * RECORD
            inside = tl.where((token >= 0) & (token < V), token, 0)
            p = chance(at, inside, V, k, factor, record, IS_PROBS)
            q = draft_chance(
                y, stride_yb, stride_yi, Vd, q_records, b, tl.zeros((), tl.int32) + j, inside,
                inside, k, factor, K, HAS_DRAFT, IS_PROBS,
            )  # fmt: skip
            ratio = next_ratio(ratio, p, q)
        token = tl.load(ids + row).to(tl.int32)
        start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
        record = records + (b.to(tl.int64) * (K + 1) + i) * RECORD
        total = tl.full((), 0, tl.int64)
        for begin in tl.static_range(0, TILE, BLOCK):
            places = tile * TILE + begin + tl.arange(0, BLOCK)
            p = chance(start, places, V, k, factor, record, IS_PROBS)
            q = draft_chance(
                y, stride_yb, stride_yi, Vd, q_records, b, i, places, token, k, factor, K,
                HAS_DRAFT, IS_PROBS,
            )  # fmt: skip
            total += tl.sum(fixed_point(rest_of(p, q, places, ratio.to(tl.float32), -1)), 0)
        tl.store(out + row.to(tl.int64) * tiles + tile, total)
