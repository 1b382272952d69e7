"""A few steps of three workers in a workspace, with moves and forks, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignops.attention import RopeSpec
from alignops.attention.ops import append_kv, concurrent_attention
from alignops.attention.pool import KVPool
from alignops.attention.workspace import Workspace

LAYERS, HEADS, KV_HEADS = 2, 6, 2


def make_pool(device: str, dtype: torch.dtype) -> KVPool:
    """Two layers of different widths; one has rotary positions."""
    spec = RopeSpec.default(16, pairs="interleaved", offset=8)
    return KVPool(
        *(LAYERS, KV_HEADS, (32, 24), (16, 40)),
        **{"dtype": dtype, "device": device, "page_size": 16, "num_pages": 120},
        rope=([spec], [0, None]),
    )


def run(
    device: str, dtype: torch.dtype, rope_mode: str, visibility: str, seed: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """(out, lse, mass) of each layer and step."""
    generator = torch.Generator().manual_seed(seed)
    pool = make_pool(device, dtype)
    ws = Workspace(pool, rope_mode=rope_mode)
    common, header = ws.new_block("common"), ws.new_block("header")
    own = [ws.new_block(f"own {w}") for w in range(3)]
    for w in range(3):
        others = [b for i, b in enumerate(own) if i != w]
        ws.add_worker(f"worker {w}", [common, header, *others, own[w]])
    ws.set_weight(1, common, bias=0.25, gain=0.5)
    ws.set_weight(2, header, bias=float("-inf"))

    def new(rows: int, heads: int, size: int) -> Tensor:
        return torch.randn(rows, heads, size, generator=generator).to(dtype).to(device)

    def step(counts: list[int], **options: object) -> Iterator[tuple[Tensor, ...]]:
        plan = ws.plan(counts, **options)
        for layer in range(LAYERS):
            d, dv = pool.head_dims[layer], pool.v_head_dims[layer]
            append_kv(
                *(pool, layer, plan, new(plan.rows, KV_HEADS, d), new(plan.rows, KV_HEADS, dv))
            )
            results = concurrent_attention(
                *(new(plan.rows, HEADS, d), pool, layer, plan),
                **{"return_lse": True, "return_mass": True, "window": 70 if layer else None},
            )
            assert isinstance(results, tuple)
            yield results
        ws.commit(plan)

    yield from step([37], views=[[common]])
    yield from step([5], views=[[common, header]])
    for i in range(4):
        yield from step([(i + w) % 4 for w in range(3)], visibility=visibility)
        if i in (1, 2):
            ws.move(own[i], common, mode="splice" if i == 1 else "rewrite")
    ws.evict(common, 10, 21)
    copy = ws.fork_block(common)
    yield from step([3], views=[[header, copy]])
    yield from step([1, 1, 1], visibility=visibility)
