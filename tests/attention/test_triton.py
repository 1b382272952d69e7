"""The Triton kernels of the attention core: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
from alignops.triton_kernels import attention as kernels
from tests.attention import plans
from tests.attention.plans import Shape
from tests.attention.triton_cases import DEVICE, SMALL, Case

# The interpreter computes with NumPy, which remarks on logarithms of 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NARROW = {"d": 16, "dv": 16, "pairs": 8}


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_dtypes(dtype: torch.dtype) -> None:
    Case(dtype=dtype).check()
    Case(Shape(**NARROW, interleaved=True), dtype=dtype, raw=False, seed=1).check()
    Case(kv_dtype=dtype, longest=1, two_types=True, seed=2).check()


# D, Dv, pairs, first rotary column; one piece or two, full or not.
WIDTHS = [
    (5, 7, 2, 0),
    (32, 32, 16, 0),
    (24, 20, 4, 8),
    (80, 80, 16, 0),
    (96, 64, 48, 0),
    (112, 48, 56, 0),
    (160, 160, 20, 0),
    (192, 128, 32, 128),
    (256, 256, 128, 0),
    (576, 512, 32, 512),
]


@pytest.mark.parametrize("index", range(len(WIDTHS)), ids=[str(width) for width in WIDTHS])
def test_widths(index: int) -> None:
    shape = Shape(1, 2, *WIDTHS[index], interleaved=index % 2 == 1)
    Case(shape, workers=1, blocks=1, seed=index).check()


@pytest.mark.parametrize("group", [1, 2, 5, 7, 8])
def test_groups(group: int) -> None:
    """Tiles that are not full, some that are, and more than one."""
    Case(Shape(3 if group == 1 else 1, group, **NARROW), workers=3, seed=group).check()


@pytest.mark.parametrize("seed", range(8))
def test_layouts(seed: int) -> None:
    """Blocks in pieces, of any length, with gaps; workers without rows, or with many."""
    shape = Shape(**NARROW, kv_heads=1, interleaved=seed % 2 == 1)
    sizes = {"page_size": (16, 32, 128)[seed % 3], "workers": 1 + seed % 5, "longest": 9}
    Case(shape, raw=seed < 4, seed=seed, blocks=3, **sizes).check()


@pytest.mark.parametrize("window", [1, 7, 40])
def test_windows(window: int) -> None:
    for raw in (True, False):
        shape = Shape(**NARROW, kv_heads=1, window=window)
        Case(shape, raw=raw, longest=9, seed=window, weights=True).check()


def test_scores() -> None:
    for spread in (0.1, 3.0):  # hyperbolic tangent near 0 and far from it
        shape = Shape(**NARROW, softcap=2.0, sinks=True)
        Case(shape, spread=spread, weights=True).check()
    Case(Shape(**NARROW, softcap=30.0, window=9), dtype=HALF).check(scale=1.5)
    Case(Shape(**NARROW, rope=False, sinks=True), weights=True, longest=5).check()


def test_others_are_seen_without_their_new_tokens() -> None:
    def lagged(tables: dict[str, Any]) -> None:
        for line in tables["pairs"]:
            rising = [pair for pair in line if pair["state"] == plans.RISING]
            for pair in line:
                if rising and pair["state"] == plans.VISIBLE:
                    pair["limit0"] = max(rising[0]["limit0"] - 1, 0)

    for seed in range(3):
        Case(change=lagged, longest=5, workers=3, seed=seed).check()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts(parts: int) -> None:
    """However many parts, and whatever tiles."""
    tiles = SMALL if parts % 2 else kernels.Tiles(32, 64, 4, 1)
    shape = Shape(1, 3, 16, 24, 8, sinks=True)
    dtype = SINGLE if parts < 3 else BRAIN
    Case(shape, dtype=dtype, seed=parts, length=500).check(parts=parts, tiles=tiles)


def test_rows_and_blocks_behind_those_of_the_plan() -> None:
    for parts in (1, 3):
        case = Case(Shape(1, 3, **NARROW, sinks=True), length=500, seed=5)
        assert case.step.words[9] >= 512
        case.check(parts=parts, spare_rows=3, spare_blocks=2)


def test_nothing_to_see() -> None:
    """All keys hidden; no rows; no keys at all."""

    def hide(tables: dict[str, Any]) -> None:
        tables["bias"][:] = -math.inf

    def clear(tables: dict[str, Any]) -> None:
        tables.update(segments=[], pairs=[], bias=np.zeros((0, 2)), gain=np.zeros((0, 2)))

    def rowless(tables: dict[str, Any]) -> None:
        clear(tables)
        tables.update(rows=[], row_ptr=[0, 0, 0])

    for change in (hide, clear, rowless):
        for sinks in (False, True):
            case = Case(Shape(**NARROW, sinks=sinks), change=change)
            case.check(spare_rows=2)
            assert case.run(spare_rows=2).out.eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [16, 24])
def test_what_is_not_finite_reaches_rows_that_see_it(value: float, width: int) -> None:
    case = Case(Shape(1, 3, width, width, 8), longest=5, workers=3, seed=8)
    clean = case.run()
    counts = np.diff(case.step.tables["row_ptr"])
    worker = int(counts.argmax())
    page, slot, sees = case.own_key(worker, int(counts[worker]) - 1)
    assert sees.any()
    assert not sees.all()
    case.v[page, 0, slot, -1] = value
    found = case.run()
    assert torch.equal(found.lse, clean.lse)
    torch.testing.assert_close(found.out[..., :-1], clean.out[..., :-1])
    assert not found.out[sees, :, -1].isfinite().any()
    torch.testing.assert_close(found.out[~sees], clean.out[~sees])
    case.k[page, 0, slot, 0] = math.nan
    found = case.run()
    torch.testing.assert_close(found.out[~sees], clean.out[~sees])
    torch.testing.assert_close(found.mass[~sees], clean.mass[~sees])
    assert found.out[sees].isnan().all()
    first = int((~sees).nonzero()[0])
    case.q[first] = math.nan
    found = case.run()
    assert found.out[first].isnan().all()
    sees[first] = True
    torch.testing.assert_close(found.out[~sees], clean.out[~sees])


def test_huge_logits() -> None:
    Case(spread=100.0).check()
    found = Case(dtype=HALF, spread=150.0).run()
    assert found.out.isfinite().all()
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(found.lse.shape))


def test_strides() -> None:
    case = Case()
    expected = case.run()
    rows, heads, d = case.q.shape
    wide = torch.full((heads, rows, d + 3), math.nan)
    wide[..., 1:-2] = case.q.transpose(0, 1)
    case.q = wide[..., 1:-2].transpose(0, 1)
    pages, kv_heads, page_size, _ = case.k.shape
    pool = torch.full((pages + 1, kv_heads + 3, page_size, d), math.nan)
    pool[1:, 2 : 2 + kv_heads] = case.k
    case.k = pool[1:, 2 : 2 + kv_heads]
    assert torch.equal(case.run().out, expected.out)


def test_pages_that_do_not_exist_are_clamped() -> None:
    case = Case()
    case.plan = case.plan.clone()
    first, count = int(case.plan[16]), int(case.plan[7])
    wrong = torch.tensor([-(2**40), 2**40, 10**6])
    case.plan[first : first + count] = wrong[torch.arange(count) % 3]
    case.run()


def test_shapes_without_a_kernel() -> None:
    with pytest.raises(NotImplementedError, match=r"attention_concurrent_: .* head_dim 640"):
        Case(Shape(d=640, rope=False)).run()
    case = Case()
    with pytest.raises(ValueError, match="attention_concurrent_: scratch must have at least"):
        kernels.attend(
            *(case.q, case.k, case.v, case.plan, None, -1, 0, False, 1.0, 0.0, 0),
            *(case.q, None, None, torch.empty(7, dtype=torch.uint8)),
            tiles=SMALL,
            parts=1,
        )


# Writes


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
def test_append(dtype: torch.dtype, raw: bool, interleaved: bool) -> None:
    shape = Shape(3, 1, 20, 12, 4, 8, interleaved)
    case = Case(shape, kv_dtype=dtype, raw=raw, longest=4, two_types=True)
    # The interpreter does not round to nearest: what is only copied is rounded already.
    spare = torch.randn(3, case.rows + 2, 40).to(dtype).float()
    # Two rows behind those of the plan go nowhere.
    new_k, new_v = (spare[..., part].transpose(0, 1) for part in (slice(1, 21), slice(22, 34)))
    expected_k, expected_v = case.k.clone(), case.v.clone()
    for row, (_, _, slot, index) in enumerate(case.step.tables["rows"]):
        place = (slot // case.step.page_size, slice(None), slot % case.step.page_size)
        angle = index * raw * case.step.tables["omega"]
        turned = plans.rotate(new_k[row].double().numpy(), angle, shape)
        expected_k[place] = torch.from_numpy(turned).to(dtype)
        expected_v[place] = new_v[row].to(dtype)
    k, v = case.k.to(DEVICE), case.v.to(DEVICE)
    arguments = (t.to(DEVICE) for t in (new_k, new_v, case.plan))
    kernels.append(*arguments, case.rope, shape.offset, interleaved, k, v)
    assert same_bits(v.cpu(), expected_v)
    if raw:
        rtol = {SINGLE: 1e-5, BRAIN: 2**-7, HALF: 2**-10}[dtype]
        torch.testing.assert_close(k.cpu(), expected_k, rtol=rtol, atol=1e-5, equal_nan=True)
    else:
        assert same_bits(k.cpu(), expected_k)


def test_slots_outside_of_the_pool_are_not_written() -> None:
    case = Case(Shape(2, 1, **NARROW))
    plan = case.plan.clone()
    slots = plan[int(plan[17]) :][: 4 * case.rows].view(-1, 4)[:, 2]
    wrong = torch.tensor([-1, case.step.pages * case.step.page_size, 2**50])
    slots[:] = wrong[torch.arange(case.rows) % 3]
    k, v = case.k.to(DEVICE, copy=True), case.v.to(DEVICE, copy=True)
    new = torch.randn(case.rows, 2, 16, device=DEVICE)
    kernels.append(new, new, plan.to(DEVICE), -1, 0, False, k, v)
    assert same_bits(k.cpu(), case.k)
    assert same_bits(v.cpu(), case.v)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_rewrite(dtype: torch.dtype) -> None:
    """Layers of two shapes, with and without rotation, in one call; more than one launch holds."""
    page = 16
    angles = torch.tensor([0.0, -5.0, 9000.0])[:, None] * torch.tensor([1.0, 0.1, 0.01])
    table = torch.stack([angles.cos(), angles.sin()], -1)
    shapes = [(6, 2, page, 8)] * 17 + [(6, 3, page, 6)]
    k = [torch.randn(shape).to(dtype) for shape in shapes]
    v = [torch.randn(*shape[:3], 5).to(dtype) for shape in shapes]
    rope = [-1] + [0] * 17
    interleaved = [i % 2 == 1 for i in range(18)]
    offset = [2] * 17 + [0]
    moves = [(3, 4 * page, 9, 1), (page, 5 * page + 2, 14, -1), (2 * page, 3 * page, 1, 2)]
    runs = torch.tensor(moves)
    expected_k, expected_v = [t.clone() for t in k], [t.clone() for t in v]
    for source, target, tokens, turn in moves:
        for i in range(18):
            for token in range(tokens):
                here, there = source + token, target + token
                key = k[i][here // page, :, here % page].clone()
                if rope[i] >= 0 and turn >= 0:
                    cos, sin = table[turn, :, 0], table[turn, :, 1]
                    rotary = key[:, offset[i] : offset[i] + 6].float()
                    a, b = (
                        (rotary[:, 0::2], rotary[:, 1::2])
                        if interleaved[i]
                        else (rotary[:, :3], rotary[:, 3:])
                    )
                    x, y = a * cos - b * sin, b * cos + a * sin
                    turned = torch.stack([x, y], 2 if interleaved[i] else 1).reshape(-1, 6)
                    key[:, offset[i] : offset[i] + 6] = turned.to(dtype)
                expected_k[i][there // page, :, there % page] = key
                expected_v[i][there // page, :, there % page] = v[i][here // page, :, here % page]
    k, v = ([t.to(DEVICE) for t in tensors] for tensors in (k, v))
    kernels.rewrite(k, v, runs.to(DEVICE), [table.to(DEVICE)], rope, offset, interleaved)
    for i in range(18):
        assert same_bits(v[i].cpu(), expected_v[i])
        rtol = 1e-6 if dtype == SINGLE else 2**-7
        torch.testing.assert_close(k[i].cpu(), expected_k[i], rtol=rtol, atol=1e-6)
    assert same_bits(k[0].cpu(), expected_k[0])
