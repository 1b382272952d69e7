"""Every instruction set, and every number of threads, takes the same decisions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from alignops import testing
from alignops.reference.speculative import laws
from alignops.speculative import propose, verify
from alignops.speculative.verify import RULES
from tests.speculative.oracle import assert_rows, expected_rows
from tests.speculative.samples_verify import (
    DTYPES,
    generator,
    make_drafts,
    make_logits,
    make_params,
    make_warp,
)

ROWS, DRAFTS = 500, 4
BATCHES = 20  # of each rule: 100 000 rows in all
WITH_REFERENCE = 8  # rows of each batch


def make_batch(rule: str, seed: int) -> dict[str, Any]:
    """Many rows of the same size, spread and parameters, other ones for each seed."""
    rng = generator(seed, 1000 + RULES[rule][0])
    size, dtype = int(rng.integers(1, 80)), DTYPES[seed % 3]
    target = make_logits(rng, ROWS, DRAFTS + 1, size, dtype=dtype)
    draft = make_logits(rng, ROWS, DRAFTS, size, dtype=dtype) if seed % 4 else None
    return {
        "target": target,
        "draft_ids": make_drafts(rng, target, draft, DRAFTS),
        "draft": draft,
        "rule": rule,
        "params": make_params(rng, rule, ROWS, size),
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63, ROWS)),
        "positions": torch.from_numpy(rng.integers(0, 2**33, ROWS)),
        "eos_ids": [0] if seed % 2 else [],
        **make_warp(rng, ROWS, size),
    }


def call(batch: dict[str, Any]) -> Any:
    return verify(batch["target"], **{k: v for k, v in batch.items() if k != "target"})


def first_rows(batch: dict[str, Any]) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        whole = isinstance(value, torch.Tensor) and len(value) == ROWS
        return value[:WITH_REFERENCE] if whole else value

    return {name: cut(value) for name, value in batch.items()}


def assert_equal(a: Any, b: Any, note: object) -> None:
    for field in fields(a):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), (field.name, note)


@pytest.mark.parametrize("rule", RULES)
def test_levels_agree_on_many_rows(rule: str) -> None:
    for seed in range(BATCHES):
        batch = make_batch(rule, seed)
        results = []
        for isa in testing.available_isas():
            with testing.use_isa(isa):
                results.append(call(batch))
        for isa, result in zip(testing.available_isas(), results, strict=True):
            assert_equal(result, results[0], (isa, seed))
        few = first_rows(batch)
        assert_rows(call(few), expected_rows(few), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_and_threads_agree_on_large_vocabularies(dtype: torch.dtype) -> None:
    """One row is shared by threads, tile by tile; several are not."""
    before = torch.get_num_threads()
    try:
        for seed in range(12):
            rng = generator(seed, 2000)
            rows, size = int(rng.choice([1, 3])), int(rng.integers(20_000, 60_000))
            logits = make_logits(rng, rows, size, dtype=dtype)
            seeds = torch.from_numpy(rng.integers(0, 2**63, rows))
            warp = make_warp(rng, rows, size)
            race = bool(rng.random() < 0.3)
            found = []
            for isa in testing.available_isas():
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    with testing.use_isa(isa):
                        found.append(
                            propose(logits, seeds=seeds, positions=seeds % 97, race=race, **warp)
                        )
            for other in found[1:]:
                assert_equal(other, found[0], seed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "value", [float("nan"), -float("nan"), float("inf")], ids=["nan", "-nan", "inf"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_values_are_seen_in_every_lane(isa: str, dtype: torch.dtype, value: float) -> None:
    size, places = 4096 + 77, [*range(70), *range(4060, 4096 + 77)]
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((len(places), size)))
    logits = logits.to(dtype)
    for row, place in enumerate(places):
        logits[row, place] = value
    numbers = torch.arange(len(places))
    for temperature in (0.0, 1.0):
        out = propose(logits, seeds=numbers, positions=numbers, temperature=temperature)
        assert out.row_error.eq(1).all()
        assert out.ids.eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_weights_are_those_of_the_definition(isa: str, dtype: torch.dtype) -> None:
    """Decisions hardly ever show the last bit of a weight; the sum over a vocabulary does."""
    rng = generator(0, 2000)
    for temperature in (0.2, 0.7, 1.0, 3.0):
        logits = make_logits(rng, 3, 1, 9001, dtype=dtype)[:, 0]
        found = propose(
            logits,
            seeds=torch.arange(3),
            positions=torch.arange(3),
            temperature=temperature,
        )
        found.raise_errors()
        for row, stats, token in zip(logits, found.stats.tolist(), found.ids.tolist(), strict=True):
            law = laws.law(row.float().numpy(), temperature)
            weight = [int(law.mantissa[token]), int(law.exponent[token])]
            assert stats[:4] == [law.top, law.total, *weight], temperature
