"""Attention on a GPU against the CPU, and what a serving loop asks of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alignops.attention import _triton
from tests.attention import plans, workspace_runs
from tests.attention.plans import Shape
from tests.attention.samples import INVALID, VALID

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = "cuda:0"
OPS = ("attention_append_", "attention_concurrent_", "attention_rewrite_")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def to_gpu(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(GPU), values)


def op(name: str) -> Any:
    return getattr(torch.ops.alignops, name)


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of attention with scratch as a GPU wants it."""
    q, k, v, plan, *rest = args
    size = _triton.scratch_bytes(
        plan, torch.device(GPU), q.shape[2], q.shape[1], k.shape[1], v.shape[3], True
    )
    scratch = torch.full((size,), 255, dtype=torch.uint8, device=GPU)
    return (*to_gpu((q, k, v, plan, *rest[:-1])), scratch)


def assert_close(found: Any, expected: Any, exact: bool) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(a, Tensor) and a.dtype.is_floating_point:
            tolerance = 2e-5 if exact else 4e-3 if a.dtype == SINGLE else 2e-2
            torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_samples_equal_those_of_the_cpu(name: str) -> None:
    for args in VALID[name]():
        found = on_gpu(args) if name == "attention_concurrent_" else to_gpu(args)
        op(name)(*args)
        op(name)(*found)
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        exact = all(t.dtype not in (HALF, BRAIN) for t in tensors)
        if name == "attention_concurrent_":
            found, args = found[11:14], args[11:14]
        assert_close(found, args, exact)


