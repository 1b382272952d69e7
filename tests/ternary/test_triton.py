"""The Triton kernels against the definition: interpreted, or compiled where there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignops import ternary
from alignops.reference import ternary as reference
from tests.ternary.cuda_layout import cuda_layout
from tests.ternary.samples import DTYPES, SHAPES, Shape, make_bias, make_weight, make_x

kernels = pytest.importorskip("alignops.triton_kernels.ternary", reason="triton is not installed")
from alignops.triton_kernels import _tuning  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTS = {"none": 0, "a8": 1, "a8g": 2}


def steps(shape: Shape) -> int:
    """Tile products of a sample, which the interpreter takes milliseconds for."""
    return -(-shape.m // 16) * -(-shape.n // 32) * -(-shape.k // 32)


SMALL = [s for s in SHAPES if steps(s) <= 25] if DEVICE == "cpu" else SHAPES


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def triton_linear(
    x: Tensor, w: ternary.TernaryWeight, bias: Tensor | None, act: str, config=None
) -> Tensor:
    n, k = w.shape
    y = x.new_empty((*x.shape[:-1], n), device=DEVICE)
    packed = cuda_layout(w.idx, w.sign)
    scale = torch.nn.functional.pad(w.scale.t(), (0, -n % 64)).contiguous()
    args = on_device(x, packed, scale, bias)
    kernels.linear(*args, y, k, w.group, w.stride, ACTS[act], config)
    return y.cpu()


def assert_close(y: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Within `bound` before the cast, and one cast: the interpreter truncates to bfloat16."""
    cut = 1 if DEVICE == "cpu" and y.dtype == torch.bfloat16 else 0.5
    unit = torch.finfo(y.dtype)
    cast = cut * unit.eps * (expected.double().abs() + bound) + unit.smallest_normal * unit.eps
    assert ((y.double() - expected.double()).abs() <= bound + cast).all()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_linear(shape: Shape, act: str) -> None:
    w, weight = make_weight(shape)
    x, bias = make_x(shape), make_bias(shape)
    y = triton_linear(x, weight, bias, act)
    lanes, alpha = reference.quantize(w, shape.group, shape.stride)
    expected = reference.linear(
        x if act == "none" else x.float(), lanes, alpha, bias, shape.group, shape.stride, act
    )
    one_scale = weight.group == shape.k and (act == "a8" or shape.k <= 256)
    if act != "none" and one_scale and (y.dtype != torch.bfloat16 or DEVICE == "cuda"):
        assert torch.equal(y, expected.to(y.dtype))
        return
    size = reference.linear(
        x.double().abs().float(), lanes.abs(), alpha, None, shape.group, shape.stride
    )
    assert_close(y, expected, 1e-6 * (size + (0 if bias is None else bias.double().abs())))


@pytest.mark.parametrize("config", [(32, 64, 128), (16, 128, 64), (64, 32, 32)])
def test_tile_sizes(config: tuple[int, int, int]) -> None:
    shape = Shape(70, 600, 18)
    _, weight = make_weight(shape)
    x = make_x(shape)
    tiles = dict(zip(("BM", "BN", "BK"), config, strict=True))
    y = triton_linear(x, weight, None, "a8", tiles | {"num_warps": 4, "num_stages": 2})
    assert torch.equal(y, triton_linear(x, weight, None, "a8"))


def test_forms_of_x() -> None:
    _, weight = make_weight(Shape(35, 100))
    base = torch.randn(3, 4, 101)
    for x in (base[0, 0, 1:], base[..., :100], base[0, ::2, 1:], base[:1, 0, 1:].expand(3, 100)):
        expected = x.double() @ weight.dequantize().double().T
        torch.testing.assert_close(
            triton_linear(x, weight, None, "none").double(), expected, rtol=1e-5, atol=1e-5
        )
    assert triton_linear(base[:0, :, :100], weight, None, "none").shape == (0, 4, 35)


