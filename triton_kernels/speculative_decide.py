"""Acceptance rules of chains: which drafts stand, which token follows, what is emitted.

`decide_kernel` walks the drafts of a sequence with the records of its rows and what the second
reads of `speculative_chains` found. It names the token that follows, or what it is drawn from; then
`sums_kernel` reads that one row, and `finish_kernel` the one tile that the random word points into,
cuts behind the end of the text and at the limit, and writes the outputs.

Letters: B sequences, K drafts, V ids (Vd of the drafter), T tiles of 4096. Sources as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_chains import (
    BASE,
    BLOCK_RULE,
    BONUS,
    CORRECTION,
    COUPLED,
    DRAFT,
    FROM_P,
    FROM_REST,
    GREEDY,
    IDLE,
    LOSSLESS,
    MODE,
    NOTHING,
    NUDGE,
    NUDGE_RULE,
    RATIO,
    REMOVED,
    REQUEST,
    ROW,
    RSD,
    SCRIPTED,
    STATE_BASE,
    STATE_NUDGE,
    STUDENT,
    THRESHOLD,
    TYPICAL,
    best_chance,
    chance,
    draft_chance,
    is_end,
    next_ratio,
    random_word,
    winner_of,
)
from .speculative_laws import (
    ACCEPT,
    TWO_M32,
    accepts,
    rate_of,
)
from .speculative_laws import BLOCK as BLOCK_TEST
from .speculative_rows import (
    BAD_ARGUMENT,
    BEST,
    ERROR,
    OUT_OF_RANGE,
    RECORD,
    count_drafts,
    fault_of_warp,
    row_start,
    temperature_of,
)

TWO_M40 = tl.constexpr(2.0**-40)


@triton.jit
def double_of(bits):
    """A float64 argument, which comes as the integer of its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def test_of(
    RULE: tl.constexpr, token, best, b, i, start, record, k, factor, second, tile, T, V, K,
    words, seeds, positions, eps, delta, m, r, below_best, t_single, t_acc, p_th, top_n,
    IS_PROBS: tl.constexpr, HAS_WORDS: tl.constexpr,
):  # fmt: skip
    """Whether draft i passes the test of a rule that looks at one row only."""
    at = (b * K + i) * T + tile
    if RULE == GREEDY or RULE == COUPLED or RULE == SCRIPTED:
        return token == best
    elif RULE == TYPICAL:
        p = chance(start, token, V, k, factor, record, IS_PROBS).to(tl.float64)
        entropy = tl.sum(tl.load(second + at, mask=tile < T, other=0.0), 0)
        bound = tl.minimum(double_of(eps), double_of(delta) * tl.exp(-entropy))
        return (p > 0) & (p > bound)
    elif RULE == THRESHOLD:
        p = chance(start, token, V, k, factor, record, IS_PROBS)
        word = random_word(words, seeds, positions, b, i, K, ACCEPT, HAS_WORDS)
        chosen = accepts(word, tl.full((), 0.0, tl.float32) + t_acc, p)
        return (p > 0) & ((p >= t_single) | chosen)
    else:
        p = chance(start, token, V, k, factor, record, IS_PROBS)
        rank = tl.sum(tl.load(second + at, mask=tile < T, other=0), 0)
        if RULE == RSD:
            return (p > 0) & (p >= p_th) & ((top_n == 0) | (rank < top_n))
        else:
            largest = best_chance(record, IS_PROBS)
            bound = tl.where(below_best < 0, largest * r, largest - below_best)
            return (p > 0) & (p >= bound) & (rank < m)


@triton.jit
def threshold_of_block(ratio, i, drafts, second, at, tile, T):
    """What the random word of a prefix of i + 1 drafts must be below, float64."""
    h = ratio
    if i + 1 < drafts:
        part = tl.load(second + at + T + tile, mask=tile < T, other=0)
        z = tl.sum(part, 0).to(tl.float64) * TWO_M40
        passed = (z + 1.0) - ratio
        h = tl.where(passed > 0, z / tl.where(passed > 0, passed, 1.0), 1.0)
    return h


