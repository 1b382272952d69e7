"""How a ternary training is doing: effective rank of gradients, flip rate of codes, latent weights.

Source: Sherry, arXiv 2601.07892, section 3.2 and figure 4 (effective rank as the sign of collapse).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignops.ternary import ops
from alignops.ternary.arenas import ArenasLinear

_PROBES = 16  # random vectors of the stochastic trace
_LEADING = 32  # directions handled without noise
_STEPS = 64  # Lanczos steps per vector


def effective_rank(g: Tensor, exact_up_to: int = 1024, seed: int = 0) -> float:
    """Exp of the entropy of the normalised singular values: how many directions g really uses.

    Up to `exact_up_to` rows or columns (the smaller count) from all singular values; beyond, from
    the traces of f(A) for A = G G^T, f = sqrt and sqrt ln sqrt, estimated by Lanczos quadrature:
    without noise on the leading directions, with random probes on their complement. For spectra
    that fall like a power or are noise the estimate is within a few percent. It depends on g and
    `seed` only, and costs matrix products instead of an SVD.

    Args:
        g: (N, K) of any floating dtype, usually the gradient of a weight.
        exact_up_to: largest min(N, K) for which all singular values are computed.
        seed: of the random probes.

    Returns:
        float: between 1 and min(N, K); 0 for an all-zero or empty g.

    Raises:
        ValueError: g is not 2-D or holds NaN or infinities.

    Source: arXiv 2601.07892, section 3.2; entropy of singular values after Roy and Vetterli, 2007.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([3.0, 1.0]))), 4)
        1.7548
    """
    if g.dim() != 2:
        raise ValueError(f"effective_rank: g must be 2-D, got shape {tuple(g.shape)}")
    g = g.detach()
    g = g if g.dtype == torch.float64 else g.float()
    largest = float(g.abs().amax()) if g.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("effective_rank: g must be finite, got NaN or infinities")
    if largest == 0:
        return 0.0
    g = g / largest
    if min(g.shape) <= exact_up_to:
        sigma = torch.linalg.svdvals(g).double()
        total = float(sigma.sum())
        entropy_sum = float(torch.xlogy(sigma, sigma).sum())
    else:
        total, entropy_sum = _spectral_sums(g if g.shape[0] <= g.shape[1] else g.T, seed)
    return math.exp(math.log(total) - entropy_sum / total)


def _spectral_sums(g: Tensor, seed: int) -> tuple[float, float]:
    """Estimates of sum(sigma) and sum(sigma ln sigma) over the singular values of g (N <= K)."""
    n = g.shape[0]
    draw = torch.randn(n, _LEADING + _PROBES, generator=torch.Generator().manual_seed(seed))
    draw = draw.to(g)
    leading = torch.linalg.qr(g @ (g.T @ draw[:, :_LEADING])).Q
    probes = draw[:, _LEADING:]
    probes = probes - leading @ (leading.T @ probes)
    starts = torch.cat([leading, probes], 1)
    weights = (starts * starts).sum(0).double()
    weights[_LEADING:] *= (n - _LEADING) / weights[_LEADING:].sum()  # known trace of the complement
    alpha, beta = _lanczos(g, starts / starts.norm(dim=0))
    tridiagonal = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    sigma = values.clamp(min=0).sqrt()
    density = weights[:, None] * vectors[:, 0].square()
    return float((density * sigma).sum()), float((density * torch.xlogy(sigma, sigma)).sum())


def _lanczos(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tridiagonal coefficients (b, m), (b, m - 1) of G G^T for unit start vectors v (N, b)."""
    steps = min(_STEPS, g.shape[0])
    basis = v.new_zeros(steps, *v.shape)
    alpha, beta = [], []
    for j in range(steps):
        basis[j] = v
        w = g @ (g.T @ v)
        alpha.append((w * v).sum(0))
        known = basis[: j + 1]
        for _ in range(2):  # full reorthogonalisation; once is not enough in float32
            w = w - torch.einsum("jnb,jb->nb", known, torch.einsum("jnb,nb->jb", known, w))
        norm = w.norm(dim=0)
        ended = norm <= 1e-6 * alpha[0].abs().clamp(min=1e-30)  # an invariant subspace is reached
        beta.append(torch.where(ended, 0.0, norm))
        v = torch.where(ended, 0.0, w / norm.clamp(min=1e-30))
    return torch.stack(alpha, 1).double(), torch.stack(beta[:-1], 1).double()


