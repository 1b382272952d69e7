"""This project's operators as contestants, and the plain PyTorch form of the training operator."""

from __future__ import annotations

import copy
import functools

import torch

import alignops
from alignops import ternary
from benchmarks.shapes import Model, packed_bytes
from benchmarks.timing import Runner, ring_length


def random_weight(
    n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """(n, k) Gaussian weights of a usual size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator).mul_(0.02).to(dtype)


@functools.lru_cache(maxsize=2)
def _ring(n: int, k: int, group: int | None, cold: bool) -> list[ternary.TernaryWeight]:
    first = ternary.quantize(random_weight(n, k), group)
    return [first] + [copy.deepcopy(first) for _ in range(ring_length(first.nbytes, cold) - 1)]


def linear(
    n: int,
    k: int,
    m: int,
    cold: bool,
    act: str = "a8g",
    group: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    hot_calls: int = 16,
) -> Runner:
    """`ternary_linear` on m tokens; per-channel scales unless `group` is given."""
    ring = _ring(n, k, group, cold)
    nbytes = ring[0].nbytes
    if not cold:
        ring = ring * hot_calls
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    call = alignops.ternary_linear

    def run() -> None:
        for w in ring:
            call(x, w, act=act)

    return Runner(f"alignops {act}", run, len(ring), nbytes)


@functools.lru_cache(maxsize=1)
def decode_step(model: Model) -> Runner:
    """All products of one token: distinct weights, q/k/v and gate/up fused, int8 head."""
    shapes = {name: (n, k) for name, n, k in model.linears}
    groups = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    nbytes, steps = 0, []
    for layer in range(model.layers):
        for names in groups:
            weights = []
            for name in names:
                n, k = shapes[name]
                # Rows of one random matrix in another order: distinct bytes without a new draw.
                base = random_weight(n, k, torch.bfloat16, seed=len(name)).roll(layer, 0)
                weights.append(ternary.quantize(base))
                nbytes += packed_bytes(n, k) + 4 * n
            x = torch.randn(1, k, generator=torch.Generator().manual_seed(0)).bfloat16()
            fused = ternary.TernaryWeight.cat(weights) if len(weights) > 1 else weights[0]
            fused.prepack(release=True)
            steps.append((x, fused))
    n, k = model.head
    q, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.full((n,), 1e-3)
    nbytes += n * k + 4 * n
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    call, head = alignops.ternary_linear, ternary.int8_linear

    def run() -> None:
        for step_x, weight in steps:
            call(step_x, weight, act="a8g")
        head(x, q, scale, None, "a8g")

    return Runner(f"alignops {model.name}", run, 1, nbytes)


def topk_fake_quant(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """alpha T + lam w with a straight-through gradient, written with masks as training code is.

    Keeps the three largest of four magnitudes by `topk`; per-row scale.
    """
    blocks = w.unflatten(1, (-1, 4))
    kept = blocks.abs().topk(3, dim=-1).indices
    mask = torch.zeros_like(blocks).scatter_(-1, kept, 1.0).flatten(1)
    alpha = (w.abs() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    quantized = torch.sign(w) * mask * alpha
    return w + (quantized - w).detach() + lam * w


def fake_quant(weight: torch.Tensor, ours: bool) -> Runner:
    """Forward and backward of the effective weight of Arenas, float32."""
    w = weight.clone().requires_grad_()
    lam = torch.tensor(0.5)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    k = w.shape[1]

    def run() -> None:
        with torch.enable_grad():
            if ours:
                y = ternary.ops.ternary_fake_quant(w, lam, k, 1, torch.float32)
            else:
                y = topk_fake_quant(w, lam)
            torch.autograd.grad(y, w, upstream)

    return Runner("alignops" if ours else "top-k reference", run, 1, w.numel() * 4)


def quantize(weight: torch.Tensor) -> Runner:
    """Quantize and pack for the kernels; traffic counted as the bytes of the input."""

    def run() -> None:
        ternary.quantize(weight)

    return Runner("alignops quantize", run, 1, weight.numel() * weight.element_size())
