"""Speculative core: verification of drafts at the vocabularies of named models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import speculative_cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", speculative_cases.VOCABULARIES)
@pytest.mark.parametrize("rule", ["greedy", "lossless"])
def test_verify(
    measure: Callable[..., None], rule: str, name: str, batch: int, dtype: torch.dtype
) -> None:
    vocabulary = speculative_cases.VOCABULARIES[name]
    case = speculative_cases.make(rule, batch, vocabulary, dtype)
    speculative_cases.check(case)
    runner = speculative_cases.runners(case)[0]
    # The floor is that of memory: an id costs about 30 operations, too.
    measure(runner, cold=True, shape=case.shape, dtype=str(dtype), rule=rule)
