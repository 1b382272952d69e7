"""New keys and values in their slots, and moved ones, on every instruction set and dtype."""

import numpy as np
import pytest
import torch

from tests.attention import plans

_op = torch.ops.alignops
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    plans.Shape(d=20, dv=24, pairs=6, offset=2),
    plans.Shape(d=128, dv=64, pairs=64, interleaved=True),
    plans.Shape(d=7, dv=5, pairs=3, rope=False),
)


def rounded(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x).float().to(dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to the last bit of the dtype, where float32 arithmetic rounds another way."""
    eps = torch.finfo(a.dtype).eps
    return bool(((a.double() - b.double()).abs() <= eps * (1 + b.double().abs())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raw", [True, False])
def test_append_writes_slots_and_nothing_else(isa: str, dtype: torch.dtype, raw: bool) -> None:
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    for shape in SHAPES:
        for given in {torch.float32, dtype}:
            step = plans.make(rng, workers=3, longest=4, pairs=shape.pairs, raw=raw)
            k, v = plans.pool(step, shape, dtype, generator)
            before = k.clone(), v.clone()
            k_new = torch.randn(step.rows, shape.kv_heads, shape.d, generator=generator).to(given)
            v_new = torch.randn(step.rows, shape.kv_heads, shape.dv, generator=generator).to(given)
            rope = 0 if shape.rope else -1
            _op.attention_append_(
                k_new, v_new, step.words, rope, shape.offset, shape.interleaved, k, v
            )
            for row, (_, _, slot, index) in enumerate(step.tables["rows"]):
                at = (slot // step.page_size, slice(None), slot % step.page_size)
                key = k_new[row].double().numpy()
                if raw:
                    key = plans.rotate(key, index * step.tables["omega"], shape)
                assert close(k[at], rounded(key, dtype))
                assert torch.equal(v[at], v_new[row].to(dtype))
                k[at], v[at] = before[0][at], before[1][at]
            assert torch.equal(k, before[0])
            assert torch.equal(v, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewrite_moves_runs_of_all_layers(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    omega = 100.0 ** -torch.linspace(0, 1, 6)
    positions = torch.tensor([17, -5, 100_000])
    rotations = _op.attention_rotations(omega, positions)
    shape = plans.Shape(d=20, dv=24, pairs=6, offset=2, interleaved=True)
    layers = 3
    k = [torch.randn(8, 2, 16, 20, generator=generator).to(dtype) for _ in range(layers)]
    v = [torch.randn(8, 2, 16, 24, generator=generator).to(dtype) for _ in range(layers)]
    before = [t.clone() for t in k], [t.clone() for t in v]
    runs = torch.tensor([[3, 83, 9, 1], [16, 64, 12, -1], [30, 76, 2, 2], [0, 112, 1, 0]])
    _op.attention_rewrite_(k, v, runs, [rotations], [0, -1, 0], [2, 0, 2], [True, False, True])
    for layer in range(layers):
        wanted_k, wanted_v = before[0][layer].clone(), before[1][layer].clone()
        for source, target, n, turn in runs.tolist():
            a = (source // 16, slice(None), slice(source % 16, source % 16 + n))
            b = (target // 16, slice(None), slice(target % 16, target % 16 + n))
            wanted_v[b] = before[1][layer][a]
            key = before[0][layer][a]
            if turn >= 0 and layer != 1:
                angle = omega.double().numpy() * positions[turn].item()
                key = rounded(plans.rotate(key.double().numpy(), angle, shape), dtype)
                assert close(k[layer][b], key)
                key = k[layer][b]
            wanted_k[b] = key
        assert torch.equal(k[layer], wanted_k)
        assert torch.equal(v[layer], wanted_v)


@pytest.mark.parametrize(
    "run",
    [
        [0, 32, 17, -1],
        [8, 32, 9, -1],
        [0, 40, 9, -1],
        [-1, 32, 1, -1],
        [0, 8 * 16, 1, -1],
        [0, 32, 0, -1],
        [0, 32, 1, -2],
        [0, 32, 1, 3],
        [0, 8, 4, -1],
    ],
    ids=str,
)
def test_rewrite_refuses_runs_that_leave_their_page(run: list[int]) -> None:
    k, v = [torch.zeros(8, 2, 16, 20)], [torch.zeros(8, 2, 16, 20)]
    with pytest.raises(ValueError, match=r"^attention_rewrite_: (runs|rotations) must "):
        _op.attention_rewrite_(
            k, v, torch.tensor([[64, 96, 3, -1], run]), [torch.zeros(3, 4, 2)], [0], [0], [False]
        )


def test_rotations_are_those_of_double_precision() -> None:
    omega = torch.tensor([1.0, 0.1, 1e-4])
    positions = torch.tensor([[0, 1, -3], [4096, 131_072, 1 << 20]])
    found = _op.attention_rotations(omega, positions)
    angle = positions.double()[..., None] * omega.double()
    wanted = torch.stack([angle.cos(), angle.sin()], -1)
    assert found.shape == (2, 3, 3, 2)
    assert (found.double() - wanted).abs().max() <= 2**-24
