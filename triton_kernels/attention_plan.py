"""What kernels of the attention core read from a plan (csrc/attention/plan.h), in device memory.

A plan is one buffer of 64-bit words, passed as int64 (`plan`) and once more as float32 (`reals`,
two per word). Letters: R rows, W workers, S segments, B blocks, F pairs of rotary dimensions, D
columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Words of the header.
WORKERS, ROWS, SEGMENTS, BLOCKS = (tl.constexpr(i) for i in range(2, 6))
LONGEST, TOKENS, STEP = (tl.constexpr(i) for i in range(8, 11))
SEGMENT, PAIR, WEIGHT, PAGE, ROW, ROPE = (tl.constexpr(i) for i in range(13, 19))

HIDDEN, RISING = tl.constexpr(0), tl.constexpr(2)  # states of a pair

# Below this many keys nothing is split; above, no part has fewer keys than the second number.
UNSPLIT, SHORTEST = tl.constexpr(512), tl.constexpr(128)


@triton.jit
def number(plan, word: tl.constexpr):
    """A count of the header."""
    return tl.load(plan + word).to(tl.int32)


@triton.jit
def partition(plan, splits, TILE: tl.constexpr):
    """(keys of a part, number of parts): equal parts of all segments, at most `splits`."""
    tokens = number(plan, TOKENS)
    size = tl.maximum((tokens + splits - 1) // splits, SHORTEST)
    size = (size + TILE - 1) // TILE * TILE
    size = tl.where(tokens < UNSPLIT, UNSPLIT, size)
    return size, tl.maximum((tokens + size - 1) // size, 1)


@triton.jit
def segment_of(segments, count, token):
    """Index of the segment that holds a key, counted through all segments."""
    low = tl.full((), 0, tl.int32)
    high = count
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(segments + middle.to(tl.int64) * 8 + 6) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def seen(pairs, weights, pair, t, n, window, planned, WINDOW: tl.constexpr):
    """Keys lo <= i < hi of a segment that rows see (int32; none: hi <= lo), their bias and gain.

    `pairs` and `weights` are the tables, `pair` the entries of segment and workers in them.
    """
    at = pairs + pair * 4
    state = tl.load(at, mask=planned, other=HIDDEN)
    limit = tl.load(at + 1, mask=planned, other=0)
    bias = tl.load(weights + 2 * pair, mask=planned, other=0.0)
    gain = tl.load(weights + 2 * pair + 1, mask=planned, other=0.0)
    hi = tl.minimum(limit + tl.where(state == RISING, t, 0), n)
    hi = tl.where((state == HIDDEN) | (bias == float("-inf")), 0, hi)
    lo = tl.zeros_like(hi)
    if WINDOW:
        distance = tl.load(at + 2, mask=planned, other=0)
        lo = tl.minimum(tl.maximum(distance + t - window + 1, 0), n)
    return lo.to(tl.int32), hi.to(tl.int32), bias, gain


@triton.jit
def rotated(
    x, at, inside, columns, reals, pairs, turn, further, combine, offset,
    D: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Columns of the rows x + at, rotated, float32 (rows, columns); outside: 0.

    `reals` is the rotation table, (cos, sin) of F pairs a row; a row of x is rotated by row `turn`
    of it, and by row `further`, too, if `combine`. Columns offset + [0, 2 F) take part.
    """
    real = inside[:, None] & (columns < D)[None, :]
    value = tl.load(x + at[:, None] + columns[None, :], mask=real, other=0.0).to(tl.float32)
    if TURNED:
        j = columns - offset
        if INTERLEAVED:
            first = j % 2 == 0
            pair = j // 2
            partner = tl.where(first, columns + 1, columns - 1)
        else:
            first = j < pairs
            pair = tl.where(first, j, j - pairs)
            partner = tl.where(first, columns + pairs, columns - pairs)
        rotary = (j >= 0) & (j < 2 * pairs) & (partner < D)
        both = real & rotary[None, :]
        other = tl.load(x + at[:, None] + partner[None, :], mask=both, other=0.0).to(tl.float32)
        entry = reals + 2 * (turn[:, None] * pairs + pair[None, :])
        cos = tl.load(entry, mask=both, other=1.0)
        sin = tl.load(entry + 1, mask=both, other=0.0)
        if combine:
            entry = reals + 2 * (further[:, None] * pairs + pair[None, :])
            c = tl.load(entry, mask=both, other=1.0)
            s = tl.load(entry + 1, mask=both, other=0.0)
            cos, sin = cos * c - sin * s, sin * c + cos * s
        turned = value * cos + tl.where(first[None, :], -other, other) * sin
        # Where nothing rotates other * sin would be 0, or NaN of an infinite value.
        value = tl.where(both, turned, value)
    return value
