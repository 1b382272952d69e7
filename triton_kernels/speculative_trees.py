"""Acceptance rules of trees: the walk from the root.

One program per sequence walks the tree with the records of the nodes. For the rule `tree_rrs` it
reads a node's row once more for every child that is refused. The token behind the path is drawn as
that of a chain.

Letters: B sequences, N nodes (N - 1 = K of the chain kernels), V ids (Vd of the drafter). Source:
arXiv 2305.09781; the definition is `alignops.reference.speculative.rules`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_chains import (
    BONUS,
    CORRECTION,
    DRAFT,
    FROM_P,
    IDLE,
    MODE,
    NOTHING,
    RATIO,
    REMOVED,
    REQUEST,
    ROW,
    chance,
)
from .speculative_laws import CHILD, TWO_M32, accepts, fixed_point, rate_of, word_of
from .speculative_refused import left_of
from .speculative_rows import (
    BEST,
    ERROR,
    OUT_OF_RANGE,
    RECORD,
    fault_of_warp,
    temperature_of,
)

# Codes of the operator.
TREE_GREEDY, TREE_TARGET, TREE_RRS = (tl.constexpr(i) for i in range(3))


@triton.jit
def next_child(parent, token, node, behind, N_PAD: tl.constexpr):
    """The first child of `node` behind a node, or N_PAD."""
    j = tl.arange(0, N_PAD)
    return tl.min(tl.where((parent == node) & (token >= 0) & (j > behind), j, N_PAD), 0)


@triton.jit
def refuse(
    x, y, record, q_record, node, child, V, Vd, k, factor, nodes, parents, p_totals, q_totals,
    IS_PROBS: tl.constexpr, REPLACEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the totals of what the refusal of `child` leaves of target and drafter."""
    token = tl.load(nodes + child)
    of_p = tl.full((), 0, tl.int64)
    of_q = tl.full((), 0, tl.int64)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        p = chance(x, ids, V, k, factor, record, IS_PROBS)
        q = chance(y, ids, Vd, k, factor, q_record, IS_PROBS)
        p, q = left_of(p, q, ids, node, child, nodes, parents, p_totals, q_totals, REPLACEMENT)
        of_p += tl.sum(fixed_point(tl.maximum(p - q, 0.0)), 0)
        of_q += tl.sum(tl.where(ids == token, 0, fixed_point(q)), 0)
    tl.debug_barrier()
    tl.store(p_totals + child, of_p)
    tl.store(q_totals + child, of_q)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N"])