class GradientRank:
    """Effective rank of the weight gradients of all Arenas layers, every `every` optimizer steps.

    Measured just before the step is taken, on the accumulated gradient.

    Args:
        model: contains the `ArenasLinear` layers.
        optimizer: calls the measurement; its `step` must not use a closure.
        every: optimizer steps between measurements, the first at step 0.

    Attributes:
        history: list of (step, {layer name: effective rank}).

    Example:
        >>> from alignops.ternary.arenas import ArenasSchedule
        >>> layer = ArenasLinear(8, 8, schedule=ArenasSchedule(10))
        >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        >>> ranks = GradientRank(layer, optimizer, every=5)
        >>> layer(torch.eye(8)).square().sum().backward()
        >>> optimizer.step()
        >>> len(ranks.history)
        1
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 100
    ) -> None:
        if every <= 0:
            raise ValueError(f"GradientRank: every must be positive, got {every}")
        self.history: list[tuple[int, dict[str, float]]] = []
        self._layers = dict(_arenas_layers(model))
        self._every = every
        self._step = 0
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        if self._step % self._every == 0:
            ranks = {
                name: effective_rank(layer.weight.grad)
                for name, layer in self._layers.items()
                if layer.weight.grad is not None
            }
            self.history.append((self._step, ranks))
        self._step += 1

    def remove(self) -> None:
        """Stops measuring."""
        self._handle.remove()


Codes = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def codes(model: nn.Module) -> Codes:
    """The code planes of all Arenas layers of `model` now, by layer name; see `flip_rate`."""
    return {name: _quantize(layer)[:2] for name, layer in _arenas_layers(model)}


def flip_rate(before: Codes, after: Codes) -> float:
    """Share of the 5-bit codes (blocks of 4 weights) that differ between two results of `codes`.

    Padding blocks are always equal and count in the total.

    Raises:
        ValueError: the two come from different models.
    """
    if {k: v[0].shape for k, v in before.items()} != {k: v[0].shape for k, v in after.items()}:
        raise ValueError("flip_rate: before and after must come from models with the same layers")
    changed = total = 0
    for name, (idx, sign) in before.items():
        low_high = torch.stack([(after[name][0] ^ idx) & 15, (after[name][0] ^ idx) >> 4], -1)
        signs = ((after[name][1] ^ sign)[..., None] >> torch.arange(8, device=sign.device)) & 1
        flips = (low_high.flatten(1) | signs.flatten(1)) != 0
        changed += int(flips.sum())
        total += flips.numel()
    return changed / total if total else 0.0


class LatentShares(NamedTuple):
    """Where the latent weights are, relative to the scale alpha of their group."""

    near_scale: float  #: share with 0.8 alpha <= |w| <= 1.2 alpha: settled on a pole
    near_zero: float  #: share with |w| < 0.2 alpha


@torch.no_grad()
def latent_shares(model: nn.Module) -> LatentShares:
    """Shares of the latent weights of all Arenas layers near the poles and near zero."""
    near_scale = near_zero = total = 0
    for _, layer in _arenas_layers(model):
        scale = _quantize(layer)[2].repeat_interleave(layer.group or layer.in_features, 1)
        magnitude = layer.weight.abs().float()
        scale = scale[:, : magnitude.shape[1]]
        near_scale += int(((magnitude >= 0.8 * scale) & (magnitude <= 1.2 * scale)).sum())
        near_zero += int((magnitude < 0.2 * scale).sum())
        total += magnitude.numel()
    return LatentShares(near_scale / max(total, 1), near_zero / max(total, 1))


def _arenas_layers(model: nn.Module) -> Iterator[tuple[str, ArenasLinear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, ArenasLinear))


def _quantize(layer: ArenasLinear) -> tuple[Tensor, Tensor, Tensor]:
    return ops.ternary_quantize(
        layer.weight.detach(), layer.group or layer.in_features, layer.stride
    )
