"""Acceptance of chains: every decision is the one of the definition, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignops.speculative import verify
from alignops.speculative.verify import RULES
from tests.speculative.oracle import assert_rows, expected_rows
from tests.speculative.samples_verify import DTYPES, SIZES, SMALL, generator, make_case


def call(case: dict[str, Any]) -> Any:
    return verify(case["target"], **{k: v for k, v in case.items() if k != "target"})


def check(case: dict[str, Any], note: object = "") -> None:
    assert_rows(call(case), expected_rows(case), note)


@pytest.mark.parametrize("rule", RULES)
def test_decisions_equal_the_definition(isa: str, rule: str) -> None:
    for seed in range(60):
        check(make_case(generator(seed, RULES[rule][0]), rule, SMALL), seed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_tiles(isa: str, rule: str, dtype: torch.dtype) -> None:
    for seed, size in enumerate(SIZES[6:]):
        check(make_case(generator(seed, 100 + RULES[rule][0]), rule, (size,), dtype), size)
