"""Concurrent attention at the shapes of named models, beside the strongest way in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import attention_cases as cases
from benchmarks import attention_layouts as layouts
from benchmarks import attention_pools as pools
from benchmarks.shapes import ATTENTION

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: Model, pattern, keys, workers, dtype: each of them varies around one case.
GRID = [
    ("QwQ-32B", "headers", 4096, 4, BF16),
    *[(model, "headers", 4096, 4, BF16) for model in list(ATTENTION)[1:]],
    *[("QwQ-32B", pattern, 4096, 4, BF16) for pattern in layouts.PATTERNS if pattern != "headers"],
    *[("QwQ-32B", "headers", tokens, 4, BF16) for tokens in (300, 1024, 16384, 65536)],
    *[("QwQ-32B", "headers", 4096, workers, BF16) for workers in (1, 2, 8)],
    *[("QwQ-32B", "headers", 4096, 4, dtype) for dtype in (F32, F16)],
]


@pytest.mark.parametrize("who", ["alignops", "B2"])
@pytest.mark.parametrize(("model", "pattern", "tokens", "workers", "dtype"), GRID)
def test_attention(
    measure: Callable[..., None],
    model: str,
    pattern: str,
    tokens: int,
    workers: int,
    dtype: torch.dtype,
    who: str,
) -> None:
    case = cases.make(ATTENTION[model], layouts.make(pattern, tokens, workers), dtype)
    contestant = pools.ours(case) if who == "alignops" else cases.PEERS[who](case)
    runner = cases.runner(case, who, contestant)
    measure(runner, cold=True, shape=str(case), dtype=str(dtype), segments=case.layout.segments)
