"""Gradients of the kernels against gradients of the definition."""

import pytest
import torch
from torch import Tensor

import alignops
from alignops import ternary
from tests.ternary.samples import ACTS, DTYPES, Shape, make_weight, make_x


def assert_gradient(got: Tensor, g: Tensor, dense: Tensor) -> None:
    """`got` = g @ dense, within float32 sums of N terms, rounding of dense, and one cast."""
    exact = g.double() @ dense.double()
    size = g.double().abs() @ dense.double().abs()
    eps = torch.finfo(got.dtype).eps
    bound = (g.shape[-1] * 2.0**-23 + 2 * eps) * size + eps * exact.abs()
    assert got.dtype == g.dtype
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["auto", *ACTS])
def test_linear(isa: str, act: str, dtype: torch.dtype) -> None:
    for shape in (
        Shape(37, 100, 3, 32, dtype=dtype),
        Shape(64, 128, 1, None, 16, dtype=dtype),
        Shape(7, 9, 0, dtype=dtype),
    ):
        _, weight = make_weight(shape)
        x = make_x(shape).requires_grad_()
        for bias_dtype in {torch.float32, dtype}:
            bias = torch.randn(shape.n).to(bias_dtype).requires_grad_()
            y = alignops.ternary_linear(x, weight, bias, act)
            g = torch.randn_like(y)
            grad_x, grad_bias = torch.autograd.grad(y, (x, bias), g)
            assert_gradient(grad_x, g, weight.dequantize())
            total = g.double().sum(0)
            unit = torch.finfo(bias_dtype).eps
            close = (grad_bias.double() - total).abs() <= unit * total.abs() + 1e-5
            assert grad_bias.dtype == bias_dtype
            assert close.all()


def test_forms_of_x() -> None:
    _, weight = make_weight(Shape(35, 100))
    for x in (torch.randn(100), torch.randn(2, 3, 100), torch.randn(100, 4).t()):
        x.requires_grad_()
        y = alignops.ternary_linear(x, weight)
        g = torch.randn_like(y)
        y.backward(g)
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert_gradient(x.grad, g, weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear(isa: str, dtype: torch.dtype) -> None:
    q, scale = ternary.int8_quantize(torch.randn(37, 100))
    x = torch.randn(5, 100).to(dtype).requires_grad_()
    bias = torch.randn(37, requires_grad=True)
    y = ternary.int8_linear(x, q, scale, bias)
    g = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), g)
    assert_gradient(grad_x, g, q * scale[:, None])
    torch.testing.assert_close(grad_bias, g.float().sum(0))


def test_sequence_of_weights() -> None:
    weights = [ternary.quantize(torch.randn(n, 64)) for n in (64, 128)]
    biases = [None, torch.randn(128, requires_grad=True)]
    x = torch.randn(3, 64, requires_grad=True)
    outputs = alignops.ternary_linear(x, weights, biases)
    gradients = [torch.randn_like(y) for y in outputs]
    outputs[0].mul_(1)  # outputs may be changed in place
    torch.autograd.backward(outputs, gradients)
    assert x.grad is not None
    assert biases[1] is not None
    assert biases[1].grad is not None
    dense = torch.cat([w.dequantize() for w in weights])
    assert_gradient(x.grad, torch.cat(gradients, 1), dense)
    torch.testing.assert_close(biases[1].grad, gradients[1].sum(0))


def test_only_what_needs_a_gradient() -> None:
    _, weight = make_weight(Shape(5, 64))
    x, bias = torch.randn(2, 64), torch.randn(5, requires_grad=True)
    y = alignops.ternary_linear(x, weight, bias)
    y.sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full((5,), 2.0))
    with torch.no_grad():
        assert not alignops.ternary_linear(x, weight, bias).requires_grad
    assert not alignops.ternary_linear(x, weight).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quant(isa: str, dtype: torch.dtype) -> None:
    w = torch.randn(9, 65).to(dtype).requires_grad_()
    lam = torch.tensor(0.25)
    y = torch.ops.alignops.ternary_fake_quant(w, lam, 32, 1, torch.float32)
    g = torch.randn_like(y)
    y.backward(g)
    assert w.grad is not None
    assert torch.equal(w.grad, (1.25 * g).to(dtype))


def test_gradient_checkpointing() -> None:
    _, weight = make_weight(Shape(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    plain = torch.autograd.grad(alignops.ternary_linear(x, weight).square().sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(
        lambda t: alignops.ternary_linear(t, weight), x, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], plain)
