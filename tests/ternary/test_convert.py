"""convert(): what it swaps, what it leaves alone and why, and that the model still works."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import alignops
from alignops import ternary
from alignops.ternary.layers import Siblings


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 128)
        self.k_proj = nn.Linear(64, 64, bias=False)
        self.v_proj = nn.Linear(64, 64, bias=False)
        self.o_proj = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate_proj = nn.Linear(64, 192)
        self.up_proj = nn.Linear(64, 192)
        self.down_proj = nn.Linear(192, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """A language model in miniature, with a tied head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def dense_twin(model: nn.Module, converted: nn.Module) -> nn.Module:
    """The original model with the weights that the converted one multiplies by."""
    twin = copy.deepcopy(model)
    for name, module in converted.named_modules():
        if isinstance(module, ternary.TernaryLinear):
            twin.get_submodule(name).weight.data = module.weight.dequantize()
    return twin


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("fuse", [False, True])
def test_model_computes_with_the_ternary_weights(group: int | None, fuse: bool) -> None:
    model = Model()
    converted = copy.deepcopy(model)
    report = ternary.convert(converted, group=group, fuse=fuse, progress=False)
    assert len(report.swapped) == 14
    assert list(report.skipped) == ["lm_head"]
    assert len(report.fused) == (4 if fuse else 0)
    torch.testing.assert_close(converted(TOKENS), dense_twin(model, converted)(TOKENS))
    assert isinstance(converted.embed, nn.Embedding)
    assert converted.lm_head.weight is converted.embed.weight


def test_report() -> None:
    model = Model()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report = ternary.convert(model, progress=False)
    assert report.bytes_before == before
    swapped = report.swapped["layers.0.attention.q_proj"]
    assert (swapped.kind, swapped.shape) == ("ternary", (128, 64))
    assert swapped.bytes_before == 128 * 64 * 4
    assert swapped.bytes_after == 128 * 64 * 5 // 32 + 128 * 4
    saved = sum(s.bytes_before - s.bytes_after for s in report.swapped.values())
    formats = 14 * 5 * 8
    assert report.bytes_after == before - saved <= before - formats
    text = str(report)
    assert "layers.*.attention.q_proj  ternary  128 x 64      2" in text
    assert "skipped lm_head (1): excluded" in text


def test_patterns() -> None:
    def swapped(**options: object) -> set[str]:
        return set(ternary.convert(Model(), progress=False, **options).swapped)

    everything = swapped()
    assert swapped(include="q_proj") == {f"layers.{i}.attention.q_proj" for i in (0, 1)}
    assert swapped(include=["layers.0"]) == {n for n in everything if n.startswith("layers.0")}
    assert swapped(include="*_proj", exclude=["attention"]) == {
        n for n in everything if "attention" not in n
    }
    assert swapped(exclude=["layers.?.down_proj", "lm_head"]) == {
        n for n in everything if "down" not in n
    }
    untied = Model(tied=False)
    assert "lm_head" in ternary.convert(untied, exclude=(), progress=False).swapped
    for option in ("include", "exclude"):
        with pytest.raises(ValueError, match=f"{option} must match layers, got 'proj'"):
            swapped(**{option: ["q_proj", "proj"]})
    report = ternary.convert(Model(), include="q_proj", progress=False)
    assert report.skipped["layers.0.gate_proj"] == "not included"


def test_int8_head_of_a_tied_model() -> None:
    model = Model()
    embedding = model.embed.weight.clone()
    report = ternary.convert(model, head="int8", progress=False)
    assert isinstance(model.lm_head, ternary.Int8Linear)
    assert report.swapped["lm_head"].kind == "int8"
    assert torch.equal(model.embed.weight, embedding)
    q, scale = ternary.int8_quantize(embedding)
    assert torch.equal(model.lm_head.weight, q)
    assert torch.equal(model.lm_head.scale, scale)
    assert model(TOKENS).shape == (2, 12, 50)


def test_head_by_method_and_without() -> None:
    model = Model(tied=False)
    model.decoder = model.lm_head
    model.get_output_embeddings = lambda: model.decoder
    ternary.convert(model, head="int8", exclude=(), progress=False)
    assert model.decoder is model.lm_head
    assert isinstance(model.lm_head, ternary.Int8Linear)
    with pytest.raises(ValueError, match="head must be None for a model without"):
        ternary.convert(nn.Sequential(nn.Linear(8, 8)), head="int8", progress=False)
    with pytest.raises(ValueError, match='head must be None or "int8"'):
        ternary.convert(Model(), head="int4", progress=False)


def test_idempotent() -> None:
    model = Model()
    ternary.convert(model, head="int8", fuse=True, progress=False)
    modules = dict(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = ternary.convert(model, head="int8", fuse=True, progress=False)
    assert not report.swapped
    assert not report.fused
    assert set(report.skipped.values()) == {"already converted"}
    assert report.bytes_before == report.bytes_after
    assert all(modules[name] is module for name, module in model.named_modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_shared_modules_stay_shared() -> None:
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU()), "c": nn.Linear(64, 8)})
    report = ternary.convert(model, progress=False)
    assert list(report.swapped) == ["a", "c"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], ternary.TernaryLinear)