@triton.jit
def nudge_step(
    now, i, token, best, p, drafts, ids, row_of_ids, source, word_start, gamma, lookahead,
    K_PAD: tl.constexpr, EOS: tl.constexpr,
):  # fmt: skip
    """One place of `nudge`: (state, drafts that stand, what is emitted instead or -1, goes on)."""
    j = tl.arange(0, K_PAD)
    sure = (p >= gamma) & (is_end(best, EOS) == 0)
    count = tl.full((), 1, tl.int32)
    goes_on = tl.full((), 1, tl.int32)
    instead = token
    if (now == STATE_BASE) & (sure == 0):
        now = tl.full((), STATE_NUDGE, tl.int32)
        d = tl.load(ids + row_of_ids + j, mask=j < drafts, other=-1).to(tl.int64)
        seen = (is_end(d, EOS) != 0) & (j >= i) & (j < i + lookahead)
        first = tl.min(tl.where(seen, j, K_PAD), 0)
        if first < K_PAD:
            count = first + 1 - i
            goes_on = tl.full((), 0, tl.int32)
    elif now == STATE_NUDGE:
        begins = tl.load(word_start + token) != 0
        back = begins & (sure | ((best == token) & (is_end(best, EOS) == 0)))
        if back:
            now = tl.full((), STATE_BASE, tl.int32)
            instead = best
    else:
        instead = best
    origin = tl.where(now == STATE_NUDGE, NUDGE, BASE).to(tl.uint8)
    for place in range(i, i + count):
        tl.store(source + place, origin)
    count = tl.where(instead == token, count, 0)
    goes_on = tl.where(instead == token, goes_on, 0)
    return now, count, tl.where(instead == token, -1, instead), goes_on


