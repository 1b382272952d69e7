"""Checks of tensors, for layers and for fake kernels, which repeat those of the native code."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Like "float32"."""
    return str(dtype).removeprefix("torch.")


def check(condition: bool, text: str) -> None:
    """ValueError with `text` unless `condition`."""
    if not condition:
        raise ValueError(text)


def check_float_dtype(dtype: torch.dtype, op: str, argument: str) -> None:
    """ValueError unless the kernels compute with this dtype."""
    check(
        dtype in FLOAT_DTYPES,
        f"{op}: {argument} must be float32, bfloat16 or float16, got {dtype_name(dtype)}",
    )


def check_layout(
    t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], op: str, argument: str
) -> None:
    """ValueError unless the kernels can read `t` as it lies in memory."""
    check(
        t.dtype == dtype, f"{op}: {argument} must be {dtype_name(dtype)}, got {dtype_name(t.dtype)}"
    )
    check(
        t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)),
        f"{op}: {argument} must have shape {shape}, got {tuple(t.shape)}",
    )
    check(t.is_contiguous(), f"{op}: {argument} must be contiguous, got strides {t.stride()}")


def check_devices(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on the device of `like`."""
    for name, t in tensors.items():
        check(
            t is None or t.device == like.device,
            f"{op}: {name} must be on {like.device}, got {None if t is None else t.device}",
        )


def ceil_div(a: int, b: int) -> int:
    """The quotient a / b, rounded up."""
    return -(-a // b)
