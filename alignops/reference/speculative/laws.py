"""Random bits and distributions of the speculative core, defined to the last bit.

Every sum is over integers and every product is one IEEE operation, so kernels may sum in any order,
on any device, and take the same decisions.

Shape letters: V ids of the vocabulary. A tile is 4096 consecutive ids.

Source: arXiv 2211.17192 (acceptance test and residual), arXiv 2408.07978 (shared noise), Salmon et
al. 2011 (Philox4x32-10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Uint32 = npt.NDArray[np.uint32]
Uint64 = npt.NDArray[np.uint64]

LOG2_E = 1.4426950408889634
TILE = 4096
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e4
# Weights this many powers of two below the largest one have probability 0.
NEGLIGIBLE = 96

# What a random word is for: the second counter of the generator.
ACCEPT, SAMPLE, PROPOSE, RETRY, RACE, CHILD, BLOCK = range(7)

_LOW = np.uint64(0xFFFFFFFF)
# 2**x - 1 - ... on [0, 1): coefficients of x**5 to x, and of the noise of a race.
_EXP2 = np.array([0x3AF4BA7E, 0x3C13BC2A, 0x3D648E73, 0x3E75EDAB, 0x3F31725D], np.uint32).view(
    np.float32
)
_NOISE = np.array(
    [
        *(0x3FB8AA3B, 0x3F38A99D, 0x3EF67A7C, 0x3EB38315, 0x3EC6120C),
        *(0xBE923EBC, 0x3FE608F6, 0xC01B4FF0, 0x400476E5),
    ],
    np.uint32,
).view(np.float32)


# Random words


def philox(seed: int, position: int, stream: int, lane: npt.ArrayLike = 0) -> Uint32:
    """Four random words of Philox4x32-10 for each lane: (..., 4).

    The key is the 64-bit seed of the sequence, the counter (position of the token that is decided,
    stream, lane, 0), so the words do not depend on the row, the batch, or the number of drafts.
    """
    lanes = np.asarray(lane, np.uint64)
    counter = [np.full_like(lanes, position), np.full_like(lanes, stream), lanes, lanes * 0]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        first = np.uint64(0xD2511F53) * (counter[0] & _LOW)
        second = np.uint64(0xCD9E8D57) * (counter[2] & _LOW)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ key[0],
            second & _LOW,
            (first >> np.uint64(32)) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & _LOW, (key[1] + np.uint64(0xBB67AE85)) & _LOW]
    return np.stack(counter, -1).astype(np.uint32)


def uniform(seed: int, position: int, stream: int, lane: int = 0) -> int:
    """A random word in [0, 2**32): word 0 of the counter."""
    return int(philox(seed, position, stream, lane)[0])


def race_noise(seed: int, position: int, size: int) -> Float32:
    """Exponential noise of `size` ids, shared by all models that decide this position."""
    words = philox(seed, position, RACE, np.arange(-(-size // 4))).reshape(-1)[:size]
    zeros = np.full(size, 32, np.int64)  # leading zeros: the integer part of -log2
    for bit in range(32):
        zeros[words >> np.uint32(bit) == 1] = 31 - bit
    fraction = (words.astype(np.uint64) << (zeros.astype(np.uint64) + np.uint64(1))) & _LOW
    t = (np.uint64(1 << 32) - fraction).astype(np.float32) * np.float32(2.0**-33)
    value = np.full(size, _NOISE[-1], np.float32)
    for coefficient in _NOISE[-2::-1]:
        value = value * t + coefficient
    noise: Float32 = zeros.astype(np.float32) + t * value
    return noise


# Distributions


@dataclass(frozen=True)
class Law:
    """A distribution over ids (V,): probability 0 where `mantissa` is 0.

    The weight of an id is mantissa * 2**exponent, with a mantissa of 24 bits; `logits` decide what
    is largest.
    """

    logits: Float32
    mantissa: Int64
    exponent: Int64

    @property
    def top(self) -> int:
        """N: the largest exponent of an id that is possible."""
        return int(self.exponent[self.mantissa > 0].max())

    @property
    def total(self) -> int:
        """A: the sum of all weights, in units of 2**(N - 16); tiles are summed first."""
        return total_of_tiles(*tile_sums(self))

    @property
    def p(self) -> Float32:
        """Probabilities float32."""
        scale = 1.0 / float(self.total)
        shift = self.exponent - self.top
        p = self.mantissa.astype(np.float64) * np.ldexp(scale, (16 + shift).astype(np.int32))
        return np.where(shift < -NEGLIGIBLE, 0.0, p).astype(np.float32)

    @property
    def argmax(self) -> int:
        """The id of the largest logit; the lowest one of equals."""
        return int(np.argmax(self.logits))

    def order(self) -> Int64:
        """Ids by falling weight; equal weights by rising id."""
        exponent = np.where(self.mantissa > 0, self.exponent, -(1 << 62))
        return np.lexsort((np.arange(self.logits.size), -self.mantissa, -exponent))


def law(
    logits: npt.ArrayLike,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Law:
    """The distribution softmax(logits / temperature), cut to top-k, then top-p, then min-p.

    Args:
        logits: (V,), float32 or narrower; -inf is probability 0.
        temperature: in [1e-5, 1e4], rounded to float32 as top_p and min_p are.
        top_k: ids kept; 0: all.
        top_p: the shortest sequence of falling probabilities that reaches this sum is kept.
        min_p: ids at least this fraction of the largest probability are kept.

    Raises:
        ValueError: NaN or +inf, nothing but -inf, or an argument out of range.
    """
    l32 = np.asarray(logits, np.float32)
    if np.isnan(l32).any() or np.isposinf(l32).any() or not np.isfinite(l32).any():
        raise ValueError("law: logits must be finite or -inf, and not all -inf")
    if not np.float32(MIN_TEMPERATURE) <= np.float32(temperature) <= MAX_TEMPERATURE:
        raise ValueError(f"law: temperature must be in [1e-5, 1e4], got {temperature}")
    whole = Law(l32, *_weights(l32, temperature))
    return _cut(whole, top_k, float(np.float32(top_p)), min_p)


class _Given(Law):
    """A law whose probabilities are given, and stay as they are."""

    @property
    def p(self) -> Float32:
        return self.logits


def given(probabilities: npt.ArrayLike) -> Law:
    """The distribution of probabilities (V,), float32 or narrower; they are not normalized.

    Raises:
        ValueError: a probability is outside [0, 1], or all are below 2**-40.
    """
    p = np.asarray(probabilities, np.float32)
    if not ((p >= 0) & (p <= 1)).all() or total_of(p) == 0:
        raise ValueError("given: probabilities must be in [0, 1], and not all 0")
    fraction, exponent = np.frexp(p)
    mantissa = (fraction * np.float32(1 << 24)).astype(np.int64)
    return _Given(p, mantissa, exponent.astype(np.int64) - 24)


def _weights(l32: Float32, temperature: float) -> tuple[Int64, Int64]:
    rate = LOG2_E / float(np.float32(temperature))
    k = 29 - math.floor(math.log2(rate))
    factor = round(math.ldexp(rate, k))
    fixed = np.rint(np.clip(l32, -2047, 2047).astype(np.float64) * 2.0**20).astype(np.int64)
    scaled = fixed * factor  # logit * log2(e) / T, in units of 2**-(20 + k)
    exponent = scaled >> (20 + k)
    fraction = ((scaled >> (k - 3)) & 0x7FFFFF).astype(np.uint32)
    x = (fraction | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    g = np.full(l32.shape, _EXP2[0], np.float32)
    for coefficient in _EXP2[1:]:
        g = g * x + coefficient
    g = np.minimum(g * x + np.float32(1), np.uint32(0x3FFFFFFF).view(np.float32))
    mantissa = ((g.view(np.uint32) & np.uint32(0x7FFFFF)) | np.uint32(0x800000)).astype(np.int64)
    return np.where(np.isneginf(l32), 0, mantissa), exponent


def tile_sums(law: Law) -> tuple[list[int], list[int]]:
    """(N_t, A_t) of each tile: its largest exponent, and its sum in units of 2**(N_t - 16)."""
    tops, sums = [], []
    for begin in range(0, law.mantissa.size, TILE):
        mantissa, exponent = law.mantissa[begin : begin + TILE], law.exponent[begin : begin + TILE]
        possible = mantissa > 0
        top = int(exponent[possible].max()) if possible.any() else -(1 << 31)
        shifts = np.minimum(top - exponent[possible], 63)
        tops.append(top)
        sums.append(int(((mantissa[possible] << 16) >> shifts).sum()))
    return tops, sums


def total_of_tiles(tops: list[int], sums: list[int]) -> int:
    """A of a row from those of its tiles."""
    top = max(t for t, s in zip(tops, sums, strict=True) if s > 0)
    return sum(s >> min(top - t, 63) for t, s in zip(tops, sums, strict=True) if s > 0)


def _cut(whole: Law, top_k: int, top_p: float, min_p: float) -> Law:
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            "law: top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1], got "
            f"{top_k}, {top_p} and {min_p}"
        )
    size = whole.logits.size
    kept = whole
    if 0 < top_k < size:
        kept = _keep(kept, kept.order()[:top_k])
    if top_p < 1:
        order, top = kept.order(), kept.top
        units = (kept.mantissa << 16) >> np.minimum(np.maximum(top - kept.exponent, 0), 63)
        bound, reached, count = round(top_p * 2**32) * kept.total, 0, 0
        for v in order:
            count += 1
            reached += int(units[v])
            if reached << 32 >= bound:
                break
        kept = _keep(kept, order[:count])
    if min_p > 0:
        p = kept.p
        kept = _keep(kept, np.flatnonzero(p >= np.float32(min_p) * p.max()))
    return kept


def _keep(law: Law, ids: Int64) -> Law:
    mantissa = np.zeros_like(law.mantissa)
    mantissa[ids] = law.mantissa[ids]
    return Law(law.logits, mantissa, law.exponent)


# Decisions


def accepts(word: int, q: np.float32, p: np.float32) -> bool:
    """The test u q < p, strict: what p says is impossible is rejected at u = 0, too."""
    return float(word) * 2.0**-32 * float(q) < float(p)


def total_of(r: Float32) -> int:
    """Sum of non-negative values, in units of 2**-40."""
    return int(_fixed(r).sum(dtype=np.uint64))


def sample(r: Float32, word: int, instead: Float32 | None = None) -> int:
    """An id drawn in proportion to r (V,), float32 and not negative; from `instead` if r is 0."""
    fixed = _fixed(r)
    total = int(fixed.sum(dtype=np.uint64))
    if total == 0:
        if instead is None:
            raise ValueError("sample: r must not be 0 everywhere")
        return sample(instead, word)
    threshold = ((word << 32) * total) >> 64
    return int(np.searchsorted(np.cumsum(fixed, dtype=np.uint64), threshold, side="right"))


def _fixed(r: Float32) -> Uint64:
    return np.trunc(r.astype(np.float64) * 2.0**40).astype(np.uint64)


def residual(p: Float32, q: Float32) -> Float32:
    """What p has beyond q: max(p - q, 0)."""
    beyond: Float32 = np.maximum(p - q, np.float32(0))
    return beyond


def race_winner(law: Law, noise: Float32) -> int:
    """The id with the smallest noise / weight; the lowest one of equals."""
    shift = law.exponent - law.top
    weight = np.ldexp(law.mantissa.astype(np.float32), shift.astype(np.int32)).astype(np.float32)
    weight[(law.mantissa == 0) | (shift < -NEGLIGIBLE)] = 0
    with np.errstate(divide="ignore"):
        return int(np.argmin(noise / weight))
