"""The definition itself: golden vectors, optimality, codes, exact arithmetic, schedules."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops import ternary
from alignops.reference import ternary as reference


def codes_of(w: Tensor, group: int | None = None, stride: int = 1) -> tuple[Tensor, Tensor]:
    lanes, alpha = reference.quantize(w, group, stride)
    return reference.encode(lanes), alpha


def planes_hex(codes: Tensor) -> tuple[str, str]:
    idx, sign = reference.to_planes(codes)
    return bytes(idx[0].tolist()).hex(), bytes(sign[0].tolist()).hex()


GOLDEN = [
    [0.5, -0.1, -0.7, 0.2],
    [-0.3, 0.3, 0.3, -0.3],
    [0, 0, 0, 0],
    [-1, -2, -3, 4],
    [-0.0, 1, 1, 1],
    [2, 2, 2, -1],
    [1, -1, 0, 0],
    [5, 6, 7, 8],
]


def wave() -> Tensor:
    return ((37 * torch.arange(256) + 11) % 101 - 50)[None] / 64


def test_golden_row() -> None:
    codes, alpha = codes_of(torch.tensor(GOLDEN).flatten()[None])
    assert codes[0].tolist() == [5, 2, 0, 18, 0, 12, 9, 0]
    assert planes_hex(codes) == ("2520c009", "08")
    assert alpha.item() == pytest.approx(43.3 / 24)


def test_golden_ragged_row() -> None:
    lanes, alpha = reference.quantize(torch.tensor([[1.0, -2, 3, -4, 5, -6]]))
    assert lanes.tolist() == [[[0, -1, 1, -1], [1, -1, 0, 1]]]
    codes = reference.encode(lanes)
    assert codes[0].tolist() == [17, 9]
    assert planes_hex(codes) == ("91000000", "01")
    assert alpha.item() == 4


@pytest.mark.parametrize(
    ("stride", "idx", "sign", "alpha"),
    [
        (
            16,
            "0f3ac7722feac073c0722ffac0732cf72ffaa00e2cf7a20fa00e2cf7a20f3ac7",
            "4b5bb5a5dbdaad2d",
            0.47265625,
        ),
        (
            1,
            "1515d6dbd959595151619d9d9d95151515dbd95959595161b19d9d95951515d6",
            "a5aa5255a92a5495",
            0.4873861,
        ),
    ],
)
def test_golden_wave(stride: int, idx: str, sign: str, alpha: float) -> None:
    codes, scale = codes_of(wave(), 256, stride)
    assert planes_hex(codes) == (idx, sign)
    assert scale.item() == pytest.approx(alpha, rel=1e-7)


def test_all_codes_round_trip_and_mirror() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None]
    lanes = reference.decode(codes)
    assert torch.equal(reference.encode(lanes), codes)
    assert torch.equal(reference.decode(codes ^ 16), -lanes)
    assert len({tuple(block) for block in lanes[0].tolist()}) == 32
    byte_codebook = bytes.fromhex(
        "A98929 09A68626 06 9A921A12 6A624A42 012181A1 042484A4 10189098 40486068"
    )
    stored = (lanes[0].long() + 1) << (2 * torch.arange(4))
    assert bytes(stored.sum(-1).tolist()) == byte_codebook


@pytest.mark.parametrize("bad", [[0, 0, 1, 1], [1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 0, 0]])
def test_encode_refuses_blocks_without_code(bad: list[int]) -> None:
    lanes = reference.decode(torch.zeros(3, 4, dtype=torch.uint8))
    lanes[1, 2] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r"\(row, block\) = \(1, 2\)"):
        reference.encode(lanes)


@pytest.mark.parametrize("stride", [1, 16])
def test_blocks_and_planes_are_invertible(stride: int) -> None:
    w = torch.randn(3, 192)
    assert torch.equal(reference.from_blocks(reference.to_blocks(w, stride), 192, stride), w)
    codes, _ = codes_of(w, None, stride)
    assert torch.equal(reference.from_planes(*reference.to_planes(codes), 192), codes)


def test_choice_is_optimal() -> None:
    """No pair of codes with its best scale comes closer than the quantizer (L2)."""
    lanes = reference.decode(torch.arange(32, dtype=torch.uint8)[None])[0].double()
    pairs = torch.cat(
        [lanes.repeat_interleave(32, 0), lanes.repeat(32, 1)], 1
    )  # (1024, 8): T of two blocks
    for w in torch.randn(50, 8, dtype=torch.float64):
        best = (w.square().sum() - (pairs @ w).clamp(min=0).square() / 6).min()
        t, alpha = reference.quantize(w[None].float())
        error = (w - reference.dequantize(t, alpha, 8)[0].double()).square().sum()
        assert error <= best * (1 + 1e-5)


def test_error_on_gaussian_weights() -> None:
    w = torch.randn(256, 4096)
    lanes, alpha = reference.quantize(w)
    mse = (w - reference.dequantize(lanes, alpha, 4096)).square().mean().item()
    assert mse == pytest.approx(0.2850, rel=0.01)
    assert alpha.mean().item() == pytest.approx(0.9762, rel=0.01)


def test_fma_rounds_once() -> None:
    """Against exact rational arithmetic, with cancellation and ties."""
    a, b = torch.randn(3000), torch.randn(3000)
    c = torch.randn(3000) * 2.0 ** torch.randint(-40, 40, (3000,))
    c[::3] = -(a * b)[::3]
    one = torch.full((1,), 1.0)
    ties = (one + 2.0**-23, one, one * 2.0**-24), (one, one, one * 2.0**-24 * (1 + 2.0**-23))
    for x, y, z in ((a, b, c), *ties):
        got = reference.fma(x, y, z).numpy()
        for i, value in enumerate(got):
            exact = Fraction(x[i].item()) * Fraction(y[i].item()) + Fraction(z[i].item())
            error = abs(Fraction(float(value)) - exact)
            for other in (np.nextafter(value, np.float32(s)) for s in (np.inf, -np.inf)):
                other_error = abs(Fraction(float(other)) - exact)
                even = int(value.view(np.int32)) % 2 == 0
                assert error < other_error or (error == other_error and even)


@pytest.mark.parametrize("act", ["a8", "a8g", "a16"])
def test_activation_quantizer(act: str) -> None:
    top = reference.ACT_MAX[act]
    x = torch.randn(5, 600)
    x[1] = 0
    x[2] *= 1e-38
    x[3, 7] = torch.inf
    x[4, 599] = torch.nan
    q, scale = reference.quantize_activations(x, act)
    assert q[0].abs().max() == top
    assert not q[1].any()
    assert not scale[1].any()
    assert not q[2].any()
    assert not scale[2].any()
    assert scale[3].isnan().any()
    assert scale[4].isnan().any()
    last = scale.shape[1] - 1
    assert not q[3, :256].any()
    assert not q[4, 256 * last :].any()
    per_column = scale.repeat_interleave(256 if act == "a8g" else 600, 1)[:, :600]
    assert ((q[0] * per_column[0] - x[0]).abs() <= 0.5001 * per_column[0]).all()
    assert scale.shape[1] == (3 if act == "a8g" else 1)


ERRORS = {"a8": (0.0091, 0.3), "a8g": (0.0070, 0.3), "a16": (4e-5, 0.3)}


@pytest.mark.parametrize("act", ERRORS)
def test_relative_error_of_modes(act: str) -> None:
    x = torch.randn(16, 2048)
    lanes, alpha = reference.quantize(torch.randn(256, 2048))
    exact = reference.linear(x, lanes, alpha)
    y = reference.linear(x, lanes, alpha, act=act)
    expected, slack = ERRORS[act]
    error = ((y - exact).norm() / exact.norm()).item()
    assert error == pytest.approx(expected, rel=slack)


@pytest.mark.parametrize("group", [None, 32])
def test_linear_is_differentiable(group: int | None) -> None:
    lanes, alpha = reference.quantize(torch.randn(5, 66), group)
    x = torch.randn(3, 66, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: reference.linear(x, lanes, alpha, b, group), (x, bias)
    )


def test_fake_quant_gradient_is_straight_through() -> None:
    w = torch.randn(4, 64, requires_grad=True)
    g = torch.randn(4, 64)
    y = reference.fake_quant(w, 0.25)
    y.backward(g)
    lanes, alpha = reference.quantize(w.detach())
    assert torch.equal(y, reference.dequantize(lanes, alpha, 64) + 0.25 * w)
    assert torch.equal(w.grad, 1.25 * g)


def test_schedules() -> None:
    values = {0: 0, 50: 0.5, 100: 1, 325: 0.853553, 550: 0.5, 1000: 0, 2000: 0}
    for t, value in values.items():
        assert reference.arenas_lambda(t, 1000) == pytest.approx(value, abs=1e-6)
    for kind in ("linear", "cosine", "exponential"):
        curve = [reference.arenas_lambda(t, 20, peak=0.5, kind=kind) for t in range(25)]
        assert curve[0] == 0.5
        assert curve[20:] == [0.0] * 5
        assert all(a >= b for a, b in itertools.pairwise(curve))
    assert reference.arenas_lambda(99, 20, peak=0.5, kind="constant") == 0.5
    with pytest.raises(ValueError, match="kind must name a schedule"):
        reference.arenas_lambda(0, 20, kind="sudden")


def test_effective_rank() -> None:
    assert reference.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert reference.effective_rank(torch.ones(5, 9)) == pytest.approx(1)
    assert reference.effective_rank(torch.diag(torch.tensor([3.0, 1]))) == pytest.approx(
        1.7548, 1e-4
    )
    assert reference.effective_rank(torch.randn(256, 256)) == pytest.approx(0.805 * 256, rel=0.02)


# The quantizer of the package against the definition: every edge of its input


def edge_weights() -> dict[str, Tensor]:
    tiny = torch.finfo(torch.float32).smallest_normal
    return {
        "golden": torch.tensor(GOLDEN).flatten()[None],
        "ties": torch.ones(3, 65) * torch.tensor([1.0, -1, 1, -1, 1]).repeat(13),
        "ties with the zero lane": torch.randint(-1, 2, (40, 130)).float(),
        "zero row": torch.stack([torch.zeros(96), torch.randn(96)]),
        "zero block": torch.cat([torch.zeros(2, 4), torch.randn(2, 28)], 1),
        "negative zeros": -torch.zeros(2, 36),
        "subnormal": torch.randn(5, 40) * tiny / 64,
        "huge": torch.randn(5, 40).sign() * 3e38,
        "wide range": torch.randn(9, 200) * 10.0 ** torch.randint(-30, 30, (9, 200)),
        "one column": torch.randn(7, 1),
        "bfloat16": torch.randn(33, 257).bfloat16(),
        "float16": torch.randn(33, 257).half(),
        "float64": torch.randn(5, 77).double(),
        "transposed": torch.randn(130, 35).t(),
        "strided": torch.randn(20, 300)[::3, 1::2],
        "offset": torch.randn(7, 100)[:, 1:],
        "requires grad": torch.randn(3, 64, requires_grad=True),
    }


@pytest.mark.parametrize("name", edge_weights())
def test_quantize_matches(isa: str, name: str) -> None:
    w = edge_weights()[name]
    weight = ternary.quantize(w)
    lanes, alpha = reference.quantize(w.detach())
    idx, sign = reference.to_planes(reference.encode(lanes))
    assert torch.equal(weight.idx, idx)
    assert torch.equal(weight.sign, sign)
    assert torch.equal(weight.scale, alpha)
    assert not any(t.requires_grad for t in weight.buffers())
    assert torch.equal(weight.dequantize(), reference.dequantize(lanes, alpha, w.shape[1]))


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize("group", [64, 128, 192, 448, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_and_strides_match(
    isa: str, group: int | None, stride: int, dtype: torch.dtype
) -> None:
    w = torch.randn(35, 448).to(dtype)
    weight = ternary.quantize(w, group, stride)
    lanes, alpha = reference.quantize(w, group, stride)
    assert torch.equal(weight.idx, reference.to_planes(reference.encode(lanes))[0])
    assert torch.equal(weight.scale, alpha)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        expected = reference.dequantize(lanes, alpha, 448, group, stride, out)
        assert torch.equal(weight.dequantize(out), expected)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_idempotent(isa: str, group: int | None, dtype: torch.dtype) -> None:
    """Weights on the grid come back: codes equal, scales equal (bfloat16: the rounded ones)."""
    weight = ternary.quantize(torch.randn(30, 1000), group)
    dense = weight.dequantize(dtype)
    again = ternary.quantize(dense, group)
    assert torch.equal(again.idx, weight.idx)
    assert torch.equal(again.sign, weight.sign)
    assert torch.equal(again.scale, weight.scale.to(dtype).float())


def test_stack_of_experts(isa: str) -> None:
    w = torch.randn(3, 20, 70)
    stack = ternary.quantize(w, 32)
    assert stack.shape == (3, 20, 70)
    assert stack.dequantize().shape == w.shape
    for e, expert in enumerate(stack.unbind()):
        assert torch.equal(expert.dequantize(), ternary.quantize(w[e], 32).dequantize())
        assert torch.equal(stack.dequantize()[e], expert.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_dtype(dtype: torch.dtype) -> None:
    w = torch.randn(9, 256)
    weight = ternary.quantize(w, 64, scale_dtype=dtype)
    assert weight.scale.dtype == dtype
    assert torch.equal(weight.scale, ternary.quantize(w, 64).scale.to(dtype))
    assert weight.nbytes == 9 * 256 * 5 // 32 + 2 * 9 * 4


# The int8 head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_quantize_matches(isa: str, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (7, 65), (33, 257), (64, 576)):
        w = torch.randn(n, k).to(dtype)
        w[-1] = 0
        q, scale = ternary.int8_quantize(w)
        expected, expected_scale = reference.int8_quantize(w)
        assert torch.equal(q, expected)
        assert torch.equal(scale, expected_scale)
        assert q.min() >= -127
    assert math.isclose(scale.max().item() * 127, w.float().abs().max().item(), rel_tol=1e-6)
