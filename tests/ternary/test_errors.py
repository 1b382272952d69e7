"""Invalid arguments: native code and fake kernels raise the same about the same argument."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import alignops
from alignops import ternary
from tests.ternary.samples import INVALID, Invalid

LABELS = [(name, i) for name, make in INVALID.items() for i, _ in enumerate(make())]


def label(value: object) -> str:
    return str(value)


def one(name: str, index: int) -> Invalid:
    return list(INVALID[name]())[index]


@pytest.mark.parametrize(("name", "index"), LABELS, ids=label)
def test_native_and_fake_refuse_alike(name: str, index: int) -> None:
    sample = one(name, index)
    op = getattr(torch.ops.alignops, name)
    pattern = f"^{name}: {sample.argument} must "
    with pytest.raises(ValueError, match=pattern):
        op(*sample.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = pytree.tree_map_only(torch.Tensor, mode.from_tensor, sample.args)
        with pytest.raises(ValueError, match=pattern):
            op(*args)


def test_messages_hold_expected_and_got() -> None:
    weight = ternary.quantize(torch.randn(4, 64))
    with pytest.raises(
        ValueError,
        match=r"ternary_linear: x must have last dimension K=64 \(from packed weight\), "
        r"got shape \(2, 63\)",
    ):
        alignops.ternary_linear(torch.randn(2, 63), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_weights_are_counted_and_located(
    isa: str, value: float, dtype: torch.dtype
) -> None:
    w = torch.randn(70, 129).to(dtype)
    w[3, 128] = w[60, 0] = w[3, 5] = value
    for call in (lambda: ternary.quantize(w), lambda: ternary.int8_quantize(w)):
        with pytest.raises(ValueError, match=r"w must be finite, got 3 .*\(3, 5\)"):
            call()


def test_wrong_types() -> None:
    x, w = torch.randn(2, 64), torch.randn(4, 64)
    weight = ternary.quantize(w)
    cases: list[tuple[Any, str]] = [
        (lambda: alignops.ternary_linear(np.zeros((2, 64)), weight), "x must be a Tensor"),
        (lambda: alignops.ternary_linear(x.double(), weight), "x must be .* got float64"),
        (lambda: alignops.ternary_linear(x.int(), weight), "x must be .* got int32"),
        (lambda: alignops.ternary_linear(x, w), "weight must be a TernaryWeight"),
        (lambda: alignops.ternary_linear(x, [w]), "weight must be a TernaryWeight"),
        (lambda: alignops.ternary_linear(x, weight, bias=1.0), "bias must be a Tensor"),
        (lambda: ternary.int8_linear(x.double(), *ternary.int8_quantize(w)), "x must be"),
        (lambda: ternary.quantize(w.int()), "w must be a floating point"),
        (lambda: ternary.quantize(w.numpy()), "w must be a floating point"),
        (lambda: ternary.quantize(w, group=32.0), "group must be an int"),
        (lambda: ternary.quantize(w, stride=True), "stride must be an int"),
    ]
    for call, text in cases:
        with pytest.raises(TypeError, match=text):
            call()


def test_wrong_values() -> None:
    x, w = torch.randn(2, 64), torch.randn(4, 64)
    weight, other = ternary.quantize(w), ternary.quantize(torch.randn(4, 32))
    stack = ternary.quantize(torch.randn(2, 4, 64))
    cases: list[tuple[Any, str]] = [
        (lambda: alignops.ternary_linear(x, weight, act="int8"), "act must be one of auto"),
        (lambda: alignops.ternary_linear(x, stack), r"weight must have shape \(N, K\)"),
        (lambda: alignops.ternary_linear(x, [weight], [None, None]), "bias must have one entry"),
        (lambda: ternary.TernaryLinear(64, 4, act="fast"), "act must be one of"),
        (lambda: ternary.Int8Linear(64, 4, act="fast"), "act must be one of"),
        (lambda: ternary.quantize(w, scale_dtype=torch.float64), "scale_dtype must be"),
        (lambda: ternary.quantize(torch.randn(64)), "w must have shape"),
        (lambda: ternary.quantize(torch.randn(1, 1, 1, 64)), "w must have shape"),
        (lambda: ternary.quantize(torch.randn(0, 64)), "not be empty"),
        (lambda: ternary.quantize(torch.randn(64, 0)), "not be empty"),
        (lambda: ternary.quantize(w, group=30), "group must be a multiple of 32"),
        (lambda: ternary.quantize(w, group=128), "group must be"),
        (lambda: ternary.quantize(w, group=32, stride=16), "group must be a multiple of 64"),
        (lambda: ternary.quantize(torch.randn(4, 72), stride=16), "k must be a multiple of 64"),
        (lambda: ternary.quantize(w, stride=4), "stride must be 1 or 16"),
        (lambda: ternary.TernaryWeight.cat([weight, other]), "weights must have equal K"),
        (lambda: weight.unbind(), r"shape must be \(E, N, K\)"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize(
    ("name", "plane"),
    [
        ("idx", torch.zeros(4, 7, dtype=torch.uint8)),
        ("idx", torch.zeros(4, 8, dtype=torch.int8)),
        ("sign", torch.zeros(3, 2, dtype=torch.uint8)),
        ("scale", torch.zeros(4, 2)),
        ("scale", torch.zeros(4, 1, dtype=torch.float64)),
    ],
)
def test_planes_of_wrong_size_or_dtype(name: str, plane: torch.Tensor) -> None:
    weight = ternary.quantize(torch.randn(4, 64))
    planes = {"idx": weight.idx, "sign": weight.sign, "scale": weight.scale} | {name: plane}
    with pytest.raises(ValueError, match=f"TernaryWeight: {name} must be"):
        ternary.TernaryWeight(**planes, shape=(4, 64))


def test_scales_that_do_not_fit_their_dtype() -> None:
    w = torch.ones(3, 64)
    w[1] = 1e5
    with pytest.raises(ValueError, match=r"float16 must hold every scale, got 100000 .*\(1, 0\)"):
        ternary.quantize(w, scale_dtype=torch.float16)
    w[1] = 1e-9
    with pytest.raises(ValueError, match=r"float16 must hold every scale"):
        ternary.quantize(w, scale_dtype=torch.float16)
    w[1] = 0
    assert ternary.quantize(w, scale_dtype=torch.float16).scale[1] == 0


def test_failed_calls_change_nothing() -> None:
    layer = ternary.TernaryLinear.from_linear(nn.Linear(64, 8))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="x must"):
        layer(torch.randn(2, 65))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
