"""torch.compile(fullgraph=True): one graph, compiled once, the same bits, no state left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import alignops
from alignops import ternary
from alignops.ternary.layers import Siblings
from tests.ternary.test_convert import TOKENS, Block
from tests.ternary.test_convert import Model as TwoBlocks


def Model() -> TwoBlocks:  # noqa: N802
    """Of one block: tracing takes its time."""
    model = TwoBlocks()
    del model.layers[1]
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Compiled:
    """A function compiled in one graph, the number of compilations, and the ops of each graph."""

    def __init__(self, fn: Callable[..., Any], dynamic: bool | None = None) -> None:
        self.counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        self.fn = torch.compile(fn, fullgraph=True, backend=self.counter, dynamic=dynamic)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    @property
    def compilations(self) -> int:
        return self.counter.frame_count

    def calls(self, op: str, graph: int = -1) -> int:
        """Nodes of the graph and of the graphs inside it that call `op`."""
        modules = self.counter.graphs[graph].modules()
        graphs = [m.graph for m in modules if isinstance(m, torch.fx.GraphModule)]
        return sum(op in str(node.target) for g in graphs for node in g.nodes)


@pytest.mark.parametrize("act", ["auto", "none", "a8", "a8g", "a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(act: str, dtype: torch.dtype) -> None:
    weight = ternary.quantize(torch.randn(40, 96), 32)
    bias = torch.randn(40)
    compiled = Compiled(lambda x: alignops.ternary_linear(x, weight, bias, act))
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 96).to(dtype)
            assert torch.equal(compiled(x), alignops.ternary_linear(x, weight, bias, act))
    assert compiled.compilations == 1


def test_dynamic_batch() -> None:
    model = Model()
    ternary.convert(model, head="int8", fuse=True, progress=False)
    compiled = Compiled(model, dynamic=True)
    compilations = []
    with torch.no_grad():
        for m in (3, 5, 12):
            tokens = TOKENS[:, :m].contiguous()
            assert torch.equal(compiled(tokens), model(tokens))
            compilations.append(compiled.compilations)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(dtype: torch.dtype, fuse: bool, grad: bool) -> None:
    model = Model().to(dtype)
    ternary.convert(model, head="int8", fuse=fuse, progress=False)
    compiled = Compiled(model)
    with torch.set_grad_enabled(grad):
        for step in range(3):
            tokens = (TOKENS + step) % 50
            assert torch.equal(compiled(tokens), model(tokens))
    assert compiled.compilations == 1
    # q/k/v, o, gate/up, down
    assert compiled.calls("ternary_linear") == (4 if fuse else 7)
    siblings = {m._siblings for m in model.modules() if isinstance(m, ternary.TernaryLinear)}
    assert all(not s._kept and s._misses == 0 for s in siblings if isinstance(s, Siblings))
    assert torch.equal(model(TOKENS), compiled(TOKENS))


@pytest.mark.parametrize("fuse", [False, True])
def test_gradients(fuse: bool) -> None:
    model = Model()
    ternary.convert(model, fuse=fuse, progress=False)
    compiled = Compiled(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    eager = torch.autograd.grad(model(TOKENS).square().mean(), parameters)
    traced = torch.autograd.grad(compiled(TOKENS).square().mean(), parameters)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor() -> None:
    block = Block()
    ternary.convert(block, fuse=True, progress=False)
    x = torch.randn(2, 64)
    with torch.no_grad():
        y = torch.compile(block, fullgraph=True)(x)
        torch.testing.assert_close(y, block(x))


def test_weights_may_change_after_compilation() -> None:
    model, other = Model(), Model()
    for m in (model, other):
        ternary.convert(m, fuse=True, progress=False)
    compiled = Compiled(model)
    with torch.no_grad():
        compiled(TOKENS)
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(TOKENS), other(TOKENS))
        model.layers[0].up_proj.weight = other.layers[0].gate_proj.weight
        assert torch.equal(compiled(TOKENS), model(TOKENS))


def test_copies_compile() -> None:
    """A copy has no packed siblings yet; compiled before any call it is right, if not fused."""
    model = Model()
    ternary.convert(model, fuse=True, progress=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(Compiled(other)(TOKENS), model(TOKENS))


def test_weights_that_are_not_packed_yet() -> None:
    with torch.device("meta"):
        layer = ternary.TernaryLinear(64, 40)
    source = ternary.TernaryLinear.from_linear(nn.Linear(64, 40))
    for name, value in source.weight.state_dict().items():
        setattr(layer.weight, name, value)
    layer.bias = source.bias
    compiled = Compiled(layer)
    x = torch.randn(2, 64)
    assert torch.equal(compiled(x), source(x))
    assert torch.equal(compiled(x), source(x))
    assert torch.equal(layer(x), source(x))


def test_sequence_of_weights() -> None:
    weights = [ternary.quantize(torch.randn(n, 64)) for n in (64, 128)]
    x = torch.randn(2, 64)
    expected = alignops.ternary_linear(x, weights)
    compiled = Compiled(lambda x: alignops.ternary_linear(x, weights))
    got = compiled(x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert compiled.calls("ternary_linear") == 1


@pytest.mark.parametrize("make", [ternary.quantize, ternary.int8_quantize])
def test_quantizers(make: Callable[..., Any]) -> None:
    w = torch.randn(40, 96)
    if make is ternary.quantize:
        op, args = torch.ops.alignops.ternary_quantize, (w, 32, 1)
    else:
        op, args = torch.ops.alignops.ternary_int8_quantize, (w,)
    got = Compiled(lambda *a: op(*a))(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, op(*args), strict=True))


def test_export() -> None:
    layer = ternary.TernaryLinear.from_linear(nn.Linear(64, 40))
    x = torch.randn(3, 64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    x = torch.randn(7, 64)
    assert torch.equal(program.module()(x), layer(x))