@triton.jit(do_not_specialize=["K", "T", "eps", "delta", "m", "top_n", "lookahead"])
def decide_kernel(
    x, cu, stride_b, stride_i, ids, lens, active, temperature, top_k, top_p, min_p,
    test_temperature, records, y, stride_yb, stride_yi, q_records,
    seeds, positions, words, ratios, winners, second, given, word_start, state,
    accept_len, following, request, source, row_error, new_state, zero_q,
    K, V, Vd, T, eps, delta, m, r, below_best, t_single, t_acc, p_th, top_n, gamma, lookahead,
    RULE: tl.constexpr, PACKED: tl.constexpr, HAS_LENS: tl.constexpr, HAS_ACTIVE: tl.constexpr,
    IS_PROBS: tl.constexpr, HAS_DRAFT: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, EOS: tl.constexpr,
    K_PAD: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (B): accepted drafts, the token that follows or the request for it, and its source.

    second (B * K, T): int64 sums of `block`, float64 entropies of `typical`, int32 ranks.
    `records` are laws at `test_temperature`, which only `rsd` sets apart; 0: the row is greedy.
    """
    RATIOS: tl.constexpr = RULE == LOSSLESS or RULE == BLOCK_RULE
    b = tl.program_id(0).to(tl.int64)
    drafts = count_drafts(ids, lens, cu, active, b, K, HAS_LENS, PACKED, HAS_ACTIVE, K_PAD)
    warmth = temperature_of(temperature, b)
    k, factor = rate_of(tl.where(warmth > 0, temperature_of(test_temperature, b), 1.0))
    tile = tl.arange(0, T_PAD)
    j = tl.arange(0, K_PAD)
    now = tl.full((), STATE_BASE, tl.int32)
    if HAS_STATE:
        now = tl.load(state + b).to(tl.int32)
    before = now

    tested = tl.load(ids + b * K + j, mask=j < drafts, other=0)
    outside = tl.max(((tested < 0) | (tested >= V)).to(tl.int32), 0)
    error = fault_of_warp(temperature, top_k, top_p, min_p, b, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P)
    error = tl.where(now > STATE_NUDGE, BAD_ARGUMENT, error)
    error = tl.where((error == 0) & (outside != 0), OUT_OF_RANGE, error)
    error = tl.where(drafts < 0, 0, error)
    accepted = tl.full((), 0, tl.int32)
    zeros = tl.full((), 0, tl.int32)
    going = tl.where((error == 0) & (drafts >= 0), 1, 0)
    token_after = tl.full((), -1, tl.int64)
    ratio = tl.full((), 1.0, tl.float64)
    ratio_at = tl.full((), 1.0, tl.float64)
    if RULE == SCRIPTED:
        accepted = tl.where(going == 1, tl.minimum(tl.maximum(tl.load(given + b), 0), drafts), 0)
        going = tl.full((), 0, tl.int32)

    for place in range(0, drafts):
        if going == 1:
            i = tl.full((), 0, tl.int32) + place
            token = tl.load(ids + b * K + i).to(tl.int64)
            record = records + (b * (K + 1) + i) * RECORD
            error = tl.load(record + ERROR).to(tl.int32)
            if HAS_DRAFT and RATIOS:
                if (error == 0) & (warmth > 0):
                    error = tl.load(q_records + (b * K + i) * RECORD + ERROR).to(tl.int32)
            if error != 0:
                going = tl.full((), 0, tl.int32)
            else:
                start = row_start(x, b, i, cu, stride_b, stride_i, PACKED)
                best = tl.load(record + BEST)
                if warmth > 0:
                    if RATIOS:
                        p = chance(start, token, V, k, factor, record, IS_PROBS)
                        q = draft_chance(
                            y, stride_yb, stride_yi, Vd, q_records, b, i, token, token, k, factor,
                            K, HAS_DRAFT, IS_PROBS,
                        )  # fmt: skip
                        zeros += ((q == 0) & (p > 0)).to(tl.int32)
                        if RULE == LOSSLESS:
                            word = random_word(words, seeds, positions, b, i, K, ACCEPT, HAS_WORDS)
                            going = accepts(word, q, p).to(tl.int32)
                            accepted += going
                        else:  # a prefix may stand even if a shorter one does not
                            ratio = next_ratio(ratio, p, q)
                            at = (b * K + i) * T
                            h = threshold_of_block(ratio, i, drafts, second, at, tile, T)
                            word = random_word(
                                words, seeds, positions, b, i, K, BLOCK_TEST, HAS_WORDS
                            )
                            stands = word.to(tl.float64) * TWO_M32 < h
                            accepted = tl.where(stands, i + 1, accepted)
                            ratio_at = tl.where(stands, ratio, ratio_at)
                    elif RULE == NUDGE_RULE:
                        p = chance(start, best, V, k, factor, record, IS_PROBS)
                        now, count, token_after, going = nudge_step(
                            now, i, token, best, p, drafts, ids, b * K, source + b * (K + 1),
                            word_start, gamma, lookahead, K_PAD, EOS,
                        )  # fmt: skip
                        accepted += count
                    else:
                        if RULE == COUPLED:
                            best = winner_of(ratios, winners, b * (K + 1) + i, T, T_PAD)
                        going = test_of(
                            RULE, token, best, b, i, start, record, k, factor, second, tile, T, V,
                            K, words, seeds, positions, eps, delta, m, r, below_best, t_single,
                            t_acc, p_th, top_n, IS_PROBS, HAS_WORDS,
                        ).to(tl.int32)  # fmt: skip
                        accepted += going
                else:
                    going = (token == best).to(tl.int32)
                    accepted += going

    mode = tl.full((), NOTHING, tl.int32)
    removed = tl.full((), -1, tl.int64)
    full = accepted == drafts
    origin = tl.where(full, BONUS, CORRECTION)
    reads = drafts >= 0  # whether the row behind the accepted drafts is read
    if warmth > 0:
        if RULE == NUDGE_RULE:
            reads = reads & (going == 1) & (now == STATE_BASE)
        elif RULE == RSD:
            reads = reads & (full == 0)
    if reads & (error == 0):
        record = records + (b * (K + 1) + accepted) * RECORD
        error = tl.load(record + ERROR).to(tl.int32)
        if error == 0:
            best = tl.load(record + BEST)
            token_after = best
            if warmth > 0:
                if RULE == COUPLED:
                    token_after = winner_of(ratios, winners, b * (K + 1) + accepted, T, T_PAD)
                elif RULE == NUDGE_RULE:
                    start = row_start(x, b, accepted, cu, stride_b, stride_i, PACKED)
                    p = chance(start, best, V, k, factor, record, IS_PROBS)
                    sure = (p >= gamma) & (is_end(best, EOS) == 0)
                    token_after = tl.where(sure, best, -1)
                elif RATIOS or RULE == THRESHOLD or RULE == RSD:
                    token_after = tl.full((), -1, tl.int64)
                    mode = tl.full((), FROM_P, tl.int32)
                    if RATIOS and HAS_DRAFT:
                        mode = tl.where(full, FROM_P, FROM_REST)
                    elif RULE != RSD:
                        token = tl.load(ids + b * K + accepted, mask=full == 0, other=-1)
                        removed = token.to(tl.int64)
    if RULE == NUDGE_RULE:
        origin = tl.where(warmth > 0, tl.where(now == STATE_NUDGE, NUDGE, BASE), origin)
    if RULE == RSD:
        origin = tl.where(warmth > 0, STUDENT, origin)

    if (error != 0) | (drafts < 0):
        zeros = tl.full((), 0, tl.int32)
        accepted = tl.full((), 0, tl.int32)
        token_after = tl.full((), IDLE, tl.int64)
        mode = tl.full((), NOTHING, tl.int32)
        now = before
    ratio_bits = ratio_at.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    at = request + b * REQUEST
    tl.store(at + MODE, mode.to(tl.int64))
    tl.store(at + ROW, accepted.to(tl.int64))
    tl.store(at + REMOVED, removed)
    tl.store(at + RATIO, tl.where(full, 0x3F800000, ratio_bits))
    tl.store(accept_len + b, accepted)
    tl.store(following + b, token_after)
    tl.store(row_error + b, error.to(tl.uint8))
    tl.store(new_state + b, now.to(tl.uint8))
    tl.store(zero_q + b, zeros)
    plain = K + 1  # places whose source is plain
    if RULE == NUDGE_RULE:
        if warmth > 0:
            plain = 0
            tl.store(source + b * (K + 1) + accepted, origin.to(tl.uint8))
    tl.store(
        source + b * (K + 1) + j,
        tl.where(j < accepted, DRAFT, origin).to(tl.uint8),
        mask=j < plain,
    )