def walk_kernel(
    x, stride_b, stride_i, nodes, parents, active, temperature, top_k, top_p, min_p, records,
    y, stride_yb, stride_yi, q_records, seeds, positions, p_totals, q_totals,
    path, chosen, accept_len, following, request, source, row_error, zero_q, N, V, Vd,
    RULE: tl.constexpr, REPLACEMENT: tl.constexpr, IS_PROBS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr, N_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B): the path, its tokens, and the token behind it or the request for it."""
    b = tl.program_id(0).to(tl.int64)
    at = b * N
    j = tl.arange(0, N_PAD)
    parent = tl.load(parents + at + j, mask=(j > 0) & (j < N), other=-1)
    token = tl.load(nodes + at + j, mask=(j > 0) & (j < N), other=-1)
    warmth = temperature_of(temperature, b)
    k, factor = rate_of(tl.where(warmth > 0, warmth, 1.0))
    seed = tl.full((), 0, tl.int64)
    position = tl.full((), 0, tl.int64)
    draws = tl.full((), 0, tl.int32)
    if RULE != TREE_GREEDY:
        draws = (warmth > 0).to(tl.int32)
        seed = tl.load(seeds + b)
        position = tl.load(positions + b)

    real = token != -1
    above = tl.load(nodes + at + parent, mask=real & (parent > 0) & (parent < j), other=0)
    wrong = (token < 0) | (token >= V) | (parent < 0) | (parent >= j) | (above == -1)
    bad = tl.max((real & wrong).to(tl.int32), 0)
    error = fault_of_warp(temperature, top_k, top_p, min_p, b, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P)
    error = tl.where((error == 0) & (bad != 0), OUT_OF_RANGE, error)
    going = tl.full((), 1, tl.int32)
    if HAS_ACTIVE:
        going = (tl.load(active + b) != 0).to(tl.int32)
    idle = going == 0
    error = tl.where(idle, 0, error)
    going = tl.where(error == 0, going, 0)

    node = tl.full((), 0, tl.int32)
    accepted = tl.full((), 0, tl.int32)
    zeros = tl.full((), 0, tl.int32)
    token_after = tl.full((), -1, tl.int64)
    mode = tl.full((), NOTHING, tl.int32)
    tl.store(path + at, node)
    while going == 1:
        record = records + (at + node) * RECORD
        error = tl.load(record + ERROR).to(tl.int32)
        if RULE == TREE_RRS:
            if (error == 0) & (draws == 1):
                error = tl.load(q_records + (at + node) * RECORD + ERROR).to(tl.int32)
        child = next_child(parent, token, node, node, N_PAD)
        found = tl.full((), N_PAD, tl.int32)
        if error == 0:
            if draws == 0:
                token_after = tl.load(record + BEST)
                same = (parent == node) & (token == token_after) & (j > node)
                found = tl.min(tl.where(same, j, N_PAD), 0)
            elif RULE == TREE_TARGET:
                start = x + b * stride_b + node.to(tl.int64) * stride_i
                word = word_of(seed, position + accepted, CHILD, 0).to(tl.float64) * TWO_M32
                reached = tl.full((), 0.0, tl.float64)
                tried = tl.zeros((N_PAD,), tl.int32)
                while child < N_PAD:
                    this = tl.sum(tl.where(j == child, token, 0), 0)
                    again = tl.max(((tried != 0) & (token == this)).to(tl.int32), 0)
                    tried = tl.where(j == child, 1, tried)
                    if again == 0:
                        p = chance(start, this, V, k, factor, record, IS_PROBS)
                        reached += p.to(tl.float64)
                    if (again == 0) & (word < reached):
                        found = child
                        child = tl.full((), N_PAD, tl.int32)
                    else:
                        child = next_child(parent, token, node, child, N_PAD)
                mode = tl.full((), FROM_P, tl.int32)
            elif RULE == TREE_RRS:
                start = x + b * stride_b + node.to(tl.int64) * stride_i
                q_start = y + b * stride_yb + node.to(tl.int64) * stride_yi
                q_record = q_records + (at + node) * RECORD
                rank = tl.full((), 0, tl.int32)
                while child < N_PAD:
                    this = tl.sum(tl.where(j == child, token, 0), 0)
                    p = chance(start, this, V, k, factor, record, IS_PROBS)
                    q = chance(q_start, this, Vd, k, factor, q_record, IS_PROBS)
                    p, q = left_of(
                        p, q, this, node, child, nodes + at, parents + at, p_totals + at,
                        q_totals + at, REPLACEMENT,
                    )  # fmt: skip
                    zeros += ((q == 0) & (p > 0)).to(tl.int32)
                    word = word_of(seed, position + accepted, CHILD, rank)
                    if accepts(word, q, p):
                        found = child
                        child = tl.full((), N_PAD, tl.int32)
                    else:
                        refuse(
                            start, q_start, record, q_record, node, child, V, Vd, k, factor,
                            nodes + at, parents + at, p_totals + at, q_totals + at, IS_PROBS,
                            REPLACEMENT, BLOCK,
                        )  # fmt: skip
                        child = next_child(parent, token, node, child, N_PAD)
                        rank += 1
                mode = tl.full((), FROM_P, tl.int32)
        if found < N_PAD:
            node = found
            tl.store(chosen + b * (N - 1) + accepted, tl.sum(tl.where(j == node, token, 0), 0))
            accepted += 1
            tl.store(path + at + accepted, node)
        else:
            going = tl.full((), 0, tl.int32)

    leaf = next_child(parent, token, node, node, N_PAD) == N_PAD
    origin = tl.where(leaf, BONUS, CORRECTION)
    if mode != NOTHING:
        token_after = tl.full((), -1, tl.int64)
    # Nothing is said: not even the root stands.
    if (error != 0) | idle:
        zeros = tl.full((), 0, tl.int32)
        accepted = tl.full((), 0, tl.int32)
        token_after = tl.full((), IDLE, tl.int64)
        mode = tl.full((), NOTHING, tl.int32)
        tl.debug_barrier()
        tl.store(path + at, tl.full((), -1, tl.int32))
    tl.store(request + b * REQUEST + MODE, mode.to(tl.int64))
    tl.store(request + b * REQUEST + ROW, node.to(tl.int64))
    tl.store(request + b * REQUEST + REMOVED, tl.full((), -1, tl.int64))
    tl.store(request + b * REQUEST + RATIO, tl.full((), 0x3F800000, tl.int64))
    tl.store(accept_len + b, accepted)
    tl.store(following + b, token_after)
    tl.store(row_error + b, error.to(tl.uint8))
    tl.store(zero_q + b, zeros)
    origins = tl.where(j < accepted, DRAFT, origin).to(tl.uint8)
    tl.store(source + at + j, origins, mask=j < N)
