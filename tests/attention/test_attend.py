"""The attention operator against the formula in float64, on every instruction set and dtype."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention import plans

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
CASES = {
    "plain": (plans.Shape(), {}),
    "one row per worker, many workers": (plans.Shape(group=7), {"workers": 7}),
    "chunks": (plans.Shape(d=64, dv=64, pairs=32), {"length": 900, "longest": 3}),
    "long prompt": (plans.Shape(group=5), {"workers": 1, "longest": 90, "blocks": 1}),
    "heads of 80": (plans.Shape(d=80, dv=80, pairs=16, offset=0), {"longest": 2}),
    "heads of 128, one": (plans.Shape(kv_heads=1, group=1, d=128, dv=128, pairs=64), {}),
    "D != Dv, offset": (
        plans.Shape(d=40, dv=24, pairs=8, offset=24, interleaved=True, group=1),
        {"longest": 9, "raw": False},
    ),
    "odd columns": (plans.Shape(d=7, dv=5, pairs=3, group=2), {"longest": 2}),
    "no rotation": (plans.Shape(rope=False, sinks=True), {"longest": 4}),
    "window": (plans.Shape(window=37, interleaved=True), {"longest": 20, "weights": True}),
    "softcap, weights": (
        plans.Shape(softcap=5.0, sinks=True, group=8),
        {"weights": True, "longest": 5, "workers": 3},
    ),
    "large pages": (plans.Shape(), {"page_size": 128, "length": 300, "workers": 4}),
}


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest one; infinities are equal."""
    wanted = torch.from_numpy(expected)
    both = found.double() - wanted
    return float(torch.where(found.double() == wanted, 0.0, both).abs().max())


@functools.cache
def sample(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[tuple[Any, ...]]:
    """Steps with arguments and what is expected of them; what no segment has is NaN."""
    shape, options = CASES[name]
    rng, generator = np.random.default_rng(len(name)), torch.Generator().manual_seed(len(name))
    found = []
    for _ in range(2):
        step = plans.make(rng, pairs=shape.pairs, **options)
        q = plans.queries(step, shape, dtypes[0], generator)
        k, v = plans.pool(step, shape, dtypes[1], generator, float("nan"))
        sinks = torch.randn(shape.heads, generator=generator) if shape.sinks else None
        wanted = plans.expected(step, shape, q, k, v, shape.d**-0.5, sinks)
        found.append((step, q, k, v, sinks, wanted))
    return found


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(
    isa: str, name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    shape = CASES[name][0]
    exact = dtypes[0] == torch.float32
    for step, q, k, v, sinks, wanted in sample(name, dtypes):
        out, lse, mass = plans.attend(step, shape, q, k, v, scale=shape.d**-0.5, sinks=sinks)
        assert difference(out, wanted[0]) <= (2e-5 if exact else 2e-2)
        assert difference(lse, wanted[1]) <= (1e-5 if exact else 2e-3)
        assert difference(mass, wanted[2]) <= (1e-5 if exact else 2e-3)
        if sinks is None:
            total = mass.double().sum(-1)
            assert ((total - 1).abs() <= 1e-5).logical_or(lse == -torch.inf).all()
