"""Arguments of span functions: token ids, ragged batches, probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def as_ids(values: Any, op: str, argument: str = "ids", dims: int = 1) -> Ints:
    """Integers of any kind (sequence, NumPy array, CPU tensor) as contiguous int64.

    Raises:
        TypeError: the values are not integers.
        ValueError: they have another number of dimensions.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64 and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)  # an empty list says nothing about its type
    if array.dtype.kind not in "iu":
        raise TypeError(f"{op}: {argument} must be integers, got {array.dtype}")
    if array.ndim != dims:
        raise ValueError(f"{op}: {argument} must have {dims} dimensions, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_ragged(ids: Any, offsets: Any, op: str) -> tuple[Ints, Ints]:
    """Flat ids and offsets (rows + 1) of a ragged batch; without offsets, `ids` lists the rows.

    Raises:
        TypeError: ids or offsets are not integers.
        ValueError: the offsets do not rise from 0 to the number of ids.
    """
    if offsets is None:
        rows = [as_ids(row, op, f"ids[{i}]") for i, row in enumerate(_rows(ids, op))]
        flat = np.concatenate([np.empty(0, np.int64), *rows])
        return flat, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat, bounds = as_ids(ids, op), as_ids(offsets, op, "offsets")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(flat) or (np.diff(bounds) < 0).any():
        raise ValueError(
            f"{op}: offsets must rise from 0 to the number of ids, {len(flat)}, got "
            f"{np.array2string(bounds, threshold=8)}"
        )
    return flat, bounds


def _rows(ids: Any, op: str) -> Iterable[Any]:
    if isinstance(ids, (np.ndarray, torch.Tensor)) and ids.ndim != 2:
        raise ValueError(
            f"{op}: ids must be a list of rows or come with offsets, got shape {tuple(ids.shape)}"
        )
    rows: Iterable[Any] = ids
    return rows


def as_floats(values: Any, op: str, argument: str) -> Floats:
    """Numbers (sequence, NumPy array, tensor) as one-dimensional float64.

    Raises:
        ValueError: they have another shape, or one is NaN.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{op}: {argument} must have 1 dimension, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(
            f"{op}: {argument} must not hold NaN, got one at {int(np.isnan(array).argmax())}"
        )
    return array
