"""The probe on tiny random models of the architectures that the installed release has."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from alignops.attention import RopeSpec, UnsupportedModel
from alignops.integrations.attention_probe import FAR, probe_rope
from tests.attention.probe_models import LAYERS, known, tiny

ALL = (0,) * LAYERS
WITHOUT_LAST = (0, 0, 0, None)
# Kind, order of pairs, rotary dimensions, offset, spec of each layer.
FITS: list[tuple[str, str, int, int, tuple[int | None, ...]]] = [
    *(
        (kind, "half", 16, 0, ALL)
        for kind in (
            *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma"),
            *("gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "olmoe", "starcoder2", "granite"),
            *("granitemoe", "seed_oss", "gpt_oss", "arcee", "apertus", "bitnet", "ministral"),
            *("hy_v3", "jais2", "minimax_m2", "vaultgemma"),
        )
    ),
    *((kind, "half", 16, 0, WITHOUT_LAST) for kind in ("smollm3", "exaone4", "exaone_moe")),
    *((kind, "half", 8, 0, ALL) for kind in ("phi", "nemotron", "persimmon", "glm4_moe")),
    *((kind, "half", 4, 0, ALL) for kind in ("stablelm", "gpt_neox")),
    *((kind, "interleaved", 16, 0, ALL) for kind in ("cohere", "ernie4_5", "helium")),
    ("cohere2", "interleaved", 16, 0, WITHOUT_LAST),
    *((kind, "interleaved", 8, 0, ALL) for kind in ("glm", "glm4")),
    *((kind, "half", 16, 32, ALL) for kind in ("deepseek_v3", "minicpm3", "youtu")),
    ("deepseek_v2", "interleaved", 16, 32, ALL),
]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def need(kind: str) -> None:
    if kind not in known():
        pytest.skip(f"this release of transformers has no {kind}")


@pytest.mark.parametrize(("kind", "pairs", "dim", "offset", "layers"), FITS)
def test_fits(kind: str, pairs: str, dim: int, offset: int, layers: tuple[int | None, ...]) -> None:
    need(kind)
    model = tiny(kind)
    before = model.config._attn_implementation
    rope = probe_rope(model)
    assert model.config._attn_implementation == before
    assert rope.layer_spec == layers
    (spec,) = rope.specs
    assert (spec.pairs, spec.rotary_dim, spec.offset) == (pairs, dim, offset)
    assert (spec.attention_factor > 1) == (kind == "gpt_oss")


def test_layer_types_with_own_frequencies() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = tiny("gemma3_text", layer_types=types)
    rope = probe_rope(model)
    assert rope.layer_spec == (0, 1, 0, 1)
    held = [
        tuple(getattr(model.model.rotary_emb, f"{kind}_inv_freq").tolist()) for kind in types[:2]
    ]
    assert [spec.inv_freq for spec in rope.specs] == held
    assert held[0] != held[1]


def test_llama4_without_chunks_and_temperature() -> None:
    need("llama4_text")
    options: dict[str, Any] = {"attn_temperature_tuning": False, "attention_chunk_size": 128}
    rope = probe_rope(tiny("llama4_text", **options))
    assert rope.layer_spec == WITHOUT_LAST
    assert rope.specs[0].pairs == "interleaved"
    with pytest.raises(UnsupportedModel, match="attn_temperature_tuning"):
        probe_rope(tiny("llama4_text", attention_chunk_size=128))
    with pytest.raises(UnsupportedModel, match="layer 0 attends within chunks of 64 tokens"):
        probe_rope(tiny("llama4_text", **(options | {"attention_chunk_size": 64})))


def test_a_model_that_turns_the_other_way() -> None:
    need("nanochat")
    rope = probe_rope(tiny("nanochat"))
    assert rope.specs[0].inv_freq[0] == -1.0


@pytest.mark.parametrize(
    "rope_parameters",
    [
        YARN,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_scaled_frequencies(rope_parameters: dict[str, Any]) -> None:
    model = tiny("llama", rope_parameters=rope_parameters)
    (spec,) = probe_rope(model).specs
    assert spec.inv_freq == tuple(model.model.rotary_emb.inv_freq.tolist())
    assert spec.attention_factor == model.model.rotary_emb.attention_scaling
    assert (spec.attention_factor > 1) == (rope_parameters["rope_type"] == "yarn")


@pytest.mark.parametrize("original", [64, FAR + 10000])
def test_longrope_has_two_sets(original: int) -> None:
    short, long = [1.0] * 8, [1.0 + i for i in range(8)]
    rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": long,
        "factor": 4.0,
        "original_max_position_embeddings": original,
    }
    model = tiny(
        "phi3",
        rope_parameters=rope_parameters,
        max_position_embeddings=4 * original,
        original_max_position_embeddings=original,
    )
    before = model.model.rotary_emb.inv_freq.clone()
    for which, factors in (("short", short), ("long", long)):
        (spec,) = probe_rope(model, longrope=which).specs
        expected = RopeSpec.longrope(16, factors=factors, original_length=original, factor=4.0)
        assert spec == expected
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with pytest.raises(ValueError, match="longrope must be 'short' or 'long', got 'both'"):
        probe_rope(model, longrope="both")


def test_dynamic_frequencies_are_refused_unless_frozen() -> None:
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny("llama", rope_parameters=rope_parameters)
    with pytest.raises(UnsupportedModel, match="freeze_dynamic=True"):
        probe_rope(model)
    before = model.model.rotary_emb.inv_freq.clone()
    (spec,) = probe_rope(model, freeze_dynamic=True).specs
    assert spec.inv_freq == tuple(before.tolist())
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "cohere", "phi", "mixtral", "gemma2"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    if kind == "mixtral" and dtype == torch.float64:
        pytest.skip("the library's experts do not compute in float64")
    model = tiny(kind)
    expected = probe_rope(model)
    model.to(dtype)
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    assert rotary.inv_freq.dtype == dtype
    rounded = tuple(rotary.inv_freq.float().tolist())
    (spec,) = probe_rope(model).specs
    assert spec == dataclasses.replace(expected.specs[0], inv_freq=rounded)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gpt2", "layer 0 has values that depend on the position: learned"),
        ("gpt_bigcode", "layer 0 has values that depend on the position: learned"),
        ("opt", "layer 0 has values that depend on the position: learned"),
        ("bert", "layer 0 is not causal"),
        ("mpt", "takes no position_ids"),
        ("bloom", "takes no position_ids"),
        ("rwkv", "takes no position_ids"),
        ("falcon", "layer 0 calls the attention interface 0 times"),
        ("gpt_neo", "layer 0 calls the attention interface 0 times"),
        ("diffllama", "layer 0 calls the attention interface 2 times"),
        ("doge", "layer 0 attends by a mask of its own"),
        ("ministral3", "layer 0 has queries whose size depends on the position, 1.069 times"),
        ("hunyuan_v1_dense", "layer 0 has queries whose size depends on the position"),
        ("jamba", "layer 0 is of kind 'linear_attention'"),
        ("qwen3_next", "layer 0 is of kind 'linear_attention'"),
        ("falcon_h1", "layer 0 is of kind 'hybrid'"),
        ("lfm3", "layer 0 is of kind 'conv'"),
        ("deepseek_v32", "layer 0 is of kind 'indexed_attention'"),
    ],
)
def test_refused(kind: str, text: str) -> None:
    need(kind)
    with pytest.raises(UnsupportedModel, match=text):
        probe_rope(tiny(kind))


def test_gptj_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"GPTJForCausalLM: layer 0 .* holds no freq"):
        probe_rope(tiny("gptj", rotary_dim=8, n_positions=FAR + 1))
    with pytest.raises(UnsupportedModel, match=r"positions \[20000\] without a cache failed"):
        probe_rope(tiny("gptj", rotary_dim=8))


def test_mrope_is_refused() -> None:
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    model = tiny("qwen2")
    model.config.rope_parameters = rope_parameters
    with pytest.raises(UnsupportedModel, match="M-RoPE"):
        probe_rope(model)


def test_a_training_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        probe_rope(tiny("llama").train())


class Faulty:
    """A Llama model whose third layer does something else."""

    def __init__(self, fault: str) -> None:
        self.model = tiny("llama")
        layer = self.model.model.layers[2]
        original = layer.self_attn.forward

        def forward(hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            if fault == "frequencies":
                sin = sin * 0.99
            elif fault == "neighbour":
                hidden_states = hidden_states.clone()
                hidden_states[:, 1:] += 0.1 * hidden_states[:, :-1].clone()
            elif fault == "values":
                hidden_states = hidden_states + 0.01 * sin.sum()
            elif fault == "window":
                kwargs["bias"] = torch.zeros(1)
            return original(hidden_states, position_embeddings=(cos, sin), **kwargs)

        layer.self_attn.forward = forward


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("frequencies", "layer 2 has queries whose size depends on the position"),
        ("neighbour", "layer 2 sees another token or its column besides attention"),
        ("values", "layer 2 has values that depend on the position"),
        ("window", "layer 2 passes bias to attention"),
    ],
)
def test_the_layer_and_the_reason_are_named(fault: str, text: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"LlamaForCausalLM: {text}"):
        probe_rope(Faulty(fault).model)


def test_frequencies_that_are_not_those_of_the_model() -> None:
    model = tiny("llama")
    rotary = model.model.rotary_emb
    other = copy.deepcopy(rotary)
    other.inv_freq.mul_(1.01)
    rotary.forward = other.forward
    with pytest.raises(UnsupportedModel, match="layer 0 turns queries and keys by no frequencies"):
        probe_rope(model)


def test_layers_without_keys_of_their_own() -> None:
    model = tiny("llama")
    first, second = model.model.layers[0].self_attn, model.model.layers[1]
    original = second.self_attn.forward

    def forward(hidden_states: Any, **kwargs: Any) -> Any:
        keys = first.kept
        second.self_attn.k_proj.forward = lambda _: keys
        return original(hidden_states, **kwargs)

    project = first.k_proj.forward

    def keep(x: Any) -> Any:
        first.kept = project(x)
        return first.kept

    first.k_proj.forward = keep
    second.self_attn.forward = forward
    with pytest.raises(UnsupportedModel, match="layer 1 has no keys of its own but those of laye"):
        probe_rope(model)


def test_the_model_says_the_same_before_and_after() -> None:
    model, ids = tiny("llama"), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        probe_rope(model)
        assert torch.equal(model(ids).logits, before)
