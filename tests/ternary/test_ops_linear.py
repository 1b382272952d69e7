"""The CPU matmul against its definition, on every instruction set.

Integer modes are compared bit for bit. Mode "none" must stay within its error bound and give the
same bits on every instruction set, for every batch size, in every call.
"""

import pytest
import torch
from torch import Tensor

import alignops
from alignops import ternary, testing
from alignops.reference import ternary as reference
from alignops.ternary.weight import TernaryWeight
from tests.ternary.samples import ACTS, DTYPES, SHAPES, Shape, make_bias, make_weight, make_x


def definition(
    x: Tensor, w: Tensor, shape: Shape, bias: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    """Expected output, and the bound of its error (zero in integer modes)."""
    lanes, alpha = reference.quantize(w, shape.group, shape.stride)
    y = reference.linear(x, lanes, alpha, bias, shape.group, shape.stride, act)
    if act != "none":
        return y, torch.zeros(())
    bound = reference.none_error_bound(x, lanes, alpha, shape.group, shape.stride)
    if bias is not None:
        bound = bound + 2.0**-24 * y.abs()
    return y, bound


def assert_close_to_definition(y: Tensor, expected: Tensor, bound: Tensor) -> None:
    """`bound` before the cast to the dtype of y, half a unit in the last place for the cast."""
    if bound.dim() == 0:
        assert torch.equal(y, expected)
        return
    unit = torch.finfo(y.dtype)
    cast = unit.eps / 2 * (expected.abs() + bound) + unit.smallest_normal * unit.eps
    assert ((y.double() - expected).abs() <= bound + cast).all()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa: str, shape: Shape, act: str) -> None:
    w, weight = make_weight(shape)
    x, bias = make_x(shape), make_bias(shape)
    y = alignops.ternary_linear(x, weight, bias, act)
    assert y.shape == (shape.m, shape.n)
    assert y.dtype == x.dtype
    assert_close_to_definition(y, *definition(x, w, shape, bias, act))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_x(isa: str, act: str, dtype: torch.dtype) -> None:
    shape = Shape(35, 100, dtype=dtype)
    w, weight = make_weight(shape)
    base = torch.randn(6, 8, 101).to(dtype)
    forms = {
        "vector": base[0, 0, :100],
        "matrix at offset 1": base[0, :, 1:],
        "batch": base[..., :100],
        "transposed": base[0, :, :100].t().contiguous().t(),
        "expanded": base[:1, 0, :100].expand(7, 100),
        "every second row": base[0, ::2, 1:],
        "every second column": torch.randn(4, 200).to(dtype)[:, ::2],
        "permuted": base[..., :100].transpose(0, 1),
        "empty batch": base[:0, :, :100],
        "empty middle": base[:, :0, :100],
    }
    for name, x in forms.items():
        y = alignops.ternary_linear(x, weight, act=act)
        assert y.shape == (*x.shape[:-1], 35), name
        assert_close_to_definition(y, *definition(x, w, shape, None, act))


@pytest.mark.parametrize("act", ACTS)
def test_batch_invariance(isa: str, act: str) -> None:
    """A row gives the same bits alone and in any batch, across lookup and decode paths."""
    for shape in (Shape(70, 300, 41), Shape(33, 640, 13, 128, dtype=torch.bfloat16)):
        _, weight = make_weight(shape)
        x = make_x(shape)
        alone = torch.cat([alignops.ternary_linear(row[None], weight, act=act) for row in x])
        for m in (*range(1, 18), shape.m):
            batch = alignops.ternary_linear(x[:m], weight, act=act)
            assert torch.equal(batch, alone[:m]), m
        assert torch.equal(alignops.ternary_linear(x, weight, act=act), alone)


@pytest.mark.parametrize("act", ACTS)
def test_same_bits_on_every_instruction_set(act: str) -> None:
    for shape in (Shape(65, 999, 3), Shape(33, 576, 20, 64), Shape(70, 4096, 1)):
        _, weight = make_weight(shape)
        x = make_x(shape)
        results = []
        for name in testing.available_isas():
            with testing.use_isa(name):
                results.append(alignops.ternary_linear(x, weight, act=act))
        assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("act", ACTS)
