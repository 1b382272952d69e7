"""Moves of cache slots, appends and masks, beside plain copies and what torch users write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import speculative_kv_cases as cases
from benchmarks.shapes import CACHES, CacheShape
from benchmarks.timing import Runner

SHAPES = pytest.mark.parametrize("shape", CACHES.values(), ids=lambda s: s.name)
SLOTS = pytest.mark.parametrize("slots", cases.SLOTS)


@SHAPES
@SLOTS
@pytest.mark.parametrize("who", [cases.shift, cases.plain_copy, cases.loop_of_copies])
def test_realign(
    measure: Callable[..., None],
    shape: CacheShape,
    slots: int,
    who: Callable[..., Runner],
) -> None:
    cache = cases.make_cache(shape, slots)
    measure(who(cache), cold=True, shape=shape.name, slots=slots, layers=cache.layers)


@SHAPES
@pytest.mark.parametrize("who", ["ragged_append_", "index_put_", "slices", "cat"])
def test_append(measure: Callable[..., None], shape: CacheShape, who: str) -> None:
    cache = cases.make_cache(shape, cases.SLOTS[0])
    new, lens = cases.new_columns(cache), cases.lengths(cache.slots)
    runners = {r.name: r for r in cases.appends(cache, new, lens)}
    measure(runners[who], cold=True, shape=shape.name, slots=cache.slots, layers=cache.layers)


@pytest.mark.parametrize("window", [0, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", [cases.mask_ours, cases.mask_torch])
def test_mask(
    measure: Callable[..., None], who: Callable[..., Runner], dtype: torch.dtype, window: int
) -> None:
    slots = cases.SLOTS[-1]
    c = cases.lengths(slots)
    measure(who(c, slots, dtype, window), cold=False, dtype=str(dtype), slots=slots, window=window)
