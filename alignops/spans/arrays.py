"""Arguments of span functions: token ids, ragged batches, probabilities."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alignops.spans.errors import TokenizerMismatchError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


# What the native code reads without a copy.
_READ = tuple(np.dtype(name) for name in ("int64", "int32", "uint32", "uint16", "uint8"))


def as_tokens(values: Any, op: str, argument: str = "ids", dims: int = 1) -> npt.NDArray[Any]:
    """Integers of any kind (sequence, NumPy array, CPU tensor), contiguous, not copied if possible.

    Raises:
        TypeError: the values are not integers.
        ValueError: they have another number of dimensions, or are on another device.
        IndexError: a number is beyond int64.
    """
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{op}: {argument} must be on the CPU, got device {values.device}")
        values = values.detach().numpy()
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64 and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)  # an empty list says nothing about its type
    if array.dtype == np.object_ and all(isinstance(t, int) for t in array.flat):
        raise IndexError(f"{op}: {argument} must be below 2^63, got {max(array.flat, key=abs)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{op}: {argument} must be integers, got {array.dtype}")
    if array.ndim != dims:
        raise ValueError(f"{op}: {argument} must have {dims} dimensions, got shape {array.shape}")
    if array.dtype == np.uint64:
        array = np.minimum(array, np.iinfo(np.int64).max)
    return np.ascontiguousarray(array, dtype=array.dtype if array.dtype in _READ else np.int64)


def as_ids(values: Any, op: str, argument: str = "ids", dims: int = 1) -> Ints:
    """`as_tokens`, but always int64."""
    return as_tokens(values, op, argument, dims).astype(np.int64, copy=False)


def check_rows(
    ids: npt.NDArray[Any],
    offsets: Ints | None,
    vocab_size: int,
    token_bits: int,
    op: str,
    argument: str,
) -> None:
    """What the native `encode` of an index checks, for ids that go elsewhere.

    Raises:
        ValueError: the offsets do not rise from 0 to the number of ids.
        IndexError: an id is outside the vocabulary.
    """
    if offsets is not None:
        ends = f"{offsets[0]} and {offsets[-1]}" if len(offsets) else "none"
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(
                f"{op}: offsets must begin with 0 and end with {len(ids)}, the number of "
                f"{argument}, got {ends}"
            )
        falls = np.flatnonzero(np.diff(offsets) < 0)
        if len(falls):
            i = int(falls[0]) + 1
            raise ValueError(
                f"{op}: offsets must not decrease, got {offsets[i - 1]} and then {offsets[i]} at "
                f"{i}"
            )
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        got = int(ids[bad[0]])
        separator = got == (1 << token_bits) - 1
        raise IndexError(
            f"{op}: {argument} must hold ids in [0, {vocab_size}), got {got} at {bad[0]}"
            + ", the separator of documents: matches cannot cross documents" * separator
        )


def check_same_tokenizer(op: str, first_name: str, first: Any, name: str, index: Any) -> None:
    """Two indexes hold tokens of one tokenizer, as far as they say.

    Raises:
        TokenizerMismatchError: they differ in vocabulary size or, if both have one, in fingerprint.
    """
    for field in ("vocab_size", "fingerprint"):
        want, got = getattr(first, field), getattr(index, field)
        if want != got and None not in (want, got):
            raise TokenizerMismatchError(
                f"{op}: {field} of {name} must be {want!r}, as of {first_name}, got {got!r}"
            )


def as_int(value: Any, op: str, argument: str) -> int:
    """A single integer. Raises TypeError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        got = type(value).__name__
        raise TypeError(f"{op}: {argument} must be an integer, got {got}") from None


def as_mask(values: Any, op: str, argument: str) -> npt.NDArray[np.bool_]:
    """Booleans, or integers as truth values, as a contiguous vector.

    Raises:
        TypeError: neither booleans nor integers.
        ValueError: they have another shape.
    """
    array = np.asarray(values)
    if array.size > 0 and array.dtype.kind not in "biu":
        raise TypeError(f"{op}: {argument} must be booleans, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{op}: {argument} must have 1 dimension, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.bool_)


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
