"""STQ1_0 tensors in GGUF files: 3:4 ternary weights in 1.3125 bits, byte for byte.

A block of 256 columns takes 42 bytes: 32 of idx, 8 of sign, then its scale as float16. The planes
are the canonical ones of stride 16. Shape letters: N rows, K columns (a multiple of 256).

GGUF, little-endian: "GGUF", version u32, counts of tensors and of metadata entries u64; the entries
(key, type, value); per tensor its name, dimensions (innermost first), type id and offset; then the
data, from the next aligned place on. Type ids of STQ1_0 changed between builds, and readers made
for other ids refuse them, so the table is parsed here.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from alignops.ternary.weight import TernaryWeight

COLUMNS = 256  # of a block
BLOCK_BYTES = 42
TYPE_IDS = (43, 42)  # STQ1_0 in present files, and in older ones

_IDX, _SIGN = 32, 8
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_NAME = 63  # bytes that ggml keeps of a tensor's name
_MAX_DIMS = 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def encode_stq1_0(weight: TernaryWeight, round_scale: bool = False) -> Tensor:
    """Blocks of a ternary weight, uint8 (N, K / 256 * 42).

    Args:
        weight: (N, K) of stride 16 whose scale group is a multiple of 256; the scale is repeated in
            every block of the group.
        round_scale: allow scales that float16 does not hold exactly, and round them.

    Raises:
        ValueError: the weight has another stride, group or K, or a scale is NaN, infinite,
            negative, or not representable.

    Example:
        >>> import torch
        >>> from alignops.ternary import quantize
        >>> encode_stq1_0(quantize(torch.ones(2, 512), group=256, stride=16)).shape
        torch.Size([2, 84])
    """
    if len(weight.shape) != 2:
        raise ValueError(f"encode_stq1_0: weight must have shape (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if k % COLUMNS:
        raise ValueError(f"encode_stq1_0: weight must have K % 256 == 0, got K={k}")
    if weight.stride != 16:
        raise ValueError(
            f"encode_stq1_0: weight must have stride 16, got stride {weight.stride}, whose blocks "
            "hold other columns: only quantizing anew with stride=16 gives STQ1_0 blocks"
        )
    if weight.group % COLUMNS:
        raise ValueError(
            "encode_stq1_0: weight must have one scale per row or per multiple of 256 columns, "
            f"got group {weight.group}"
        )
    state = weight.state_dict()
    blocks = k // COLUMNS
    scale = state["scale"].repeat_interleave(weight.group // COLUMNS, dim=1)[:, :blocks]
    parts = (
        state["idx"].view(n, blocks, _IDX),
        state["sign"].view(n, blocks, _SIGN),
        _to_float16(scale, round_scale).contiguous().view(torch.uint8).view(n, blocks, 2),
    )
    return torch.cat([part.cpu() for part in parts], dim=2).view(n, blocks * BLOCK_BYTES)


def decode_stq1_0(blocks: Tensor) -> TernaryWeight:
    """The ternary weight of uint8 blocks (N, K / 256 * 42): stride 16, group 256, float16 scales.

    Raises:
        ValueError: blocks has another dtype or shape, or a scale is NaN, infinite or negative.
    """
    shaped = blocks.dim() == 2 and blocks.numel() > 0 and blocks.shape[1] % BLOCK_BYTES == 0
    if blocks.dtype != torch.uint8 or not shaped:
        raise ValueError(
            "decode_stq1_0: blocks must be uint8 of shape (N, K / 256 * 42), got "
            f"{blocks.dtype} of shape {tuple(blocks.shape)}"
        )
    n, count = blocks.shape[0], blocks.shape[1] // BLOCK_BYTES
    idx, sign, scale = torch.split(blocks.view(n, count, BLOCK_BYTES), [_IDX, _SIGN, 2], dim=2)
    scale = scale.contiguous().view(torch.float16).view(n, count)
    _check_scale(scale, "decode_stq1_0: blocks")
    shape = (n, count * COLUMNS)
    return TernaryWeight(idx.flatten(1), sign.flatten(1), scale, shape, COLUMNS, stride=16)


def read_stq1_0(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, type_id: int | None = None
) -> dict[str, TernaryWeight]:
    """Read the STQ1_0 tensors of a GGUF file.

    Args:
        path: of the file; tensors of other types are passed over.
        names: the tensors to read; None: all of type STQ1_0.
        type_id: the id of STQ1_0 in this file; None: 42 or 43.

    Returns:
        Weights by name, in the order of the file (or of `names`), with stride 16 and group 256.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not GGUF of version 2 or 3, is big-endian, truncated or
            inconsistent; a tensor is missing, is of another type, or does not have the size of
            STQ1_0; a scale is NaN, infinite or negative.
    """
    path = Path(path)
    ids = TYPE_IDS if type_id is None else (type_id,)
    with path.open("rb") as file:
        table = _read_table(file, path)
        if names is None:
            wanted = [t for t in table.values() if t.type_id in ids]
            if not wanted:
                types = ", ".join(sorted({t.type_name for t in table.values()})) or "none"
                raise ValueError(
                    f"{path}: must hold a tensor of type STQ1_0 (id {' or '.join(map(str, ids))}), "
                    f"got types: {types}"
                )
        else:
            wanted = [_find(table, name, ids, path) for name in names]
        return {t.name: _read_tensor(file, t, path) for t in wanted}


def write_stq1_0(
    path: str | os.PathLike[str],
    weights: Mapping[str, TernaryWeight],
    round_scale: bool = False,
    type_id: int = TYPE_IDS[0],
) -> None:
    """Write ternary weights as the STQ1_0 tensors of a new GGUF file (version 3).

    The file appears under its name only when it is complete; a file of that name is replaced then.

    Args:
        path: of the file.
        weights: by tensor name (at most 63 bytes); which can be written, see `encode_stq1_0`.
        round_scale: allow scales that float16 does not hold exactly, and round them.
        type_id: 43, or 42 for older readers.

    Raises:
        OSError: the file cannot be written.
        ValueError: there are no weights, or one cannot be written.
    """
    if not weights:
        raise ValueError("write_stq1_0: weights must hold at least one tensor, got none")
    if type_id not in TYPE_IDS:
        raise ValueError(f"write_stq1_0: type_id must be 42 or 43, got {type_id}")
    head = [b"GGUF", struct.pack("<IQQ", _VERSIONS[-1], len(weights), 1)]
    head += [_string("general.alignment"), struct.pack("<II", _UINT32, _ALIGNMENT)]
    data: list[bytes] = []
    offset = 0
    for name, weight in weights.items():
        size = len(name.encode())
        if not 0 < size <= _MAX_NAME:
            raise ValueError(
                f"write_stq1_0: names must have 1 to {_MAX_NAME} bytes, got {size}: {name!r}"
            )
        try:
            blocks = encode_stq1_0(weight, round_scale).numpy().tobytes()
        except ValueError as error:
            raise ValueError(f"write_stq1_0: tensor {name!r}: {error}") from error
        n, k = weight.shape
        head += [_string(name), struct.pack("<IQQIQ", 2, k, n, type_id, offset)]
        data.append(blocks + bytes(-len(blocks) % _ALIGNMENT))
        offset += len(data[-1])
    header = b"".join(head)
    _replace(Path(path), [header, bytes(-len(header) % _ALIGNMENT), *data])


# Scales


def _check_scale(scale: Tensor, what: str) -> None:
    bad = ~scale.isfinite() | (scale < 0)
    if bad.any():
        row, block = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{what} must have finite scales >= 0, got {scale[row, block].item()} at "
            f"(row, block) = ({row}, {block}), {int(bad.sum())} such in all"
        )


def _to_float16(scale: Tensor, round_scale: bool) -> Tensor:
    _check_scale(scale, "encode_stq1_0: weight")
    half = scale.to(torch.float16)
    lost = ~half.isfinite() | ((half == 0) & (scale != 0))
    if not round_scale:
        lost |= half.to(scale.dtype) != scale
    if lost.any():
        row, block = lost.nonzero()[0].tolist()
        advice = "" if round_scale else "; round_scale=True rounds what is in range"
        raise ValueError(
            "encode_stq1_0: weight must have scales that float16 can hold, got "
            f"{scale[row, block].item():.9g} at (row, block) = ({row}, {block}), "
            f"{int(lost.sum())} such in all{advice}"
        )
    return half


# GGUF


@dataclass(frozen=True)
class _Tensor:
    name: str
    dims: tuple[int, ...]  # innermost first
    type_id: int
    start: int  # in the file
    room: int  # up to the next tensor or the end of the file
    alignment: int

    @property
    def type_name(self) -> str:
        return _TYPE_NAMES.get(self.type_id, f"id {self.type_id}")


class _Cursor:
    """Reads fields; every length is compared with what the file still holds before it is used."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def fail(self, text: str) -> ValueError:
        return ValueError(f"{self.path}: {text}")

    def room(self, size: int, what: str) -> None:
        if size > self.size - self.at:
            raise self.fail(
                f"truncated: {what} needs {size} bytes at offset {self.at}, "
                f"got {self.size - self.at}"
            )

    def take(self, size: int, what: str) -> bytes:
        self.room(size, what)
        data = self.file.read(size)
        self.at += size
        return data

    def skip(self, size: int, what: str) -> None:
        self.room(size, what)
        self.file.seek(size, os.SEEK_CUR)
        self.at += size

    def uint32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def uint64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        data = self.take(self.uint64(f"length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} must be UTF-8, got {data[:64]!r}") from error


def _read_table(file: BinaryIO, path: Path) -> dict[str, _Tensor]:
    cursor = _Cursor(file, path)
    magic = cursor.take(4, "the magic number") if cursor.size >= 4 else file.read()
    if magic != b"GGUF":
        raise cursor.fail(f"must be a GGUF file, got {magic!r} as first bytes")
    version = cursor.uint32("the version")
    if version not in _VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"a big-endian file of version {big}" if big in _VERSIONS else f"version {version}"
        raise cursor.fail(f"must be little-endian GGUF of version 2 or 3, got {kind}")
    num_tensors = cursor.uint64("the number of tensors")
    num_entries = cursor.uint64("the number of metadata entries")
    cursor.room(
        num_entries * 13, f"{num_entries} metadata entries"
    )  # smallest: empty key, type, one byte
    alignment = _read_metadata(cursor, num_entries)
    cursor.room(
        num_tensors * 32, f"{num_tensors} tensor descriptions"
    )  # smallest: empty name, one dimension
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name")
        what = f"the description of tensor {name!r}"
        if name in found:
            raise cursor.fail(f"tensor names must differ, got {name!r} twice")
        rank = cursor.uint32(what)
        if not 1 <= rank <= _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} must have 1 to {_MAX_DIMS} dimensions, got {rank}")
        dims = tuple(cursor.uint64(what) for _ in range(rank))
        found[name] = dims, cursor.uint32(what), cursor.uint64(what)
    data = cursor.at + -cursor.at % alignment
    for name, (_, _, offset) in found.items():
        if offset % alignment or data + offset > cursor.size:
            raise cursor.fail(
                f"tensor {name!r} must start at a multiple of {alignment} inside the file, "
                f"got offset {offset} of {max(cursor.size - data, 0)} bytes of data"
            )
    ends = sorted({data + offset for _, _, offset in found.values()} | {cursor.size})
    following = dict(itertools.pairwise(ends))
    return {
        name: _Tensor(
            name,
            dims,
            type_id,
            data + offset,
            following.get(data + offset, cursor.size) - data - offset,
            alignment,
        )
        for name, (dims, type_id, offset) in found.items()
    }


