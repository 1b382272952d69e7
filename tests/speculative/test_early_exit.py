"""The first layers of a model: the values of a model that has no others, and the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from alignops.integrations.early_exit import early_exit
from alignops.speculative import speculative_generate

SIZES = {
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {},
}


def model_of(kind: str, depth: int = 3) -> Any:
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        vocab_size=23,
        max_position_embeddings=32,
        **({} if kind in ("gpt2", "bloom", "opt") else {"intermediate_size": 24}),
        **SIZES[kind],
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", SIZES)
def test_view_is_a_model_of_fewer_layers(kind: str) -> None:
    model = model_of(kind)
    view = early_exit(model, 2)
    shorter = model_of(kind, depth=2)
    missing = shorter.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    ids = torch.randint(0, 23, (2, 7))
    whole = model(ids).logits
    assert torch.equal(view(ids).logits, shorter(ids).logits)
    assert not torch.equal(view(ids).logits, whole)
    assert torch.equal(model(ids).logits, whole)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", SIZES)
def test_weights_are_shared(kind: str) -> None:
    model = model_of(kind)
    view = early_exit(model, 1)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in view.parameters())
    ids = torch.randint(0, 23, (1, 4))
    before = view(ids).logits
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not torch.equal(view(ids).logits, before)


def test_all_layers_are_the_model() -> None:
    model = model_of("llama")
    ids = torch.randint(0, 23, (1, 4))
    assert torch.equal(early_exit(model, 3)(ids).logits, model(ids).logits)


def test_view_generates_with_a_cache() -> None:
    view = early_exit(model_of("qwen3"), 2)
    ids = torch.tensor([[1, 2, 3]])
    got = view.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = ids
    for _ in range(got.shape[1] - 3):
        text = torch.cat([text, view(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, text)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
def test_view_drafts_for_its_model(kind: str) -> None:
    model = model_of(kind).double()
    view = early_exit(model, 2)
    prompts = torch.randint(1, 23, (3, 5))
    plain = speculative_generate(model, None, prompts, max_new_tokens=12, eos_token_id=[])
    out = speculative_generate(
        model, view, prompts, max_new_tokens=12, eos_token_id=[], return_stats=True
    )
    assert torch.equal(out.sequences, plain)
    assert out.stats.offered > 0
    everything = speculative_generate(
        model,
        early_exit(model, 3),
        prompts,
        max_new_tokens=12,
        eos_token_id=[],
        return_stats=True,
    )
    assert everything.stats.acceptance == 1
    assert torch.equal(everything.sequences, plain)


def test_lists_about_layers_are_cut() -> None:
    view = early_exit(model_of("qwen3"), 2)
    assert len(view.config.layer_types) == 2
    assert view.model.config is view.config


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_layers_out_of_range(layers: int) -> None:
    with pytest.raises(ValueError, match=f"early_exit: layers must be 1 to 3, got {layers}"):
        early_exit(model_of("llama"), layers)


def test_layers_that_cannot_be_told() -> None:
    model = model_of("llama")
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(ValueError, match=r"one ModuleList of 3 layers.*model\.layers, model\.oth"):
        early_exit(model, 2)
