"""Every op on a GPU against the definition and the CPU, with the samples of the CPU tests."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import alignops
from alignops import _native, ternary
from alignops.reference import ternary as reference
from alignops.ternary import ops
from tests.ternary.cuda_layout import cuda_layout
from tests.ternary.samples import (
    DTYPES,
    INVALID,
    SHAPES,
    VALID,
    Shape,
    make_bias,
    make_weight,
    make_x,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = "cuda:0"
ACTS = {"none": 0, "a8": 1, "a8g": 2}
# The op of each implementation: C++ for few tokens, Triton for many, both right for any number.
LINEAR = ("ternary_linear", "ternary_linear_triton")
INT8_LINEAR = ("ternary_int8_linear", "ternary_int8_linear_triton")


def to_gpu(args: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(GPU), args)


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.alignops, name)


def test_library_is_loaded() -> None:
    assert _native.cuda_loaded, "this torch has CUDA: build with ALIGNOPS_CUDA=1"


# Weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        w = torch.randn(shape.n, shape.k).to(dtype)
        w[:, ::7] = 0.25
        weight = ternary.quantize(w, shape.group, shape.stride)
        other = ternary.quantize(w.to(GPU), shape.group, shape.stride)
        for name in ("idx", "sign", "scale"):
            assert torch.equal(getattr(other, name).cpu(), getattr(weight, name)), (shape, name)
        for out in DTYPES:
            assert torch.equal(other.dequantize(out).cpu(), weight.dequantize(out)), shape
        packed = op("ternary_prepack")(other.idx, other.sign, shape.k, ops.CUDA_LAYOUT)
        assert torch.equal(packed.cpu(), cuda_layout(weight.idx, weight.sign)), shape
        planes = op("ternary_unpack")(packed, shape.n, shape.k, ops.CUDA_LAYOUT)
        assert torch.equal(planes[0], other.idx)
        assert torch.equal(planes[1], other.sign)
        for a, b in zip(ternary.int8_quantize(w), ternary.int8_quantize(w.to(GPU)), strict=True):
            assert torch.equal(a, b.cpu()), shape


def test_views_of_weights() -> None:
    wide = torch.randn(70, 200)
    for w in (wide[:, 1:101], wide[::2, :64], wide[:64].t()):
        a, b = ternary.quantize(w), ternary.quantize(w.to(GPU))
        assert torch.equal(a.idx, b.idx.cpu())
        assert torch.equal(a.scale, b.scale.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quant(dtype: torch.dtype) -> None:
    for n, k, group, stride in (
        (9, 7, 7, 1),
        (33, 300, 32, 1),
        (64, 2048, 2048, 1),
        (9, 448, 64, 16),
    ):
        w, lam = torch.randn(n, k).to(dtype), torch.tensor(0.375)
        expected = op("ternary_fake_quant")(w, lam, group, stride, dtype)
        w_gpu = w.to(GPU).requires_grad_()
        out = op("ternary_fake_quant")(w_gpu, lam.to(GPU), group, stride, dtype)
        assert torch.equal(out.cpu(), expected)
        out.backward(torch.ones_like(out))
        assert torch.equal(w_gpu.grad.cpu(), torch.full_like(w, 1.375))


# Products


def assert_linear(
    y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, shape: Shape, act: str
) -> None:
    """Bit for bit where one scale applies to an integer sum; else float32 sums and one cast."""
    lanes, alpha = reference.quantize(w, shape.group, shape.stride)
    expected = reference.linear(x, lanes, alpha, bias, shape.group, shape.stride, act)
    assert y.dtype == x.dtype
    if act == "a8" and shape.group in (None, shape.k):
        assert torch.equal(y.cpu(), expected)
        return
    size = reference.linear(x.abs(), lanes.abs(), alpha, None, shape.group, shape.stride)
    size = size + (0 if bias is None else bias.double().abs())
    unit = torch.finfo(x.dtype)
    cast = unit.eps * expected.double().abs() + unit.smallest_normal * unit.eps
    assert ((y.cpu().double() - expected.double()).abs() <= 1e-5 * size + cast).all()


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: Shape, act: str, name: str) -> None:
    w, weight = make_weight(shape)
    x, bias = make_x(shape), make_bias(shape)
    packed, scale, *rest, layout = weight.to(GPU).ready()
    y = op(name)(*to_gpu((x, packed, scale, bias)), *rest, ACTS[act], layout)
    assert_linear(y, x, w, bias, shape, act)


@pytest.mark.parametrize("m", [1, 8, 9, 100])
def test_the_number_of_tokens_chooses(m: int) -> None:
    shape = Shape(192, 576, m, dtype=torch.bfloat16, bias=True)
    w, weight = make_weight(shape)
    x, bias = make_x(shape), make_bias(shape)
    weight.to(GPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = alignops.ternary_linear(*to_gpu((x,)), weight, *to_gpu((bias,)))
    assert_linear(y, x, w, bias, shape, "none")
    called = {event.key for event in profile.key_averages()}
    assert f"alignops::{LINEAR[m > 8]}" in called


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("act", ACTS)
def test_forms_of_x(act: str, name: str) -> None:
    shape = Shape(35, 128)
    w, weight = make_weight(shape)
    packed, scale, *rest, layout = weight.to(GPU).ready()
    base = torch.randn(6, 8, 132, device=GPU).bfloat16()
    for x in (
        base[0, 0, :128],
        base[0, :, 1:129],
        base[0, :, 4:],
        base[..., :128],
        base[0, :, :128].t().contiguous().t(),
        base[:1, 0, :128].expand(7, 128),
        base[0, ::2, 1:129],
        base[:0, :, :128],
    ):
        y = op(name)(x, packed, scale, None, *rest, ACTS[act], layout)
        assert y.shape == (*x.shape[:-1], 35)
        assert_linear(y, x.cpu(), w, None, shape, act)


@pytest.mark.parametrize("act", ACTS)
def test_tokens_do_not_depend_on_each_other(act: str) -> None:
    _, weight = make_weight(Shape(70, 1000, group=None))
    weight.to(GPU)
    x = torch.randn(8, 1000, device=GPU)
    alone = torch.cat([alignops.ternary_linear(row[None], weight, act=act) for row in x])
    for m in range(1, 9):
        for _ in range(3):
            assert torch.equal(alignops.ternary_linear(x[:m], weight, act=act), alone[:m])
    special = x.clone()
    special[1] = 0
    special[2, 17] = torch.nan
    special[4, 999] = torch.inf
    y = alignops.ternary_linear(special, weight, act=act)
    assert not y[1].any()
    assert (~y[[2, 4]].isfinite()).any(1).all()
    assert torch.equal(y[[0, 3, 5, 6, 7]], alone[[0, 3, 5, 6, 7]])


@pytest.mark.parametrize("name", INT8_LINEAR)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear(dtype: torch.dtype, act: str, name: str) -> None:
    for n, k, m in ((1, 1, 1), (7, 65, 3), (33, 576, 9), (130, 257, 2), (64, 4096, 20), (5, 48, 0)):
        q, scale = ternary.int8_quantize(torch.randn(n, k))
        x, bias = make_x(Shape(n, k, m, dtype=dtype)), torch.randn(n)
        y = op(name)(*to_gpu((x, q, scale, bias)), ACTS[act])
        expected = reference.int8_linear(x, q, scale, bias, act)
        if act == "a8":
            assert torch.equal(y.cpu(), expected)
            continue
        size = x.double().abs() @ (q.double() * scale[:, None]).abs().T + bias.abs()
        unit = torch.finfo(dtype)
        cast = unit.eps * expected.double().abs() + unit.smallest_normal * unit.eps
        assert ((y.cpu().double() - expected.double()).abs() <= 1e-5 * size + cast).all()


def test_a16_is_refused() -> None:
    _, weight = make_weight(Shape(32, 64))
    weight.to(GPU)
    for m in (1, 20):
        with pytest.raises(ValueError, match=r"ternary_linear: act must be .* on a GPU"):
            alignops.ternary_linear(torch.randn(m, 64, device=GPU), weight, act="a16")


def test_mixed_devices_are_refused() -> None:
    _, weight = make_weight(Shape(32, 64))
    weight.to(GPU)
    packed, scale, *rest, layout = weight.ready()
    for name in LINEAR:
        for args, argument in (
            ((torch.randn(2, 64), packed, scale, None), "x|packed"),
            ((torch.randn(2, 64, device=GPU), packed.cpu(), scale, None), "packed"),
            ((torch.randn(2, 64, device=GPU), packed, scale.cpu(), None), "scale"),
            ((torch.randn(2, 64, device=GPU), packed, scale, torch.randn(32)), "bias"),
        ):
            with pytest.raises(ValueError, match=f"ternary_linear: ({argument}) must be on "):
                op(name)(*args, *rest, 0, layout)


# Operators as torch sees them


def gpu_samples(name: str) -> Iterator[tuple[Any, ...]]:
    """The samples of the CPU with tensors and layouts of the GPU."""
    base = name.removesuffix("_triton")
    for args in VALID[base]():
        moved = list(
            pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().to(GPU).requires_grad_(t.requires_grad), args
            )
        )
        if base in ("ternary_prepack", "ternary_unpack"):
            moved[-1] = ops.CUDA_LAYOUT
        if base == "ternary_linear":
            n, k, layout = args[4], args[5], args[-1]
            moved[1] = cuda_layout(*op("ternary_unpack")(args[1], n, k, layout)).to(GPU)
            moved[-1] = ops.CUDA_LAYOUT
        if base == "ternary_unpack":
            packed, n, k, layout = args
            moved[0] = cuda_layout(*op("ternary_unpack")(packed, n, k, layout)).to(GPU)
        if base in ("ternary_linear", "ternary_int8_linear"):
            act = -2 if base == "ternary_linear" else -1
            moved[act] = min(moved[act], 2)
        yield tuple(moved)


NAMES = sorted({*VALID, LINEAR[1], INT8_LINEAR[1]})


def test_every_operator_is_tested() -> None:
    found = torch._C._dispatch_get_all_op_names()
    assert {
        name.removeprefix("alignops::") for name in found if name.startswith("alignops::ternary_")
    } == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    for args in gpu_samples(name):
        torch.library.opcheck(op(name).default, args)


@pytest.mark.parametrize("name", sorted(INVALID))
def test_invalid_arguments(name: str) -> None:
    for sample in INVALID[name]():
        args = list(to_gpu(sample.args))
        if name == "ternary_linear":
            args[-1] = ops.CUDA_LAYOUT + (sample.label == "another layout")
            if args[1].dtype == torch.uint8 and "packed" not in sample.label:
                args[1] = torch.zeros(640, dtype=torch.uint8, device=GPU)
        elif name in ("ternary_prepack", "ternary_unpack") and sample.argument != "layout":
            args[-1] = ops.CUDA_LAYOUT
        with pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            op(name)(*args)


def test_gradients() -> None:
    for m in (2, 40):
        _, weight = make_weight(Shape(64, 300, m, 32))
        x, bias = torch.randn(m, 300), torch.randn(64)
        results = []
        for device in ("cpu", GPU):
            leaves = [t.to(device).requires_grad_() for t in (x, bias)]
            y = alignops.ternary_linear(leaves[0], weight.to(device), leaves[1])
            y.square().sum().backward()
            results.append([leaf.grad.cpu() for leaf in leaves])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


def test_cuda_graph() -> None:
    layers = [ternary.TernaryLinear.from_linear(nn.Linear(256, 256)).to(GPU) for _ in range(2)]
    head = ternary.Int8Linear.from_linear(nn.Linear(256, 300)).to(GPU)

    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            return head(layers[1](layers[0](x)))

    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 20):
            x = torch.randn(m, 256, device=GPU, dtype=dtype)
            for _ in range(3):
                model(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, model(x))


def test_current_stream() -> None:
    """Work goes to torch's current stream: after what is queued there, before what follows."""
    _, weight = make_weight(Shape(512, 512))
    weight.to(GPU)
    stream = torch.cuda.Stream()
    for m in (1, 20):
        x, later = torch.zeros(m, 512, device=GPU), torch.randn(m, 512, device=GPU)
        expected = alignops.ternary_linear(later, weight)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.copy_(later)
            y = alignops.ternary_linear(x, weight)
            x.zero_()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 20])
