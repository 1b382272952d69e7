"""Properties over random inputs (hypothesis), and all instruction sets against each other."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import alignops
from alignops import ternary, testing
from alignops.reference import ternary as reference
from tests.ternary.samples import ACTS, DTYPES

ISAS = testing.available_isas()


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int | None, int]:
    """w, group, stride; with zeros, ties and a wide range of magnitudes."""
    stride = draw(st.sampled_from([1, 1, 16]))
    n = draw(st.integers(1, 70))
    k = 64 * draw(st.integers(1, 6)) if stride == 16 else draw(st.integers(1, 400))
    unit = 64 if stride == 16 else 32
    group = draw(st.sampled_from([None, *range(unit, k, unit)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(n, k, generator=generator)
    kind = draw(st.sampled_from(["gauss", "few values", "wide"]))
    if kind == "few values":
        w = w.round()
    elif kind == "wide":
        w = w * 10 ** (6 * torch.randn(n, k, generator=generator))
    return w.to(draw(st.sampled_from(DTYPES[:2]))), group, stride


@given(weights())
def test_quantize_equals_definition_everywhere(case: tuple[Tensor, int | None, int]) -> None:
    w, group, stride = case
    lanes, alpha = reference.quantize(w, group, stride)
    idx, sign = reference.to_planes(reference.encode(lanes))
    for isa in ISAS:
        with testing.use_isa(isa):
            weight = ternary.quantize(w, group, stride)
            assert torch.equal(weight.idx, idx)
            assert torch.equal(weight.sign, sign)
            assert torch.equal(weight.scale, alpha)
            dense = weight.dequantize()
            assert torch.equal(dense, reference.dequantize(lanes, alpha, w.shape[1], group, stride))


@given(weights())
def test_quantize_is_idempotent(case: tuple[Tensor, int | None, int]) -> None:
    w, group, stride = case
    weight = ternary.quantize(w, group, stride)
    again = ternary.quantize(weight.dequantize(), group, stride)
    live = (weight.scale > 0).all(1)
    assert torch.equal(again.idx[live], weight.idx[live])
    assert torch.equal(again.sign[live], weight.sign[live])
    assert torch.equal(again.scale, weight.scale)


@given(weights())
def test_pack_and_unpack_round_trip(case: tuple[Tensor, int | None, int]) -> None:
    w, group, stride = case
    weight = ternary.quantize(w, group, stride)
    for isa in ISAS:
        with testing.use_isa(isa):
            packed, _, n, k, *_, layout = weight.ready()
            idx, sign = torch.ops.alignops.ternary_unpack(packed, n, k, layout)
            assert torch.equal(idx, weight.idx)
            assert torch.equal(sign, weight.sign)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32))
def test_every_plane_byte_is_a_code(n: int, k: int, seed: int) -> None:
    """Planes of random bytes multiply like the lanes they decode to."""
    generator = torch.Generator().manual_seed(seed)
    idx_bytes, sign_bytes = ternary.checks.plane_bytes(k)
    idx = torch.randint(0, 256, (n, idx_bytes), dtype=torch.uint8, generator=generator)
    sign = torch.randint(0, 256, (n, sign_bytes), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, 1, generator=generator)
    weight = ternary.TernaryWeight(idx, sign, scale, (n, k))
    lanes = reference.decode(reference.from_planes(idx, sign, k))
    assert torch.equal(weight.dequantize(), reference.dequantize(lanes, scale, k))
    x = torch.randn(2, k, generator=generator)
    for isa in ISAS:
        with testing.use_isa(isa):
            y = alignops.ternary_linear(x, weight, act="a16")
            assert torch.equal(y, reference.linear(x, lanes, scale, act="a16"))


@given(
    weights(),
    st.integers(1, 30),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTS),
    st.integers(0, 2**32),
)
def test_linear_equals_definition_everywhere(
    case: tuple[Tensor, int | None, int], m: int, dtype: torch.dtype, act: str, seed: int
) -> None:
    w, group, stride = case
    w = w.clamp(-100, 100)
    weight = ternary.quantize(w, group, stride)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, w.shape[1], generator=generator).to(dtype)
    results = []
    for isa in ISAS:
        with testing.use_isa(isa):
            results.append(alignops.ternary_linear(x, weight, act=act))
    assert all(torch.equal(y, results[0]) for y in results)
    lanes, alpha = reference.quantize(w, group, stride)
    if act != "none":
        assert torch.equal(results[0], reference.linear(x, lanes, alpha, None, group, stride, act))
    elif dtype == torch.float32:
        error = (results[0] - reference.linear(x, lanes, alpha, None, group, stride)).abs()
        assert (error <= reference.none_error_bound(x, lanes, alpha, group, stride) + 1e-44).all()
