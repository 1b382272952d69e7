"""transformers: ternary models are saved, loaded, converted while loading, and decoded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignops import ternary
from alignops.integrations import hf
from alignops.integrations.decode import GreedyDecoder
from alignops.ternary import Int8Linear, TernaryLinear

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPT = torch.arange(3, 10)[None]


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(PROMPT).logits


def greedy(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=tokens, do_sample=False)


def converted_names(model: nn.Module) -> dict[str, type]:
    kinds = (TernaryLinear, Int8Linear)
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, kinds)}


# Save and load


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "int8"},
        {"head": "int8", "fuse": True, "act": "a8g"},
        {"group": 32, "act": "none"},
        {"stride": 16, "group": 64, "scale_dtype": torch.float16, "include": "*.o_proj"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_model_is_the_saved_one(
    tmp_path: Path, options: dict[str, Any], tied: bool, dtype: torch.dtype
) -> None:
    model = llama(tied, dtype)
    hf.convert(model, progress=False, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert converted_names(again) == converted_names(model)
    assert torch.equal(logits(again), expected)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
    for name, module in again.named_modules():
        if isinstance(module, TernaryLinear):
            original = model.get_submodule(name)
            assert str(module) == str(original)
            assert (module._siblings is None) == (original._siblings is None)


def test_saved_twice_is_the_same(tmp_path: Path) -> None:
    model = llama()
    hf.convert(model, head="int8", progress=False)
    model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


NEW_PROCESS = """
import sys
import torch
import alignops.integrations.hf
from alignops.ternary import ops

def forbidden(*args, **kwargs):
    raise AssertionError("quantized again")

ops.ternary_quantize = ops.int8_quantize = forbidden
largest = 0
def watch(self, *args, **kwargs):
    raise AssertionError("a dense linear layer was initialized")
torch.nn.Linear.reset_parameters = lambda self: self.weight.is_meta or watch(self)

