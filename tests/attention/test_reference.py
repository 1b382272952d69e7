"""The reference operator equals the dense oracle, with and without turned queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from alignops.attention import RopeSpec
from alignops.reference import attention as reference
from tests.attention.layouts import Append, Scenario, changed, scenario
from tests.attention.oracle import Array, Cells, Shape, Step, World

#: float64, a few hundred terms.
TOLERANCE = 1e-11


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    world: World, step: Step, dtype: torch.dtype = torch.float64, local: bool = False
) -> tuple[Array, Array, Array]:
    q, blocks, workers, options = world.described(step, dtype, local)
    out, lse, mass = reference.concurrent_attention(q, blocks, workers, **options)
    assert out.dtype == dtype
    return out.double().numpy(), lse.double().numpy(), mass.double().numpy()


def close(got: tuple[Array, ...], want: tuple[Array, ...], tolerance: float = TOLERANCE) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_random_layouts_equal_the_oracle(first: int) -> None:
    for seed in range(first, first + 10):
        case = scenario(seed)
        world = case.world()
        want = world.dense(case.step)
        for local in (False, True):
            close(run(world, case.step, local=local), want)


def test_layouts_are_of_every_kind() -> None:
    cases = [scenario(seed) for seed in range(120)]
    kinds = {type(op).__name__ for case in cases for op in case.ops}
    assert kinds == {"Append", "Move", "Evict", "Fork"}
    assert {case.shape.hq // case.shape.hkv for case in cases} == {1, 2, 3, 5, 7, 8}
    assert {case.shape.d for case in cases} == {32, 64, 80, 128, 256}
    assert {len(case.step.views) for case in cases} == set(range(1, 9))
    assert {case.blocks for case in cases} == set(range(1, 13))
    assert {count for case in cases for count in case.step.counts} == set(range(10))
    phases = {p.r0 - p.s0 for case in cases for c in case.world().blocks for p in c.pieces}
    assert len(phases) > 50
    for name in ("scale", "softcap", "window", "sinks", "rope"):
        assert len({getattr(case.shape, name) is None for case in cases}) == 2, name
    assert any(case.shape.dv != case.shape.d for case in cases)
    assert any(-math.inf in {w[0] for w in case.step.weights.values()} for case in cases)


def test_float32_is_within_its_rounding() -> None:
    for seed in range(200, 220):
        case = scenario(seed)
        world = case.world()
        out, lse, mass = world.dense(case.step)
        got = run(world, case.step, torch.float32)
        scale = max(
            (np.abs(p.v).max() for c in world.after(case.step) for p in c.pieces), default=1
        )
        np.testing.assert_allclose(got[0], out, rtol=0, atol=2e-5 * scale)
        np.testing.assert_allclose(got[1], lse, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got[2], mass, rtol=0, atol=1e-5)


def small(**options: Any) -> tuple[Shape, World, Step]:
    """Two workers over a common block; options of the shape."""
    shape = Shape(**({"hq": 4, "hkv": 2, "d": 8, "dv": 6, "rope": RopeSpec.default(8)} | options))
    rng = np.random.default_rng(5)
    world = World(shape, 3)

    def tokens(n: int) -> tuple[Array, Array]:
        return rng.standard_normal((n, shape.hkv, shape.d)), rng.standard_normal(
            (n, shape.hkv, shape.dv)
        )

    world.blocks = [Cells().appended(*tokens(n)) for n in (11, 3, 5)]
    k, v = tokens(3)
    step = Step([[0, 1, 2], [0, 2, 1]], [2, 1], rng.standard_normal((3, shape.hq, shape.d)), k, v)
    return shape, world, step


def test_one_worker_is_causal_attention() -> None:
    shape, world, _ = small()
    rng = np.random.default_rng(6)
    cells = world.blocks[0]
    q = rng.standard_normal((4, shape.hq, shape.d))
    k, v = rng.standard_normal((4, shape.hkv, shape.d)), rng.standard_normal((4, shape.hkv, 6))
    step = Step([[0, 1]], [4], q, k, v)
    world.blocks = [cells, Cells()]
    keys = torch.from_numpy(np.concatenate([cells.pieces[0].k, k])).transpose(0, 1)
    values = torch.from_numpy(np.concatenate([cells.pieces[0].v, v])).transpose(0, 1)
    positions = torch.arange(15)
    assert shape.rope is not None
    table = reference.rotations(torch.tensor(shape.rope.inv_freq), positions, torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(
        reference.rotate(torch.from_numpy(q).transpose(0, 1), table[11:]),
        reference.rotate(keys, table),
        values,
        attn_mask=positions[11:, None] >= positions,
        enable_gqa=True,
    )
    close((run(world, step)[0],), (want.transpose(0, 1).numpy(),))


def test_new_tokens_of_two_workers_see_each_other_unless_lagged() -> None:
    _, world, step = small()
    out, _, mass = run(world, step)
    other = Step(step.views, step.counts, step.q, step.k.copy(), step.v)
    other.k[2] += 1  # of the second worker
    assert np.abs(run(world, other)[0][:2] - out[:2]).max() > 1e-3
    lagged = [Step(s.views, s.counts, s.q, s.k, s.v, lagged=True) for s in (step, other)]
    results = [run(world, s)[0] for s in lagged]
    assert np.array_equal(results[0][:2], results[1][:2])
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-12)


def test_nan_in_keys_that_are_not_seen_reaches_nobody() -> None:
    _, world, step = small(window=4)
    q, blocks, workers, options = world.described(step, torch.float32)
    want = reference.concurrent_attention(q, blocks, workers, **options)
    for x in (blocks[0][0].k, blocks[0][0].v):
        x[:, :3] = math.nan  # outside the window
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            reference.concurrent_attention(q, blocks, workers, **options), want, strict=True
        )
    )
    blocks[2][1].v[:, 1] = math.nan  # the second new token of the first worker
    out, _, _ = reference.concurrent_attention(q, blocks, workers, **options)
    assert torch.equal(out[0], want[0][0])
    assert out[1].isnan().all()


def test_a_row_that_sees_nothing() -> None:
    hidden = {(w, b): (-math.inf, 1.0) for w in range(2) for b in range(3)}
    for sinks in (None, np.array([1.0, 2.0, 3.0, 4.0])):
        _, world, step = small(sinks=sinks)
        out, lse, mass = run(world, changed(_case(world, step), weights=hidden).step)
        assert not out.any()
        assert not mass.any()
        assert np.array_equal(
            lse, np.broadcast_to(-math.inf if sinks is None else sinks, lse.shape)
        )


def _case(world: World, step: Step) -> Scenario:
    return Scenario(0, world.shape, 16, len(world.blocks), [], step)


def test_no_rows() -> None:
    shape, world, _ = small()
    empty = np.zeros((0, 1, 1))
    step = Step(
        [[0, 1]], [0], np.zeros((0, shape.hq, shape.d)), empty, np.zeros((0, shape.hkv, shape.dv))
    )
    out, lse, mass = run(world, step)
    assert out.shape == (0, 4, 6)
    assert lse.shape == (0, 4)
    assert mass.shape == (0, 4, 3)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 9}, {"rope": None}])
@pytest.mark.parametrize("local", [False, True])
def test_gradients(options: dict[str, Any], local: bool) -> None:
    _, world, step = small(**options, sinks=np.array([0.5, 1.0, -1.0, 0.0]))
    q, blocks, workers, given = world.described(step, torch.float64, local)
    leaves = [q, given.pop("sinks"), *(x for b in blocks for s in b for x in (s.k, s.v))]

    def attention(q: Any, sinks: Any, *kv: Any) -> Any:
        tensors = iter(kv)
        rebuilt = [
            [reference.Segment(next(tensors), next(tensors), s.s0, s.r0) for s in b] for b in blocks
        ]
        return reference.concurrent_attention(q, rebuilt, workers, sinks=sinks, **given)

    for leaf in leaves:
        leaf.requires_grad_(True)
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


def test_tokens_written_outside_the_view_see_themselves() -> None:
    """A view whose last entry begins where the new tokens do."""
    shape, world, step = small()
    q, blocks, _, options = world.described(step, torch.float64)
    end = world.blocks[2].length
    view = [reference.Seen(0, 11), reference.Seen(2, end, start=end)]
    got = reference.concurrent_attention(q[:2], blocks, [reference.Worker(2, view)], **options)
    alone = World(shape, 2)
    alone.blocks = [world.blocks[0], Cells()]
    want = alone.dense(Step([[0, 1]], [2], step.q[:2], step.k[:2], step.v[:2]))
    close((got[0].numpy(), got[1].numpy()), want[:2])
    np.testing.assert_allclose(got[2][..., [0, 2]].numpy(), want[2], atol=TOLERANCE)


def test_appends_of_a_scenario_are_float32() -> None:
    for op in scenario(3).ops:
        if isinstance(op, Append):
            assert np.array_equal(op.k, op.k.astype(np.float32))
