"""Distributions and random words of the speculative core, as Triton device functions.

An id with logit l has the weight M 2^n = 2^(l log2(e) / T), M of 24 bits: n and the argument of a
polynomial of degree 5 come out of one 64-bit product, the polynomial is multiplied and added in
float32, each rounded. A given probability is cut into M and n as it stands. A row is (N, A): its
largest n, and the sum of its weights in units of 2^(N - 16), tile by tile. A probability is
float32(M * (1 / A) * 2^(16 + n - N)) by way of float64.

All sums are over integers, so any order of programs and any block size takes the same decisions, to
the bit those of `alignops.reference.speculative`. Needs kernels compiled without contraction of
products and sums (`enable_fp_fusion=False`). Integers stay below 2**63: there are no unsigned ones
but random words.

Letters: V ids, T tiles of 4096 ids. Source: arXiv 2211.17192, 2408.07978, Salmon et al. 2011.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def _float32(bits: int) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<f", struct.pack("<I", bits))[0])


TILE = tl.constexpr(4096)
NEGLIGIBLE = tl.constexpr(96)
NOWHERE = tl.constexpr(-(1 << 31))  # exponent of what is not there
MANY = tl.constexpr((1 << 31) - 1)
INFINITY = tl.constexpr(float("inf"))

# Streams of random words.
ACCEPT, SAMPLE, PROPOSE, RETRY, RACE, CHILD, BLOCK = (tl.constexpr(i) for i in range(7))

EXP2_5, EXP2_4, EXP2_3, EXP2_2, EXP2_1 = (
    _float32(bits) for bits in (0x3AF4BA7E, 0x3C13BC2A, 0x3D648E73, 0x3E75EDAB, 0x3F31725D)
)
BELOW_2 = _float32(0x3FFFFFFF)
NOISE_0, NOISE_1, NOISE_2, NOISE_3, NOISE_4, NOISE_5, NOISE_6, NOISE_7, NOISE_8 = (
    _float32(bits)
    for bits in (
        *(0x3FB8AA3B, 0x3F38A99D, 0x3EF67A7C, 0x3EB38315, 0x3EC6120C),
        *(0xBE923EBC, 0x3FE608F6, 0xC01B4FF0, 0x400476E5),
    )
)
TWO_M33 = tl.constexpr(2.0**-33)
TWO_M32 = tl.constexpr(2.0**-32)
TWO_40 = tl.constexpr(2.0**40)


# Weights


@triton.jit
def rate_of(temperature):
    """log2(e) / T as factor 2^-k with a factor in [2^29, 2^30): (k, factor), both int64."""
    rate = tl.full((), 1.4426950408889634, tl.float64) / temperature.to(tl.float64)
    bits = rate.to(tl.int64, bitcast=True)
    k = 29 - ((bits >> 52) - 1023)
    mantissa = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
    factor = mantissa >> 23
    rest = mantissa & 0x7FFFFF
    up = (rest > 0x400000) | ((rest == 0x400000) & ((factor & 1) == 1))
    return k, factor + up.to(tl.int64)


@triton.jit
def power_of_2(e):
    """2^e, float64, |e| <= 1000."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def weight_of_logit(logit, k, factor):
    """(M, n), int32; M = 0: impossible."""
    y = tl.minimum(tl.maximum(logit, -2047.0), 2047.0) * 1048576.0
    # To the nearest integer, ties to even: above 2^23 there is nothing behind the point.
    size = tl.abs(y)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    fixed = tl.where(y < 0, -size, size).to(tl.int32)
    scaled = fixed.to(tl.int64) * factor
    n = (scaled >> (20 + k)).to(tl.int32)
    fraction = ((scaled >> (k - 3)) & 0x7FFFFF).to(tl.int32)
    x = (fraction | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    g = x * EXP2_5 + EXP2_4
    g = g * x + EXP2_3
    g = g * x + EXP2_2
    g = g * x + EXP2_1
    g = tl.minimum(g * x + 1.0, BELOW_2)
    m = (g.to(tl.int32, bitcast=True) & 0x7FFFFF) | 0x800000
    return tl.where(logit == -INFINITY, 0, m), n


@triton.jit
def is_kept(ids, m, n, cut_n, cut_m, cut_id):
    """Whether ids are possible, and not behind the last one that the filters keep."""
    same = (m > cut_m) | ((m == cut_m) & (ids <= cut_id))
    return (m > 0) & ((n > cut_n) | ((n == cut_n) & same))


@triton.jit
def given_probability(m, n):
    """The probability float32 that M and n were cut from."""
    return ((n << 23) | (m & 0x7FFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def probability(m, n, top, inverse, IS_PROBS: tl.constexpr):
    """Probabilities float32 of possible weights; top: the row's largest n, inverse: 1 / A."""
    if IS_PROBS:
        return given_probability(m, n)
    depth = top - n
    e = 16 - tl.minimum(depth, NEGLIGIBLE)
    p = (m.to(tl.float64) * inverse * power_of_2(e)).to(tl.float32)
    return tl.where(depth > NEGLIGIBLE, 0.0, p)


@triton.jit
def inverse_of(total):
    """1 / A of a row, float64."""
    return tl.full((), 1.0, tl.float64) / tl.maximum(total, 1).to(tl.float64)


@triton.jit
def fixed_point(r):
    """R in units of 2^-40, cut to integers, int64."""
    return (r * TWO_40).to(tl.int64)


@triton.jit
def units(m, n, top, IS_PROBS: tl.constexpr):
    """Weights in units of 2^(top - 16), given probabilities of 2^-40, cut to integers, int64."""
    if IS_PROBS:
        return fixed_point(given_probability(m, n))
    shift = tl.minimum(tl.maximum(top - n, 0), 63).to(tl.int64)
    return (m.to(tl.int64) << 16) >> shift


# Random words


@triton.jit
def words_of(seed, position, stream, lane):
    """The four words of Philox4x32-10 of lanes (int32, a block); uint32."""
    zero = lane * 0
    c0 = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.philox(seed, c0, zero + stream, lane, zero)


@triton.jit
def word_of(seed, position, stream, lane):
    """Word 0 of one lane, as int64 in [0, 2^32)."""
    lanes = tl.zeros((1,), tl.int32) + lane
    w0, _, _, _ = words_of(seed, position, stream, lanes)
    return tl.sum(w0.to(tl.int64), 0)


@triton.jit
def accepts(word, q, p):
    """The test u q < p, strict."""
    u = word.to(tl.float64) * TWO_M32
    return u * q.to(tl.float64) < p.to(tl.float64)


@triton.jit
def part_of(word, total):
    """floor(word total / 2^32), exactly: where in [0, total) a random word points."""
    return word * (total >> 32) + scaled_low(word, total & 0xFFFFFFFF)


@triton.jit
def scaled_low(word, low):
    """floor(word low / 2^32) of factors below 2^32."""
    product = word.to(tl.uint64) * low.to(tl.uint64)
    return (product >> 32).to(tl.int64)


@triton.jit
def noise_of_words(word):
    """Exponential noise float32 of random words uint32: -log2 of (word + a bit) / 2^32."""
    # Without the bit behind the leading one, rounding to float32 keeps the exponent.
    steady = (word & ((word >> 1) ^ 0xFFFFFFFF)).to(tl.float32).to(tl.int32, bitcast=True)
    zeros = tl.where(word == 0, 32, 158 - (steady >> 23))
    fraction = (word.to(tl.int64) << (zeros + 1).to(tl.int64)) & 0xFFFFFFFF
    t = (4294967296 - fraction).to(tl.float32) * TWO_M33
    value = t * NOISE_8 + NOISE_7
    value = value * t + NOISE_6
    value = value * t + NOISE_5
    value = value * t + NOISE_4
    value = value * t + NOISE_3
    value = value * t + NOISE_2
    value = value * t + NOISE_1
    value = value * t + NOISE_0
    return zeros.to(tl.float32) + t * value


@triton.jit
def race_noise(seed, position, first, SIZE: tl.constexpr):
    """Noise of ids first .. first + SIZE - 1; both are multiples of 4."""
    lanes = first // 4 + tl.arange(0, SIZE // 4)
    w0, w1, w2, w3 = words_of(seed, position, RACE, lanes)
    return noise_of_words(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def race_weight(m, n, top, IS_PROBS: tl.constexpr):
    """M 2^(n - N), float32, 0 if negligible; or the given probability."""
    if IS_PROBS:
        return given_probability(m, n)
    depth = top - n
    e = (127 - tl.minimum(depth, NEGLIGIBLE)) << 23
    weight = m.to(tl.float32) * e.to(tl.float32, bitcast=True)
    return tl.where(depth > NEGLIGIBLE, 0.0, weight)
