"""The token that follows the drafts that stand, and the outputs of a round.

`sums_kernel` reads the one row of a sequence that a token is drawn from, `finish_kernel` the one
tile that the random word points into; it cuts behind the end of the text and at the limit, and
writes what is emitted. Sums are over integers in units of 2^-40.

Letters: B sequences, K drafts, V ids (Vd of the drafter), T tiles of 4096. Source: arXiv
2211.17192, 2509.22230 (rsd).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_chains import (
    FROM_REST,
    IDLE,
    MODE,
    NOTHING,
    RATIO,
    REMOVED,
    REQUEST,
    ROW,
    TEACHER_RETRY,
    chance,
    draft_chance,
    is_end,
    random_word,
)
from .speculative_laws import MANY, SAMPLE, TILE, fixed_point, part_of, rate_of
from .speculative_refused import left_of, without_children
from .speculative_rows import RECORD, row_start, temperature_of

RUNNING, END_OF_TEXT, LENGTH = (tl.constexpr(i) for i in range(3))


@triton.jit
def asked_rest(
    x, cu, stride_b, stride_i, records, y, stride_yb, stride_yi, q_records, b, ids, request,
    k, factor, K, V, Vd, nodes, parents, p_totals, q_totals,
    OWN: tl.constexpr, PACKED: tl.constexpr, IS_PROBS: tl.constexpr, HAS_DRAFT: tl.constexpr,
    TREE: tl.constexpr, REPLACEMENT: tl.constexpr,
):  # fmt: skip
    """(r, p) at a block of ids: what the request asks to draw from, and from if that is 0.

    OWN: `records` has one row per sequence, that of the request. TREE: the row is a node of the
    tree of K + 1 nodes, whose children have all been refused.
    """
    i = tl.load(request + ROW).to(tl.int32)
    start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
    record = records + (b if OWN else b * (K + 1) + i) * RECORD
    p = chance(start, ids, V, k, factor, record, IS_PROBS)
    if TREE:
        at = b * (K + 1)
        if HAS_DRAFT:
            q = draft_chance(
                y, stride_yb, stride_yi, Vd, q_records, b, i, ids, -1, k, factor, K + 1, True,
                IS_PROBS,
            )  # fmt: skip
            p, _ = left_of(
                p, q, ids, i, K + 1, nodes + at, parents + at, p_totals + at, q_totals + at,
                REPLACEMENT,
            )  # fmt: skip
            return p, p
        else:
            return without_children(p, ids, i, nodes + at, parents + at, K + 1), p
    r = tl.load(request + RATIO).to(tl.int32).to(tl.float32, bitcast=True) * p
    if HAS_DRAFT:
        if tl.load(request + MODE) == FROM_REST:
            q = draft_chance(
                y, stride_yb, stride_yi, Vd, q_records, b, i, ids, -1, k, factor, K,
                HAS_DRAFT, IS_PROBS,
            )  # fmt: skip
            r = tl.maximum(r - q, 0.0)
    return tl.where(ids == tl.load(request + REMOVED), 0.0, r), p


@triton.jit(do_not_specialize=["K"])
def sums_kernel(
    x, cu, stride_b, stride_i, records, y, stride_yb, stride_yi, q_records, temperature, request,
    rest_sums, sums, nodes, parents, p_totals, q_totals, K, V, Vd,
    OWN: tl.constexpr, PACKED: tl.constexpr, IS_PROBS: tl.constexpr, HAS_DRAFT: tl.constexpr,
    TREE: tl.constexpr, REPLACEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, T): sums of a tile of what the request of a sequence asks to draw from."""
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    request += b * REQUEST
    if tl.load(request + MODE) != NOTHING:
        k, factor = rate_of(temperature_of(temperature, b))
        of_rest = tl.full((), 0, tl.int64)
        of_p = tl.full((), 0, tl.int64)
        for begin in tl.static_range(0, TILE, BLOCK):
            ids = tile * TILE + begin + tl.arange(0, BLOCK)
            r, p = asked_rest(
                x, cu, stride_b, stride_i, records, y, stride_yb, stride_yi, q_records, b, ids,
                request, k, factor, K, V, Vd, nodes, parents, p_totals, q_totals, OWN, PACKED,
                IS_PROBS, HAS_DRAFT, TREE, REPLACEMENT,
            )  # fmt: skip
            of_rest += tl.sum(fixed_point(r), 0)
            of_p += tl.sum(fixed_point(p), 0)
        tl.store(rest_sums + b * tiles + tile, of_rest)
        tl.store(sums + b * tiles + tile, of_p)


@triton.jit
def find_tile(sums, target, T, T_PAD: tl.constexpr):
    """(tile, sum before it) of the first tile at which the sums exceed `target`."""
    tile = tl.arange(0, T_PAD)
    part = tl.load(sums + tile, mask=tile < T, other=0)
    at = tl.minimum(tl.sum((tl.cumsum(part, 0) <= target).to(tl.int32), 0), T - 1)
    return at, tl.sum(tl.where(tile < at, part, 0), 0)


@triton.jit
def find_in_tile(part, ids, target, before, first):
    """(first id at which the running sum exceeds `target`, sum behind these ids)."""
    reached = before + tl.cumsum(part, 0)
    first = tl.minimum(first, tl.min(tl.where(reached > target, ids, MANY), 0))
    return first, before + tl.sum(part, 0)


