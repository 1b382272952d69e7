"""Vetoes inside `generate` of transformers, and Prov-Decode over a transformers model."""

from typing import Any

import pytest
import torch

from alignops.spans import TraceShield, prov_decode
from tests.spans.worlds import make_index

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import LlamaConfig, LlamaForCausalLM

from alignops.integrations.spans import ModelStep, SpanVetoProcessor

VOCAB, EOS, PAD = 60, 1, 0
PROMPTS = [[7, 8, 9, 10], [PAD, PAD, 20, 21]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: LlamaForCausalLM, processors: list[Any], **options: Any) -> list[list[int]]:
    torch.manual_seed(5)
    ids = torch.tensor(PROMPTS)
    rows = model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=16,
        logits_processor=processors,
        **options,
    )
    result: list[list[int]] = rows.tolist()
    return result


def before_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.mark.parametrize("scope", ["completion", "prompt+completion"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 5, "top_p": 0.8, "temperature": 0.7},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3, "top_k": 10},
    ],
    ids=["greedy", "sampling", "top-k and top-p", "beams", "sampled beams"],
)
def test_generated_text_is_never_refused(
    model: LlamaForCausalLM, options: dict[str, Any], scope: str
) -> None:
    # Whatever the model would write is unsafe.
    free = generate(model, [], **options)
    docs = [[t for t in row if t != PAD] for row in free]
    shield = TraceShield(make_index(docs, VOCAB), tau=8.0, min_len=3, scope=scope)

    def refused(row: list[int]) -> bool:
        prompt, written = row[:4], before_end(row[4:])
        return shield.check([*prompt, *written], 4).refused

    veto = SpanVetoProcessor(shield, eos=EOS, pad=PAD)
    safe = generate(model, [veto], **options)
    assert any(refused(row) for row in free)
    assert not any(refused(row) for row in safe)
    assert len(safe) == len(free)
    again = generate(model, [veto], **options)
    assert again == safe, "an object may be used again"


def test_nothing_changes_without_matches(model: LlamaForCausalLM) -> None:
    shield = TraceShield(make_index([[2, 3] * 30], VOCAB), min_len=8)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        veto = SpanVetoProcessor(shield, eos=EOS)
        assert generate(model, [veto], **options) == generate(model, [], **options)


def test_soft_veto(model: LlamaForCausalLM) -> None:
    free = generate(model, [], do_sample=False)
    shield = TraceShield(make_index(free, VOCAB), tau=8.0, min_len=3)
    none = SpanVetoProcessor(shield, mode="soft", gamma=0.0)
    much = SpanVetoProcessor(shield, mode="soft", gamma=1e4, eos=EOS)
    hard = SpanVetoProcessor(shield, eos=EOS)
    assert generate(model, [none], do_sample=False) == free
    assert generate(model, [much], do_sample=False) == generate(model, [hard], do_sample=False)


def test_prov_decode_with_a_cache_equals_one_without(model: LlamaForCausalLM) -> None:
    docs = generate(model, [], do_sample=False)
    shield = TraceShield(make_index(docs, VOCAB), tau=8.0, min_len=3)
    rows: list[list[int]] = []

    @torch.no_grad()
    def plain(tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        nonlocal rows
        if parents is None:
            rows = tokens.tolist()
        else:
            rows = [
                [*rows[p], t] for p, t in zip(parents.tolist(), tokens[:, 0].tolist(), strict=True)
            ]
        logits: torch.Tensor = model(input_ids=torch.tensor(rows)).logits[:, -1]
        return logits

    step = ModelStep(model)
    for prompt in ([7, 8, 9, 10], [20, 21]):
        options = {"max_new_tokens": 12, "eos": EOS, "beams": 3}
        with_cache, without = (prov_decode(s, prompt, shield, **options) for s in (step, plain))
        assert with_cache.tokens == without.tokens
        assert with_cache.score == pytest.approx(without.score, abs=1e-4)
        assert with_cache.vetoed == without.vetoed > 0
        assert not shield.check(with_cache.tokens).refused