def test_wrapped_model() -> None:
    inner = Model()
    model = nn.Sequential(nn.ModuleDict({"model": inner})["model"])
    report = ternary.convert(model, head="int8", progress=False)
    assert "0.layers.1.attention.v_proj" in report.swapped
    assert isinstance(inner.lm_head, ternary.Int8Linear)


@pytest.mark.parametrize("fuse", [False, True])
def test_generation_equals_that_of_the_dense_twin(fuse: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    converted = copy.deepcopy(model)
    report = ternary.convert(converted, fuse=fuse, act="none", progress=False)
    assert len(report.swapped) == 14
    assert len(report.fused) == (4 if fuse else 0)
    twin = dense_twin(model, converted)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.randint(0, 97, (2, 7))
    mask = torch.ones_like(prompt)
    tokens = converted.generate(prompt, attention_mask=mask, **options)
    assert tokens.shape == (2, 31)
    assert torch.equal(tokens, twin.generate(prompt, attention_mask=mask, **options))


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_conv1d_is_transposed() -> None:
    model = nn.Sequential(Conv1D(40, 64))
    weight = ternary.quantize(model[0].weight.t())
    bias = model[0].bias
    ternary.convert(model, progress=False)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), alignops.ternary_linear(x, weight, bias))
    assert model[0].in_features == 64
    assert model[0].out_features == 40


def test_what_is_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "tied_a": nn.Linear(8, 8),
            "tied_b": nn.Linear(8, 8),
            "subclass": type("MyLinear", (nn.Linear,), {})(8, 8),
            "parametrized": parametrizations.weight_norm(nn.Linear(8, 8)),
            "pruned": prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
            "hooked": nn.Linear(8, 8),
            "float64": nn.Linear(8, 8).double(),
            "narrow": nn.Linear(16, 8),
            "attention": nn.MultiheadAttention(32, 4),
            "encoder": nn.TransformerEncoderLayer(32, 4, 64),
            "wide": nn.Linear(64, 8),
        }
    )
    model["tied_b"].weight = model["tied_a"].weight
    model["hooked"].register_forward_hook(lambda *args: None)
    gptq = nn.Module()
    gptq.qweight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int32), requires_grad=False)
    model["gptq"] = gptq
    before = dict(model.named_modules())
    report = ternary.convert(model, group=32, exclude=("lm_head",), progress=False)
    assert list(report.swapped) == ["wide"]
    reasons = {
        "tied_a": "weight is tied to tied_b",
        "tied_b": "weight is tied to tied_a",
        "subclass": "a subclass of Linear",
        "parametrized": "parametrized",
        "pruned": "weight is not a parameter",
        "hooked": "has forward hooks",
        "float64": "weight is float64",
        "narrow": "K=16 does not fit group=32",
        "attention.out_proj": "a subclass of Linear",
        "encoder.self_attn.out_proj": "a subclass of Linear",
        "encoder.linear1": "TransformerEncoderLayer reads its weight",
        "encoder.linear2": "TransformerEncoderLayer reads its weight",
        "gptq": "quantized already",
    }
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert report.skipped[name].startswith(reason), name
    assert all(before[n] is m for n, m in model.named_modules() if not n.startswith("wide"))
    x = torch.randn(3, 5, 32)
    model.eval()
    with torch.no_grad():
        model["encoder"](x)
        model["attention"](x, x, x)


def test_a_failed_conversion_changes_nothing() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].up_proj.weight[3, 5] = torch.nan
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"convert: layers.1.up_proj: .*w must be finite.*\(3, 5\)"
    ):
        ternary.convert(model, progress=False)
    assert all(before[name] is module for name, module in model.named_modules())
    with pytest.raises(ValueError, match="act must be one of"):
        ternary.convert(model, act="int8", progress=False)
    with pytest.raises(ValueError, match="model must contain layers"):
        ternary.convert(nn.Linear(8, 8), progress=False)


def test_state_of_training_and_dtype() -> None:
    model = Model().bfloat16().eval()
    ternary.convert(model, act="a16", progress=False)
    layer = model.layers[0].gate_proj
    assert not layer.training
    assert layer.act == "a16"
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight.scale.dtype == torch.float32
    assert model(TOKENS).dtype == torch.bfloat16
    model.train()
    model(TOKENS).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_model_has_the_same_bits_and_state(isa: str, dtype: torch.dtype) -> None:
    plain = Model().to(dtype)
    fused = copy.deepcopy(plain)
    ternary.convert(plain, progress=False)
    report = ternary.convert(fused, fuse=True, progress=False)
    assert ("layers.0.gate_proj", "layers.0.up_proj") in report.fused
    assert list(plain.state_dict()) == list(fused.state_dict())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(plain(TOKENS), fused(TOKENS))
    groups = {m._siblings for m in fused.modules() if isinstance(m, ternary.TernaryLinear)}
    assert all(not g._kept for g in groups if isinstance(g, Siblings))
    other = Model().to(dtype)
    ternary.convert(other, progress=False)
    fused.load_state_dict(other.state_dict())
    assert torch.equal(fused(TOKENS), other(TOKENS))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    ternary.convert(Model(), progress=False)
    assert capsys.readouterr().err == ""
    ternary.convert(Model(), progress=True)
    assert "quantizing" in capsys.readouterr().err
