"""Ternary core: matrix products of named models' shapes, quantizer, training operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import contestants, shapes

LOOKUP_TOKENS = 4  # beyond, the kernels decode and multiply


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "hot"])
@pytest.mark.parametrize("act", ["a8g", "none"])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "k"), shapes.MATRICES[:2], ids=lambda v: str(v))
def test_linear_decode(
    measure: Callable[..., None], n: int, k: int, m: int, act: str, cold: bool
) -> None:
    runner = contestants.linear(n, k, m, cold, act)
    work = m * n * k
    ops = {"lookups": work / 4} if m <= LOOKUP_TOKENS else {"macs": work}
    measure(runner, cold=cold, shape=(m, n, k), dtype="bfloat16", act=act, **ops)


@pytest.mark.parametrize("act", ["a8g", "none"])
@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize(("n", "k"), shapes.MATRICES[:2], ids=lambda v: str(v))
def test_linear_batch(measure: Callable[..., None], n: int, k: int, m: int, act: str) -> None:
    runner = contestants.linear(n, k, m, False, act, hot_calls=1)
    measure(runner, cold=False, macs=m * n * k, shape=(m, n, k), dtype="bfloat16", act=act)


@pytest.mark.parametrize("name", ["LLaMA-3.2-1B"])
def test_decode_step(measure: Callable[..., None], name: str) -> None:
    runner = contestants.decode_step(shapes.MODELS[name])
    measure(runner, cold=True, shape=name, dtype="bfloat16", act="a8g")


def test_quantize(measure: Callable[..., None]) -> None:
    n, k = shapes.MATRICES[0]
    runner = contestants.quantize(contestants.random_weight(n, k, torch.bfloat16))
    measure(runner, cold=True, shape=(n, k), dtype="bfloat16")


@pytest.mark.parametrize("ours", [True, False], ids=["alignops", "top-k"])
def test_fake_quant(measure: Callable[..., None], ours: bool) -> None:
    n, k = shapes.MATRICES[0]
    runner = contestants.fake_quant(contestants.random_weight(n, k), ours)
    # Forward reads w and writes W_eff, backward reads and writes a gradient: four passes.
    runner.weight_bytes *= 4
    measure(runner, cold=True, shape=(n, k), dtype="float32")
