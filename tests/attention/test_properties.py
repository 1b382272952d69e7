"""Random layouts through workspace and kernels: equal to the oracle; what must change nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.attention.layouts import Append, Evict, Maker, Move, Scenario, apply, changed, scenario
from tests.attention.native import Native, Result
from tests.attention.oracle import World

#: Layouts per test that compare with the oracle, and tests.
CHUNK, CHUNKS = 42, 12
#: Layouts for each property.
SEEDS = range(1000, 1030)


def largest_value(case: Scenario) -> float:
    """max |V| of everything that is seen."""
    values = [op.v for op in case.ops if isinstance(op, Append)] + [case.step.v]
    return max((float(np.abs(v).max()) for v in values if v.size), default=1.0)


def check_close(got: Result, want: Result, case: Scenario) -> None:
    """Within the tolerances of float32."""
    name = f"seed {case.seed}"
    size = 2e-5 * largest_value(case)
    np.testing.assert_allclose(got.out, want.out, rtol=0, atol=size, err_msg=f"out, {name}")
    # A logit of some size has that many more units in the last place.
    finite = np.abs(want.lse[np.isfinite(want.lse)])
    size = 1e-5 * max(1.0, float(finite.max(initial=0)) / 8)
    np.testing.assert_allclose(got.lse, want.lse, rtol=0, atol=size, err_msg=f"lse, {name}")
    np.testing.assert_allclose(got.mass, want.mass, rtol=0, atol=1e-5, err_msg=f"mass, {name}")


@functools.cache
def expected(seed: int) -> tuple[Scenario, Result]:
    """A layout and what the oracle says, for all instruction sets."""
    case = scenario(seed)
    return case, Result(*case.world().dense(case.step))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_layouts_equal_the_oracle(chunk: int, isa: str) -> None:
    for seed in range(CHUNK * chunk, CHUNK * (chunk + 1)):
        case, want = expected(seed)
        mode = "local" if seed % 3 == 0 else "raw"
        got = Native(case, mode=mode).run()
        check_close(got, want, case)
        if case.shape.sinks is None:
            seen = np.isfinite(got.lse)
            np.testing.assert_allclose(got.mass.sum(-1)[seen], 1, rtol=0, atol=1e-5)


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest) -> Scenario:
    """A random layout."""
    return scenario(request.param)


def test_a_hidden_block_in_front_changes_nothing(case: Scenario) -> None:
    maker, shape, new = Maker(case.seed), case.shape, case.blocks
    n = maker.between(1, 100)
    op = Append(new, maker.normal(n, shape.hkv, shape.d), maker.normal(n, shape.hkv, shape.dv))
    step = replace(
        case.step,
        views=[[new, *view] for view in case.step.views],
        weights=case.step.weights
        | {(worker, new): (-math.inf, 1.0) for worker in range(len(case.step.views))},
    )
    other = replace(case, blocks=new + 1, ops=[*case.ops, op], step=step)
    got = Native(other).run()
    assert not got.mass[..., new].any()
    check_close(replace(got, mass=got.mass[..., :new]), Native(case).run(), case)


def test_splices_are_rewrites(case: Scenario) -> None:
    def all_moves(rewrite: bool) -> Scenario:
        ops = [replace(op, rewrite=rewrite) if isinstance(op, Move) else op for op in case.ops]
        return replace(case, ops=ops)

    check_close(Native(all_moves(True)).run(), Native(all_moves(False)).run(), case)


def test_order_of_workers_is_order_of_rows(case: Scenario) -> None:
    step = case.step
    order = Maker(case.seed).random.permutation(len(step.views))
    rows = np.concatenate([np.arange(sum(step.counts))[step.rows(w)] for w in order])
    place = {int(w): i for i, w in enumerate(order)}
    other = changed(
        case,
        views=[step.views[w] for w in order],
        counts=[step.counts[w] for w in order],
        q=step.q[rows],
        k=step.k[rows],
        v=step.v[rows],
        weights={(place[w], b): weight for (w, b), weight in step.weights.items()},
    )
    want = Native(case).run()
    want = Result(want.out[rows], want.lse[rows], want.mass[rows])
    check_close(Native(other).run(), want, case)


def test_hidden_is_removed_with_its_place_kept(case: Scenario) -> None:
    """Of a block somewhere in the views that nobody writes."""
    maker, shape, new = Maker(case.seed), case.shape, case.blocks
    n = maker.between(1, 60)
    op = Append(new, maker.normal(n, shape.hkv, shape.d), maker.normal(n, shape.hkv, shape.dv))
    views = [list(view) for view in case.step.views]
    for view in views:
        view.insert(maker.between(0, len(view) - 1), new)
    step = replace(case.step, views=views)
    there = replace(case, blocks=new + 1, ops=[*case.ops, op], step=step)
    hide = {(worker, new): (-math.inf, 1.0) for worker in range(len(views))}
    hidden = changed(there, weights=step.weights | hide)
    removed = replace(there, ops=[*there.ops, Evict(new, 0, n, close_gap=False)])
    check_close(Native(removed).run(), Native(hidden).run(), case)


def test_splitting_segments_changes_nothing(case: Scenario) -> None:
    """Tokens that are put between others and taken out again leave segments of other phases."""
    maker, shape = Maker(case.seed), case.shape
    world, ops = World(shape, case.blocks), []
    for op in case.ops:
        if isinstance(op, Append) and len(op.k) > 1:
            cut, junk = maker.between(1, len(op.k) - 1), maker.between(1, 40)
            start = world.blocks[op.block].length + cut
            ops += [
                Append(op.block, op.k[:cut], op.v[:cut]),
                Append(
                    op.block,
                    maker.normal(junk, shape.hkv, shape.d),
                    maker.normal(junk, shape.hkv, shape.dv),
                ),
                Append(op.block, op.k[cut:], op.v[cut:]),
                Evict(op.block, start, start + junk, close_gap=True),
            ]
        else:
            ops.append(op)
        apply(world, op)
    check_close(Native(replace(case, ops=ops)).run(), Native(case).run(), case)


def test_rotated_by_the_model_or_by_the_kernel(case: Scenario) -> None:
    check_close(Native(case, mode="local").run(), Native(case).run(), case)


def test_a_worker_without_tokens_has_no_effect(case: Scenario) -> None:
    step = case.step
    idle = len(step.views) // 2
    rows = np.r_[0 : step.first(idle), step.first(idle + 1) : sum(step.counts)]
    without = {(w - (w > idle), b): weight for (w, b), weight in step.weights.items() if w != idle}
    tokens = {"q": step.q[rows], "k": step.k[rows], "v": step.v[rows]}
    present = changed(
        case,
        counts=[0 if w == idle else count for w, count in enumerate(step.counts)],
        **tokens,
    )
    absent = changed(
        case,
        views=[view for w, view in enumerate(step.views) if w != idle],
        counts=[count for w, count in enumerate(step.counts) if w != idle],
        weights=without,
        **tokens,
    )
    got, want = Native(present).run(), Native(absent).run()
    check_close(got, want, case)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(case: Scenario) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(Native(case).run())
    for result in results[1:]:
        assert np.array_equal(result.out, results[0].out)
        assert np.array_equal(result.lse, results[0].lse)
        assert np.array_equal(result.mass, results[0].mass)
