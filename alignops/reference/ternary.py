"""Definition of the ternary core: quantizer, 5-bit code, matmul, Arenas, int8 head.

Shape letters: N rows (outputs), K columns (inputs), M tokens, B = ceil(K/4) blocks of a row with 4
lanes each, G columns per scale group (K: one scale per row), ng = ceil(K/G) scale groups.

Source: Sherry, arXiv 2601.07892 (section 3.1, eq. 4-5: quantizer; section 3.2, eq. 7-8: Arenas).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACT_GROUP_COLUMNS = 256  # columns that share one activation scale in mode a8g
ACT_MAX = {"a8": 127, "a8g": 127, "a16": 32639}  # 32639 = 127 * 256 + 127: two int8 limbs
TINY = 1e-30  # activations whose largest magnitude is not above this are quantized to zeros


# Blocks and codes


def to_blocks(w: Tensor, stride: int = 1) -> Tensor:
    """(N, K) -> (N, B, 4), zero padded; lanes are `stride` columns apart (16: in chunks of 64)."""
    n, k = w.shape
    if stride == 1:
        return F.pad(w, (0, -k % 4)).reshape(n, -(-k // 4), 4)
    return w.reshape(n, k // 64, 4, stride).transpose(2, 3).flatten(1, 2)


def from_blocks(b: Tensor, k: int, stride: int = 1) -> Tensor:
    """(N, B, 4) -> (N, K): inverse of `to_blocks`, padding sliced off."""
    if stride > 1:
        b = b.unflatten(1, (-1, stride)).transpose(2, 3)
    return b.flatten(1)[:, :k]


def encode(lanes: Tensor) -> Tensor:
    """Lanes (N, B, 4) in {-1, 0, 1}, one zero per block -> codes uint8 (N, B).

    code = 16 s + 4 z + 2 r3 + r2: z the zero lane, s the sign of the first kept lane, r2 and r3
    whether the second and third kept lanes differ from it. Raises ValueError with the first (row,
    block) that has no code.
    """
    bad = ((lanes == 0).sum(-1) != 1) | (lanes.abs() > 1).any(-1)
    if bad.any():
        row, block = bad.nonzero()[0].tolist()
        raise ValueError(
            "encode: lanes must hold one zero and three +-1 per block, got "
            f"{lanes[row, block].tolist()} at (row, block) = ({row}, {block})"
        )
    z = (lanes == 0).int().argmax(-1, keepdim=True)
    kept = torch.arange(3)
    negative = lanes.gather(-1, kept + (kept >= z)) < 0
    s = negative[..., 0]
    r2, r3 = negative[..., 1] ^ s, negative[..., 2] ^ s
    return (16 * s + 4 * z[..., 0] + 2 * r3 + r2).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Codes uint8 (N, B) -> lanes int8 (N, B, 4)."""
    c = codes[..., None].long()
    p, z = torch.arange(4), c >> 2 & 3
    kept = p - (p > z).long()
    relative = torch.where(kept == 0, 0, torch.where(kept == 1, c, c >> 1) & 1)
    return ((1 - 2 * (relative ^ c >> 4)) * (p != z)).to(torch.int8)


def to_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, B) -> planes idx uint8 (N, B8/2), sign uint8 (N, B8/8), B8 = B rounded up to 8."""
    c = F.pad(codes, (0, -codes.shape[1] % 8)).int()
    nibbles = (c & 15).unflatten(1, (-1, 2))
    bits = (c >> 4).unflatten(1, (-1, 8))
    idx = (nibbles << torch.tensor([0, 4])).sum(-1)
    sign = (bits << torch.arange(8)).sum(-1)
    return idx.to(torch.uint8), sign.to(torch.uint8)


def from_planes(idx: Tensor, sign: Tensor, k: int) -> Tensor:
    """Canonical planes -> codes uint8 (N, B)."""
    nibbles = (idx[..., None].int() >> torch.tensor([0, 4]) & 15).flatten(1)
    bits = (sign[..., None].int() >> torch.arange(8) & 1).flatten(1)
    return (16 * bits + nibbles)[:, : -(-k // 4)].to(torch.uint8)


# Quantizer


def quantize(w: Tensor, group: int | None = None, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Sparse-AbsMean: the smallest magnitude of a block becomes 0, the others their sign.

    On a tie the lowest lane becomes 0. Returns lanes int8 (N, B, 4) and alpha float32 (N, ng), the
    mean of the kept magnitudes. They are summed in float64: the lanes of a block in order, block b
    of a group into partial sum b % 16, the partial sums pairwise.
    """
    k = w.shape[1]
    blocks = to_blocks(w.float(), stride)
    real = to_blocks(torch.ones_like(w, dtype=torch.bool), stride)
    zero = torch.where(real, blocks.abs(), -1).argmin(-1, keepdim=True)  # the first minimum
    keep = torch.arange(4) != zero
    lanes = torch.where(blocks < 0, -1, 1) * keep
    a, b, c, d = torch.where(keep & real, blocks.abs().double(), 0).unbind(-1)
    sums, counts = ((a + b) + c) + d, (keep & real).sum(-1)
    width = blocks_per_group(k, group)
    groups = zip(sums.split(width, 1), counts.split(width, 1), strict=True)
    alpha = [pairwise_sum(part) / count.sum(-1) for part, count in groups]
    return lanes.to(torch.int8), torch.stack(alpha, 1).float()


