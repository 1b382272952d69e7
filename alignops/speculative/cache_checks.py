"""Checks of caches and plans, for fake kernels: those of the native code, but for values.

Source of every text: csrc/speculative/ops_kv.h and ops_layout.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignops._checks import check, check_layout, dtype_name

#: Nodes of a tree, at most: the bits of an int64.
MAX_NODES = 64


def slot_dim(layout: str, op: str) -> int:
    """The dimension of slots in a cache tensor: ValueError unless the layout is known."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"{op}: layout must be 'bhsd' or 'bshd', got {layout!r}")
    return 2 if layout == "bhsd" else 1


def check_slot_dim(dim: int, op: str) -> None:
    """ValueError unless the dimension of slots is 1 or 2."""
    check(dim in (1, 2), f"{op}: slot_dim must be 1 or 2, got {dim}")


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may lie on the same bytes."""
    if t.numel() == 0:
        return False
    inner = 1
    # Stable, so that equal strides are seen in the same order as by the native code.
    pairs = [(t.stride(d), t.shape[d]) for d in range(t.dim()) if t.shape[d] > 1]
    for stride, size in sorted(pairs, key=lambda pair: pair[0]):
        if stride < inner:
            return True
        inner += (size - 1) * stride
    return False


def check_table(
    tensors: Sequence[Tensor], dims: int, written: bool, op: str, argument: str
) -> None:
    """ValueError unless the tensors are a cache: 4 dimensions, or 3 if packed."""
    for i, t in enumerate(tensors):
        check(
            t.dim() == dims,
            f"{op}: {argument} must have {dims} dimensions, got shape {tuple(t.shape)} at {i}",
        )
        check(
            t.element_size() in (1, 2, 4, 8),
            f"{op}: {argument} must have elements of 1, 2, 4 or 8 bytes, got {t.element_size()} "
            f"at {i}",
        )
        check(
            t.shape[-1] <= 1 or t.stride(-1) == 1,
            f"{op}: {argument} must have stride 1 in the last dimension, got strides {t.stride()} "
            f"at {i}",
        )
        check(
            dims == 3 or t.shape[0] == tensors[0].shape[0],
            f"{op}: {argument} must have the same number of rows, got {tensors[0].shape[0]} at 0 "
            f"and {t.shape[0]} at {i}",
        )
        check(
            not written or not _overlaps_itself(t),
            f"{op}: {argument} must not overlap themselves, got strides {t.stride()} at {i}",
        )


def rows_of(tensors: Sequence[Tensor]) -> int:
    """Rows of a cache; 0 without tensors."""
    return tensors[0].shape[0] if tensors else 0


def check_pairs(
    tensors: Sequence[Tensor], caches: Sequence[Tensor], heads: int, op: str, argument: str
) -> None:
    """ValueError unless `tensors` fit `caches` one by one; `heads` is the dimension of heads."""
    check(
        len(tensors) == len(caches),
        f"{op}: {argument} must have {len(caches)} tensors (as caches), got {len(tensors)}",
    )
    for i, (t, cache) in enumerate(zip(tensors, caches, strict=True)):
        check(
            t.dtype == cache.dtype,
            f"{op}: {argument} must be {dtype_name(cache.dtype)} (as caches) at {i}, got "
            f"{dtype_name(t.dtype)}",
        )
        check(
            t.shape[heads] == cache.shape[heads] and t.shape[-1] == cache.shape[-1],
            f"{op}: {argument} must have the heads and the head size of caches at {i}, got shape "
            f"{tuple(t.shape)} for {tuple(cache.shape)}",
        )


def check_ints(t: Tensor | None, shape: tuple[int, ...], op: str, argument: str) -> None:
    """ValueError unless `t` is absent, or part of a plan: int32 or int64, contiguous."""
    if t is None:
        return
    check(
        t.dtype in (torch.int32, torch.int64),
        f"{op}: {argument} must be int32 or int64, got {dtype_name(t.dtype)}",
    )
    check_layout(t, t.dtype, shape, op, argument)


def check_vector(t: Tensor, op: str, argument: str) -> int:
    """The number of rows of a plan; ValueError unless it has one dimension."""
    check(t.dim() == 1, f"{op}: {argument} must have one dimension, got shape {tuple(t.shape)}")
    return t.shape[0]


def check_matrix(t: Tensor, rows: int, op: str, argument: str) -> int:
    """The number of columns; ValueError unless there are two dimensions, the first of `rows`."""
    check(
        t.dim() == 2 and t.shape[0] == rows,
        f"{op}: {argument} must have {rows} rows of one dimension, got shape {tuple(t.shape)}",
    )
    return t.shape[1]


def check_shared(t: Tensor, rows: int, columns: int, op: str, argument: str) -> None:
    """ValueError unless the shape is (columns,), for all rows, or (rows, columns)."""
    check(
        (t.dim() == 1 and t.shape[0] == columns)
        or (t.dim() == 2 and t.shape[0] == rows and t.shape[1] == columns),
        f"{op}: {argument} must have shape ({columns},) or ({rows}, {columns}), got "
        f"{tuple(t.shape)}",
    )
