"""Tile sizes of the Triton kernels: from a table per device, otherwise by a rule.

A table is JSON, one entry per operator and shape: "<op>/<dtype>/m<tokens>/n<N>/k<K>": {"BM": ...,
"BN": ..., "BK": ..., "num_warps": ..., "num_stages": ...}, tokens rounded up to a power of two.
Tables of this package are configs/<device>.json. ALIGNOPS_AUTOTUNE=1 searches missing entries at
run time and keeps them in ALIGNOPS_CACHE_DIR (default ~/.cache/alignops); these win.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Config = dict[str, int]
Table = dict[str, Config]


def _config(bm: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


CANDIDATES = [
    _config(16, 64, 64, 4, 4),
    _config(16, 128, 128, 4, 3),
    _config(32, 64, 64, 4, 4),
    _config(32, 128, 128, 4, 3),
    _config(64, 64, 64, 4, 3),
    _config(64, 128, 64, 4, 3),
    _config(128, 64, 64, 4, 3),
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 128, 8, 2),
    _config(256, 64, 64, 8, 3),
    _config(256, 128, 64, 8, 3),
]


def rule(m: int, element_bytes: int) -> Config:
    """Tile sizes that fit any supported GPU."""
    bk = {1: 128, 2: 64, 4: 32}[element_bytes]
    if m <= 32:
        return _config(16 if m <= 16 else 32, 64, bk, 4, 3)
    if m <= 64 or element_bytes == 4:  # float32 tokens become three operands: larger tiles spill
        return _config(64, 64, bk, 4, 3)
    return _config(128, 128, bk, 8, 3)


@functools.cache
def device_name(index: int) -> str:
    """File name of a GPU's table: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


def cache_dir() -> Path:
    """Where found tile sizes are kept."""
    return Path(os.environ.get("ALIGNOPS_CACHE_DIR") or Path.home() / ".cache" / "alignops")


def _read(path: Path) -> Table:
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _table(device: str) -> Table:
    """Mutable: `config` adds what it finds."""
    shipped = Path(__file__).with_name("configs") / f"{device}.json"
    return {**_read(shipped), **_read(cache_dir() / f"{device}.json")}


def _search(m: int, launch: Callable[[Config], None]) -> Config:
    """The fastest candidate whose tiles are not mostly padding."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: list[tuple[float, int]] = []
    for i, candidate in enumerate(CANDIDATES):
        if candidate["BM"] >= 2 * max(m, 16):
            continue
        try:
            run = functools.partial(launch, candidate)
            times.append((do_bench(run, warmup=5, rep=25, return_mode="median"), i))
        except OutOfResources:  # too much shared memory for this GPU
            continue
    return CANDIDATES[min(times)[1]]


def _store(device: str, key: str, found: Config) -> None:
    path = cache_dir() / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**_read(path), key: found}, indent=1, sort_keys=True))
    part.replace(path)


def config(op: str, x: Tensor, n: int, launch: Callable[[Config], None]) -> Config:
    """Tile sizes for tokens x (m, k) and n rows; `launch` runs the kernel, for the search."""
    m, k = x.shape
    if not x.is_cuda:  # interpreted: small tiles
        return _config(16, 32, 32, 4, 1)
    dtype = str(x.dtype).removeprefix("torch.")
    key = f"{op}/{dtype}/m{1 << (m - 1).bit_length()}/n{n}/k{k}"
    device = device_name(x.device.index)
    table = _table(device)
    if key not in table:
        if os.environ.get("ALIGNOPS_AUTOTUNE") != "1":
            return rule(m, x.element_size())
        table[key] = _search(m, launch)
        _store(device, key, table[key])
    return table[key]
