"""Checks of ternary arguments, for layers and for fake kernels, and those of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignops._checks import FLOAT_DTYPES as FLOAT_DTYPES
from alignops._checks import ceil_div as ceil_div
from alignops._checks import check as check
from alignops._checks import check_float_dtype as check_float_dtype
from alignops._checks import check_layout as check_layout
from alignops._checks import dtype_name as dtype_name

#: Code of each activation mode; "auto" is one of them, see `ternary_linear`.
ACTS = {"none": 0, "a8": 1, "a8g": 2, "a16": 3}
#: Rows of a packed scale are padded to a multiple of this.
ROW_PAD = 64
# Widest K whose sums fit int32, by code of the mode.
MAX_COLUMNS = {1: 22_000_000, 2: 22_000_000, 3: 87_000}
INT8_MAX_COLUMNS = 131_072


def check_matrix(w: Tensor, op: str) -> tuple[int, int]:
    """Shape of a weight (N, K) of float32, bfloat16 or float16."""
    check(w.dim() == 2, f"{op}: w must have shape (n, k), got {tuple(w.shape)}")
    check_float_dtype(w.dtype, op, "w")
    return w.shape[0], w.shape[1]


def check_group(k: int, group: int, stride: int, op: str) -> None:
    """ValueError unless K columns can have these scale groups and this stride."""
    check(stride in (1, 16), f"{op}: stride must be 1 or 16, got {stride}")
    check(stride == 1 or k % 64 == 0, f"{op}: k must be a multiple of 64 for stride 16, got {k}")
    unit = 32 if stride == 1 else 64
    check(
        group == k or (0 < group < k and group % unit == 0),
        f"{op}: group must be a multiple of {unit} below k={k}, or k, got {group}",
    )


def check_act_code(act: int, op: str, x: Tensor) -> None:
    """ValueError unless `act` is the code of a mode for the device of x."""
    check(0 <= act <= 3, f"{op}: act must be 0 (none), 1 (a8), 2 (a8g) or 3 (a16), got {act}")
    check(
        act != ACTS["a16"] or not x.is_cuda,
        f"{op}: act must be 0 (none), 1 (a8) or 2 (a8g) on a GPU, got 3 (a16)",
    )


def check_rows(x: Tensor, op: str, k: int, source: str) -> None:
    """ValueError unless x is (..., k) of float32, bfloat16 or float16."""
    check(x.dim() >= 1, f"{op}: x must have at least one dimension, got a scalar")
    check_float_dtype(x.dtype, op, "x")
    check(
        x.shape[-1] == k,
        f"{op}: x must have last dimension K={k} ({source}), got shape {tuple(x.shape)}",
    )


def check_bias(bias: Tensor | None, x: Tensor, n: int, op: str) -> None:
    """ValueError unless bias is (n,) of float32 or the dtype of x."""
    if bias is not None:
        check_layout(bias, x.dtype if bias.dtype == x.dtype else torch.float32, (n,), op, "bias")


def plane_bytes(k: int) -> tuple[int, int]:
    """Bytes of a row in the idx and the sign plane."""
    blocks = 8 * ceil_div(k, 32)
    return blocks // 2, blocks // 8


def check_types(x: Any, weights: Sequence[Any], op: str) -> None:
    """TypeError unless x is a float tensor and all weights are ternary."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        got = dtype_name(x.dtype)
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {got}")
    for w in weights:
        if not hasattr(w, "_pack"):
            got = type(w).__name__
            raise TypeError(f"{op}: weight must be a TernaryWeight or a list of them, got {got}")


def act_error(act: object, op: str) -> ValueError:
    """What to raise for an unknown mode."""
    return ValueError(f"{op}: act must be one of auto, {', '.join(ACTS)}, got {act!r}")


def check_act(act: str, op: str) -> None:
    """ValueError unless act names a mode."""
    if act != "auto" and act not in ACTS:
        raise act_error(act, op)