from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
dense = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
assert not dense, dense
prompt = torch.load(tokens)
torch.save(model.generate(prompt[:, :7], max_new_tokens=9, do_sample=False), tokens + ".new")
"""


def test_new_process_generates_the_same(tmp_path: Path) -> None:
    model = llama()
    hf.convert(model, head="int8", fuse=True, progress=False)
    model.save_pretrained(tmp_path)
    expected = greedy(model, 9)
    tokens = tmp_path / "tokens.pt"
    torch.save(expected, tokens)
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(tmp_path), str(tokens)], check=True)
    assert torch.equal(torch.load(f"{tokens}.new"), expected)


def test_files_hold_packed_weights_and_their_description(tmp_path: Path) -> None:
    model = llama()
    hf.convert(model, head="int8", group=32, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    description = config["quantization_config"]
    assert description["quant_method"] == "alignops_ternary"
    linear, head = description["layers"]
    assert {k: linear[k] for k in ("kind", "group", "stride", "act", "scale_dtype")} == {
        "kind": "ternary", "group": 32, "stride": 1, "act": "auto", "scale_dtype": "float32",
    }  # fmt: skip
    assert len(linear["names"]) == 14
    assert (head["kind"], head["names"]) == ("int8", ["lm_head"])
    tensors = load_file(tmp_path / "model.safetensors")
    floats = {k for k, t in tensors.items() if t.is_floating_point() and not k.endswith("scale")}
    assert floats == {"model.embed_tokens.weight"} | {k for k in floats if "norm" in k}


def test_biases_and_untouched_layers(tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    hf.convert(model, exclude=("lm_head", "down_proj"), progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(again), expected)


def test_conv1d(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    hf.convert(model, progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert converted_names(again)["transformer.h.0.attn.c_attn"] is TernaryLinear
    assert torch.equal(logits(again), expected)


def test_layers_converted_in_different_ways(tmp_path: Path) -> None:
    model = llama()
    ternary.convert(model, include="mlp", group=32, progress=False)
    ternary.convert(model, include="self_attn", act="a8", progress=False)
    config = hf.attach(model)
    assert config.layers is not None
    assert [(e["group"], e["act"], len(e["names"])) for e in config.layers] == [
        (None, "a8", 8),
        (32, "auto", 6),
    ]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_attach_needs_a_converted_model() -> None:
    with pytest.raises(ValueError, match="attach: model must have converted layers, got none"):
        hf.attach(llama())


def test_untied_head_stays_untied() -> None:
    model = llama(tied=True)
    hf.convert(model, head="int8", progress=False)
    model.tie_weights()
    assert isinstance(model.lm_head, Int8Linear)
    assert model.lm_head.weight.dtype == torch.int8


# What may be wrong with a saved model


def edit_description(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = llama()
    hf.convert(model, progress=False)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 2}, "format_version must be at most 1, got 2"),
        ({"layers": [{"kind": "nine", "names": ["lm_head"]}]}, "kind of lm_head .* got 'nine'"),
        ({"layers": [{"kind": "int8", "names": ["model.norm"]}]}, r"model.norm must be a linear"),
    ],
)
def test_bad_descriptions(saved: Path, changes: dict[str, Any], text: str) -> None:
    edit_description(saved, **changes)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(saved)


def test_planes_of_another_format_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight.format"][4] = 16
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj.weight.format must be .*, 1\], got"
    ):
        AutoModelForCausalLM.from_pretrained(saved)


# Convert while loading


def test_conversion_while_loading(tmp_path: Path) -> None:
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    options = {"head": "int8", "group": 32, "fuse": True}
    config = hf.AlignopsTernaryConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    hf.convert(dense, progress=False, **options)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "ternary")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")
    assert torch.equal(logits(again), logits(dense))


def test_options_survive_json() -> None:
    config = hf.AlignopsTernaryConfig(include=["mlp"], act="a8", scale_dtype="float16", stride=16)
    again = hf.AlignopsTernaryConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()


# Decoding


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the weights of a converted one."""
    dense = LlamaForCausalLM(model.config).eval()
    state = {k: v for k, v in model.state_dict().items() if k in dense.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            state[f"{name}.weight"] = module.weight.dequantize()
    dense.load_state_dict(state)
    return dense


def test_lossless_mode_generates_the_tokens_of_the_dequantized_model() -> None:
    model = llama()
    ternary.convert(model, act="none", fuse=True, progress=False)
    assert torch.equal(greedy(model, 40), greedy(dequantized(model), 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
def test_decoder_generates_the_same_uncompiled(dtype: torch.dtype, fuse: bool) -> None:
    model = llama(dtype=dtype)
    ternary.convert(model, head="int8", act="none", fuse=fuse, progress=False)
    decoder = GreedyDecoder(model, max_length=64, compiled=False)
    assert torch.equal(decoder.generate(PROMPT, 30), greedy(model, 30))


@pytest.mark.slow
def test_compiled_decoder() -> None:
    model = llama()
    ternary.convert(model, head="int8", act="none", fuse=True, progress=False)
    before = model.config._attn_implementation
    decoder = GreedyDecoder(model, max_length=64)
    expected = greedy(model, 57)
    assert torch.equal(decoder.generate(PROMPT, 57), expected)
    assert decoder._graph.again is not None  # later tokens skipped Dynamo
    assert model.config._attn_implementation == before
    # Again, from another prompt and from a longer one, with what was compiled before.
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(decoder.generate(expected[:, :30], 34), expected)
        assert torch.equal(decoder.generate(PROMPT[:, :1], 3)[:, :1], PROMPT[:, :1])
    # New weights are seen.
    other = llama()
    ternary.convert(other, head="int8", act="none", fuse=True, progress=False)
    model.load_state_dict(other.state_dict())
    assert torch.equal(decoder.generate(PROMPT, 20), greedy(other, 20))


@pytest.mark.slow
def test_two_compiled_decoders() -> None:
    """What the first leaves behind in Dynamo does not change the second."""
    for max_length, config in ((24, {}), (32, {"hidden_size": 96})):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES | config)).eval()
        decoder = GreedyDecoder(model, max_length)
        with torch._dynamo.config.patch(recompile_limit=1):
            assert torch.equal(decoder.generate(PROMPT, 15), greedy(model, 15))
            assert torch.equal(decoder.generate(PROMPT, 10), greedy(model, 10))
        assert decoder._graph.again is not None


def test_decoder_stops_after_the_last_token() -> None:
    model = llama()
    decoder = GreedyDecoder(model, max_length=64, compiled=False)
    free = decoder.generate(PROMPT, 20)
    stop = int(free[0, 12])
    first = PROMPT.shape[1] + free[0, PROMPT.shape[1] :].tolist().index(stop)
    assert torch.equal(decoder.generate(PROMPT, 20, eos_token_id=stop), free[:, : first + 1])
    assert decoder.generate(PROMPT, 1).shape == (1, PROMPT.shape[1] + 1)


def test_decoder_fills_its_cache_to_the_end() -> None:
    model = llama()
    decoder = GreedyDecoder(model, max_length=20, compiled=False)
    assert torch.equal(decoder.generate(PROMPT, 13), greedy(model, 13))


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.long), 1, r"shape \(1, L\), got \(2, 3\)"),
        (torch.zeros(3, dtype=torch.long), 1, r"shape \(1, L\), got \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), 1, r"shape \(1, L\), got \(1, 0\)"),
        (PROMPT, 0, r"max_new_tokens must be 1 to 9 .*, got 0"),
        (PROMPT, 10, r"max_new_tokens must be 1 to 9 .*, got 10"),
    ],
)
def test_decoder_refuses(prompt: torch.Tensor, new: int, text: str) -> None:
    decoder = GreedyDecoder(llama(), max_length=16, compiled=False)
    with pytest.raises(ValueError, match=text):
        decoder.generate(prompt, new)


def test_decoder_needs_room() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        GreedyDecoder(llama(), max_length=1)


def test_decoder_refuses_sliding_windows() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    with pytest.raises(ValueError, match="model must not use sliding_window, got 8"):
        GreedyDecoder(model, max_length=16, compiled=False).generate(PROMPT, 2)
    assert model.config._attn_implementation != "alignops_decode"