def _read_metadata(cursor: _Cursor, entries: int) -> int:
    """Pass over the metadata; returns the alignment of the data."""
    alignment = _ALIGNMENT
    seen = set()
    for _ in range(entries):
        key = cursor.string("a metadata key")
        if key in seen:
            raise cursor.fail(f"metadata keys must differ, got {key!r} twice")
        seen.add(key)
        kind = cursor.uint32(f"the type of {key!r}")
        if key == "general.alignment":
            alignment = cursor.uint32(f"the value of {key!r}")
            if kind != _UINT32 or alignment == 0 or alignment % 8:
                raise cursor.fail(
                    "general.alignment must be a uint32 that is a multiple of 8, "
                    f"got {alignment} (type {kind})"
                )
        elif kind == _ARRAY:
            kind = cursor.uint32(f"the type of {key!r}")
            _skip_values(cursor, kind, cursor.uint64(f"the length of {key!r}"), key)
        else:
            _skip_values(cursor, kind, 1, key)
    return alignment


def _skip_values(cursor: _Cursor, kind: int, count: int, key: str) -> None:
    what = f"the value of {key!r}"
    if kind in _SCALAR_BYTES:
        cursor.skip(count * _SCALAR_BYTES[kind], what)
    elif kind == _STRING:
        cursor.room(8 * count, what)
        for _ in range(count):
            cursor.skip(cursor.uint64(what), what)
    else:
        raise cursor.fail(
            f"{what} must be a scalar, a string, or an array of these, got type {kind}"
        )


