"""Distributions of rows of logits in PyTorch operations, to the last bit those of the kernels.

Every operation is one IEEE operation and every sum one over integers, so the bits do not depend on
the device. `csrc/speculative/kernels.h` tells the arithmetic, `alignops.reference.speculative.laws`
defines it.

Shape letters: n ids.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

TILE = 4096
MIN_TEMPERATURE, MAX_TEMPERATURE = struct.unpack("f", struct.pack("f", 1e-5))[0], 1e4
# Weights this many powers of two below the largest one have probability 0.
NEGLIGIBLE = 96
#: Exponent of ids that are impossible.
NOWHERE = -(1 << 31)
# What a random word is for.
ACCEPT, SAMPLE, RACE = 0, 1, 4

_LOG2_E = 1.4426950408889634
_LOW = 0xFFFFFFFF
_EXP2 = (0x3AF4BA7E, 0x3C13BC2A, 0x3D648E73, 0x3E75EDAB, 0x3F31725D, 0x3F800000)
_NOISE = (
    *(0x400476E5, 0xC01B4FF0, 0x3FE608F6, 0xBE923EBC, 0x3EC6120C),
    *(0x3EB38315, 0x3EF67A7C, 0x3F38A99D, 0x3FB8AA3B),
)


def weights(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights mantissa * 2**exponent of float32 logits (n,): int64 (n,) each.

    Impossible ids have mantissa 0 and exponent `NOWHERE`; NaN and +inf must not occur.
    """
    rate = _LOG2_E / temperature
    shift = 29 - math.floor(math.log2(rate))
    fixed = torch.round(logits.double().clamp(-2047, 2047) * 2.0**20).long()
    scaled = fixed * round(math.ldexp(rate, shift))
    fraction = (scaled >> (shift - 3)) & 0x7FFFFF
    x = _as_float(fraction | 0x3F800000) - 1
    g = _horner(_EXP2, x).clamp(max=_float(0x3FFFFFFF))
    mantissa = (g.view(torch.int32).long() & 0x7FFFFF) | 0x800000
    impossible = logits == -math.inf
    exponent = scaled >> (20 + shift)
    return mantissa.masked_fill(impossible, 0), exponent.masked_fill(impossible, NOWHERE)


def probabilities(mantissa: Tensor, exponent: Tensor, top: int, total: int) -> Tensor:
    """float32 (n,) of weights, in a row whose largest exponent and sum of weights are given."""
    below = exponent - top
    scale = (1.0 / float(total)) * _power(below.clamp(min=-NEGLIGIBLE) + 16)
    p = mantissa.double() * scale
    return p.masked_fill(below < -NEGLIGIBLE, 0).float()


def units(mantissa: Tensor, exponent: Tensor, top: Tensor) -> Tensor:
    """Weights in units of 2**(top - 16), rounded down: what a tile adds up."""
    return (mantissa << 16) >> (top - exponent).clamp(0, 63)


def fixed(r: Tensor) -> Tensor:
    """Non-negative float32 in units of 2**-40, rounded down."""
    return (r.double() * 2.0**40).long()


def threshold(word: int, total: int) -> int:
    """Of a sum of `fixed`: the first id whose prefix sum is above it is the one that is drawn."""
    return (word * total) >> 32


def _philox(seed: int, counter: list[Any]) -> list[Any]:
    """Philox4x32-10 of a counter of four integers, or of four int64 tensors."""
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32 & _LOW) ^ counter[1] ^ key[0],
            second & _LOW,
            (first >> 32 & _LOW) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return counter


def philox(seed: int, position: int, stream: int, lanes: Tensor) -> Tensor:
    """Four random words, int64 (n, 4), for each of some lanes: Philox4x32-10."""
    zero = torch.zeros_like(lanes)
    counter = [zero + (position & _LOW), zero + stream, lanes, zero]
    return torch.stack(_philox(seed, counter), -1)


def word(seed: int, position: int, stream: int) -> int:
    """A random word in [0, 2**32): that of lane 0."""
    return int(_philox(seed, [position & _LOW, stream, 0, 0])[0])


def race_noise(seed: int, position: int, ids: Tensor) -> Tensor:
    """Exponential noise float32 (n,) of some ids, shared by all models."""
    words = philox(seed, position, RACE, ids >> 2).gather(1, (ids & 3)[:, None])[:, 0]
    zeros = 32 - torch.frexp(words.double()).exponent.long()
    fraction = (words << (zeros + 1)) & _LOW
    t = ((1 << 32) - fraction).float() * 2.0**-33
    return zeros.float() + t * _horner(_NOISE, t)


def race_times(mantissa: Tensor, exponent: Tensor, top: int, noise: Tensor) -> Tensor:
    """Noise / weight float32 (n,): the smallest wins; +inf cannot."""
    below = exponent - top
    weight = mantissa.float() * _power(below.clamp(min=-NEGLIGIBLE)).float()
    return (noise / weight).masked_fill((mantissa == 0) | (below < -NEGLIGIBLE), math.inf)


def ordered(values: Tensor) -> Tensor:
    """int64 (n,) below 2**31 in size that order as float32 values do; 0 and -0 are equal."""
    bits = (values + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _horner(coefficients: tuple[int, ...], x: Tensor) -> Tensor:
    """A polynomial, highest power first; product and sum are rounded separately."""
    value = torch.full_like(x, _float(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = value * x
        value = value + _float(coefficient)
    return value


def _power(exponent: Tensor) -> Tensor:
    """2**exponent float64."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _as_float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _float(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits))[0])