class Call:
    """A step with its pool, and the arguments of the operator."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.step = plans.make(np.random.default_rng(seed), pairs=shape.pairs, **options)
        generator = torch.Generator().manual_seed(seed)
        q = plans.queries(self.step, shape, dtype, generator)
        k, v = plans.pool(self.step, shape, kv_dtype or dtype, generator, float("nan"))
        sinks = torch.randn(shape.heads, generator=generator) if shape.sinks else None
        rows, blocks = self.step.rows, self.step.tables["blocks"]
        out = [
            torch.full((rows, shape.heads, shape.dv), float("nan"), dtype=dtype),
            torch.full((rows, shape.heads), float("nan")),
            torch.full((rows, shape.heads, blocks), float("nan")),
        ]
        size = op("attention_scratch")(self.step.words, shape.heads, shape.kv_heads, shape.dv, True)
        self.args = (
            *(q, k, v, self.step.words, sinks, 0 if shape.rope else -1, shape.offset),
            *(shape.interleaved, shape.d**-0.5, shape.softcap, shape.window, *out),
            torch.zeros(size, dtype=torch.uint8),
        )

    def check(self) -> None:
        found = on_gpu(self.args)
        op("attention_concurrent_")(*self.args)
        op("attention_concurrent_")(*found)
        assert_close(found[11:14], self.args[11:14], self.dtype == SINGLE)


# D, Dv, pairs, first rotary column.
WIDTHS = [
    (32, 32, 16, 0),
    (64, 64, 32, 0),
    (80, 80, 16, 0),
    (96, 96, 48, 0),
    (112, 112, 56, 0),
    (128, 128, 64, 0),
    (160, 160, 80, 0),
    (192, 128, 32, 128),
    (256, 256, 64, 0),
    (576, 512, 32, 512),
    (5, 7, 2, 1),
]


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("dtypes", [(BRAIN, BRAIN), (HALF, HALF), (SINGLE, SINGLE)], ids=str)
def test_widths(width: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for seed in range(2):
        shape = Shape(2, 5, *width, interleaved=width[2] % 3 == 1)
        Call(shape, *dtypes, seed=seed, longest=3, length=150, workers=3).check()


def test_float32_queries_and_16_bit_caches() -> None:
    for seed, kv_dtype in enumerate((BRAIN, HALF)):
        Call(Shape(d=128, dv=128, pairs=64), SINGLE, kv_dtype, seed, length=400).check()


@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_long_caches(group: int, page_size: int) -> None:
    """Several parts; a tile and more of rows."""
    for seed, longest in enumerate((1, 30)):
        shape = Shape(2, group, 128, 128, 64, sinks=seed == 1)
        Call(
            *(shape, BRAIN), seed=seed, longest=longest, length=4000, workers=4, page_size=page_size
        ).check()


@pytest.mark.parametrize("raw", [True, False])
def test_options(raw: bool) -> None:
    shapes = [
        Shape(softcap=5.0, sinks=True),
        Shape(window=37, interleaved=True),
        Shape(rope=False),
        Shape(window=300, softcap=30.0),
    ]
    for seed, shape in enumerate(shapes):
        for dtype in (SINGLE, HALF):
            options = {"raw": raw, "weights": True, "longest": 20, "length": 500}
            Call(shape, dtype, seed=seed, workers=5, **options).check()


@pytest.mark.parametrize("rope_mode", ["raw", "local"])
@pytest.mark.parametrize("visibility", ["inclusive", "lagged"])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_workspaces(rope_mode: str, visibility: str, dtype: torch.dtype) -> None:
    found = workspace_runs.run(GPU, dtype, rope_mode, visibility)
    expected = workspace_runs.run("cpu", dtype, rope_mode, visibility)
    for results, wanted in zip(found, expected, strict=True):
        assert_close(results, wanted, dtype == SINGLE)


def long_call(seed: int = 0, dtype: torch.dtype = BRAIN, **options: Any) -> tuple[Any, ...]:
    options = {"length": 3000, "workers": 4, "blocks": 3} | options
    return on_gpu(Call(Shape(8, 5, 128, 128, 64), dtype, seed=seed, **options).args)


def test_results_are_the_same_each_time() -> None:
    args = long_call()
    op("attention_concurrent_")(*args)
    first = [t.clone() for t in args[11:14]]
    for _ in range(20):
        args[14].fill_(255)
        op("attention_concurrent_")(*args)
        for a, b in zip(first, args[11:14], strict=True):
            assert torch.equal(a, b)


def test_less_scratch_makes_fewer_parts() -> None:
    args = long_call()
    op("attention_concurrent_")(*args)
    expected = [t.clone() for t in args[11:14]]
    for share in (2, 7, 40):
        guard = torch.full((len(args[14]),), 7, dtype=torch.uint8, device=GPU)
        size = len(guard) // share
        op("attention_concurrent_")(*args[:14], guard[:size])
        assert guard[size:].eq(7).all()
        for a, b in zip(expected, args[11:14], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_nothing_is_allocated_and_the_host_does_not_wait() -> None:
    args = long_call()
    new = [torch.randn(len(args[0]), 8, 128, device=GPU).bfloat16() for _ in range(2)]
    runs = torch.tensor([[0, 32, 5, 0]], device=GPU)
    table = torch.ones(1, 64, 2, device=GPU)

    def step() -> None:
        op("attention_append_")(*new, args[3], 0, 0, False, args[1], args[2])
        op("attention_concurrent_")(*args)
        op("attention_rewrite_")([args[1]], [args[2]], runs, [table], [0], [0], [False])

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    used = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == used


def test_cuda_graph() -> None:
    """Captured with one plan, replayed with others: longer, with fewer rows, more segments."""
    calls = [
        Call(Shape(2, 3, 64, 64, 32), HALF, seed=seed, workers=3, length=length)
        for seed, length in ((0, 300), (1, 3000), (2, 20), (3, 900))
    ]
    rows = max(call.step.rows for call in calls)
    blocks = max(call.step.tables["blocks"] for call in calls)
    pages = max(call.step.pages for call in calls)
    plan = torch.zeros(max(len(call.step.words) for call in calls), dtype=torch.int64, device=GPU)
    q = torch.zeros(rows, 6, 64, dtype=HALF, device=GPU)
    k, v = (torch.zeros(pages, 2, 16, 64, dtype=HALF, device=GPU) for _ in range(2))
    out, lse = torch.empty_like(q), torch.empty(rows, 6, device=GPU)
    mass = torch.empty(rows, 6, blocks, device=GPU)
    longest = max(calls, key=lambda call: int(call.step.words[9]))
    size = _triton.scratch_bytes(longest.step.words, torch.device(GPU), 64, 6, 2, 64, True)
    scratch = torch.empty(2 * size, dtype=torch.uint8, device=GPU)

    def load(call: Call) -> None:
        plan[: len(call.step.words)].copy_(call.step.words)
        q[: call.step.rows].copy_(call.args[0])
        k[: call.step.pages].copy_(call.args[1])
        v[: call.step.pages].copy_(call.args[2])

    def attend() -> None:
        op("attention_concurrent_")(
            *(q, k, v, plan, None, 0, 0, False, 0.125, 0.0, 0, out, lse, mass, scratch)
        )

    load(calls[0])
    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for call in calls:
        load(call)
        graph.replay()
        op("attention_concurrent_")(*call.args)
        n, b = call.step.rows, call.step.tables["blocks"]
        assert_close((out[:n], lse[:n], mass[:n, :, :b]), call.args[11:14], False)
        assert out[n:].eq(0).all()
        assert lse[n:].eq(-torch.inf).all()
        assert mass[n:].eq(0).all()


def test_current_stream() -> None:
    args = long_call()
    op("attention_concurrent_")(*args)
    expected = args[11].clone()
    later = torch.zeros_like(args[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        later.copy_(args[0])
        op("attention_concurrent_")(later, *args[1:])
        later.zero_()
    torch.cuda.synchronize()
    assert torch.equal(args[11], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_rows_that_see_it(value: float) -> None:
    call = Call(Shape(2, 3, 64, 64, 32), HALF, seed=4, workers=3, longest=4)
    tables = call.step.tables
    row = tables["row_ptr"][1] - 1  # the last one of the first worker sees its own key
    page, slot = divmod(tables["rows"][row][2], call.step.page_size)
    for i in (1, 2):
        call.args[i][page, :, slot, 3] = value
    found = on_gpu(call.args)
    op("attention_concurrent_")(*call.args)
    op("attention_concurrent_")(*found)
    spoilt = call.args[11].isfinite().logical_not().any(-1)
    assert spoilt[row].all()
    assert torch.equal(found[11].cpu().isfinite().logical_not().any(-1), spoilt)
    torch.testing.assert_close(
        found[11].cpu()[~spoilt], call.args[11][~spoilt], rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    for args in VALID[name]():
        torch.library.opcheck(op(name).default, to_gpu(args))


@pytest.mark.parametrize("name", OPS)
def test_invalid_arguments(name: str) -> None:
    for sample in INVALID[name]():
        with pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            op(name)(*to_gpu(sample.args))


@pytest.mark.parametrize("name", OPS)
def test_mixed_devices_are_refused(name: str) -> None:
    args = next(iter(VALID[name]()))
    for i, value in enumerate(args):
        if i == 0 or not any(isinstance(t, Tensor) for t in pytree.tree_leaves(value)):
            continue
        mixed = [v if j == i else to_gpu(v) for j, v in enumerate(args)]
        with pytest.raises(ValueError, match=f"^{name}: .* must be on "):
            op(name)(*mixed)


def test_shapes_without_a_kernel() -> None:
    call = Call(Shape(1, 1, 640, 640, 4), HALF)
    with pytest.raises(NotImplementedError, match=r"attention_concurrent_: .* head_dim 640"):
        op("attention_concurrent_")(*to_gpu(call.args))
