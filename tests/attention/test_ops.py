"""The public functions over a workspace: forms of arguments, results that are asked for, errors."""

import pytest
import torch

from alignops.attention import (
    KVPool,
    RopeSpec,
    StalePlan,
    StepError,
    Workspace,
    append_kv,
    concurrent_attention,
)


def workspace() -> Workspace:
    pool = KVPool(
        2, 2, 16, dtype=torch.float32, num_pages=16, page_size=16, rope=RopeSpec.default(16)
    )
    ws = Workspace(pool)
    common = ws.new_block()
    for _ in range(2):
        ws.add_worker(f"worker {ws.workers}", [common, ws.new_block()])
    return ws


def new(ws: Workspace, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16)


def batch(x: torch.Tensor, counts: tuple[int, ...], longest: int, fill: float) -> torch.Tensor:
    """(W, H, T, ...) with valid rows at the end, built row by row."""
    out = torch.full((len(counts), x.shape[1], longest, *x.shape[2:]), fill)
    rows = iter(x)
    for w, count in enumerate(counts):
        for t in range(longest - count, longest):
            out[w, :, t] = next(rows)
    return out


@pytest.mark.parametrize("counts", [(3, 1), (1, 1), (0, 2), (2, 2)], ids=str)
def test_batches_and_packed_rows_agree(counts: tuple[int, int]) -> None:
    ws = workspace()
    plan = ws.plan(counts)
    q, k, v = new(ws, sum(counts))
    longest = max(counts) + 1
    append_kv(ws.pool, 0, plan, k, v)
    both = {"return_lse": True, "return_mass": True}
    packed = concurrent_attention(q, ws.pool, 0, plan, **both)
    append_kv(ws.pool, 1, plan, *(batch(x, counts, longest, torch.nan) for x in (k, v)))
    wide = concurrent_attention(batch(q, counts, longest, torch.nan), ws.pool, 1, plan, **both)
    for found, rows, fill in zip(wide, packed, (0.0, -torch.inf, 0.0), strict=True):
        assert torch.equal(found, batch(rows, counts, longest, fill))
    out = torch.empty(sum(counts), 6, 16)
    assert concurrent_attention(q, ws.pool, 0, plan, out=out) is out
    assert torch.equal(out, packed[0])
    ws.commit(plan)


def test_errors() -> None:
    ws = workspace()
    plan = ws.plan((1, 1))
    q, k, v = new(ws, 2)
    with pytest.raises(StepError):
        concurrent_attention(q, ws.pool, 0, plan)
    with pytest.raises(NotImplementedError, match=r"alignops\.reference\.attention"):
        append_kv(ws.pool, 0, plan, k.requires_grad_(), v)
    append_kv(ws.pool, 0, plan, k.detach(), v)
    with pytest.raises(NotImplementedError, match=r"concurrent_attention: q must not require"):
        concurrent_attention(q.clone().requires_grad_(), ws.pool, 0, plan)
    with pytest.raises(ValueError, match="q must have a multiple of 2 heads"):
        concurrent_attention(q[:, :5], ws.pool, 0, plan)
    with pytest.raises(ValueError, match="k must be float16"):
        concurrent_attention(q.half(), ws.pool, 0, plan)
    with pytest.raises(StepError):
        append_kv(ws.pool, 0, plan, k.detach(), v)
    append_kv(ws.pool, 1, plan, k.detach(), v)
    ws.commit(plan)
    with pytest.raises(StalePlan):
        concurrent_attention(q, ws.pool, 0, plan)
