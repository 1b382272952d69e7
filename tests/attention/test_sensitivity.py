"""Faults that are easy to make break the comparison with the oracle by a hundred tolerances.

Each is planted in what the kernels are given: the plan, the queries, or the order of pairs. Faults
in the code itself are those of `mutants.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alignops.attention import Plan, RopeSpec
from tests.attention.layouts import Append, Evict, Maker, Move, Scenario
from tests.attention.native import Native, Result
from tests.attention.oracle import Shape, Step

TIMES = 100


def scene() -> Scenario:
    """Two workers, several new tokens each; a spliced paragraph, a block without its beginning."""
    maker = Maker(7)
    rope = RopeSpec.yarn(64, theta=1e6, factor=4.0, original_length=256)
    shape = Shape(hq=6, hkv=2, d=64, dv=64, rope=rope)

    def tokens(n: int) -> Any:
        return maker.normal(n, shape.hkv, shape.d), maker.normal(n, shape.hkv, shape.dv)

    ops: list[Any] = [Append(b, *tokens(n)) for b, n in enumerate((33, 20, 5, 7))]
    ops += [Move(1, 0, rewrite=False), Evict(3, 0, 3, close_gap=True)]
    step = Step([[0, 3, 2], [0, 2, 3]], [3, 2], maker.normal(5, shape.hq, shape.d), *tokens(5))
    return Scenario(7, shape, 16, 4, ops, step)


def turn_plan(plan: Plan, spec: RopeSpec, change: Callable[[Any], Any]) -> None:
    """Other rotations of queries: `change` gets the tables and returns delta0 (S, W)."""
    tables = plan.decode()
    delta = change(tables)
    rows = spec.rotations(torch.from_numpy(np.ascontiguousarray(delta).reshape(-1)))
    tables["rope"][0][: delta.size] = rows.numpy()


def off_by_one(native: Native, plan: Plan) -> None:
    def change(tables: Any) -> Any:
        delta = tables["pair"]["delta0"].copy()
        delta[tables["segment"]["block"] == 0] += 1  # where the common block begins
        return delta

    turn_plan(plan, native.shape.rope, change)  # type: ignore[arg-type]


def without_r0(native: Native, plan: Plan) -> None:
    def change(tables: Any) -> Any:
        segment = tables["segment"]
        return tables["pair"]["delta0"] - np.where(segment["r0"] > 0, segment["r0"], 0)[:, None]

    turn_plan(plan, native.shape.rope, change)  # type: ignore[arg-type]


def without_s0(native: Native, plan: Plan) -> None:
    def change(tables: Any) -> Any:
        segment = tables["segment"]
        return tables["pair"]["delta0"] + (segment["s0"] - segment["r0"])[:, None]

    turn_plan(plan, native.shape.rope, change)  # type: ignore[arg-type]


def later_limit(native: Native, plan: Plan) -> None:
    pair = plan.decode()["pair"]
    pair["limit0"][pair["state"] == 2] += 1


def earlier_limit(native: Native, plan: Plan) -> None:
    pair = plan.decode()["pair"]
    pair["limit0"][pair["state"] == 2] -= 1


def nothing(native: Native, plan: Plan) -> None:
    pass


PLANS = [off_by_one, without_r0, without_s0, later_limit, earlier_limit]


def worst(got: Result, want: Result) -> float:
    """The largest error in tolerances of float32, of out and of lse."""
    size = 2e-5 * 4.0  # |V| of standard normal numbers
    return max(
        float(np.abs(got.out - want.out).max()) / size,
        float(np.abs(got.lse - want.lse).max()) / 1e-5,
    )


def run(fault: Callable[[Native, Plan], None], mode: str, twice: bool = False) -> float:
    case = scene()
    native = Native(case, mode=mode)
    plan = native.plan(case.step)
    native.append(plan, case.step.k, case.step.v)
    fault(native, plan)
    step = case.step
    if twice:
        assert case.shape.rope is not None
        step = replace(step, q=step.q * case.shape.rope.attention_factor)
    return worst(native.attend(plan, step), Result(*case.world().dense(case.step)))


@pytest.mark.parametrize("mode", ["raw", "local"])
def test_without_a_fault_it_is_within_tolerance(mode: str) -> None:
    assert run(nothing, mode) <= 1


@pytest.mark.parametrize("mode", ["raw", "local"])
@pytest.mark.parametrize("fault", PLANS)
def test_a_wrong_plan_is_noticed(fault: Callable[[Native, Plan], None], mode: str) -> None:
    assert run(fault, mode) >= TIMES


def test_a_factor_that_is_applied_twice_is_noticed() -> None:
    assert run(nothing, "raw", twice=True) >= TIMES


def test_the_other_order_of_pairs_is_noticed() -> None:
    """Of queries alone: keys in the cache have the right one."""
    case = scene()
    assert case.shape.rope is not None
    native = Native(case)
    plan = native.plan(case.step)
    native.append(plan, case.step.k, case.step.v)
    native.pool.specs = (replace(case.shape.rope, pairs="interleaved"),)
    got = native.attend(plan, case.step)
    assert worst(got, Result(*case.world().dense(case.step))) >= TIMES


def test_lse_to_base_2_is_noticed() -> None:
    case = scene()
    want = Result(*case.world().dense(case.step))
    assert worst(replace(want, lse=want.lse / math.log(2)), want) >= TIMES
