"""Quantizer, dequantizer and fake quantizer on every instruction set, against the definition.

Everything is compared bit for bit: codes, scales (their sum has a fixed order) and outputs (a
product, a sum and a cast per weight). test_reference.py and test_properties.py have more weights.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from alignops import testing
from alignops.reference import ternary as reference
from tests.ternary.samples import DTYPES

OPS = torch.ops.alignops
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 576, 1001)


def planes(w: Tensor, group: int | None = None, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `ternary_quantize`."""
    lanes, alpha = reference.quantize(w, group, stride)
    return *reference.to_planes(reference.encode(lanes)), alpha


def effective(w: Tensor, lam: float, group: int | None, stride: int, dtype: torch.dtype) -> Tensor:
    """The definition of `ternary_fake_quant`: float32 inside, one cast."""
    return reference.fake_quant(w.float(), lam, group, stride).to(dtype)


def assert_planes(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def awkward(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Gaussian weights among ties, zeros of both signs and subnormals."""
    w = torch.randn(n, k)
    kind = torch.randint(0, 8, (n, k))
    w = torch.where(kind < 3, w.round(), w)
    w = torch.where(kind == 3, -0.0, w)
    return torch.where(kind == 4, w * 2.0**-130, w).to(dtype)


# fmt: off
GOLDEN = [
    .5, -.1, -.7, .2, -.3, .3, .3, -.3, 0, 0, 0, 0, -1, -2, -3, 4,
    -.0, 1, 1, 1, 2, 2, 2, -1, 1, -1, 0, 0, 5, 6, 7, 8,
]
# fmt: on


def test_golden_vectors(isa: str) -> None:
    idx, sign, scale = OPS.ternary_quantize(torch.tensor([GOLDEN]), 32, 1)
    assert idx.tolist() == [[0x25, 0x20, 0xC0, 0x09]]
    assert sign.tolist() == [[0x08]]
    assert scale.item() == pytest.approx(43.3 / 24)

    idx, sign, scale = OPS.ternary_quantize(torch.tensor([[1.0, -2, 3, -4, 5, -6]]), 6, 1)
    assert idx.tolist() == [[0x91, 0, 0, 0]]
    assert sign.tolist() == [[0x01]]
    assert scale.item() == 4
    dense = OPS.ternary_dequantize(idx, sign, scale, 6, 6, 1, torch.float32)
    assert dense.tolist() == [[0, -4, 4, -4, 4, -4]]


WAVE = {
    1: (
        "1515d6dbd959595151619d9d9d95151515dbd95959595161b19d9d95951515d6",
        "a5aa5255a92a5495",
        0.4873861,
    ),
    16: (
        "0f3ac7722feac073c0722ffac0732cf72ffaa00e2cf7a20fa00e2cf7a20f3ac7",
        "4b5bb5a5dbdaad2d",
        0.47265625,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", WAVE)
def test_golden_wave(isa: str, stride: int, dtype: torch.dtype) -> None:
    w = (((37 * torch.arange(256) + 11) % 101 - 50) / 64)[None].to(dtype)  # exact in every dtype
    idx, sign, scale = OPS.ternary_quantize(w, 256, stride)
    assert bytes(idx[0].tolist()).hex() == WAVE[stride][0]
    assert bytes(sign[0].tolist()).hex() == WAVE[stride][1]
    assert scale.item() == pytest.approx(WAVE[stride][2], abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_ragged_rows(isa: str, k: int, dtype: torch.dtype) -> None:
    w = awkward(5, k, dtype)
    expected = planes(w)
    assert_planes(OPS.ternary_quantize(w, k, 1), expected)
    lanes, alpha = reference.quantize(w)
    lam = torch.tensor(0.37)
    for out in DTYPES:
        dense = OPS.ternary_dequantize(*expected, k, k, 1, out)
        assert torch.equal(dense, reference.dequantize(lanes, alpha, k, dtype=out))
        fake = OPS.ternary_fake_quant(w, lam, k, 1, out)
        assert torch.equal(fake, effective(w, lam.item(), None, 1, out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "group", "stride"),
    [
        *[(576, group, 1) for group in (32, 64, 96, 128, 320, 544)],
        *[(1003, group, 1) for group in (32, 96, 256)],
        *[(640, group, 16) for group in (64, 128, 192, 320, 640)],
    ],
)
def test_groups(isa: str, k: int, group: int, stride: int, dtype: torch.dtype) -> None:
    w = awkward(4, k, dtype)
    assert_planes(OPS.ternary_quantize(w, group, stride), planes(w, group, stride))
    fake = OPS.ternary_fake_quant(w, torch.tensor(-1.5), group, stride, torch.float32)
    assert torch.equal(fake, effective(w, -1.5, group, stride, torch.float32))


def test_scales_are_summed_in_order(isa: str) -> None:
    """Rows whose sum lies on a tie of float32, which the last bit of float64 decides."""
    unit, half, tie = 2.0**-45, 2.0**-46, 1.5 * 2.0**-17
    added = (
        {},
        {64: unit},
        {2: half, 3: half},
        {64: half, 128: half},
        {64: half, 67: half},
        {32: half, 96: half},
        {32: half, 16: half},
        {16: half, 48: half},
        {8: half, 24: half},
        {4: half, 12: half},
        {8: half, 4: half},
    )
    w = torch.zeros(len(added), 256)
    w[:, 0], w[:, 1] = 192, tie
    for row, columns in zip(w, added, strict=True):
        for column, value in columns.items():
            row[column] = value
    scale = OPS.ternary_quantize(w, 256, 1)[2]
    assert set(scale.flatten().tolist()) == {1.0, 1 + 2.0**-23}
    assert torch.equal(scale, reference.quantize(w)[1])


def test_forms_of_w(isa: str) -> None:
    base = torch.randn(40, 131)
    lam = torch.tensor(1.0)
    forms = {
        "offset 1": base[:, 1:],
        "every third row": base[::3],
        "every second column": base[:, ::2],
        "transposed": base.t(),
        "expanded row": base[:1].expand(7, 131),
        "expanded column": base[:, :1].expand(40, 9),
        "one row": base[3:4, 5:70],
        "requires grad": base.clone().requires_grad_(),
    }
    for name, w in forms.items():
        k = w.shape[1]
        assert_planes(OPS.ternary_quantize(w, k, 1), planes(w.detach()))
        fake = OPS.ternary_fake_quant(w.detach(), lam, k, 1, torch.float32)
        assert torch.equal(fake, effective(w.detach(), 1.0, None, 1, torch.float32)), name


def test_no_rows(isa: str) -> None:
    idx, sign, scale = (torch.empty(0, size) for size in (8, 2, 1))
    dense = OPS.ternary_dequantize(idx.byte(), sign.byte(), scale, 64, 64, 1, torch.float16)
    assert dense.shape == (0, 64)
    fake = OPS.ternary_fake_quant(torch.empty(0, 64), torch.tensor(0.5), 64, 1, torch.float32)
    assert fake.shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quant_without_residual_is_the_quantized_weight(isa: str, dtype: torch.dtype) -> None:
    w = torch.randn(33, 300).to(dtype)
    fake = OPS.ternary_fake_quant(w, torch.tensor(0.0), 96, 1, dtype)
    dense = OPS.ternary_dequantize(*OPS.ternary_quantize(w, 96, 1), 300, 96, 1, dtype)
    assert torch.equal(fake, dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fake_quant_does_not_hide_nonfinite_weights(isa: str, value: float) -> None:
    w = torch.randn(4, 256)
    w[2, 130] = value
    fake = OPS.ternary_fake_quant(w, torch.tensor(0.5), 64, 1, torch.bfloat16)
    assert not fake[2, 128:192].isfinite().any()
    fake[2, 128:192] = 0
    assert fake.isfinite().all()


def test_float16_overflow_is_inf(isa: str) -> None:
    w = torch.full((1, 64), 7e4)
    fake = OPS.ternary_fake_quant(w, torch.tensor(0.0), 64, 1, torch.float16)
    assert torch.equal(fake, effective(w, 0.0, None, 1, torch.float16))
    assert fake.isinf().sum() == 48


@given(
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.floats(-2, 2, width=32),
    st.integers(0, 2**32),
)
def test_fake_quant_equals_definition_everywhere(
    n: int, k: int, dtype: torch.dtype, out: torch.dtype, lam: float, seed: int
) -> None:
    torch.manual_seed(seed)
    w = awkward(n, k, dtype)
    expected = effective(w, lam, None, 1, out)
    for isa in testing.available_isas():
        with testing.use_isa(isa):
            assert torch.equal(OPS.ternary_fake_quant(w, torch.tensor(lam), k, 1, out), expected)