def test_rows_do_not_depend_on_other_weights(isa: str, act: str) -> None:
    _, weight = make_weight(Shape(100, 320))
    x = torch.randn(3, 320)
    y = alignops.ternary_linear(x, weight, act=act)
    for begin, end in ((0, 1), (31, 70), (99, 100)):
        part = TernaryWeight(
            weight.idx[begin:end],
            weight.sign[begin:end],
            weight.scale[begin:end],
            (end - begin, 320),
        )
        assert torch.equal(alignops.ternary_linear(x, part, act=act), y[:, begin:end])


# Extremes


def constant_codes(k: int) -> TernaryWeight:
    """32 rows, row c made of code c only."""
    codes = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, -(-k // 4))
    return TernaryWeight(*reference.to_planes(codes), torch.ones(32, 1), (32, k))


def worst_activations(k: int) -> Tensor:
    """Rows that reach every bound: all +-max, alternating, and a16 limbs of -128."""
    x = torch.ones(6, k)
    x[1] = -1
    x[2, ::2] = -1
    x[3] = torch.tensor([1.0, 1, -1, -1]).repeat(-(-k // 4))[:k]
    x[4] = 32384 / 32639  # 127 * 256 - 128
    x[4, 0] = 1
    x[5] = -x[4]
    return x


@pytest.mark.parametrize("act", ["a8", "a8g", "a16"])
@pytest.mark.parametrize("tokens", [1, 6, 36])
def test_accumulators_do_not_overflow(isa: str, act: str, tokens: int) -> None:
    k = 8640
    weight = constant_codes(k)
    lanes = reference.decode(torch.arange(32, dtype=torch.uint8)[:, None].expand(32, k // 4))
    x = worst_activations(k).repeat(-(-tokens // 6), 1)
    expected = reference.linear(x, lanes, torch.ones(32, 1), act=act)
    if tokens == 1:
        y = torch.cat([alignops.ternary_linear(row[None], weight, act=act) for row in x])
    else:
        y = alignops.ternary_linear(x, weight, act=act)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("act", ACTS)
def test_special_rows_stay_alone(isa: str, act: str, tokens: int) -> None:
    """Zero, tiny, NaN and Inf tokens, each among ordinary ones."""
    shape = Shape(37, 300, tokens)
    w, weight = make_weight(shape)
    x = torch.randn(8, 300)
    x[1] = 0
    x[2] = 1e-38
    x[3, 17] = torch.nan
    x[4, 299] = torch.inf
    x[5, 0] = -torch.inf
    x[6] *= 1e30
    if tokens > 1:
        x = x.repeat(3, 1)
        y = alignops.ternary_linear(x, weight, act=act)
    else:
        y = torch.cat([alignops.ternary_linear(row[None], weight, act=act) for row in x])
    expected, bound = definition(x, w, shape, None, act)
    finite = expected.isfinite()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~finite & ~y.isnan()], expected[~finite & ~y.isnan()].float())
    if act == "none":
        assert (finite[0] & finite[6]).all()
        assert not finite[3].all()
        assert_close_to_definition(y[finite], expected[finite], bound[finite])
    else:
        assert torch.equal(y[finite], expected[finite])
        assert not y[1:3].any()
        assert y[3:6].isnan().all()


@pytest.mark.parametrize("act", ACTS)
def test_float16_overflow_is_inf(isa: str, act: str) -> None:
    weight = TernaryWeight.zeros((4, 64))
    weight.scale = torch.full((4, 1), 3e4)
    y = alignops.ternary_linear(torch.ones(1, 64).half(), weight, act=act)
    assert (y == torch.inf).all()


@pytest.mark.parametrize("act", ACTS)
def test_zero_rows_give_the_bias(isa: str, act: str) -> None:
    weight = ternary.quantize(torch.zeros(5, 33))
    bias = torch.randn(5)
    y = alignops.ternary_linear(torch.randn(2, 33), weight, bias, act)
    assert torch.equal(y, bias.expand(2, 5))


def test_too_wide_for_int32(isa: str) -> None:
    weight = TernaryWeight.zeros((1, 87_004))
    x = torch.ones(1, 87_004)
    with pytest.raises(ValueError, match="k must be at most 87000"):
        alignops.ternary_linear(x, weight, act="a16")
    assert alignops.ternary_linear(x, weight, act="a8").item() == 0


# Choice of the mode, fused weights


def test_auto_mode() -> None:
    _, weight = make_weight(Shape(40, 512))
    x = torch.randn(3, 512)

    def same(x: Tensor, act: str) -> bool:
        y = alignops.ternary_linear(x, weight)
        return torch.equal(y, alignops.ternary_linear(x, weight, act=act))

    assert same(x, "none")
    assert not same(x, "a8g")
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert same(half, "a8g")
        assert not same(half, "none")
        half.requires_grad_()
        assert same(half, "none")
        assert not same(half, "a8g")
        with torch.no_grad():
            assert same(half, "a8g")


@pytest.mark.parametrize("rows", [(64, 128, 64), (40, 7, 192)])
@pytest.mark.parametrize("group", [None, 64])
def test_sequence_of_weights(isa: str, rows: tuple[int, ...], group: int | None) -> None:
    weights = [ternary.quantize(torch.randn(n, 192), group) for n in rows]
    biases = [torch.randn(rows[0]), None, torch.randn(rows[2])]
    for x in (torch.randn(1, 192), torch.randn(2, 5, 192).bfloat16()):
        for act in ("auto", *ACTS):
            outputs = alignops.ternary_linear(x, weights, biases, act)
            for y, w, b in zip(outputs, weights, biases, strict=True):
                assert torch.equal(y, alignops.ternary_linear(x, w, b, act))
    plain = alignops.ternary_linear(torch.randn(1, 192), weights)
    assert [y.shape[-1] for y in plain] == list(rows)


def test_sequence_of_different_weights() -> None:
    weights = [ternary.quantize(torch.randn(8, 64), 32), ternary.quantize(torch.randn(8, 64))]
    x = torch.randn(2, 64)
    outputs = alignops.ternary_linear(x, weights)
    assert all(
        torch.equal(y, alignops.ternary_linear(x, w)) for y, w in zip(outputs, weights, strict=True)
    )
    assert alignops.ternary_linear(x, []) == ()


def test_cat(isa: str) -> None:
    weights = [ternary.quantize(torch.randn(n, 100)) for n in (3, 40, 5)]
    whole = TernaryWeight.cat(weights)
    assert torch.equal(whole.dequantize(), torch.cat([w.dequantize() for w in weights]))


# The int8 head


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1),
        Shape(7, 65, 3, dtype=torch.bfloat16, bias=True),
        Shape(33, 576, 9, dtype=torch.float16),
        Shape(130, 257, 2, bias=True),
        Shape(5, 4100, 33),
        Shape(4, 64, 0),
    ],
    ids=str,
)
def test_int8_linear(isa: str, shape: Shape, act: str) -> None:
    q, scale = ternary.int8_quantize(torch.randn(shape.n, shape.k))
    x, bias = make_x(shape), make_bias(shape)
    y = ternary.int8_linear(x, q, scale, bias, act)
    expected = reference.int8_linear(x, q, scale, bias, act)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    bound = torch.zeros(())
    if act == "none":
        size = reference.int8_linear(x.abs(), q.abs(), scale, None if bias is None else bias.abs())
        bound = (shape.k / 16 + 8) * 2.0**-24 * size
    assert_close_to_definition(y, expected, bound)
    if shape.m:
        alone = torch.cat([ternary.int8_linear(row[None], q, scale, bias, act) for row in x])
        assert torch.equal(y, alone)


@pytest.mark.parametrize("act", ["a8", "a8g", "a16"])
def test_int8_sums_do_not_overflow(isa: str, act: str) -> None:
    k = 8640
    q = torch.full((2, k), 127, dtype=torch.int8)
    q[1, ::2] = -127
    x, scale = worst_activations(k), torch.ones(2)
    expected = reference.int8_linear(x, q, scale, act=act)
    assert torch.equal(ternary.int8_linear(x, q, scale, act=act), expected)


@pytest.mark.parametrize("act", ACTS)
def test_int8_same_bits_on_every_instruction_set(act: str) -> None:
    q, scale = ternary.int8_quantize(torch.randn(77, 1234))
    x = make_x(Shape(77, 1234, 6))
    results = []
    for name in testing.available_isas():
        with testing.use_isa(name):
            results.append(ternary.int8_linear(x, q, scale, act=act))
    assert all(torch.equal(results[0], y) for y in results[1:])