@triton.jit(do_not_specialize=["K", "T"])
def finish_kernel(
    x, cu, stride_b, stride_i, records, y, stride_yb, stride_yi, q_records, temperature, request,
    rest_sums, sums, nodes, parents, p_totals, q_totals, seeds, positions, words,
    ids, following, accept_len, remaining, retries, path, next_token, num_emitted, tokens, source,
    finished,
    K, V, Vd, T,
    DRAWS: tl.constexpr, RETRIES: tl.constexpr, OWN: tl.constexpr, PACKED: tl.constexpr,
    IS_PROBS: tl.constexpr, HAS_DRAFT: tl.constexpr, TREE: tl.constexpr, REPLACEMENT: tl.constexpr,
    HAS_WORDS: tl.constexpr, HAS_REMAINING: tl.constexpr, EOS: tl.constexpr, K_PAD: tl.constexpr,
    T_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B): the token that follows, the cuts, the outputs."""
    b = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accept_len + b)
    token = tl.load(following + b)
    j = tl.arange(0, K_PAD)
    retried = tl.full((), -1, tl.int32)  # the place of a retry
    if DRAWS:
        mode = tl.load(request + b * REQUEST + MODE)
        if RETRIES:
            found = tl.load(retries + b)
            if (mode != NOTHING) & (found >= 0):
                token = found
                mode = tl.full((), NOTHING, tl.int64)
                retried = accepted
        if mode != NOTHING:
            k, factor = rate_of(temperature_of(temperature, b))
            tile = tl.arange(0, T_PAD)
            total = tl.sum(tl.load(rest_sums + b * T + tile, mask=tile < T, other=0), 0)
            at_sums = rest_sums + b * T
            if total == 0:
                at_sums = sums + b * T
            from_p = total == 0
            total = tl.sum(tl.load(at_sums + tile, mask=tile < T, other=0), 0)
            word = random_word(words, seeds, positions, b, accepted, K, SAMPLE, HAS_WORDS)
            target = part_of(word, total)
            at, before = find_tile(at_sums, target, T, T_PAD)
            first = tl.full((), MANY, tl.int32)
            for begin in tl.static_range(0, TILE, BLOCK):
                places = at * TILE + begin + tl.arange(0, BLOCK)
                r, p = asked_rest(
                    x, cu, stride_b, stride_i, records, y, stride_yb, stride_yi, q_records, b,
                    places, request + b * REQUEST, k, factor, K, V, Vd, nodes, parents, p_totals,
                    q_totals, OWN, PACKED, IS_PROBS, HAS_DRAFT, TREE, REPLACEMENT,
                )  # fmt: skip
                part = fixed_point(tl.where(from_p, p, r))
                first, before = find_in_tile(part, places, target, before, first)
            token = tl.where(total > 0, first.to(tl.int64), -1)

    drafts = tl.load(ids + b * K + j, mask=j < accepted, other=-1).to(tl.int64)
    emitted = tl.where(j == accepted, token, drafts)
    length = accepted + (token >= 0).to(tl.int32)
    cut = tl.min(tl.where(is_end(emitted, EOS) != 0, j + 1, MANY), 0)
    reason = tl.where(cut <= length, END_OF_TEXT, RUNNING)
    length = tl.minimum(length, cut)
    if HAS_REMAINING:
        limit = tl.maximum(tl.load(remaining + b).to(tl.int32), 0)
        broken = (token != IDLE) & (length >= limit)
        reason = tl.where(broken & ((length > limit) | (reason == RUNNING)), LENGTH, reason)
        length = tl.where(broken, limit, length)
    accepted = tl.minimum(accepted, length)
    last = tl.sum(tl.where((j == length - 1) & (length > accepted), emitted, 0), 0)
    origin = tl.load(source + b * (K + 1) + j, mask=j < length, other=0)
    origin = tl.where((j == retried) & (j < length), TEACHER_RETRY, origin).to(tl.uint8)
    tl.debug_barrier()  # accept_len and source are read, too
    tl.store(accept_len + b, accepted)
    tl.store(num_emitted + b, length)
    tl.store(next_token + b, tl.where(length > accepted, last, -1))
    tl.store(finished + b, reason.to(tl.uint8))
    tl.store(tokens + b * (K + 1) + j, tl.where(j < length, emitted, -1), mask=j <= K)
    if TREE:
        nowhere = tl.full((K_PAD,), -1, tl.int32)
        tl.store(path + b * (K + 1) + j, nowhere, mask=(j > accepted) & (j <= K))
    tl.store(source + b * (K + 1) + j, origin, mask=j <= K)


@triton.jit(do_not_specialize=["B", "K"])
def flatten_kernel(
    num_emitted, tokens, cu_emitted, flat, B, K, B_PAD: tl.constexpr, K_PAD: tl.constexpr
):
    """Grid (B + 1): emitted tokens one sequence behind the other, -1 behind the last."""
    b = tl.program_id(0)
    other = tl.arange(0, B_PAD)
    lengths = tl.load(num_emitted + other, mask=other < B, other=0)
    offset = tl.sum(tl.where(other < b, lengths, 0), 0)
    tl.store(cu_emitted + b, offset)
    j = tl.arange(0, K_PAD)
    if b < B:
        token = tl.load(tokens + b.to(tl.int64) * (K + 1) + j, mask=j <= K, other=-1)
        tl.store(flat + offset + j, token, mask=j < tl.load(num_emitted + b))
    else:
        nothing = tl.full((K_PAD,), -1, tl.int64)
        for first in range(offset, B * (K + 1), K_PAD):
            tl.store(flat + first + j, nothing, mask=first + j < B * (K + 1))