def test_special_tokens_stay_alone() -> None:
    _, weight = make_weight(Shape(33, 320))
    x = torch.randn(6, 320)
    x[1] = 0
    x[2, 7] = torch.nan
    x[3, 8] = torch.inf
    for act in ACTS:
        y = triton_linear(x, weight, None, act)
        assert not y[1].any()
        assert (~y[2:4].isfinite()).any(1).all()
        alone = triton_linear(x[[0, 4, 5]], weight, None, act)
        assert torch.equal(y[[0, 4, 5]], alone)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear(dtype: torch.dtype, act: str) -> None:
    for n, k, m in ((33, 70, 9), (64, 300, 17)):
        q, scale = ternary.int8_quantize(torch.randn(n, k))
        x, bias = make_x(Shape(n, k, m, dtype=dtype)), torch.randn(n)
        y = torch.empty(m, n, dtype=dtype, device=DEVICE)
        kernels.int8_linear(*on_device(x, q, scale, bias), y, ACTS[act])
        expected = reference.int8_linear(
            x if act == "none" else x.float(), q, scale, bias, act
        ).double()
        size = x.double().abs() @ (q.double() * scale[:, None]).abs().T
        assert_close(y.cpu(), expected, 1e-6 * (size + bias.abs()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "group", "stride"),
    [(9, 7, 7, 1), (17, 100, 100, 1), (8, 300, 32, 1), (5, 320, 128, 1), (9, 448, 64, 16)],
)
def test_fake_quant(n: int, k: int, group: int, stride: int, dtype: torch.dtype) -> None:
    w = torch.randn(n, k).to(dtype)
    w[0, 1::3] = 0
    w[n // 2] = 0.25
    for strength in (0.0, 0.375):
        lam = torch.tensor(strength)
        expected = torch.ops.alignops.ternary_fake_quant(w, lam, group, stride, torch.float32)
        out = torch.empty(n, k, device=DEVICE)
        kernels.fake_quant(*on_device(w, lam), out, group, stride)
        assert torch.equal(out.cpu(), expected)
    half = torch.empty(n, k, dtype=torch.bfloat16, device=DEVICE)
    kernels.fake_quant(*on_device(w, lam), half, group, stride)
    assert_close(half.cpu(), expected, 0.0)


def test_fake_quant_of_views() -> None:
    wide = torch.randn(6, 200)
    for w in (wide[:, 1:101], wide[:, ::2], wide[:5].t()):
        out = torch.empty(w.shape, device=DEVICE)
        lam = torch.tensor(0.5)
        kernels.fake_quant(*on_device(w, lam), out, w.shape[1], 1)
        expected = torch.ops.alignops.ternary_fake_quant(w, lam, w.shape[1], 1, torch.float32)
        assert torch.equal(out.cpu(), expected)


# Choice of tile sizes


def fake_tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    with FakeTensorMode():
        return torch.empty(m, k, dtype=dtype, device="cuda:0")


@pytest.fixture
def gpu_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("ALIGNOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Maker (R) Chip-7")
    caches = (_tuning._table, _tuning.device_name)
    for cache in caches:
        cache.cache_clear()
    yield "maker-r-chip-7"
    for cache in caches:
        cache.cache_clear()


def unused(config: _tuning.Config) -> None:
    raise AssertionError("nothing may be launched")


def test_rule_without_a_table(gpu_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNOPS_AUTOTUNE", raising=False)
    for m in (9, 16, 17, 33, 65, 4096):
        for dtype in (*DTYPES, torch.int8):
            config = _tuning.config("ternary_linear", fake_tokens(m, 576, dtype), 192, unused)
            assert config == _tuning.rule(m, dtype.itemsize)
            assert all(v & (v - 1) == 0 for key, v in config.items() if key != "num_stages")


def test_table_in_the_cache_folder_wins(gpu_name: str, tmp_path: Path) -> None:
    found = _tuning.CANDIDATES[5]
    key = "ternary_linear/bfloat16/m128/n192/k576"
    (tmp_path / f"{gpu_name}.json").write_text(json.dumps({key: found}))
    x = fake_tokens(100, 576, torch.bfloat16)
    assert _tuning.config("ternary_linear", x, 192, unused) == found
    other = _tuning.config("ternary_linear", x, 193, unused)
    assert other == _tuning.rule(100, 2) != found


def test_search_is_stored(gpu_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNOPS_AUTOTUNE", "1")
    monkeypatch.setattr(_tuning, "_search", lambda m, launch: _tuning.CANDIDATES[3])
    x = fake_tokens(9, 64, torch.int8)
    assert _tuning.config("ternary_linear", x, 32, unused) == _tuning.CANDIDATES[3]
    stored = json.loads((tmp_path / f"{gpu_name}.json").read_text())
    assert stored == {"ternary_linear/int8/m16/n32/k64": _tuning.CANDIDATES[3]}


def test_shipped_tables_are_complete() -> None:
    for path in (Path(_tuning.__file__).parent / "configs").glob("*.json"):
        for key, config in json.loads(path.read_text()).items():
            assert len(key.split("/")) == 5
            assert set(config) == set(_tuning.CANDIDATES[0])


def test_import_needs_no_gpu() -> None:
    """Kernels are made without asking for a GPU, also when they are not interpreted."""
    code = (
        "import os, torch; os.environ.pop('TRITON_INTERPRET', None)\n"
        "torch.cuda._lazy_init = torch.cuda.get_device_name = None\n"
        "import alignops.triton_kernels.ternary as t\n"
        "assert type(t.linear_kernel).__name__ == 'JITFunction'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
