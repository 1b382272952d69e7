"""Valid and invalid inputs of every ternary op: for parity, opcheck, errors and fuzzing.

A valid sample is a tuple of arguments of `torch.ops.alignops.<op>`; an invalid one also names the
argument that the error message must name. Both are made when asked for, for the active ISA.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignops import _native, ternary
from alignops.ternary.weight import Pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("none", "a8", "a8g", "a16")


@dataclass(frozen=True)
class Shape:
    """A matmul: N x K weight, scale groups and stride, M tokens, dtype of x, bias or not."""

    n: int
    k: int
    m: int = 1
    group: int | None = None
    stride: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = False

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.n}x{self.k}", ("f32", "bf16", "f16")[DTYPES.index(self.dtype)]]
        parts += [f"g{self.group}"] if self.group else []
        parts += ["s16"] if self.stride == 16 else []
        return "-".join(parts + (["bias"] if self.bias else []))


def _shapes() -> list[Shape]:
    """Each K, N and M that may trip a tile, a tail or a panel, with dtypes and biases mixed in."""
    columns = (*range(1, 10), 31, 32, 33, 63, 64, 65, 255, 256, 257, 576, 1000)
    rows = (1, 7, 31, 32, 33, 63, 64, 65, 192)
    tokens = (1, 2, 3, 7, 8, 9, 4, 5, 13, 1, 25)
    shapes = []
    for i, k in enumerate(columns):
        n, m = rows[i % len(rows)], tokens[i % len(tokens)]
        shapes.append(Shape(n, k, m, None, 1, DTYPES[i % 3], i % 2 == 1))
    for i, n in enumerate(rows):
        shapes.append(Shape(n, 100 + i, tokens[-i], None, 1, DTYPES[i % 3], i % 2 == 0))
    for i, (k, group) in enumerate(
        [(64, 32), (576, 128), (65, 32), (300, 96), (520, 256), (1030, 512), (700, 320), (256, 64)]
    ):
        shapes.append(Shape(rows[-i], k, tokens[i], group, 1, DTYPES[i % 3], i % 2 == 0))
    for i, (k, group) in enumerate([(64, None), (256, 64), (576, 128), (320, 256), (1024, None)]):
        shapes.append(Shape(33 + i, k, 1 + 3 * i, group, 16, DTYPES[i % 3], i % 2 == 0))
    shapes += [
        Shape(8640, 64, 2),
        Shape(33, 8640, 2, None, 1, torch.bfloat16),
        Shape(33, 3200, 17, 128, 1, torch.bfloat16, True),
        Shape(40, 96, 333, 32, 1, torch.float16),
        Shape(65, 256, 64),
        Shape(3, 8, 0),
    ]
    return shapes


SHAPES = _shapes()


def make_weight(shape: Shape) -> tuple[Tensor, ternary.TernaryWeight]:
    """A Gaussian weight (N, K) and its quantized form."""
    w = torch.randn(shape.n, shape.k)
    return w, ternary.quantize(w, shape.group, shape.stride)


def make_x(shape: Shape) -> Tensor:
    """Activations with outliers: (M, K), heavy tailed."""
    x = torch.randn(shape.m, shape.k)
    return (x * (1 + x.abs() ** 3)).to(shape.dtype)


def make_bias(shape: Shape) -> Tensor | None:
    """Float32 for odd N, else in the dtype of x."""
    if not shape.bias:
        return None
    return torch.randn(shape.n).to(torch.float32 if shape.n % 2 else shape.dtype)


# Samples of the ops


@dataclass
class Invalid:
    """Arguments that must be refused with a ValueError about `argument`."""

    label: str
    args: tuple[Any, ...]
    argument: str


_SMALL = (
    Shape(5, 9),
    Shape(33, 96, 2, 32, 1, torch.bfloat16, True),
    Shape(64, 128, 3, None, 16, torch.float16),
    Shape(7, 64, 0),
)


def _quantize() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        yield torch.randn(s.n, s.k).to(s.dtype), s.group or s.k, s.stride
    yield torch.randn(40, 12).t(), 40, 1
    yield torch.randn(9, 65)[1::2, 1:], 64, 16


def _bad_matrix(rest: tuple[Any, ...]) -> Iterator[Invalid]:
    yield Invalid("vector", (torch.randn(8), *rest), "w")
    yield Invalid("float64", (torch.randn(4, 64).double(), *rest), "w")
    yield Invalid("integers", (torch.ones(4, 64, dtype=torch.int32), *rest), "w")


def _bad_groups(make: Callable[[int, int, int], tuple[Any, ...]]) -> Iterator[Invalid]:
    """`make(k, group, stride)` gives arguments."""
    for k, group in ((64, 0), (64, 128), (64, 16), (64, 33), (128, -32)):
        yield Invalid(f"group {group} of {k}", make(k, group, 1), "group")
    yield Invalid("group 32, stride 16", make(128, 32, 16), "group")
    yield Invalid("stride 2", make(64, 64, 2), "stride")
    yield Invalid("stride 16, k 72", make(72, 72, 16), "k")


def _bad_quantize() -> Iterator[Invalid]:
    yield from _bad_matrix((64, 1))
    yield from _bad_groups(lambda k, group, stride: (torch.randn(2, k), group, stride))
    yield Invalid("no rows", (torch.randn(0, 64), 64, 1), "w")
    yield Invalid("no columns", (torch.randn(4, 0), 0, 1), "w")


def _planes(n: int, k: int) -> tuple[Tensor, Tensor]:
    weight = ternary.quantize(torch.randn(n, k))
    return weight.idx, weight.sign


def _dequantize() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        _, w = make_weight(s)
        yield w.idx, w.sign, w.scale, s.k, w.group, s.stride, s.dtype


def _bad_planes(make: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> Iterator[Invalid]:
    """`make(idx, sign)` gives arguments for planes of shape (4, 64)."""
    idx, sign = _planes(4, 64)
    yield Invalid("idx as vector", make(idx[0], sign), "idx")
    yield Invalid("idx too narrow", make(idx[:, 1:].contiguous(), sign), "idx")
    yield Invalid("idx of int8", make(idx.to(torch.int8), sign), "idx")
    yield Invalid("idx with strides", make(idx.t().contiguous().t(), sign), "idx")
    yield Invalid("sign of other rows", make(idx, sign[1:]), "sign")
    yield Invalid("sign of bool", make(idx, sign.bool()), "sign")


def _bad_dequantize() -> Iterator[Invalid]:
    idx, sign = _planes(4, 64)
    scale, f32 = torch.ones(4, 1), torch.float32
    yield from _bad_planes(lambda i, s: (i, s, scale, 64, 64, 1, f32))
    yield from _bad_groups(lambda k, group, stride: (*_planes(4, k), scale, k, group, stride, f32))
    yield Invalid("k of 0", (idx, sign, scale, 0, 0, 1, f32), "k")
    yield Invalid("scale of half", (idx, sign, scale.half(), 64, 64, 1, f32), "scale")
    yield Invalid("scale of one group", (idx, sign, scale, 64, 32, 1, f32), "scale")
    yield Invalid("to float64", (idx, sign, scale, 64, 64, 1, torch.float64), "dtype")


def _fake_quant() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        w = torch.randn(s.n, s.k, requires_grad=True)
        yield w, torch.tensor(0.25), s.group or s.k, s.stride, s.dtype
    yield torch.randn(4, 64).bfloat16(), torch.tensor(0.0), 64, 1, torch.float32


def _bad_fake_quant() -> Iterator[Invalid]:
    lam, f32 = torch.tensor(0.5), torch.float32
    yield from _bad_matrix((lam, 64, 1, f32))
    yield from _bad_groups(lambda k, group, stride: (torch.randn(2, k), lam, group, stride, f32))
    w = torch.randn(4, 64)
    yield Invalid("lam of half", (w, lam.half(), 64, 1, f32), "lam")
    yield Invalid("lam as vector", (w, lam[None], 64, 1, f32), "lam")
    yield Invalid("to int8", (w, lam, 64, 1, torch.int8), "dtype")


def _prepack() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        _, w = make_weight(s)
        for layout in sorted({0, _native.cpu_layout}):
            yield w.idx, w.sign, s.k, layout


def _bad_prepack() -> Iterator[Invalid]:
    layout = _native.cpu_layout
    yield from _bad_planes(lambda i, s: (i, s, 64, layout))
    yield Invalid("k of 0", (*_planes(4, 64), 0, layout), "k")
    yield Invalid("unknown layout", (*_planes(4, 64), 64, 9), "layout")


def _pack(shape: Shape) -> Pack:
    return make_weight(shape)[1].ready()


def _unpack() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        packed, _, n, k, _, _, layout = _pack(s)
        yield packed, n, k, layout


def _bad_unpack() -> Iterator[Invalid]:
    packed, _, n, k, _, _, layout = _pack(_SMALL[0])
    yield Invalid("short", (packed[1:], n, k, layout), "packed")
    yield Invalid("int8", (packed.to(torch.int8), n, k, layout), "packed")
    yield Invalid("n of 0", (packed, 0, k, layout), "n")
    yield Invalid("k of 0", (packed, n, 0, layout), "k")
    yield Invalid("unknown layout", (packed, n, k, -1), "layout")


def _linear() -> Iterator[tuple[Any, ...]]:
    for i, s in enumerate(_SMALL):
        packed, scale, *rest, layout = _pack(s)
        x, bias = make_x(s), make_bias(s)
        for act in (0, 1 + i % 3):
            yield x, packed, scale, bias, *rest, act, layout
    packed, scale, *rest, layout = _pack(Shape(8, 12))
    for x in (
        torch.randn(12),
        torch.randn(2, 3, 12),
        torch.randn(12, 4).t(),
        torch.randn(3, 13)[:, 1:],
        torch.randn(1, 12).expand(3, 12),
    ):
        yield x, packed, scale, None, *rest, 2, layout


def _bad_linear() -> Iterator[Invalid]:
    packed, scale, n, k, group, stride, layout = _pack(Shape(4, 64))
    x = torch.randn(2, 64)

    def args(**changes: Any) -> tuple[Any, ...]:
        names = {
            "x": x,
            "packed": packed,
            "scale": scale,
            "bias": None,
            "n": n,
            "k": k,
            "group": group,
            "stride": stride,
            "act": 0,
            "layout": layout,
        }
        return tuple((names | changes).values())

    yield Invalid("x of 63 columns", args(x=x[:, 1:]), "x")
    yield Invalid("x as scalar", args(x=torch.tensor(1.0)), "x")
    yield Invalid("x of float64", args(x=x.double()), "x")
    yield Invalid("x of integers", args(x=x.int()), "x")
    yield Invalid("packed too short", args(packed=packed[1:]), "packed")
    yield Invalid("packed of int8", args(packed=packed.to(torch.int8)), "packed")
    yield Invalid("packed for other rows", args(n=90, scale=torch.zeros(1, 128)), "packed")
    yield Invalid("scale not padded", args(scale=scale[:, :4].contiguous()), "scale")
    yield Invalid("scale of half", args(scale=scale.half()), "scale")
    yield Invalid("scale of one group", args(group=32), "scale")
    yield Invalid("bias of 3", args(bias=torch.randn(3)), "bias")
    yield Invalid("bias of float64", args(bias=torch.randn(4).double()), "bias")
    yield Invalid("bias of half", args(bias=torch.randn(4).half()), "bias")
    yield Invalid("bias as matrix", args(bias=torch.randn(1, 4)), "bias")
    yield Invalid("n of 0", args(n=0), "n")
    yield Invalid("k of 0", args(k=0), "k")
    yield Invalid("group of 48", args(group=48), "group")
    yield Invalid("stride of 4", args(stride=4), "stride")
    yield Invalid("act of 4", args(act=4), "act")
    yield Invalid("another layout", args(layout=layout + 1), "packed")


def _int8_quantize() -> Iterator[tuple[Any, ...]]:
    for s in _SMALL:
        yield (torch.randn(s.n, s.k).to(s.dtype),)
    yield (torch.randn(40, 12).t(),)


def _bad_int8_quantize() -> Iterator[Invalid]:
    yield from _bad_matrix(())
    yield Invalid("no rows", (torch.randn(0, 64),), "w")
    yield Invalid("no columns", (torch.randn(4, 0),), "w")


def _int8_linear() -> Iterator[tuple[Any, ...]]:
    for i, s in enumerate(_SMALL):
        weight, scale = ternary.int8_quantize(torch.randn(s.n, s.k))
        x, bias = make_x(s), make_bias(s)
        for act in (0, 1 + i % 3):
            yield x, weight, scale, bias, act
    yield torch.randn(2, 3, 12)[..., 1:], *ternary.int8_quantize(torch.randn(4, 11)), None, 2


def _bad_int8_linear() -> Iterator[Invalid]:
    weight, scale = ternary.int8_quantize(torch.randn(4, 64))
    x = torch.randn(2, 64)
    yield Invalid("x of 63 columns", (x[:, 1:], weight, scale, None, 0), "x")
    yield Invalid("x as scalar", (torch.tensor(1.0), weight, scale, None, 0), "x")
    yield Invalid("x of float64", (x.double(), weight, scale, None, 0), "x")
    yield Invalid("weight as vector", (x, weight[0], scale, None, 0), "weight")
    yield Invalid("weight of uint8", (x, weight.to(torch.uint8), scale, None, 0), "weight")
    yield Invalid("weight with strides", (x, weight[:, :32], scale, None, 0), "weight")
    yield Invalid("scale of 3", (x, weight, scale[1:], None, 0), "scale")
    yield Invalid("scale of half", (x, weight, scale.half(), None, 0), "scale")
    yield Invalid("bias of 3", (x, weight, scale, torch.randn(3), 0), "bias")
    yield Invalid("bias of half", (x, weight, scale, torch.randn(4).half(), 0), "bias")
    yield Invalid("act of -1", (x, weight, scale, None, -1), "act")


VALID: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "ternary_quantize": _quantize,
    "ternary_dequantize": _dequantize,
    "ternary_fake_quant": _fake_quant,
    "ternary_prepack": _prepack,
    "ternary_unpack": _unpack,
    "ternary_linear": _linear,
    "ternary_int8_quantize": _int8_quantize,
    "ternary_int8_linear": _int8_linear,
}

INVALID: dict[str, Callable[[], Iterator[Invalid]]] = {
    "ternary_quantize": _bad_quantize,
    "ternary_dequantize": _bad_dequantize,
    "ternary_fake_quant": _bad_fake_quant,
    "ternary_prepack": _bad_prepack,
    "ternary_unpack": _bad_unpack,
    "ternary_linear": _bad_linear,
    "ternary_int8_quantize": _bad_int8_quantize,
    "ternary_int8_linear": _bad_int8_linear,
}
