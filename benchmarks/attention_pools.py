"""Cases of the attention benchmarks in a pool and a workspace, and our contestant."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from alignops.attention import Block, KVPool, Plan, Workspace
from alignops.attention.ops import append_kv, concurrent_attention
from benchmarks.attention_cases import Case, Contestant, rope
from benchmarks.attention_layouts import Layout
from benchmarks.shapes import AttentionShape

PAGE = 32
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Stage:
    """A workspace whose workers are about to make the step that is measured.

    Row w of the step is worker w's new token, the last key of its block.
    """

    pool: KVPool
    workspace: Workspace
    plan: Plan


def empty_pool(shape: AttentionShape, tokens: int, layers: int, dtype: torch.dtype) -> KVPool:
    """Room for `tokens` and 256 pages that are filled in part."""
    return KVPool(
        layers,
        shape.kv_heads,
        shape.head_size,
        dtype=dtype,
        page_size=PAGE,
        num_pages=-(-tokens // PAGE) + 256,
        rope=rope(shape.head_size),
    )


def arrange(pool: KVPool, layout: Layout, case: Case | None = None) -> Workspace:
    """A workspace with the blocks of a layout, spliced where they have several segments.

    Of a worker's own block the last key is left for the step. Keys and values are those of `case`,
    in every layer of the pool; without a case they are whatever the memory holds.
    """
    workspace = Workspace(pool)
    blocks = [workspace.new_block() for _ in layout.blocks]
    own = {view[-1] for view in layout.views}
    for index, start in enumerate(layout.block_starts()):
        for n in layout.blocks[index]:
            target = blocks[index] if len(layout.blocks[index]) == 1 else workspace.new_block()
            write(workspace, target, n - (index in own), start, case)
            if target is not blocks[index]:
                workspace.move(target, blocks[index], mode="splice")
            start += n
    for view in layout.views:
        workspace.add_worker(f"worker {len(workspace.workers)}", [blocks[b] for b in view])
    return workspace


def write(
    workspace: Workspace, block: Block, n: int, start: int = 0, case: Case | None = None
) -> None:
    """Appends n tokens to a block that no worker writes: those of `case` from `start` on."""
    for first in range(start, start + n, CHUNK):
        count = min(CHUNK, start + n - first)
        plan = workspace.plan([count], views=[[block]])
        if case is not None:
            rows = [t[:, first : first + count].transpose(0, 1) for t in (case.k, case.v)]
            _append(workspace.pool, plan, *rows)
        workspace.commit(plan)


def _append(pool: KVPool, plan: Plan, k: Tensor, v: Tensor) -> None:
    for layer in range(pool.num_layers):
        append_kv(pool, layer, plan, k, v)


def stage(case: Case) -> Stage:
    """Everything before the attention of a step, the new keys and values included."""
    pool = empty_pool(case.shape, case.layout.tokens, case.layers, case.dtype)
    workspace = arrange(pool, case.layout, case)
    plan = workspace.plan([1] * case.layout.workers)
    starts = case.layout.block_starts()
    new = [starts[view[-1]] + case.layout.blocks[view[-1]][-1] - 1 for view in case.layout.views]
    _append(pool, plan, *(t[:, new].transpose(0, 1) for t in (case.k, case.v)))
    return Stage(pool, workspace, plan)


def ours(case: Case) -> Contestant:
    """One call, which rotates the queries, too."""
    made = stage(case)
    out = torch.empty_like(case.q)

    def run(layer: int) -> Tensor:
        at = layer % made.pool.num_layers
        return concurrent_attention(case.q, made.pool, at, made.plan, out=out)  # type: ignore[no-any-return]

    return run
