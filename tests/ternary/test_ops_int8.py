"""The dense int8 head on every instruction set, against the definition.

Integer modes are compared bit for bit. Mode "none" must stay within its error bound and give the
same bits on every instruction set, for every batch size, in every call.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from alignops import testing
from alignops.reference import ternary as reference
from tests.ternary.samples import ACTS, DTYPES, Shape, make_bias, make_x

OPS = torch.ops.alignops
MODES = {name: code for code, name in enumerate(ACTS)}


def make_int8(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 64


def linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, act: str) -> Tensor:
    result: Tensor = OPS.ternary_int8_linear(x, q, scale, bias, MODES[act])
    return result


def assert_definition(
    y: Tensor, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, act: str
) -> None:
    expected = reference.int8_linear(x, q, scale, bias, act)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    if act != "none":
        assert torch.equal(y, expected)
        return
    # 16 interleaved sums: K/16 roundings, four more to fold them, scale and bias.
    size = reference.int8_linear(x.abs(), q.abs(), scale, None, "none")
    bound = (x.shape[-1] / 16 + 7) * 2.0**-24 * size + 2.0**-24 * expected.abs()
    unit = torch.finfo(x.dtype)
    cast = unit.eps / 2 * (expected.abs() + bound) + unit.smallest_normal * unit.eps
    assert ((y.double() - expected).abs() <= bound + cast).all()


def shapes() -> list[Shape]:
    columns = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 255, 256, 257, 576, 1000, 2112)
    rows, tokens = (1, 3, 4, 15, 16, 17, 33, 100), (1, 2, 3, 4, 5, 7, 8, 13)
    listed = [
        Shape(rows[i % 8], k, tokens[(3 * i) % 8], None, 1, DTYPES[i % 3], i % 2 == 1)
        for i, k in enumerate(columns)
    ]
    return [
        *listed,
        *(Shape(n, 320, 1, None, 1, torch.bfloat16, True) for n in rows),
        *(Shape(50, 576, m) for m in (*tokens, 64)),
        Shape(7, 64, 0),
    ]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_shapes(isa: str, shape: Shape, act: str) -> None:
    q, scale = make_int8(shape.n, shape.k)
    x, bias = make_x(shape), make_bias(shape)
    assert_definition(linear(x, q, scale, bias, act), x, q, scale, bias, act)


@pytest.mark.parametrize("act", ACTS)
def test_forms_of_x(isa: str, act: str) -> None:
    q, scale = make_int8(21, 100)
    base = torch.randn(6, 8, 101)
    forms = {
        "vector": base[0, 0, :100],
        "matrix at offset 1": base[0, :, 1:],
        "batch": base[..., :100],
        "expanded": base[:1, 0, :100].expand(7, 100),
        "every second row": base[0, ::2, 1:],
        "every second column": torch.randn(4, 200)[:, ::2],
        "transposed": torch.randn(100, 5).t(),
        "empty batch": base[:0, :, :100],
    }
    for x in forms.values():
        assert_definition(linear(x, q, scale, None, act), x, q, scale, None, act)


@pytest.mark.parametrize("act", ACTS)
def test_weights_at_every_offset(isa: str, act: str) -> None:
    """A slice of a larger weight, down to the last byte of its memory."""
    x = torch.randn(2, 77)
    storage, scale = make_int8(1, 40 * 77 + 3)[0][0], torch.rand(40)
    for offset in range(4):
        q = storage[offset : offset + 40 * 77].view(40, 77)
        assert_definition(linear(x, q, scale, None, act), x, q, scale, None, act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("k", [300, 640])
def test_batch_invariance(isa: str, act: str, k: int) -> None:
    q, scale = make_int8(37, k)
    x = torch.randn(13, k).bfloat16()
    together = linear(x, q, scale, None, act)
    for m in (1, 2, 3, 4, 6):
        assert torch.equal(linear(x[:m], q, scale, None, act), together[:m])
    for t in range(13):
        assert torch.equal(linear(x[t], q, scale, None, act), together[t])


@pytest.mark.parametrize("act", ACTS)
def test_results_do_not_depend_on_the_instruction_set(act: str) -> None:
    q, scale = make_int8(70, 700)
    for m in (1, 2, 5):
        x = torch.randn(m, 700)
        results = []
        for isa in testing.available_isas():
            with testing.use_isa(isa):
                results.append(linear(x, q, scale, None, act))
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("act", ["a8", "a8g", "a16"])
@pytest.mark.parametrize("k", [576, 8640, 131072])
def test_largest_sums_are_exact(isa: str, act: str, k: int) -> None:
    """Every product of the largest magnitude and of one sign, and a16's low limb at -128."""
    q = torch.full((3, k), 127, dtype=torch.int8)
    q[1] = -127
    q[2, ::2] = -127
    x = torch.ones(3, k)
    x[1, ::2] = -1
    x[2, 1:] = 32384 / 32639
    scale = torch.rand(3)
    assert_definition(linear(x, q, scale, None, act), x, q, scale, None, act)


@pytest.mark.parametrize("act", ACTS)
def test_special_tokens(isa: str, act: str) -> None:
    q, scale = make_int8(9, 320)
    x = torch.randn(6, 320)
    x[1, 300] = float("nan")
    x[2, 5] = float("inf")
    x[3] = 0
    x[4] *= 1e-38
    y = linear(x, q, scale, None, act)
    assert not y[1:3].isfinite().any()
    assert (y[3] == 0).all()
    kept = [0, 3, 4, 5]
    assert_definition(y[kept], x[kept], q, scale, None, act)


def test_columns_beyond_32_bit_sums_are_refused() -> None:
    q, scale, x = torch.zeros(1, 131073, dtype=torch.int8), torch.ones(1), torch.ones(1, 131073)
    assert linear(x, q, scale, None, "none").item() == 0
    with pytest.raises(ValueError, match=r"weight must have at most 131072 columns .* got 131073"):
        linear(x, q, scale, None, "a8")


@pytest.mark.parametrize("act", ACTS)
def test_weight_without_rows_or_columns(isa: str, act: str) -> None:
    q, scale = make_int8(0, 64)
    assert linear(torch.randn(3, 64), q, scale, None, act).shape == (3, 0)
    q, scale = make_int8(5, 0)
    bias = torch.randn(5)
    assert torch.equal(linear(torch.randn(2, 0), q, scale, bias, act), bias.expand(2, 5))


@given(
    st.integers(1, 70),
    st.integers(1, 600),
    st.integers(1, 10),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_equals_definition_everywhere(
    n: int, k: int, m: int, dtype: torch.dtype, act: str, with_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, scale = make_int8(n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n) if with_bias else None
    for isa in testing.available_isas():
        with testing.use_isa(isa):
            assert_definition(linear(x, q, scale, bias, act), x, q, scale, bias, act)
