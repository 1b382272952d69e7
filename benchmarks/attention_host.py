"""What the host does in a step of several workers: the plan, new keys and values, moves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from alignops.attention import Workspace
from alignops.attention.ops import append_kv, concurrent_attention
from benchmarks import attention_layouts as layouts
from benchmarks import attention_pools as pools
from benchmarks import memory, shapes
from benchmarks.attention_cases import rope
from benchmarks.timing import Runner

if TYPE_CHECKING:
    from benchmarks.attention_report import AttentionReport

SHAPE = shapes.ATTENTION["QwQ-32B"]
WORKERS = 4
STEP_TOKENS = 150
PLAN_BAR_MS, MOVE_BAR_US = 0.2, 50.0
LONG, SHORT = 16384, 1024  # keys that are planned for; keys that are stored in 64 layers


def section(report: AttentionReport) -> Iterator[str]:
    """Plans, steps without allocations, appends, moves."""
    torch.set_num_threads(report.threads[-1])
    yield from _plans(report)
    yield from _steps(report)
    yield from _appends(report)
    yield from _moves(report)


def _arranged(pattern: str, tokens: int, layers: int) -> Workspace:
    """Blocks without keys: plans and moves do not look at them."""
    layout = layouts.make(pattern, tokens, WORKERS)
    return pools.arrange(pools.empty_pool(SHAPE, tokens, layers, torch.bfloat16), layout)


def _each(prepare: Callable[[], None], run: Callable[[], None], times: int) -> float:
    """Median seconds of `run`, each time after `prepare`."""
    found = []
    for _ in range(times):
        prepare()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _growth(run: Callable[[], None], few: int, many: int) -> float:
    """Bytes by which the process grows with each call, between `few` and `many` of them.

    The first ones touch what was given back to the system before. The least of three measurements:
    the interpreter takes a page now and then.
    """

    def growth(times: int) -> int:
        def calls() -> None:
            for _ in range(times):
                run()

        return memory.peak_growth(calls)

    found = [growth(many) - growth(few) for _ in range(3)]
    return max(0, min(found)) / (many - few)


def _plans(report: AttentionReport) -> Iterator[str]:
    for pattern in ("headers", "64 segments"):
        case = f"{SHAPE.name}, {SHAPE.layers} layers, S={LONG // 1024}k, {pattern}, W={WORKERS}"
        yield f"{case}, plan"
        _plan(report, case, _arranged(pattern, LONG, SHAPE.layers))


def _plan(report: AttentionReport, case: str, workspace: Workspace) -> None:
    held = [workspace.plan([1] * WORKERS)]

    def abort() -> None:
        workspace.abort(held.pop())

    def plan() -> None:
        held.append(workspace.plan([1] * WORKERS))

    _each(abort, plan, 20)
    seconds = _each(abort, plan, 200)
    report.bar(
        "plan of a step", case, 1e3 * seconds, PLAN_BAR_MS, "ms",
        f"{held[0].data.nbytes} bytes", at_most=True,
    )  # fmt: skip

    def both() -> None:
        abort()
        plan()

    growth = _growth(both, 100, 1000)
    report.bar("memory that a further plan takes", case, growth, 0.0, "B", at_most=True)


def _steps(report: AttentionReport) -> Iterator[str]:
    """The core's part of a whole step, everything but the model."""
    case = f"{SHAPE.name}, {SHAPE.layers} layers, S={SHORT // 1024}k, headers, W={WORKERS}"
    yield f"{case}, step"
    workspace = _arranged("headers", SHORT, SHAPE.layers)
    pool = workspace.pool
    q, k, v = _new_rows()
    out = torch.empty_like(q)

    def step() -> None:
        plan = workspace.plan([1] * WORKERS)
        for layer in range(SHAPE.layers):
            append_kv(pool, layer, plan, k, v)
            concurrent_attention(q, pool, layer, plan, out=out)
        workspace.abort(plan)

    for t in (*pool.k, *pool.v):
        t.zero_()  # memory that is first touched in a step would count
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    tensors = sum(max(event.self_cpu_memory_usage, 0) for event in found.events())
    report.bar("memory of tensors allocated by a step", case, tensors, 0.0, "B", at_most=True)
    report.bar(
        "memory that a further step takes", case, _growth(step, 4, 20), 0.0, "B", at_most=True
    )


