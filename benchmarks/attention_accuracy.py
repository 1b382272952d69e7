"""Errors of the operator against float64, beside those of dense SDPA in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from alignops.attention import KVPool, Workspace
from alignops.attention.ops import append_kv, concurrent_attention
from benchmarks import attention_cases as cases
from benchmarks import attention_layouts as layouts
from benchmarks import attention_pools as pools
from benchmarks import shapes

if TYPE_CHECKING:
    from benchmarks.attention_report import AttentionReport

ERROR_BAR = 1.5
POSITIONS = (4096, 131072, 1 << 20)
LOGIT_BAR = 5e-7  # error of a scaled score, at any position
HEADS, HEAD_SIZE, DRAWS = 8, 128, 32


def section(report: AttentionReport) -> Iterator[str]:
    """Errors on the cases of the operator, then of single scores at distant positions."""
    torch.set_num_threads(report.threads[-1])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models = ("Qwen2.5-0.5B",) if report.quick else ("QwQ-32B", "Qwen2.5-0.5B")
    for model in models:
        for pattern in ("headers", "64 segments"):
            for dtype in dtypes:
                layout = layouts.make(pattern, 4096, 4)
                case = cases.make(shapes.ATTENTION[model], layout, dtype)
                yield f"{case}, error"
                expected = cases.oracle(case)
                found = {
                    "alignops": pools.ours(case)(0),
                    "dense": cases.dense_copies(case)(0),
                }
                norms = {n: cases.difference(out, expected) for n, out in found.items()}
                most = {n: float((out.double() - expected).abs().max()) for n, out in found.items()}
                report.bar(
                    "error against that of dense SDPA",
                    str(case),
                    norms["alignops"] / norms["dense"],
                    ERROR_BAR,
                    "x",
                    f"{norms['alignops']:.1e} by norm; largest {most['alignops']:.1e}, "
                    f"dense {most['dense']:.1e}",
                    at_most=True,
                )
    near = score_error(1)
    for distance in POSITIONS[-1:] if report.quick else POSITIONS:
        case = f"D={HEAD_SIZE}, float32, {distance} positions apart"
        yield case
        report.bar(
            "error of a scaled score", case, score_error(distance), LOGIT_BAR, "",
            f"{near:.1e} next to each other", at_most=True,
        )  # fmt: skip


def score_error(distance: int) -> float:
    """Largest error of single scaled scores between a query and a key `distance` before it.

    The key is the only one that the worker sees: what lies between is hidden, and so is its own
    block. So the logsumexp is the score.
    """
    pool = KVPool(
        1, 1, HEAD_SIZE, dtype=torch.float32, page_size=128,
        num_pages=distance // 128 + 8, rope=cases.rope(HEAD_SIZE),
    )  # fmt: skip
    workspace = Workspace(pool)
    key, between, own = (workspace.new_block() for _ in range(3))
    pools.write(workspace, key, 1)
    pools.write(workspace, between, distance - 1)
    worker = workspace.add_worker("A", [key, between, own])
    for block in (between, own):
        workspace.set_weight(worker, block, bias=float("-inf"))
    plan = workspace.plan([1])
    append_kv(pool, 0, plan, *torch.zeros(2, 1, 1, HEAD_SIZE))
    page = plan.decode()["page"][0]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(DRAWS):
        q = torch.randn(1, HEADS, HEAD_SIZE, generator=generator)
        k = torch.randn(HEAD_SIZE, generator=generator)
        pool.k[0][page, 0, 0] = k
        pool.v[0][page, 0, 0] = 0
        _, lse = concurrent_attention(q, pool, 0, plan, return_lse=True)
        turned = cases.rotate(q[0].double(), torch.tensor(distance))
        expected = turned @ k.double() / HEAD_SIZE**0.5
        worst = max(worst, float((lse[0].double() - expected).abs().max()))
    return worst
