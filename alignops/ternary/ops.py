"""Ternary operators over `torch.ops.alignops.ternary_*`, with fake kernels and gradients.

Shape letters: N rows (outputs), K columns (inputs), B8 = ceil(K/4) blocks rounded up to 8,
G columns per scale group, ng = ceil(K/G). The fake kernels make the checks of the native code:
the same type, the same argument.

The functions are differentiable where they say so. The operators of the products are not: their
gradients are `torch.autograd.Function`s, entered only where a gradient is needed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from alignops import _native
from alignops.ternary import checks

if TYPE_CHECKING:
    from alignops.ternary.weight import TernaryWeight


#: On a GPU, the C++ kernels take up to this many tokens, and the Triton kernels more than that.
CUDA_TOKENS = (
    math.inf
    if find_spec("triton") is None
    else 0
    if os.environ.get("ALIGNOPS_PREFER_TRITON") == "1"
    else 8
)

_op = torch.ops.alignops


# Quantize, dequantize


def ternary_quantize(w: Tensor, group: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize w (N, K) to canonical planes and scales; `quantize` is the friendly form.

    Returns idx uint8 (N, B8/2), sign uint8 (N, B8/8), scale float32 (N, ng). Raises ValueError
    where w holds NaN or Inf. Not differentiable.
    """
    result: tuple[Tensor, Tensor, Tensor] = _op.ternary_quantize(w, group, stride)
    return result


@torch.library.register_fake("alignops::ternary_quantize")
def _(w: Tensor, group: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    op = "ternary_quantize"
    n, k = checks.check_matrix(w, op)
    checks.check(n > 0 and k > 0, f"{op}: w must not be empty, got shape {tuple(w.shape)}")
    checks.check_group(k, group, stride, op)
    idx, sign = checks.plane_bytes(k)
    return (
        w.new_empty((n, idx), dtype=torch.uint8),
        w.new_empty((n, sign), dtype=torch.uint8),
        w.new_empty((n, checks.ceil_div(k, group)), dtype=torch.float32),
    )


def ternary_dequantize(
    idx: Tensor, sign: Tensor, scale: Tensor, k: int, group: int, stride: int, dtype: torch.dtype
) -> Tensor:
    """The weight scale * T, (N, K), of planes and float32 scales. Not differentiable."""
    result: Tensor = _op.ternary_dequantize(idx, sign, scale, k, group, stride, dtype)
    return result


@torch.library.register_fake("alignops::ternary_dequantize")
def _(
    idx: Tensor, sign: Tensor, scale: Tensor, k: int, group: int, stride: int, dtype: torch.dtype
) -> Tensor:
    op = "ternary_dequantize"
    checks.check(idx.dim() == 2, f"{op}: idx must have shape (n, bytes), got {tuple(idx.shape)}")
    checks.check(k > 0, f"{op}: k must be positive, got {k}")
    checks.check_group(k, group, stride, op)
    n = idx.shape[0]
    idx_bytes, sign_bytes = checks.plane_bytes(k)
    checks.check_layout(idx, torch.uint8, (n, idx_bytes), op, "idx")
    checks.check_layout(sign, torch.uint8, (n, sign_bytes), op, "sign")
    checks.check_layout(scale, torch.float32, (n, checks.ceil_div(k, group)), op, "scale")
    checks.check_float_dtype(dtype, op, "dtype")
    return idx.new_empty((n, k), dtype=dtype)


def ternary_fake_quant(
    w: Tensor, lam: Tensor, group: int, stride: int, dtype: torch.dtype
) -> Tensor:
    """Effective weight of Arenas, scale * T + lam * w, for w (N, K) and lam float32 ().

    The gradient is the straight-through one, (1 + lam) g for every weight (arXiv 2601.07892, eq.
    7-8).
    """
    result: Tensor = _op.ternary_fake_quant(w, lam, group, stride, dtype)
    return result


@torch.library.register_fake("alignops::ternary_fake_quant")
def fake_quant_output(
    w: Tensor, lam: Tensor, group: int, stride: int, dtype: torch.dtype
) -> Tensor:
    """Checks the arguments of the operator and allocates its result."""
    op = "ternary_fake_quant"
    n, k = checks.check_matrix(w, op)
    checks.check_layout(lam, torch.float32, (), op, "lam")
    checks.check_group(k, group, stride, op)
    checks.check_float_dtype(dtype, op, "dtype")
    return w.new_empty((n, k), dtype=dtype)


def _fake_quant_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, lam = inputs[:2]
    ctx.save_for_backward(lam)
    ctx.dtype = w.dtype


def _fake_quant_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (lam,) = ctx.saved_tensors
    return ((1 + lam) * grad).to(ctx.dtype), None, None, None, None


torch.library.register_autograd(
    "alignops::ternary_fake_quant", _fake_quant_backward, setup_context=_fake_quant_context
)


# Packing for the kernels

CUDA_LAYOUT = 3
# Rows and blocks of a tile, by layout (csrc/ternary/kernels.h).
_TILES = {0: (1, 8), 1: (32, 8), 2: (64, 16), 3: (32, 32)}


def _packed_bytes(n: int, k: int, layout: int, op: str) -> int:
    checks.check(layout in _TILES, f"{op}: layout must be 0, 1, 2 or 3 (CUDA), got {layout}")
    rows, blocks = _TILES[layout]
    return checks.ceil_div(n, rows) * rows * checks.ceil_div(k, 4 * blocks) * blocks * 5 // 8


def ternary_prepack(idx: Tensor, sign: Tensor, k: int, layout: int) -> Tensor:
    """Canonical planes to uint8 (bytes,) in a kernel's layout. Not differentiable."""
    result: Tensor = _op.ternary_prepack(idx, sign, k, layout)
    return result


@torch.library.register_fake("alignops::ternary_prepack")
def _(idx: Tensor, sign: Tensor, k: int, layout: int) -> Tensor:
    op = "ternary_prepack"
    checks.check(idx.dim() == 2, f"{op}: idx must have shape (n, bytes), got {tuple(idx.shape)}")
    checks.check(k > 0, f"{op}: k must be positive, got {k}")
    n = idx.shape[0]
    idx_bytes, sign_bytes = checks.plane_bytes(k)
    checks.check_layout(idx, torch.uint8, (n, idx_bytes), op, "idx")
    checks.check_layout(sign, torch.uint8, (n, sign_bytes), op, "sign")
    return idx.new_empty((_packed_bytes(n, k, layout, op),))


def ternary_unpack(packed: Tensor, n: int, k: int, layout: int) -> tuple[Tensor, Tensor]:
    """Canonical planes idx (N, B8/2), sign (N, B8/8) of a packed weight. Not differentiable."""
    result: tuple[Tensor, Tensor] = _op.ternary_unpack(packed, n, k, layout)
    return result


@torch.library.register_fake("alignops::ternary_unpack")
def _(packed: Tensor, n: int, k: int, layout: int) -> tuple[Tensor, Tensor]:
    op = "ternary_unpack"
    checks.check(n > 0, f"{op}: n must be positive, got {n}")
    checks.check(k > 0, f"{op}: k must be positive, got {k}")
    checks.check_layout(packed, torch.uint8, (_packed_bytes(n, k, layout, op),), op, "packed")
    idx_bytes, sign_bytes = checks.plane_bytes(k)
    return packed.new_empty((n, idx_bytes)), packed.new_empty((n, sign_bytes))


# Matmul

_AUTO = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 2}