def blocks_per_group(k: int, group: int | None) -> int:
    """Blocks that share one scale: ceil(G/4)."""
    return -(-(group or k) // 4)


def pairwise_sum(x: Tensor) -> Tensor:
    """(N, B) float64 -> (N): 16 interleaved partial sums, then i with i+8, i+4, i+2, i+1."""
    partial = torch.zeros(x.shape[0], 16, dtype=x.dtype)
    for part in x.split(16, 1):
        partial[:, : part.shape[1]] += part
    for half in (8, 4, 2, 1):
        partial = partial[:, :half] + partial[:, half:]
    return partial[:, 0]


def dequantize(
    lanes: Tensor,
    alpha: Tensor,
    k: int,
    group: int | None = None,
    stride: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight alpha * T, (N, K)."""
    scale = alpha.float().repeat_interleave(blocks_per_group(k, group), 1)[:, : lanes.shape[1]]
    return from_blocks(lanes * scale[..., None], k, stride).to(dtype)


# Matmul


def quantize_activations(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Activations (M, K) -> q float64 (M, K) with integer values, scales float32 (M, groups).

    q = clamp(rint(x * (Q/amax)), -Q, Q) and scale = amax/Q in float32. Where amax <= 1e-30 both are
    0; where it is Inf or NaN, q = 0 and scale = NaN. One amax per row, in a8g per 256 columns.
    """
    top = ACT_MAX[act]
    columns = ACT_GROUP_COLUMNS if act == "a8g" else max(x.shape[1], 1)
    q, scale = [], []
    for part in x.float().split(columns, 1):
        amax = part.abs().amax(1, keepdim=True)
        live = (amax > TINY) & amax.isfinite()
        factor = torch.full_like(amax, top) / amax  # not top / amax, which rounds twice
        rounded = (part * factor).round().clamp(-top, top)
        q.append(torch.where(live, rounded, 0).double())
        scale.append(torch.where(amax <= TINY, 0, torch.where(live, amax / top, torch.nan)))
    return torch.cat(q, 1), torch.cat(scale, 1)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c with one rounding.

    The product is exact in float64; the sum is rounded to odd there (two-sum gives the direction),
    so that the final rounding to float32 cannot round twice.
    """
    p, c = a.double() * b.double(), c.double()
    s = p + c
    d = s - p
    error = (p - (s - d)) + (c - d)
    bits = s.view(torch.int64)
    inexact = error.isfinite() & (error != 0) & (bits & 1 == 0)
    toward = torch.where((error > 0) == (s > 0), 1, -1)
    return torch.where(inexact, bits + toward, bits).view(torch.float64).float()


def segments(k: int, group: int | None, act: str) -> list[tuple[int, int]]:
    """Block ranges with one activation scale and one weight scale."""
    blocks = -(-k // 4)
    cuts = set(range(0, blocks, blocks_per_group(k, group))) | {blocks}
    if act == "a8g":
        cuts |= set(range(0, blocks, ACT_GROUP_COLUMNS // 4))
    edges = sorted(cuts)
    return list(itertools.pairwise(edges))


def linear(
    x: Tensor,
    lanes: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    group: int | None = None,
    stride: int = 1,
    act: str = "none",
) -> Tensor:
    """The product y = x (alpha T)^T + bias for x (..., K).

    "none": exact inputs, float64 sums and float64 result: the oracle for accuracy. A zero weight
    contributes nothing, also where x is Inf or NaN. Integer modes: acc = 0; for segments in order:
    acc = fma(float(I), s * alpha, acc) in float32 with the exact integer dot product I; + bias in
    float32; one cast to x.dtype.
    """
    m, k = x.shape[:-1].numel(), x.shape[-1]
    rows = x.reshape(m, k)
    n = lanes.shape[0]
    if act == "none":
        w = dequantize(lanes, alpha, k, group, stride, torch.float64)
        y = rows.double() @ w.T
        for i in (~rows.isfinite().all(1)).nonzero().flatten().tolist():
            y[i] = torch.where(w == 0, 0, rows[i].double() * w).sum(1)
        return (y if bias is None else y + bias.double()).reshape(*x.shape[:-1], n)
    q, scale = quantize_activations(rows, act)
    q = to_blocks(q, stride)
    acc = torch.zeros(m, n)
    for begin, end in segments(k, group, act):
        # Integers below 2^53 are exact in float64.
        total = torch.einsum("mbp,nbp->mn", q[:, begin:end], lanes[:, begin:end].double())
        s = scale[:, begin * 4 // ACT_GROUP_COLUMNS if act == "a8g" else 0, None]
        a = alpha.float()[:, begin // blocks_per_group(k, group)]
        acc = fma(total.float(), s * a, acc)
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(x.dtype).reshape(*x.shape[:-1], n)


def none_error_bound(
    x: Tensor, lanes: Tensor, alpha: Tensor, group: int | None = None, stride: int = 1
) -> Tensor:
    """Bound of the error of mode "none" before the cast, (K/4 + 4) 2^-24 sum |alpha T x|."""
    k = x.shape[-1]
    total = linear(x.abs(), lanes.abs(), alpha, None, group, stride)
    return (k / 4 + 4) * 2.0**-24 * total


# Dense int8 head


def int8_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to q int8 (N, K), scale float32 (N) by the rule of `quantize_activations`, mode a8."""
    q, scale = quantize_activations(w, "a8")
    return q.to(torch.int8), scale[:, 0]


def int8_linear(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, act: str = "none"
) -> Tensor:
    """The product y = x (scale q)^T + bias by the rules of `linear`, with one scale per row."""
    k = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), k)
    if act == "none":
        y = rows.double() @ (q.double() * scale.double()[:, None]).T
        return (y if bias is None else y + bias.double()).reshape(*x.shape[:-1], q.shape[0])
    codes, s = quantize_activations(rows, act)
    columns = ACT_GROUP_COLUMNS if act == "a8g" else max(k, 1)
    acc = torch.zeros(rows.shape[0], q.shape[0])
    for i, (part, weight) in enumerate(
        zip(codes.split(columns, 1), q.split(columns, 1), strict=True)
    ):
        acc = fma((part @ weight.double().T).float(), s[:, i, None] * scale, acc)
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])


