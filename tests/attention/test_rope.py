"""Frequencies against those of transformers and the formulas; rotations against exact ones."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alignops.attention import RopeSpec, UnsupportedModel
from alignops.reference.attention import rope as reference

LLAMA3: dict[str, Any] = {"factor": 8.0, "original_length": 8192}
LLAMA3_HF = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARNS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_length": 32768},
    {"factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"factor": 32.0, "original_length": 4096, "beta_fast": 32.0, "truncate": False},
    {"factor": 4.0, "original_length": 32768, "attention_factor": 1.5, "beta_slow": 2.0},
    {"factor": 2.0, "original_length": 8},  # both bounds at 0
]
SIZES = [(128, 1e6), (64, 10000.0), (80, 500000.0), (96, 150000.0), (2, 10000.0)]


def library(kind: str, dim: int, theta: float, **options: Any) -> tuple[Tensor, float]:
    options["original_max_position_embeddings"] = options.pop("original_length", 8192)
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=options.pop("length", 4096),
        rope_parameters={"rope_type": kind, "rope_theta": theta, **options},
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config)


def check_ulp(spec: RopeSpec, expected: tuple[Tensor, float]) -> None:
    """Equal to one unit in the last place of float32."""
    got = torch.tensor(spec.inv_freq)
    want = expected[0].float()
    assert got.shape == want.shape
    assert (got.view(torch.int32) - want.view(torch.int32)).abs().max() <= 1
    assert spec.attention_factor == pytest.approx(expected[1], rel=1e-15)


def check_formula(spec: RopeSpec, expected: Tensor) -> None:
    """Powers in float32 lose about ln(theta) units."""
    torch.testing.assert_close(
        torch.tensor(spec.inv_freq, dtype=torch.float64), expected, rtol=2e-6, atol=0
    )


@pytest.mark.parametrize(("dim", "theta"), SIZES)
def test_frequencies_are_those_of_transformers(dim: int, theta: float) -> None:
    plain = RopeSpec.default(dim, theta)
    check_ulp(plain, library("default", dim, theta))
    check_formula(plain, reference.default(dim, theta))

    linear = RopeSpec.linear(dim, theta, factor=3.0)
    check_ulp(linear, library("linear", dim, theta, factor=3.0))
    check_formula(linear, reference.linear(dim, theta, 3.0))

    llama3 = RopeSpec.llama3(dim, theta, **LLAMA3)
    check_ulp(llama3, library("llama3", dim, theta, **LLAMA3, **LLAMA3_HF))
    check_formula(llama3, reference.llama3(dim, theta, 8.0, 1.0, 4.0, 8192))

    short = [1.0 + 0.01 * i for i in range(dim // 2)]
    long = [1.0 + 0.5 * i for i in range(dim // 2)]
    for factors, length in ((short, 4096), (long, 4097)):
        spec = RopeSpec.longrope(dim, theta, factors=factors, original_length=4096, factor=32.0)
        config = LlamaConfig(
            hidden_size=dim,
            num_attention_heads=1,
            head_dim=dim,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": theta,
                "short_factor": short,
                "long_factor": long,
                "original_max_position_embeddings": 4096,
            },
        )
        check_ulp(spec, ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length))
        check_formula(spec, reference.longrope(dim, theta, factors))
        assert spec.attention_factor == reference.longrope_attention_factor(32.0, 4096)


@pytest.mark.parametrize(("dim", "theta"), SIZES)
@pytest.mark.parametrize("options", YARNS)
def test_yarn_is_that_of_transformers(dim: int, theta: float, options: dict[str, Any]) -> None:
    spec = RopeSpec.yarn(dim, theta, **options)
    check_ulp(spec, library("yarn", dim, theta, **options))
    formula = {k: v for k, v in options.items() if k not in ("mscale", "mscale_all_dim")}
    given = formula.pop("attention_factor", None)
    check_formula(spec, reference.yarn(dim, theta, **formula))
    a = reference.yarn_attention_factor(
        options["factor"], options.get("mscale"), options.get("mscale_all_dim")
    )
    assert spec.attention_factor == pytest.approx(given or a, rel=1e-15)


def test_dynamic_is_refused_unless_frozen() -> None:
    options: dict[str, Any] = {"factor": 4.0, "original_length": 2048, "length": 8192}
    with pytest.raises(UnsupportedModel, match="freeze_dynamic=True"):
        RopeSpec.dynamic(64, **options)
    spec = RopeSpec.dynamic(64, **options, freeze_dynamic=True)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )
    check_ulp(spec, ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=8192))
    check_formula(spec, reference.dynamic(64, 10000.0, 4.0, 2048, 8192))
    module = LlamaRotaryEmbedding(config)
    with pytest.raises(UnsupportedModel, match="LlamaRotaryEmbedding: dynamic"):
        RopeSpec.from_module(module)
    frozen = RopeSpec.from_module(module, freeze_dynamic=True)
    check_ulp(frozen, ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=2048))


def test_frequencies_of_a_module_are_read() -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    )
    module = LlamaRotaryEmbedding(config)
    spec = RopeSpec.from_module(module, pairs="interleaved", offset=8)
    assert spec.inv_freq == tuple(module.inv_freq.tolist())
    assert spec == RopeSpec.yarn(
        64, factor=4.0, original_length=2048, pairs="interleaved", offset=8
    )
    assert spec.attention_factor == module.attention_scaling > 1
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert len({spec, copy.deepcopy(spec)}) == 1


def specs() -> list[RopeSpec]:
    return [
        RopeSpec.default(64, pairs=pairs, offset=offset)
        for pairs in ("half", "interleaved")
        for offset in (0, 16)
    ] + [RopeSpec.yarn(64, factor=4.0, original_length=512)]


@pytest.mark.parametrize("spec", specs())
def test_rotation_is_that_of_the_reference(spec: RopeSpec) -> None:
    x = torch.randn(2, 3, 5, 96)
    positions = torch.randint(0, 1 << 20, (2, 1, 5))
    table = reference.rotations(torch.tensor(spec.inv_freq), positions, torch.float64)
    expected = spec.attention_factor * reference.rotate(
        x.double(), table, offset=spec.offset, interleaved=spec.interleaved
    )
    torch.testing.assert_close(spec.rotate(x, positions).double(), expected, rtol=0, atol=2e-6)
    for dtype in (torch.bfloat16, torch.float16):  # one rounding
        got = spec.rotate(x.to(dtype), positions)
        assert got.dtype == dtype
        again = spec.rotate(x.to(dtype).float(), positions).to(dtype)
        assert torch.equal(got, again)
    other = torch.ones(96, dtype=torch.bool)
    other[spec.offset : spec.offset + spec.rotary_dim] = False
    assert torch.equal(spec.rotate(x, positions)[..., other], spec.scale(x)[..., other])


@pytest.mark.parametrize("offset", [0, 2])
def test_pair_orders_are_the_same_map_up_to_order(offset: int) -> None:
    half = RopeSpec.default(8, offset=offset)
    neighbours = RopeSpec.default(8, pairs="interleaved", offset=offset)
    x, positions = torch.randn(4, 12), torch.arange(4)
    order = torch.arange(12)
    order[offset : offset + 8] = offset + torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    got = neighbours.rotate(x[:, order], positions)
    assert torch.equal(got, half.rotate(x, positions)[:, order])


def test_a_query_turned_back_meets_a_key_as_stored() -> None:
    spec = RopeSpec.default(64, theta=1e6)
    q, k = torch.randn(64).double(), torch.randn(64).double()
    p, o, j = 5000, 4321, 17
    query, key = (spec.rotate(x, torch.tensor(n)) for x, n in ((q, p), (k, o + j)))
    turned, stored = (spec.rotate(x, torch.tensor(n)) for x, n in ((q, p - o), (k, j)))
    assert query @ key == pytest.approx(float(turned @ stored), abs=1e-5)


@pytest.mark.parametrize(("position", "fp32"), [(4096, 7e-5), (131072, 2.4e-3), (1 << 20, 2.0e-2)])
def test_errors_of_angles(position: int, fp32: float) -> None:
    """Scaled logits of random queries and keys; fp32 angles are a hundred times worse."""
    spec = RopeSpec.default(128, theta=1e6)
    q, k = torch.randn(2, 400, 128)
    positions = position - torch.randint(0, 64, (2, 400))
    table = reference.rotations(torch.tensor(spec.inv_freq), positions, torch.float64)
    exact = [reference.rotate(x.double(), t) for x, t in zip((q, k), table, strict=True)]
    scale = 128**-0.5
    want = (exact[0] * exact[1]).sum(-1) * scale
    error = {}
    for precision in ("fp64", "fp32"):
        a, b = (
            spec.rotate(x, n, angle_precision=precision).double()
            for x, n in zip((q, k), positions, strict=True)
        )
        error[precision] = float(((a * b).sum(-1) * scale - want).abs().max())
    assert error["fp64"] <= 1e-6
    assert 0.02 * fp32 <= error["fp32"] <= 2 * fp32


def test_tables_are_exact_to_rounding() -> None:
    spec = RopeSpec.default(128, theta=1e6)
    positions = torch.cat(
        [torch.arange(-100, 4000), torch.randint(0, 1 << 20, (2, 1000)).flatten()]
    )
    table = reference.rotations(torch.tensor(spec.inv_freq), positions, torch.float64)
    error = (spec.rotations(positions).double() - table).abs().max()
    assert error <= 0.51 * 2.0**-24
    shaped = spec.rotations(positions.reshape(4, -1))
    assert torch.equal(shaped.flatten(0, 1), spec.rotations(positions))


def test_fp32_angles_are_those_of_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=1)
    module = LlamaRotaryEmbedding(config)
    spec = RopeSpec.from_module(module)
    positions = torch.tensor([[0, 1, 37, 20000, 1 << 20]])
    cos, sin = module(torch.zeros(1), positions)
    table = spec.rotations(positions, angle_precision="fp32")
    assert torch.equal(table[..., 0], cos[..., :32])
    assert torch.equal(table[..., 1], sin[..., :32])


def test_the_factor_is_applied_once_to_a_side() -> None:
    spec = RopeSpec.yarn(64, factor=4.0, original_length=512)
    a = 0.1 * math.log(4) + 1
    x = torch.randn(7, 64)
    norms = spec.rotate(x, torch.arange(7)).norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((7,), a))
    torch.testing.assert_close(spec.scale(x), a * x)
    assert torch.equal(spec.rotate(x, torch.zeros(7, dtype=torch.int64)), spec.scale(x))
    plain = RopeSpec.default(64)
    assert torch.equal(plain.scale(x), x)


def test_rotation_has_a_gradient() -> None:
    spec = RopeSpec.yarn(4, factor=4.0, original_length=64, pairs="interleaved", offset=1)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: spec.rotate(t, torch.arange(3)), (x,))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RopeSpec.default(7), "rotary_dim must be even and positive, got 7"),
        (lambda: RopeSpec.default(0), "rotary_dim must be even and positive, got 0"),
        (lambda: RopeSpec.default(8, 1.0), "theta must be above 1"),
        (lambda: RopeSpec.default(8, pairs="gptj"), "pairs must be one of"),
        (lambda: RopeSpec.default(8, offset=-1), "offset must be at least 0, got -1"),
        (lambda: RopeSpec(()), "inv_freq must be finite numbers"),
        (lambda: RopeSpec((math.nan,)), "inv_freq must be finite numbers"),
        (lambda: RopeSpec((1.0,), attention_factor=0.0), "attention_factor must be positive"),
        (lambda: RopeSpec.linear(8, factor=0.0), "factor must be positive, got 0"),
        (
            lambda: RopeSpec.llama3(8, factor=8.0, original_length=64, low_freq_factor=4.0),
            "low_freq_factor must be positive and below high_freq_factor 4.0, got 4.0",
        ),
        (
            lambda: RopeSpec.yarn(8, factor=8.0, original_length=64, beta_fast=1.0),
            "beta_fast must be above beta_slow, both positive, got 1.0 and 1.0",
        ),
        (
            lambda: RopeSpec.longrope(8, factors=[1.0], original_length=64, factor=2.0),
            "factors must be 4 positive numbers",
        ),
        (
            lambda: RopeSpec.longrope(4, factors=[1.0, 2.0], original_length=64),
            "factor or attention_factor must be given",
        ),
        (
            lambda: RopeSpec.default(8).rotate(torch.zeros(1, 6), torch.zeros(1)),
            r"rope must rotate dimensions of a head of 6, got \[0, 8\)",
        ),
        (
            lambda: RopeSpec.default(8).rotations(torch.zeros(1), angle_precision="fp16"),
            "angle_precision must be one of",
        ),
    ],
)
def test_errors(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