def _find(table: dict[str, _Tensor], name: str, ids: tuple[int, ...], path: Path) -> _Tensor:
    if name not in table:
        raise ValueError(f"{path}: must hold a tensor {name!r}, got {len(table)} others")
    tensor = table[name]
    if tensor.type_id not in ids:
        raise ValueError(
            f"{path}: tensor {name!r} must be of type STQ1_0 (id {' or '.join(map(str, ids))}), "
            f"got type {tensor.type_name}"
        )
    return tensor


def _read_tensor(file: BinaryIO, tensor: _Tensor, path: Path) -> TernaryWeight:
    k, n = tensor.dims if len(tensor.dims) == 2 else (0, 0)
    if n == 0 or k == 0 or k % COLUMNS:
        raise ValueError(
            f"{path}: tensor {tensor.name!r} must have dimensions (K, N) with K % 256 == 0 to be "
            f"STQ1_0, got {tensor.dims}"
        )
    row = k // COLUMNS * BLOCK_BYTES
    if not 0 <= tensor.room - n * row < tensor.alignment:
        raise ValueError(
            f"{path}: tensor {tensor.name!r} must take {n * row} bytes to be STQ1_0 of dimensions "
            f"{tensor.dims}, got room for {tensor.room}: the file is truncated, or type id "
            f"{tensor.type_id} is another type in it"
        )
    file.seek(tensor.start)
    data = bytearray(file.read(n * row))
    try:
        return decode_stq1_0(torch.frombuffer(data, dtype=torch.uint8).view(n, row))
    except ValueError as error:
        raise ValueError(f"{path}: tensor {tensor.name!r}: {error}") from error


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _replace(path: Path, parts: list[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
