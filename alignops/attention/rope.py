"""Rotary positions of one layer type: frequencies, pair order, rotary dimensions, factor.

Frequencies are float32, made by the operations of the libraries that models were trained with, in
their order, because the last bits count at large positions; angles are float64 products of them
with positions. The attention factor `a` belongs to the first rotation of a query or a key and to
no later one.

Shape letters: D head size, d rotary dimensions, F = d / 2 pairs.

Source: arXiv 2504.06261; 2309.00071 (YaRN), 2402.13753 (LongRoPE); Llama 3.1's own scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.attention.errors import UnsupportedModel

PAIRS = ("half", "interleaved")
ANGLES = ("fp64", "fp32")


@dataclass(frozen=True)
class RopeSpec:
    """How queries and keys of a layer type are rotated. A layer without rotation has no spec.

    Attributes:
        inv_freq: F frequencies in radians per position, rounded to float32.
        pairs: "half": pair i is (i, i + F); "interleaved": (2 i, 2 i + 1).
        offset: first rotary dimension; dimensions outside [offset, offset + 2 F) pass.
        attention_factor: factor a, which the first rotation multiplies by.

    Raises:
        ValueError: an attribute is out of its range.

    Source: arXiv 2104.09864; 2504.06261.

    Example:
        >>> spec = RopeSpec.default(4, theta=100.0)
        >>> [round(f, 3) for f in spec.inv_freq]
        [1.0, 0.1]
        >>> x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> [round(y, 3) for y in spec.rotate(x, torch.tensor([1]))[0].tolist()]
        [0.54, 0.0, 0.841, 0.0]
    """

    inv_freq: tuple[float, ...]
    pairs: str = "half"
    offset: int = 0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.inv_freq, dtype=torch.float32)
        check(
            values.dim() == 1 and len(values) > 0 and bool(values.isfinite().all()),
            f"RopeSpec: inv_freq must be finite numbers, at least one, got {self.inv_freq}",
        )
        check(self.pairs in PAIRS, f"RopeSpec: pairs must be one of {PAIRS}, got {self.pairs!r}")
        check(self.offset >= 0, f"RopeSpec: offset must be at least 0, got {self.offset}")
        check(
            0 < self.attention_factor < math.inf,
            f"RopeSpec: attention_factor must be positive, got {self.attention_factor}",
        )
        object.__setattr__(self, "inv_freq", tuple(values.tolist()))

    @property
    def rotary_dim(self) -> int:
        """Dimensions that rotate, 2 F."""
        return 2 * len(self.inv_freq)

    @property
    def interleaved(self) -> bool:
        """Whether pairs are neighbours."""
        return self.pairs == "interleaved"

    def check_head(self, head_dim: int, op: str) -> None:
        """ValueError unless the rotary dimensions lie within a head of `head_dim` dimensions."""
        check(
            self.offset + self.rotary_dim <= head_dim,
            f"{op}: rope must rotate dimensions of a head of {head_dim}, got "
            f"[{self.offset}, {self.offset + self.rotary_dim})",
        )

    # Kinds of frequencies

    @classmethod
    def default(
        cls, rotary_dim: int, theta: float = 10000.0, *, pairs: str = "half", offset: int = 0
    ) -> RopeSpec:
        """Frequencies theta^(-2 i / d)."""
        return cls._of(_default(rotary_dim, theta), pairs, offset)

    @classmethod
    def linear(
        cls,
        rotary_dim: int,
        theta: float = 10000.0,
        *,
        factor: float,
        pairs: str = "half",
        offset: int = 0,
    ) -> RopeSpec:
        """Positions that are `factor` times as dense."""
        _check_factor(factor)
        return cls._of(_default(rotary_dim, theta) / factor, pairs, offset)

    @classmethod
    def llama3(
        cls,
        rotary_dim: int,
        theta: float = 500000.0,
        *,
        factor: float,
        original_length: int,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        pairs: str = "half",
        offset: int = 0,
    ) -> RopeSpec:
        """Scaling of Llama 3.1: waves longer than the original length are slowed down.

        Args:
            rotary_dim: d.
            theta: base of the frequencies.
            factor: how much slower.
            original_length: context of the first training.
            low_freq_factor: waves longer than original_length / this are slowed down in full.
            high_freq_factor: waves shorter than original_length / this stay as they are.
            pairs: order of pairs.
            offset: first rotary dimension.
        """
        _check_factor(factor)
        check(
            0 < low_freq_factor < high_freq_factor,
            "RopeSpec: low_freq_factor must be positive and below high_freq_factor "
            f"{high_freq_factor}, got {low_freq_factor}",
        )
        plain = _default(rotary_dim, theta)
        wave = 2 * math.pi / plain
        long_wave, short_wave = (
            original_length / low_freq_factor,
            original_length / high_freq_factor,
        )
        slow = torch.where(wave > long_wave, plain / factor, plain)
        part = (original_length / wave - low_freq_factor) / (high_freq_factor - low_freq_factor)
        between = (1 - part) * slow / factor + part * slow
        middle = ~(wave < short_wave) & ~(wave > long_wave)
        return cls._of(torch.where(middle, between, slow), pairs, offset)

    @classmethod
    def yarn(
        cls,
        rotary_dim: int,
        theta: float = 10000.0,
        *,
        factor: float,
        original_length: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        truncate: bool = True,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        pairs: str = "half",
        offset: int = 0,
    ) -> RopeSpec:
        """YaRN: pairs with few turns within the original length are slowed down.

        Args:
            rotary_dim: d.
            theta: base of the frequencies.
            factor: how much slower.
            original_length: context of the first training.
            beta_fast: pairs with more turns stay as they are.
            beta_slow: pairs with fewer turns are slowed down in full.
            truncate: the bounds between are whole pairs.
            attention_factor: a; None: follows from `factor`, `mscale` and `mscale_all_dim`.
            mscale: weight of ln(factor) in a.
            mscale_all_dim: the same in what a is divided by; both or neither count.
            pairs: order of pairs.
            offset: first rotary dimension.
        """
        _check_factor(factor)
        check(
            original_length > 0 and beta_fast > beta_slow > 0,
            "RopeSpec: beta_fast must be above beta_slow, both positive, got "
            f"{beta_fast} and {beta_slow}",
        )

        def pair(turns: float) -> float:
            waves = math.log(original_length / (turns * 2 * math.pi))
            return (rotary_dim * waves) / (2 * math.log(theta))

        first, last = pair(beta_fast), pair(beta_slow)
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        if first == last:
            last += 0.001
        powers = _powers(rotary_dim, theta)
        ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / (last - first)
        kept = 1 - ramp.clamp(0, 1)
        inv_freq = (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept
        if attention_factor is None:
            if mscale and mscale_all_dim:
                attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
            else:
                attention_factor = _mscale(factor, 1.0)
        return cls._of(inv_freq, pairs, offset, attention_factor)

    @classmethod
    def longrope(
        cls,
        rotary_dim: int,
        theta: float = 10000.0,
        *,
        factors: Sequence[float],
        original_length: int,
        factor: float | None = None,
        attention_factor: float | None = None,
        pairs: str = "half",
        offset: int = 0,
    ) -> RopeSpec:
        """LongRoPE with one of a model's two sets of factors, chosen once for all positions.

        Args:
            rotary_dim: d.
            theta: base of the frequencies.
            factors: the model's short or long factors, F of them.
            original_length: context of the first training.
            factor: how much longer the final context is; only a depends on it.
            attention_factor: a; None: follows from `factor`.
            pairs: order of pairs.
            offset: first rotary dimension.
        """
        check(
            len(factors) == rotary_dim // 2 and all(f > 0 for f in factors),
            f"RopeSpec: factors must be {rotary_dim // 2} positive numbers, got {factors}",
        )
        check(
            factor is not None or attention_factor is not None,
            "RopeSpec: factor or attention_factor must be given, got neither",
        )
        _check_pairs(rotary_dim, theta)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**exponents)
        if attention_factor is None:
            attention_factor = 1.0
            if factor is not None and factor > 1:
                attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_length))
        return cls._of(inv_freq, pairs, offset, attention_factor)

    @classmethod
    def dynamic(
        cls,
        rotary_dim: int,
        theta: float = 10000.0,
        *,
        factor: float,
        original_length: int,
        length: int,
        freeze_dynamic: bool = False,
        pairs: str = "half",
        offset: int = 0,
    ) -> RopeSpec:
        """Frequencies that a model with growing ones has at one length, kept for all lengths.

        Raises:
            UnsupportedModel: `freeze_dynamic` is not set. Growing frequencies would mix keys that
                are rotated by different ones.
        """
        _check_frozen(freeze_dynamic, "RopeSpec")
        _check_factor(factor)
        _check_pairs(rotary_dim, theta)
        check(rotary_dim > 2, f"RopeSpec: rotary_dim must be at least 4, got {rotary_dim}")
        grown = (factor * max(length, original_length) / original_length) - (factor - 1)
        return cls._of(
            _default(rotary_dim, theta * grown ** (rotary_dim / (rotary_dim - 2))), pairs, offset
        )

    @classmethod
    def from_module(
        cls,
        module: Any,
        *,
        layer_type: str | None = None,
        pairs: str = "half",
        offset: int = 0,
        freeze_dynamic: bool = False,
    ) -> RopeSpec:
        """The frequencies that a model's rotary embedding holds now.

        Args:
            module: has a buffer `inv_freq` and, if it scales, `attention_scaling`.
            layer_type: of a module for several layer types, whose names begin with it.
            pairs: order of pairs; `alignops.integrations.attention_probe` finds it out.
            offset: first rotary dimension.
            freeze_dynamic: allow frequencies that would grow with the length.

        Raises:
            UnsupportedModel: the frequencies grow with the length and `freeze_dynamic` is not set.
        """
        prefix = f"{layer_type}_" if layer_type else ""
        kind = getattr(module, "rope_type", "default")
        kind = kind[layer_type] if isinstance(kind, dict) and layer_type else kind
        if "dynamic" in str(kind):
            _check_frozen(freeze_dynamic, type(module).__name__)
        factor = getattr(module, f"{prefix}attention_scaling", 1.0)
        inv_freq = getattr(module, f"{prefix}inv_freq").detach().float().cpu()
        return cls._of(inv_freq, pairs, offset, float(factor))

    @classmethod
    def _of(
        cls, inv_freq: Tensor, pairs: str, offset: int, attention_factor: float = 1.0
    ) -> RopeSpec:
        return cls(tuple(inv_freq.tolist()), pairs, offset, attention_factor)

    # Rotations

    def rotations(self, positions: Tensor, *, angle_precision: str = "fp64") -> Tensor:
        """(cos, sin) of a rotation by so many positions.

        Args:
            positions: (...) of integers.
            angle_precision: "fp32": angles are float32 products, as in models of transformers.

        Returns:
            (..., F, 2) float32, on the device of `positions`.

        Raises:
            ValueError: unknown `angle_precision`.
        """
        check(
            angle_precision in ANGLES,
            f"RopeSpec.rotations: angle_precision must be one of {ANGLES}, got {angle_precision!r}",
        )
        dtype = torch.float64 if angle_precision == "fp64" else torch.float32
        if dtype == torch.float64 and positions.device.type == "cpu":
            inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32)
            table: Tensor = torch.ops.alignops.attention_rotations(inv_freq, positions.long())
            return table
        inv_freq = torch.tensor(self.inv_freq, dtype=dtype, device=positions.device)
        angles = positions.to(dtype).unsqueeze(-1) * inv_freq
        return torch.stack([angles.cos(), angles.sin()], -1).float()

    def scale(self, x: Tensor) -> Tensor:
        """`a x`: what the first rotation does besides rotating, for a query or key at position 0.

        Whoever passes unrotated queries and keys to the kernels, whose rotations are pure, applies
        this once to either.
        """
        return x if self.attention_factor == 1 else x * self.attention_factor

    def rotate(self, x: Tensor, positions: Tensor, *, angle_precision: str = "fp64") -> Tensor:
        """The first rotation of queries or keys, `a R(positions) x`.

        Args:
            x: (..., D); computed in float32 or wider, rounded once.
            positions: of integers; broadcasts against the dimensions of x before the last.
            angle_precision: see `rotations`.

        Returns:
            Shape and dtype of x.

        Raises:
            ValueError: D is smaller than what rotates.
        """
        self.check_head(x.shape[-1], "RopeSpec.rotate")
        table = self.rotations(positions, angle_precision=angle_precision)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.scale(turn(wide, table, self)).to(x.dtype)


def turn(x: Tensor, rotation: Tensor, spec: RopeSpec) -> Tensor:
    """The pure rotation: x (..., D), rotation (..., F, 2) of `RopeSpec.rotations`."""
    f, d = spec.offset, spec.rotary_dim
    before, rotary, after = x[..., :f], x[..., f : f + d], x[..., f + d :]
    cos, sin = rotation[..., 0], rotation[..., 1]
    if spec.interleaved:
        a, b = rotary.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = rotary.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    rotary = torch.stack(turned, -1).flatten(-2) if spec.interleaved else torch.cat(turned, -1)
    return torch.cat([before, rotary, after], -1)


def _check_frozen(frozen: bool, who: str) -> None:
    if not frozen:
        raise UnsupportedModel(
            f"{who}: dynamic frequencies change with the length, stored keys would mix them; "
            "freeze_dynamic=True keeps those of one length"
        )


def _check_factor(factor: float) -> None:
    check(factor > 0, f"RopeSpec: factor must be positive, got {factor}")


def _check_pairs(rotary_dim: int, theta: float) -> None:
    check(
        rotary_dim > 0 and rotary_dim % 2 == 0,
        f"RopeSpec: rotary_dim must be even and positive, got {rotary_dim}",
    )
    check(theta > 1, f"RopeSpec: theta must be above 1, got {theta}")


def _powers(rotary_dim: int, theta: float) -> Tensor:
    _check_pairs(rotary_dim, theta)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.pow(theta, exponents)


def _default(rotary_dim: int, theta: float) -> Tensor:
    return 1.0 / _powers(rotary_dim, theta)


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
