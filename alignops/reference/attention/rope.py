"""Rotary positions by definition: frequencies, the rotation of a vector, the shift of a segment.

Rotation by x positions, R(x), turns pair i of the rotary dimensions by the angle x omega_i. So
(R(p) q) . (R(o + j) k) = (R(p - o) q) . (R(j) k): a key that is stored as if its block began at 0
is met by a query that is turned back by the block's origin.

Shape letters: D head size, d rotary dimensions, F = d / 2 pairs.

Source: arXiv 2504.06261 (queries turned per block), 2104.09864 (rotary positions), 2309.00071
(YaRN), 2402.13753 (LongRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def default(rotary_dim: int, theta: float) -> Tensor:
    """omega_i = theta^(-2 i / d), (F,) float64."""
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def linear(rotary_dim: int, theta: float, factor: float) -> Tensor:
    """Omega / s."""
    return default(rotary_dim, theta) / factor


def llama3(
    rotary_dim: int, theta: float, factor: float, low: float, high: float, original_length: int
) -> Tensor:
    """Long waves are slowed down, short ones not, those between in part."""
    out = default(rotary_dim, theta)
    for i, omega in enumerate(out.tolist()):
        wave = 2 * math.pi / omega
        if wave > original_length / low:
            out[i] = omega / factor
        elif wave >= original_length / high:
            part = (original_length / wave - low) / (high - low)
            out[i] = (1 - part) * omega / factor + part * omega
    return out


def yarn(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Pairs that turn less than `beta_slow` times within the original length are slowed down."""

    def pair(turns: float) -> float:
        """The pair that turns so many times."""
        return (
            rotary_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
        )

    first, last = pair(beta_fast), pair(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    out = default(rotary_dim, theta)
    for i, omega in enumerate(out.tolist()):
        ramp = min(max((i - first) / (last - first), 0), 1)
        out[i] = omega * (1 - ramp) + omega / factor * ramp
    return out


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Factor a of a YaRN model that does not state it."""

    def of(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1)


def longrope(rotary_dim: int, theta: float, factors: Sequence[float]) -> Tensor:
    """omega_i / factors_i."""
    return default(rotary_dim, theta) / torch.tensor(factors, dtype=torch.float64)


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """Factor a of a LongRoPE model that does not state it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def dynamic(
    rotary_dim: int, theta: float, factor: float, original_length: int, length: int
) -> Tensor:
    """The base grows with the length."""
    grown = factor * max(length, original_length) / original_length - (factor - 1)
    return default(rotary_dim, theta * grown ** (rotary_dim / (rotary_dim - 2)))


def rotations(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(cos, sin) of the angles positions * omega, which are float64: (..., F, 2) of `dtype`."""
    angles = positions.double().unsqueeze(-1) * inv_freq.double()
    angles = torch.remainder(angles, 2 * math.pi)
    return torch.stack([angles.cos(), angles.sin()], -1).to(dtype)


def rotate(x: Tensor, rotation: Tensor, *, offset: int = 0, interleaved: bool = False) -> Tensor:
    """R x: pairs of the dimensions [offset, offset + d) of x are turned, the others pass.

    Args:
        x: (..., D).
        rotation: (..., F, 2) of `rotations`; its dimensions before F broadcast against those of x.
        offset: first rotary dimension.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + F).
    """
    pairs = rotation.shape[-2]
    rotary = x[..., offset : offset + 2 * pairs]
    cos, sin = rotation[..., 0], rotation[..., 1]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
    else:
        a, b = rotary[..., :pairs], rotary[..., pairs:]
    turned = [a * cos - b * sin, b * cos + a * sin]
    rotary = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([x[..., :offset], rotary, x[..., offset + 2 * pairs :]], -1)
