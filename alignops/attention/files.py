"""Workspaces in files: keys and values as safetensors, layout as JSON in its header.

The file holds the pages that blocks use, in any order, each once; slots without a token are zero.
Its header names format and version and has a checksum of the layout and of every tensor. Files are
written under another name first, so that a file is either whole or not there.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alignops._checks import check, dtype_name
from alignops.attention.pool import KVPool
from alignops.attention.rope import RopeSpec

if TYPE_CHECKING:
    from alignops.attention.workspace import Workspace

FORMAT = "alignops.attention.workspace"
VERSION = 1


def _checksum(t: Tensor) -> int:
    return zlib.crc32(t.contiguous().view(torch.uint8).numpy().data)


def save(ws: Workspace, path: str | Path) -> None:
    """Write a workspace; see `Workspace.save`."""
    from safetensors.torch import save_file

    pool, native = ws.pool, ws.native
    blocks = [
        (block.name, native.length(block.id), *native.segments(block.id)) for block in ws.blocks
    ]
    pages = np.unique(np.concatenate([np.zeros(0, np.int64), *(entry for *_, entry in blocks)]))
    used = np.zeros((len(pages), pool.page_size), bool)
    for _, _, segments, entries in blocks:
        place = 0
        for n, first, *_ in segments.tolist():
            count = -(-(first + n) // pool.page_size)
            rows = np.searchsorted(pages, entries[place : place + count])
            slots = np.arange(first, first + n)
            used[rows[slots // pool.page_size], slots % pool.page_size] = True
            place += count
    tensors = {}
    at, mask = torch.from_numpy(pages), torch.from_numpy(used)
    for layer in range(pool.num_layers):
        for name, cache in (("k", pool.k[layer]), ("v", pool.v[layer])):
            t = cache[at.to(cache.device)].cpu()
            tensors[f"{name}.{layer}"] = t.masked_fill_(~mask[:, None, :, None], 0)
    layout = {
        "page_size": pool.page_size,
        "num_pages": pool.num_pages,
        "dtype": dtype_name(pool.dtype),
        "heads": pool.num_kv_heads,
        "head_dims": pool.head_dims,
        "v_head_dims": pool.v_head_dims,
        "rope_mode": ws.rope_mode,
        "specs": [
            [spec.inv_freq, spec.pairs, spec.offset, spec.attention_factor] for spec in pool.specs
        ],
        "layer_spec": pool.layer_spec,
        "blocks": [
            [name, length, segments.tolist(), np.searchsorted(pages, entries).tolist()]
            for name, length, segments, entries in blocks
        ],
        "tokens": np.where(used.ravel(), pool.native.slot_tokens(pages.tolist()), -1).tolist(),
        "filled": (used * np.arange(1, pool.page_size + 1)).max(axis=1).tolist(),
        "workers": [
            [ws.worker_name(w), native.view(w), native.weights(w)]
            for w in range(native.num_workers)
        ],
        "order": ws.workers,
        "checksums": {name: _checksum(t) for name, t in tensors.items()},
    }
    text = json.dumps(layout)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "layout": text,
        "checksum": str(zlib.crc32(text.encode())),
    }
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, draft, header)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | Path, pool: KVPool | None, kind: type[Workspace]) -> Workspace:
    """Read a workspace; see `Workspace.load`."""
    from safetensors import SafetensorError

    op = f"Workspace.load: {path}"
    try:
        layout, tensors = _read(path, op)
    except SafetensorError as error:
        raise ValueError(f"{op} must be a whole file of a workspace, got {error}") from None
    geometry = (layout["heads"], layout["head_dims"], layout["v_head_dims"])
    specs = tuple(
        RopeSpec(tuple(inv_freq), pairs, offset, factor)
        for inv_freq, pairs, offset, factor in layout["specs"]
    )
    dtype, layer_spec = getattr(torch, layout["dtype"]), tuple(layout["layer_spec"])
    if pool is None:
        pool = KVPool(
            len(layer_spec),
            *geometry,
            dtype=dtype,
            page_size=layout["page_size"],
            num_pages=layout["num_pages"],
            rope=(specs, layer_spec),
        )
    ours = [pool.page_size, dtype_name(pool.dtype), *map(list, _geometry(pool)), pool.layer_spec]
    theirs = [layout["page_size"], layout["dtype"], *geometry, layer_spec]
    check(ours == theirs, f"{op} must fit the pool, {ours}, got {theirs}")
    check(
        pool.specs == specs, f"{op} must have the rope types of the pool, {pool.specs}, got {specs}"
    )

    ws = kind(pool, rope_mode=layout["rope_mode"])
    names, lengths, segments, entries = (
        zip(*layout["blocks"], strict=True) if layout["blocks"] else [()] * 4
    )
    pages = ws.native.restore(
        list(names),
        list(lengths),
        [np.array(rows, np.int64).reshape(-1, 5) for rows in segments],
        list(entries),
        layout["tokens"],
        layout["filled"],
    )
    at = torch.from_numpy(pages).to(pool.device)
    for layer in range(pool.num_layers):
        pool.k[layer][at] = tensors[f"k.{layer}"].to(pool.device)
        pool.v[layer][at] = tensors[f"v.{layer}"].to(pool.device)
    pool.used()
    ws._adopt(names)
    for id, (name, view, weights) in enumerate(layout["workers"]):
        order = layout["order"]
        index = sum(w < id for w in order[: order.index(id)]) if id in order else None
        ws.native.add_worker(name, view, index)
        for block, bias, gain in weights:
            ws.native.set_weight(id, block, bias, gain)
        if id not in order:
            ws.native.retire_worker(id)
    return ws


def _geometry(pool: KVPool) -> tuple[tuple[int, ...], ...]:
    return pool.num_kv_heads, pool.head_dims, pool.v_head_dims


def _read(path: str | Path, op: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        check(
            header.get("format") == FORMAT,
            f"{op} must be a file of {FORMAT}, got format {header.get('format')!r}",
        )
        check(
            header.get("version") == str(VERSION),
            f"{op} must have version {VERSION}, got {header.get('version')}",
        )
        text = header.get("layout", "")
        check(
            header.get("checksum") == str(zlib.crc32(text.encode())),
            f"{op} must have the layout that was written, got another checksum",
        )
        layout = json.loads(text)
        pages = len(layout["filled"])
        tensors = {}
        dims = {"k": layout["head_dims"], "v": layout["v_head_dims"]}
        for layer, heads in enumerate(layout["heads"]):
            for kind, sizes in dims.items():
                name, shape = f"{kind}.{layer}", (pages, heads, layout["page_size"], sizes[layer])
                check(name in file.keys(), f"{op} must have a tensor {name}, got none")  # noqa: SIM118
                t = tensors[name] = file.get_tensor(name)
                check(
                    tuple(t.shape) == shape and dtype_name(t.dtype) == layout["dtype"],
                    f"{op} must have {name} of shape {shape}, got {tuple(t.shape)}",
                )
                check(
                    _checksum(t) == layout["checksums"][name],
                    f"{op} must have the tensor {name} that was written, got another checksum",
                )
    return layout, tensors
