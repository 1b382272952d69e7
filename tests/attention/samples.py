"""Valid and invalid inputs of every operator of the core.

A valid sample is a tuple of arguments of `torch.ops.alignops.<op>`; an invalid one also names the
argument that the error message must name. What is wrong with it shows in shapes and dtypes; plans
that are damaged are in test_plan_view.py, since fake kernels do not read them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import alignops.attention.ops as _fakes  # noqa: F401
from tests.attention import plans
from tests.spans.samples import Invalid

SHAPE = plans.Shape(d=20, dv=24, pairs=6, offset=2)


def step(seed: int = 0, **options: Any) -> plans.Step:
    rng = np.random.default_rng(seed)
    return plans.make(rng, pairs=SHAPE.pairs, length=20, **options)


def pool(at: plans.Step, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return plans.pool(at, SHAPE, dtype, torch.Generator().manual_seed(1))


def _concurrent(
    seed: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    extras: bool = True,
    rope: int = 0,
    **options: Any,
) -> tuple[Any, ...]:
    at = step(seed, **options)
    k, v = pool(at, dtypes[1])
    q = plans.queries(at, SHAPE, dtypes[0], torch.Generator().manual_seed(2))
    rows, heads = q.shape[:2]
    size = torch.ops.alignops.attention_scratch(at.words, heads, k.shape[1], 24, extras)
    return (
        q,
        k,
        v,
        at.words,
        torch.randn(heads) if extras else None,
        rope,
        SHAPE.offset,
        False,
        0.3,
        4.0 if extras else 0.0,
        9 if extras else 0,
        q.new_empty(rows, heads, 24),
        torch.empty(rows, heads) if extras else None,
        torch.empty(rows, heads, at.tables["blocks"]) if extras else None,
        torch.zeros(size, dtype=torch.uint8),
    )


def _attends() -> Iterator[tuple[Any, ...]]:
    yield _concurrent()
    yield _concurrent(1, (torch.float32, torch.bfloat16), False, longest=3)
    yield _concurrent(2, (torch.float16, torch.float16), True, -1, workers=3)
    args = _concurrent(3)
    strided = torch.randn(args[0].shape[1], args[0].shape[0], 40)[..., :20].transpose(0, 1)
    yield (strided, *args[1:])


def _replace(args: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def _bad_pool(args: tuple[Any, ...], k: int, v: int) -> Iterator[Invalid]:
    keys, values = args[k], args[v]
    yield Invalid("k of int32", _replace(args, k, keys.int()), "k")
    yield Invalid("k with 3 dimensions", _replace(args, k, keys[0]), "k")
    yield Invalid("k with strides", _replace(args, k, keys.transpose(2, 3)), "k")
    yield Invalid("v of another dtype", _replace(args, v, values.bfloat16()), "v")
    yield Invalid("v with fewer pages", _replace(args, v, values[:-1]), "v")
    yield Invalid(
        "k without heads", _replace(_replace(args, k, keys[:, :0]), v, values[:, :0]), "k"
    )


def _bad_plan(args: tuple[Any, ...], place: int) -> Iterator[Invalid]:
    plan = args[place]
    yield Invalid("plan of int32", _replace(args, place, plan.int()), "plan")
    yield Invalid("plan as matrix", _replace(args, place, plan[None]), "plan")
    yield Invalid("plan with strides", _replace(args, place, plan.repeat(2)[::2]), "plan")


def _bad_attends() -> Iterator[Invalid]:
    args = _concurrent()
    q = args[0]
    yield Invalid("q of float64", _replace(args, 0, q.double()), "q")
    yield Invalid("q as matrix", _replace(args, 0, q[0]), "q")
    yield Invalid("q with strides", _replace(args, 0, q.repeat(1, 1, 2)[..., ::2]), "q")
    yield Invalid("q with fewer columns", _replace(args, 0, q[..., :16]), "q")
    yield Invalid("heads that do not divide", _replace(args, 0, q[:, :5]), "q")
    yield from _bad_pool(args, 1, 2)
    half = _concurrent(0, (torch.float16, torch.float16))
    yield Invalid("k wider than q", (half[0], *args[1:]), "k")
    yield from _bad_plan(args, 3)
    yield Invalid("sinks of float16", _replace(args, 4, args[4].half()), "sinks")
    yield Invalid("short sinks", _replace(args, 4, args[4][:3]), "sinks")
    yield Invalid("rope of -2", _replace(args, 5, -2), "rope")
    yield Invalid("rotary_offset below 0", _replace(args, 6, -1), "rotary_offset")
    yield Invalid("softcap below 0", _replace(args, 9, -1.0), "softcap")
    yield Invalid("window below 0", _replace(args, 10, -1), "window")
    yield Invalid("out of another dtype", _replace(args, 11, args[11].half()), "out")
    yield Invalid("out without a row", _replace(args, 11, args[11][1:]), "out")
    yield Invalid("lse of float16", _replace(args, 12, args[12].half()), "lse")
    yield Invalid("mass as matrix", _replace(args, 13, args[13][0]), "mass")
    yield Invalid("scratch of int8", _replace(args, 14, args[14].view(torch.int8)), "scratch")


def _scratch() -> Iterator[tuple[Any, ...]]:
    yield step().words, 6, 2, 24, True
    yield step(1, longest=5).words, 14, 2, 64, False


def _bad_scratch() -> Iterator[Invalid]:
    args = (step().words, 6, 2, 24, True)
    yield from _bad_plan(args, 0)
    yield Invalid("heads that do not divide", _replace(args, 1, 7), "q_heads")
    yield Invalid("no heads", _replace(args, 2, 0), "q_heads")
    yield Invalid("no columns", _replace(args, 3, 0), "v_head_dim")


def _appended(dtype: torch.dtype = torch.float32, rope: int = 0, **options: Any) -> tuple[Any, ...]:
    at = step(5, **options)
    k, v = pool(at, dtype)
    k_new, v_new = (torch.randn(at.rows, 2, t.shape[3]) for t in (k, v))
    return k_new, v_new.to(dtype), at.words, rope, SHAPE.offset, True, k, v


def _appends() -> Iterator[tuple[Any, ...]]:
    yield _appended()
    yield _appended(torch.bfloat16, longest=4)
    yield _appended(torch.float16, -1, workers=4, raw=False)


def _bad_appends() -> Iterator[Invalid]:
    args = _appended()
    yield from _bad_pool(args, 6, 7)
    yield from _bad_plan(args, 2)
    k_new, k = args[0], args[6]
    yield Invalid("k_new of float64", _replace(args, 0, k_new.double()), "k_new")
    yield Invalid("k_new of float16", _replace(args, 0, k_new.half()), "k_new")
    yield Invalid("k_new as matrix", _replace(args, 0, k_new[0]), "k_new")
    yield Invalid("v_new with fewer columns", _replace(args, 1, args[1][..., :8]), "v_new")
    yield Invalid("v_new of another head", _replace(args, 1, args[1][:, :1]), "v_new")
    yield Invalid("rope of -2", _replace(args, 3, -2), "rope")
    yield Invalid("rotary_offset below 0", _replace(args, 4, -1), "rotary_offset")
    yield Invalid("k expanded", _replace(args, 6, k[:1].expand_as(k)), "k")


def _rewritten(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    at = step(7)
    layers = [pool(at, dtype), pool(at, dtype)]
    angles = torch.randn(3, 6)
    rotations = torch.stack([angles.cos(), angles.sin()], -1)
    runs = torch.tensor([[3, 33, 9, 1], [0, 44, 2, -1], [16 + 4, 64, 12, 2]])
    return (
        [k for k, _ in layers],
        [v for _, v in layers],
        runs,
        [rotations],
        [0, -1],
        [2, 0],
        [True, False],
    )


def _rewrites() -> Iterator[tuple[Any, ...]]:
    yield _rewritten()
    yield _rewritten(torch.bfloat16)
    args = _rewritten()
    yield _replace(args, 2, args[2][:0])
    yield [], [], args[2][:0], [], [], [], []


def _bad_rewrites() -> Iterator[Invalid]:
    args = _rewritten()
    k, v, runs, rotations = args[:4]
    yield Invalid("v missing", _replace(args, 1, v[1:]), "v")
    for place, name in ((4, "rope"), (5, "rotary_offset"), (6, "interleaved")):
        yield Invalid(f"{name} of one layer", _replace(args, place, args[place][1:]), name)
    yield Invalid("runs of int32", _replace(args, 2, runs.int()), "runs")
    yield Invalid("runs with 3 columns", _replace(args, 2, runs[:, :3].contiguous()), "runs")
    yield Invalid("runs with strides", _replace(args, 2, runs.t().contiguous().t()), "runs")
    yield Invalid("rotations of float64", _replace(args, 3, [rotations[0].double()]), "rotations")
    yield Invalid("rotations as matrix", _replace(args, 3, [rotations[0][0]]), "rotations")
    yield Invalid("k of int32", _replace(args, 0, [t.int() for t in k]), "k")
    yield Invalid("k expanded", _replace(args, 0, [t[:1].expand_as(t) for t in k]), "k")
    yield Invalid("layers of two sizes", (*([t[0], t[1][1:]] for t in (k, v)), *args[2:]), "k")
    yield Invalid("rope of 1", _replace(args, 4, [1, -1]), "rope")
    yield Invalid("rotary_offset of 9", _replace(args, 5, [9, 0]), "rotary_offset")


def _rotations() -> Iterator[tuple[Any, ...]]:
    omega = 100.0 ** -torch.linspace(0, 1, 5)
    yield omega, torch.tensor([0, 1, -7, 1 << 20])
    yield omega, torch.arange(6).view(2, 3).t()
    yield omega[:0], torch.tensor(3)


def _bad_rotations() -> Iterator[Invalid]:
    args = (torch.ones(4), torch.arange(3))
    yield Invalid("inv_freq of float64", (args[0].double(), args[1]), "inv_freq")
    yield Invalid("inv_freq as matrix", (args[0][None], args[1]), "inv_freq")
    yield Invalid("positions of int32", (args[0], args[1].int()), "positions")


VALID: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "attention_concurrent_": _attends,
    "attention_scratch": _scratch,
    "attention_append_": _appends,
    "attention_rewrite_": _rewrites,
    "attention_rotations": _rotations,
}

INVALID: dict[str, Callable[[], Iterator[Invalid]]] = {
    "attention_concurrent_": _bad_attends,
    "attention_scratch": _bad_scratch,
    "attention_append_": _bad_appends,
    "attention_rewrite_": _bad_rewrites,
    "attention_rotations": _bad_rotations,
}