@overload
def ternary_linear(
    x: Tensor, weight: TernaryWeight, bias: Tensor | None = None, act: str = "auto"
) -> Tensor: ...


@overload
def ternary_linear(
    x: Tensor,
    weight: Sequence[TernaryWeight],
    bias: Sequence[Tensor | None] | None = None,
    act: str = "auto",
) -> tuple[Tensor, ...]: ...


def ternary_linear(x: Tensor, weight: Any, bias: Any = None, act: str = "auto") -> Any:
    """The product y = x W^T + bias with a ternary weight.

    Args:
        x: (..., K) float32, bfloat16 or float16.
        weight: (N, K), or a sequence of weights of equal K, group and stride: one call computes all
            of them.
        bias: (N,) float32 or x.dtype; for a sequence of weights a sequence of these, or of None.
        act: how activations enter the products. "none": as they are, with float32 sums. "a8": int8,
            one scale per token. "a8g": int8, one scale per token and 256 columns. "a16": 16 bits
            per token, on the CPU only. "auto": "none" where x is float32 or needs a gradient or is
            on a GPU, else "a8g".

    Returns:
        (..., N) in x.dtype, or a tuple of these. On the CPU the bits do not depend on the number of
        threads, on the other rows of x, or on the instruction set. Differentiable in x and bias, as
        if activations were not rounded.

    Raises:
        TypeError: an argument is of a wrong Python type, or x is not float32, bfloat16 or float16.
        ValueError: shapes or devices do not fit, or act is unknown or not available on the device.

    Source: arXiv 2601.07892, section 3.

    Example:
        >>> import torch, alignops
        >>> w = alignops.ternary.quantize(torch.randn(8, 64))
        >>> alignops.ternary_linear(torch.randn(3, 64), w).shape
        torch.Size([3, 8])
    """
    # This is the hot path of decoding: the native code makes all checks it can make.
    if isinstance(weight, (list, tuple)):
        return _linear_sequence(x, tuple(weight), bias, act)
    try:
        auto, pack = _AUTO[x.dtype], weight._pack
    except (AttributeError, KeyError):
        checks.check_types(x, [weight], "ternary_linear")
        raise
    if pack is None or pack[6] != _native.cpu_layout:
        pack = weight.ready()
    packed, scale, n, k, group, stride, layout = pack
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"ternary_linear: bias must be a Tensor or None, got {type(bias).__name__}")
    record = torch.is_grad_enabled()
    if act == "auto":
        code = 0 if (record and x.requires_grad) or layout == CUDA_LAYOUT else auto
    elif act in checks.ACTS:
        code = checks.ACTS[act]
    else:
        raise checks.act_error(act, "ternary_linear")
    if layout == CUDA_LAYOUT and x.numel() > CUDA_TOKENS * k:
        return _op.ternary_linear_triton(x, packed, scale, bias, n, k, group, stride, code, layout)
    if record and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(  # type: ignore[no-untyped-call]
            x, packed, scale, bias, n, k, group, stride, code, layout
        )
    return _op.ternary_linear(x, packed, scale, bias, n, k, group, stride, code, layout)


