"""The attention kernels compiled ahead, see tests.triton_ahead; run as a program."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from alignops.triton_kernels import attention
from tests import triton_ahead

# dtypes of q, of keys and values; D, Dv; Hq, Hkv; rows; what else changes the code.
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SHAPES: list[tuple[torch.dtype, torch.dtype, int, int, int, int, int, dict[str, Any]]] = [
    (BRAIN, BRAIN, 128, 128, 40, 8, 2, {"mass": True}),
    (BRAIN, BRAIN, 128, 128, 40, 8, 64, {"window": 4096}),
    (HALF, HALF, 80, 80, 32, 32, 3, {"softcap": 30.0, "interleaved": True}),
    (BRAIN, BRAIN, 256, 256, 16, 8, 16, {"rope": -1, "sinks": True}),
    (BRAIN, BRAIN, 576, 512, 16, 1, 4, {"interleaved": True, "offset": 512}),
    (SINGLE, BRAIN, 128, 128, 40, 8, 4, {}),
]


def look(arguments: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """What it was compiled for, how it multiplies and copies."""
    ptx = compiled.asm["ptx"]
    return {
        "d": arguments.get("D"),
        "rows": arguments.get("BM"),
        "q": str(arguments["q"].dtype) if "q" in arguments else None,
        "shared": compiled.metadata.shared,
        "tensor_cores": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        "async_copies": ptx.count("cp.async"),
    }


def launch_all() -> None:
    """Every launcher, for every shape."""
    plan = torch.zeros(64, dtype=torch.int64)
    for q_dtype, dtype, d, dv, hq, hkv, rows, options in SHAPES:
        q, out = (torch.zeros(rows, hq, n, dtype=q_dtype) for n in (d, dv))
        k, v = (torch.zeros(2, hkv, 32, n, dtype=dtype) for n in (d, dv))
        rope, offset = options.get("rope", 0), options.get("offset", 0)
        rotary = (rope, offset, options.get("interleaved", False))
        mass = torch.zeros(rows, hq, 9) if "mass" in options else None
        shape = attention.Shape(rows, hq, hkv, d, dv, q.element_size(), 9)
        attention.attend(
            *(q, k, v, plan, torch.zeros(hq) if "sinks" in options else None, *rotary),
            *(d**-0.5, options.get("softcap", 0.0), options.get("window", 0)),
            *(out, torch.zeros(rows, hq), mass),
            torch.zeros(shape.scratch_bytes(2), dtype=torch.uint8),
            parts=2,
        )
        new = (torch.zeros(rows, hkv, n, dtype=q_dtype) for n in (d, dv))
        attention.append(*new, plan, *rotary, k, v)
    for d, dv, dtype in ((128, 128, BRAIN), (576, 512, HALF), (80, 80, SINGLE)):
        k, v = ([torch.zeros(2, 4, 32, n, dtype=dtype)] * 18 for n in (d, dv))
        table = torch.zeros(3, d // 2, 2)
        runs = torch.zeros(5, 4, dtype=torch.int64)
        attention.rewrite(k, v, runs, [table], [0] * 9 + [-1] * 9, [0] * 18, [False] * 18)


if __name__ == "__main__":
    with triton_ahead.recorded([attention], look) as found:
        launch_all()
    json.dump(found, sys.stdout)
