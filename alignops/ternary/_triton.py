"""Registers the Triton kernels as operators on CUDA tensors; the first call imports triton.

One owner per operator and device. Fake quantization on a GPU is Triton's. The products have a C++
kernel for few tokens, `ternary_linear`, and a Triton kernel with tensor-core tiles for many,
`ternary_linear_triton`; `ops.ternary_linear` chooses by the number of tokens. So it is with the
int8 head. Both read the same packed weight and share checks, fake kernel and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignops._checks import check_devices
from alignops.ternary import ops

_library = torch.library.Library("alignops", "FRAGMENT")


def _kernels() -> Any:
    from alignops.triton_kernels import ternary

    return ternary


def _linear(
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
    check_devices("ternary_linear", x, packed=packed, scale=scale, bias=bias)
    y: Tensor = ops.linear_output(x, packed, scale, bias, n, k, group, stride, act, layout)
    _kernels().linear(x, packed, scale, bias, y, k, group, stride, act)
    return y


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act: int) -> Tensor:
    check_devices("ternary_int8_linear", x, weight=weight, scale=scale, bias=bias)
    y: Tensor = ops.int8_linear_output(x, weight, scale, bias, act)
    _kernels().int8_linear(x, weight, scale, bias, y, act)
    return y


def _fake_quant(w: Tensor, lam: Tensor, group: int, stride: int, dtype: torch.dtype) -> Tensor:
    check_devices("ternary_fake_quant", w, lam=lam)
    out: Tensor = ops.fake_quant_output(w, lam, group, stride, dtype)
    _kernels().fake_quant(w, lam, out, group, stride)
    return out


_library.define(
    "ternary_linear_triton(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int n, int k, "
    "int group, int stride, int act, int layout) -> Tensor"
)
_library.define(
    "ternary_int8_linear_triton(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int act) -> "
    "Tensor"
)
_library.impl("ternary_linear_triton", _linear, "CUDA")
_library.impl("ternary_int8_linear_triton", _int8_linear, "CUDA")
_library.impl("ternary_fake_quant", _fake_quant, "CUDA")
torch.library.register_fake("alignops::ternary_linear_triton", ops.linear_output)
torch.library.register_fake("alignops::ternary_int8_linear_triton", ops.int8_linear_output)
torch.library.register_autograd(
    "alignops::ternary_linear_triton", ops.linear_backward, setup_context=ops.linear_context
)
torch.library.register_autograd(
    "alignops::ternary_int8_linear_triton", ops.int8_backward, setup_context=ops.int8_context
)