def _new_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one new token per worker."""
    generator = torch.Generator().manual_seed(0)
    heads = (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)
    size = SHAPE.head_size
    q, k, v = (torch.randn(WORKERS, h, size, generator=generator).bfloat16() for h in heads)
    return q, k, v


def _appends(report: AttentionReport) -> Iterator[str]:
    """New keys rotated and written, one call per layer, against the same in torch's indexing."""
    case = f"{SHAPE.name}, {SHAPE.layers} layers, W={WORKERS}, append to a layer"
    yield case
    workspace = _arranged("headers", SHORT, SHAPE.layers)
    pool = workspace.pool
    _, k, v = _new_rows()
    index = torch.arange(WORKERS)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (*pool.k, *pool.v)]  # (slots, Hkv, D)
    table = rope(SHAPE.head_size).rotations(index)[:, None]
    cos, sin = table[..., 0], table[..., 1]
    half = SHAPE.head_size // 2

    def ours() -> None:
        plan = workspace.plan([1] * WORKERS)
        for layer in range(SHAPE.layers):
            append_kv(pool, layer, plan, k, v)
        workspace.abort(plan)

    def indexing() -> None:
        for layer in range(SHAPE.layers):
            a, b = k[..., :half].float(), k[..., half:].float()
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16()
            flat[layer].index_copy_(0, index, turned)
            flat[SHAPE.layers + layer].index_copy_(0, index, v)

    runners = [
        Runner("alignops, with the plan", ours, SHAPE.layers),
        Runner("torch, rotation and index_copy_", indexing, SHAPE.layers),
    ]
    seconds = report.time(case, runners, report.threads[-1])
    mine, theirs = seconds.values()
    report.bar("append against torch", case, theirs / mine, None, "x")


def _moves(report: AttentionReport) -> Iterator[str]:
    """A finished step goes to the end of the history."""
    case = f"{SHAPE.name}, {SHAPE.layers} layers, {STEP_TOKENS} tokens"
    yield f"{case}, splice"
    seconds = _move(report, case, "splice", 8 if report.quick else 50)
    report.bar("splice of a finished step", case, 1e6 * seconds, MOVE_BAR_US, "us", at_most=True)
    report.bar("splices per second", case, 1 / seconds, None, "")
    yield f"{case}, rewrite"
    rewrite = _move(report, case, "rewrite", 8)
    report.bar("splice against rewrite", case, rewrite / seconds, None, "x")


def _move(report: AttentionReport, case: str, mode: str, times: int) -> float:
    """Median seconds of moves, each of a new step; pages that changed are counted of the first."""
    room = (times + 2) * (STEP_TOKENS + pools.PAGE)
    workspace = Workspace(pools.empty_pool(SHAPE, room, SHAPE.layers, torch.bfloat16))
    pool = workspace.pool
    history, own = workspace.new_block(), workspace.new_block()
    worker = workspace.add_worker("A", [history, own])

    def write() -> None:
        workspace.commit(workspace.plan([STEP_TOKENS], workers=[worker]))

    def move() -> None:
        workspace.move(own, history, mode=mode)

    write()
    before = own.segments["first"]
    move()
    if mode == "splice":
        stayed = bool((history.segments["first"] == before).all())
        moved = 0 if stayed else STEP_TOKENS * pool.token_bytes
        report.bar("bytes moved by a splice", case, moved, 0.0, "B", at_most=True)
    return _each(write, move, times)
