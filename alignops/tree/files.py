"""Files of search trees.

Layout, little endian: magic `ALNTREE1`; uint32 version; uint32 bytes of the header; the header,
JSON in UTF-8; then the columns of `TreeStore.state_dict`, each at a multiple of 64 bytes. The
header has the arguments of the store and, per column, its dtype, offset from the first column,
bytes and CRC-32.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignops._files import replacing
from alignops.tree import policies
from alignops.tree.errors import TreeFormatError
from alignops.tree.store import TreeStore

MAGIC = b"ALNTREE1"
VERSION = 1
_ALIGN = 64
_PREFIX = struct.Struct("<8sII")
_POLICIES = {
    c.__name__: c
    for c in (policies.PUCT, policies.RainPUCT, policies.UCT, policies.Boltzmann, policies.Greedy)
}
_BACKUPS = {
    c.__name__: c for c in (policies.Mean, policies.Max, policies.Soft, policies.SubtreeMean)
}


def save(store: TreeStore, path: str | os.PathLike[str]) -> None:
    """Write a store to a file, which appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    columns = {name: column.numpy() for name, column in store.state_dict().items()}
    arguments = store.arguments
    header: dict[str, Any] = {
        "policy": [type(store.policy).__name__, asdict(store.policy)],
        "backup": [type(store.backup_rule).__name__, asdict(store.backup_rule)],
        **{k: arguments[k] for k in ("trees", "capacity", "edge_capacity", "seed")},
    }
    table, parts = [], []
    offset = 0
    for name, column in columns.items():
        data = column.astype(column.dtype.newbyteorder("<")).tobytes()
        table.append([name, column.dtype.str.lstrip("<=|"), offset, len(data), zlib.crc32(data)])
        parts.append(data)
        offset += -(-len(data) // _ALIGN) * _ALIGN
    header["columns"] = table
    text = json.dumps(header).encode()
    start = -(-(_PREFIX.size + len(text)) // _ALIGN) * _ALIGN
    with replacing(path) as file:
        file.write(_PREFIX.pack(MAGIC, VERSION, len(text)) + text)
        for (_, _, place, _, _), data in zip(table, parts, strict=True):
            file.seek(start + place)
            file.write(data)
        file.truncate(start + offset)


def load(path: str | os.PathLike[str]) -> TreeStore:
    """Read a store; a search goes on as it would have in the one that was saved.

    Raises:
        TreeFormatError: the file is foreign, newer, cut off or damaged; names what.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()

    def fail(what: str) -> TreeFormatError:
        return TreeFormatError(f"{os.fspath(path)}: {what}")

    if data[: len(MAGIC)] != MAGIC:
        raise fail(f"is not a file of search trees: it does not begin with {MAGIC.decode()}")
    if len(data) < _PREFIX.size:
        raise fail("is cut off in its first bytes")
    _, version, length = _PREFIX.unpack_from(data)
    if version > VERSION:
        raise fail(f"has version {version}, this release reads up to {VERSION}")
    start = -(-(_PREFIX.size + length) // _ALIGN) * _ALIGN
    try:
        header = json.loads(data[_PREFIX.size : _PREFIX.size + length])
        policy = _POLICIES[header["policy"][0]](**_tuples(header["policy"][1]))
        backup = _BACKUPS[header["backup"][0]](**header["backup"][1])
        store = TreeStore(
            header["trees"],
            policy,
            backup,
            capacity=header["capacity"],
            edge_capacity=header["edge_capacity"],
            seed=header["seed"],
        )
        table = [
            (str(n), np.dtype(f"<{d}"), int(o), int(b), int(c))
            for n, d, o, b, c in header["columns"]
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise fail(f"its header is damaged: {error}") from error
    state = {}
    for name, dtype, offset, size, crc in table:
        column = data[start + offset : start + offset + size]
        if len(column) != size or size % dtype.itemsize:
            raise fail(f"column {name} is cut off")
        if zlib.crc32(column) != crc:
            raise fail(f"column {name} is damaged")
        state[name] = torch.from_numpy(np.frombuffer(column, dtype).astype(dtype.newbyteorder("=")))
    try:
        store.load_state_dict(state)
    except TreeFormatError as error:
        raise fail(str(error)) from error
    return store


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