# Arenas


class _FakeQuant(torch.autograd.Function):
    """W_eff = alpha T + lambda W with the straight-through gradient (1 + lambda) g."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, lam: float, group: int | None, stride: int) -> Tensor:
        ctx.lam = lam
        lanes, alpha = quantize(w, group, stride)
        return dequantize(lanes, alpha, w.shape[1], group, stride).to(w.dtype) + lam * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (1 + ctx.lam) * grad, None, None, None


def fake_quant(w: Tensor, lam: float, group: int | None = None, stride: int = 1) -> Tensor:
    """Arenas: alpha T + lambda W (eq. 7), with gradient (1 + lambda) g for every weight (eq. 8)."""
    result: Tensor = _FakeQuant.apply(w, lam, group, stride)  # type: ignore[no-untyped-call]
    return result


def arenas_lambda(
    t: int, total: int, warmup: int | None = None, peak: float = 1.0, kind: str = "warmup_cosine"
) -> float:
    """Coefficient of the residual at optimizer step t of `total`.

    It is 0 from t = total on, but for "constant".
    "warmup_cosine" rises linearly over `warmup` (total // 10) steps and falls as half a cosine;
    "linear", "cosine" and "exponential" fall from t = 0.
    """
    if kind == "constant":
        return peak
    if t >= total:
        return 0.0
    u = t / total
    if kind == "warmup_cosine":
        w = total // 10 if warmup is None else warmup
        return peak * t / w if t < w else peak * (1 + math.cos(math.pi * (t - w) / (total - w))) / 2
    if kind == "linear":
        return peak * (1 - u)
    if kind == "cosine":
        return peak * (1 + math.cos(math.pi * u)) / 2
    if kind == "exponential":
        return peak * (math.exp(-5 * u) - math.exp(-5)) / (1 - math.exp(-5))
    raise ValueError(f"arenas_lambda: kind must name a schedule, got {kind!r}")


def effective_rank(g: Tensor) -> float:
    """exp(entropy) of the normalized singular values: n for the identity, 1 for rank one."""
    sigma = torch.linalg.svdvals(g.double())
    p = sigma / sigma.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())