def test_compile(m: int) -> None:
    layer = ternary.TernaryLinear.from_linear(nn.Linear(256, 128)).to(GPU)
    head = ternary.Int8Linear.from_linear(nn.Linear(128, 70)).to(GPU)
    x = torch.randn(m, 256, device=GPU, dtype=torch.bfloat16)
    compiled = torch.compile(lambda t: head(layer(t).relu()), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), head(layer(x).relu()))


# Modules


def test_modules_move() -> None:
    model = nn.Sequential(
        ternary.TernaryLinear.from_linear(nn.Linear(96, 40), 32),
        ternary.Int8Linear.from_linear(nn.Linear(40, 33)),
    )
    x = torch.randn(3, 96)
    with torch.no_grad():
        expected = model(x)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        model.cuda()
        torch.testing.assert_close(model(x.to(GPU)).cpu(), expected, rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x.to(GPU)), model(x.to(GPU)))
        for name, t in model.state_dict().items():
            assert torch.equal(t.cpu(), state[name]), name
        model[0].weight.prepack(release=True)
        torch.testing.assert_close(twin(x.to(GPU)), model(x.to(GPU)))
        model.cpu()
        assert torch.equal(model(x), expected)
        for name, t in model.state_dict().items():
            assert torch.equal(t, state[name]), name


def test_sequence_of_weights() -> None:
    weights = [ternary.quantize(torch.randn(n, 192)).to(GPU) for n in (64, 128, 64)]
    biases = [torch.randn(64, device=GPU), None, None]
    for m in (1, 20):
        x = torch.randn(m, 192, device=GPU)
        outputs = alignops.ternary_linear(x, weights, biases)
        for y, w, b in zip(outputs, weights, biases, strict=True):
            torch.testing.assert_close(y, alignops.ternary_linear(x, w, b))


def test_convert_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(GPU)
    x = torch.randn(2, 128, device=GPU)
    other = copy.deepcopy(model).cpu()
    ternary.convert(model, exclude=(), act="none", progress=False)
    ternary.convert(other, exclude=(), act="none", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x).cpu(), other(x.cpu()), rtol=1e-4, atol=1e-4)


def test_arenas_step() -> None:
    schedule = ternary.ArenasSchedule(10)
    layer = ternary.ArenasLinear.from_linear(nn.Linear(64, 32), schedule).to(GPU)
    x = torch.randn(5, 64, device=GPU)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
