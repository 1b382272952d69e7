"""What callers of `build_index` pass as documents, as batches of arrays."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignops.spans.arrays import as_ids, as_tokens

# A batch of documents is handed on when it has this many tokens or documents, or is this old.
BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 14
BATCH_SECONDS = 0.5
_OP = "build_index"


@dataclass
class Batch:
    """Documents i = 0 ... n-1, tokens[offsets[i]:offsets[i+1]], and what goes with them."""

    tokens: NDArray[Any]  # any integer dtype, contiguous
    offsets: NDArray[np.int64]  # (n + 1,)
    labels: NDArray[np.uint16] | None  # (n,)
    meta: list[bytes] | None  # n texts
    byte_offsets: NDArray[np.uint32] | None  # like tokens


def batches(docs: Any, labels: Any, meta: Any, byte_offsets: Any) -> Iterator[Batch]:
    """Documents with their labels, metadata and byte offsets, each of which is consumed once.

    Raises:
        TypeError: tokens, offsets, labels or byte offsets are not integers, metadata is not JSON.
        ValueError: shapes, offsets or lengths do not fit.
    """
    source = _flat(docs, byte_offsets) if is_flat(docs) else _streamed(docs, byte_offsets)
    label_list = _Parallel(labels, "labels")
    meta_list = _Parallel(meta, "meta")
    first = 0
    for batch in source:
        n = len(batch.offsets) - 1
        if labels is not None:
            values = label_list.take(n, first)
            batch.labels = _in_range(as_tokens(values, _OP, "labels"), 1 << 16, "labels", np.uint16)
        if meta is not None:
            entries = meta_list.take(n, first)
            batch.meta = [_json(entry, first + i) for i, entry in enumerate(entries)]
        first += n
        yield batch
    label_list.expect_end(first)
    meta_list.expect_end(first)


def is_flat(docs: Any) -> bool:
    """Whether docs is (flat, offsets): a pair of arrays or tensors, rather than two documents."""
    return (
        isinstance(docs, tuple)
        and len(docs) == 2
        and all(isinstance(part, (np.ndarray, Tensor)) for part in docs)
    )


def _in_range(array: NDArray[Any], limit: int, what: str, dtype: type[Any]) -> NDArray[Any]:
    if array.size > 0 and (int(array.min()) < 0 or int(array.max()) >= limit):
        bad = int(np.flatnonzero((array < 0) | (array >= limit))[0])
        raise ValueError(
            f"{_OP}: {what} must be in [0, {limit}), got {array[bad]} at index {bad} of its batch"
        )
    return np.ascontiguousarray(array, dtype)


def _json(entry: Any, document: int) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_OP}: meta of document {document} is not JSON: {error}") from None


class _Parallel:
    """One value per document, taken in step with the documents."""

    def __init__(self, values: Iterable[Any] | None, what: str) -> None:
        self.what = what
        self.values = iter(()) if values is None else iter(values)

    def take(self, count: int, first: int) -> list[Any]:
        taken = list(itertools.islice(self.values, count))
        if len(taken) < count:
            raise ValueError(
                f"{_OP}: {self.what} must have one entry per document, got {first + len(taken)} "
                f"for at least {first + count}"
            )
        return taken

    def expect_end(self, documents: int) -> None:
        if next(self.values, self) is not self:
            raise ValueError(
                f"{_OP}: {self.what} must have one entry per document, got more than {documents}"
            )


def _check_offsets(tokens: NDArray[Any], offsets: Any) -> NDArray[np.int64]:
    array = as_ids(offsets, _OP, "offsets")
    if array.size == 0 or array[0] != 0 or array[-1] != tokens.size:
        got = f"{array[0]} and {array[-1]}" if array.size else "none"
        raise ValueError(
            f"{_OP}: offsets must begin with 0 and end with len(flat)={tokens.size}, got {got}"
        )
    if (steps := np.diff(array)).size > 0 and steps.min() < 0:
        bad = int(np.argmin(steps >= 0)) + 1
        raise ValueError(
            f"{_OP}: offsets must not decrease, got {array[bad]} after {array[bad - 1]} at index "
            f"{bad}"
        )
    return array


def _flat(docs: tuple[Any, Any], byte_offsets: Any) -> Iterator[Batch]:
    """Views of one array: nothing is copied."""
    tokens = as_tokens(docs[0], _OP, "docs")
    offsets = _check_offsets(tokens, docs[1])
    bytes_of = None
    if byte_offsets is not None:
        bytes_of = as_tokens(byte_offsets, _OP, "byte_offsets")
        if bytes_of.size != tokens.size:
            raise ValueError(
                f"{_OP}: byte_offsets must have one entry per token ({tokens.size}), got "
                f"{bytes_of.size}"
            )
    for first in range(0, len(offsets) - 1, BATCH_DOCUMENTS):
        part = offsets[first : first + BATCH_DOCUMENTS + 1]
        begin, end = int(part[0]), int(part[-1])
        own = None
        if bytes_of is not None:
            own = _in_range(bytes_of[begin:end], 1 << 32, "byte_offsets", np.uint32)
        yield Batch(tokens[begin:end], part - begin, None, None, own)


def _streamed(docs: Iterable[Any], byte_offsets: Any) -> Iterator[Batch]:
    """Documents one by one, joined to batches. A long document is a batch of its own."""
    positions = _Parallel(byte_offsets, "byte_offsets")
    parts: list[NDArray[Any]] = []
    offsets: list[NDArray[np.uint32]] = []
    tokens = count = 0
    begin = time.monotonic()
    for doc in docs:
        array = as_tokens(doc, _OP, f"document {count}")
        if byte_offsets is not None:
            own = as_tokens(positions.take(1, count)[0], _OP, f"byte_offsets of document {count}")
            if own.size != array.size:
                raise ValueError(
                    f"{_OP}: byte_offsets of document {count} must have one entry per token "
                    f"({array.size}), got {own.size}"
                )
            offsets.append(_in_range(own, 1 << 32, "byte_offsets", np.uint32))
        parts.append(array)
        count += 1
        tokens += array.size
        if (
            tokens >= BATCH_TOKENS
            or len(parts) >= BATCH_DOCUMENTS
            or time.monotonic() - begin > BATCH_SECONDS
        ):
            yield _join(parts, offsets)
            parts, offsets, tokens = [], [], 0
            begin = time.monotonic()
    if parts:
        yield _join(parts, offsets)
    positions.expect_end(count)


def _join(parts: list[NDArray[Any]], byte_offsets: list[NDArray[np.uint32]]) -> Batch:
    ends = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
    dtypes = {part.dtype for part in parts if part.size > 0}
    if len(dtypes) > 1:
        # NumPy would join unsigned and signed 64-bit integers as floats.
        parts = [part.astype(np.int64, copy=False) for part in parts]
    elif dtypes:
        parts = [part for part in parts if part.size > 0]
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    own = np.concatenate(byte_offsets) if byte_offsets else None
    return Batch(tokens, ends, None, None, own)