def _linear_sequence(
    x: Tensor, weights: tuple[TernaryWeight, ...], bias: Any, act: str
) -> tuple[Tensor, ...]:
    checks.check_types(x, weights, "ternary_linear")
    biases = [None] * len(weights) if bias is None else list(bias)
    checks.check(
        len(biases) == len(weights),
        f"ternary_linear: bias must have one entry per weight ({len(weights)}), got {len(biases)}",
    )
    fused = weights[0].fused_with(weights) if weights else None
    if fused is None:
        return tuple(ternary_linear(x, w, b, act) for w, b in zip(weights, biases, strict=True))
    return fused_outputs(x, fused, [w.shape[0] for w in weights], biases, act)


def fused_outputs(
    x: Tensor, weight: TernaryWeight, sizes: list[int], biases: Sequence[Tensor | None], act: str
) -> tuple[Tensor, ...]:
    """`ternary_linear` of stacked weights of `sizes` rows, split."""
    y = ternary_linear(x, weight, _cat_bias(biases, sizes, x), act)
    if not y.requires_grad:
        return tuple(y.split_with_sizes(sizes, -1))
    # Outputs of one split must not be changed in place where gradients are recorded; these may.
    ends = itertools.accumulate(sizes)
    return tuple(y.narrow(-1, end - n, n) for end, n in zip(ends, sizes, strict=True))


def _cat_bias(biases: Sequence[Tensor | None], sizes: list[int], x: Tensor) -> Tensor | None:
    if not any(b is not None for b in biases):
        return None
    return torch.cat(
        [x.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)]
    )


@torch.library.register_fake("alignops::ternary_linear")
def linear_output(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group: int,
    stride: int,
    act: int,
    layout: int,
) -> Tensor:
    """Checks the arguments of the operator and allocates its result."""
    op = "ternary_linear"
    checks.check(n > 0, f"{op}: n must be positive, got {n}")
    checks.check(k > 0, f"{op}: k must be positive, got {k}")
    checks.check_group(k, group, stride, op)
    checks.check_act_code(act, op, x)
    needed = CUDA_LAYOUT if x.is_cuda else _native.cpu_layout
    checks.check(
        layout == needed, f"{op}: packed must have the layout {needed}, got layout {layout}"
    )
    checks.check_rows(x, op, k, "from packed weight")
    checks.check_layout(packed, torch.uint8, (_packed_bytes(n, k, layout, op),), op, "packed")
    checks.check_layout(
        scale,
        torch.float32,
        (checks.ceil_div(k, group), checks.ROW_PAD * checks.ceil_div(n, checks.ROW_PAD)),
        op,
        "scale",
    )
    checks.check_bias(bias, x, n, op)
    most = checks.MAX_COLUMNS.get(act, k)
    checks.check(k <= most, f"{op}: k must be at most {most} in this mode, got {k}")
    return x.new_empty((*x.shape[:-1], n))


def linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what `linear_backward` needs."""
    _, packed, scale, bias, *ctx.shape, _, ctx.layout = inputs
    ctx.save_for_backward(packed, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, through the dequantized weight."""
    packed, scale = ctx.saved_tensors
    n, k, group, stride = ctx.shape
    grad_x = None
    if ctx.needs_input_grad[0]:
        idx, sign = ternary_unpack(packed, n, k, ctx.layout)
        w = ternary_dequantize(
            idx, sign, scale[:, :n].t().contiguous(), k, group, stride, grad.dtype
        )
        grad_x = grad @ w
    return grad_x, None, None, _bias_grad(ctx, grad), None, None, None, None, None, None


def _bias_grad(ctx: Any, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[3]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)


class _Linear(torch.autograd.Function):
    """The gradient, for calls that need one.

    One registered for the operator would cost 3.6 us in every call, with or without gradients,
    compiled or not: as much as the product of a small layer.
    """

    forward = staticmethod(_op.ternary_linear)
    setup_context = staticmethod(linear_context)
    backward = staticmethod(linear_backward)


# Dense int8 head


def int8_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of w (N, K) to int8 by their largest magnitude. Not differentiable.

    Returns q int8 (N, K) in -127..127 and scale float32 (N). Raises ValueError where w holds NaN or
    Inf.
    """
    result: tuple[Tensor, Tensor] = _op.ternary_int8_quantize(w)
    return result


@torch.library.register_fake("alignops::ternary_int8_quantize")
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    op = "ternary_int8_quantize"
    n, k = checks.check_matrix(w, op)
    checks.check(n > 0 and k > 0, f"{op}: w must not be empty, got shape {tuple(w.shape)}")
    return w.new_empty((n, k), dtype=torch.int8), w.new_empty((n,), dtype=torch.float32)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, act: str = "auto"
) -> Tensor:
    """The product y = x (scale * weight)^T + bias with weight int8 (N, K), scale float32 (N).

    x, bias, act, result and errors are those of `ternary_linear`.

    Example:
        >>> import torch
        >>> q, scale = int8_quantize(torch.randn(8, 64))
        >>> int8_linear(torch.randn(3, 64), q, scale).shape
        torch.Size([3, 8])
    """
    checks.check_types(x, (), "int8_linear")
    if act == "auto":
        differentiable = torch.is_grad_enabled() and x.requires_grad
        code = 0 if differentiable or x.is_cuda else _AUTO[x.dtype]
    elif act in checks.ACTS:
        code = checks.ACTS[act]
    else:
        raise checks.act_error(act, "int8_linear")
    result: Tensor
    if x.is_cuda and x.numel() > CUDA_TOKENS * weight.shape[-1]:
        result = _op.ternary_int8_linear_triton(x, weight, scale, bias, code)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result = _Int8Linear.apply(  # type: ignore[no-untyped-call]
            x, weight, scale, bias, code
        )
    else:
        result = _op.ternary_int8_linear(x, weight, scale, bias, code)
    return result


@torch.library.register_fake("alignops::ternary_int8_linear")
def int8_linear_output(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act: int
) -> Tensor:
    """Checks the arguments of the operator and allocates its result."""
    op = "ternary_int8_linear"
    checks.check_act_code(act, op, x)
    checks.check(
        weight.dim() == 2, f"{op}: weight must have shape (n, k), got {tuple(weight.shape)}"
    )
    n, k = weight.shape
    checks.check_layout(weight, torch.int8, (n, k), op, "weight")
    checks.check_layout(scale, torch.float32, (n,), op, "scale")
    limit = checks.INT8_MAX_COLUMNS
    checks.check(
        act == 0 or k <= limit,
        f"{op}: weight must have at most {limit} columns in the integer modes, got {k}",
    )
    checks.check_rows(x, op, k, "from weight")
    checks.check_bias(bias, x, n, op)
    return x.new_empty((*x.shape[:-1], n))


def int8_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what `int8_backward` needs."""
    _, weight, scale, bias, _ = inputs
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias."""
    weight, scale = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad.float() * scale).to(grad.dtype) @ weight.to(grad.dtype)
    return grad_x, None, None, _bias_grad(ctx, grad), None


class _Int8Linear(torch.autograd.Function):
    forward = staticmethod(_op.ternary_int8_linear)
    setup_context = staticmethod(int8_context)
    backward = staticmethod(int8_backward)
