"""TernaryWeight, TernaryLinear, Int8Linear, Siblings as modules: state, copies, devices."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import alignops
from alignops import ternary, testing
from alignops.ternary.layers import Siblings
from alignops.ternary.weight import TernaryWeight


def make(group: int | None = None, act: str = "auto") -> ternary.TernaryLinear:
    return ternary.TernaryLinear.from_linear(nn.Linear(96, 40), group, act)


def planes(weight: TernaryWeight) -> list[Tensor]:
    return [weight.idx, weight.sign, weight.scale, weight.format]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_linear_like_the_dense_layer() -> None:
    dense = nn.Linear(96, 40)
    layer = ternary.TernaryLinear.from_linear(dense)
    assert layer.bias is dense.bias
    with torch.no_grad():
        dense.weight.copy_(layer.weight.dequantize())
    x = torch.randn(2, 5, 96)
    torch.testing.assert_close(layer(x), dense(x))
    assert set(layer.state_dict()) == {
        "weight.idx",
        "weight.sign",
        "weight.scale",
        "weight.format",
        "bias",
    }
    assert layer.state_dict()["weight.format"].tolist() == [1, 40, 96, 96, 1]
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_repr() -> None:
    text = repr(ternary.TernaryLinear(128, 8, bias=False, group=64, act="a8", stride=16))
    assert "in_features=128, out_features=8, bias=False, act=a8" in text
    assert "TernaryWeight((8, 128), group=64, stride=16)" in text
    assert "in_features=128, out_features=8, bias=True" in repr(ternary.Int8Linear(128, 8))


def test_sizes() -> None:
    weight = ternary.quantize(torch.randn(64, 256))
    assert weight.nbytes == 64 * 256 * 5 // 32 + 4 * 64
    assert weight.shape == (64, 256)
    assert weight.group == 256
    assert weight.stride == 1


@pytest.mark.parametrize("kind", ["ternary", "int8"])
def test_fresh_layer_is_zero_and_loads(kind: str) -> None:
    source = nn.Linear(96, 40)
    if kind == "ternary":
        layer, fresh = ternary.TernaryLinear.from_linear(source), ternary.TernaryLinear(96, 40)
    else:
        layer, fresh = ternary.Int8Linear.from_linear(source), ternary.Int8Linear(96, 40)
    x = torch.randn(3, 96)
    assert not fresh(x).any()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_replaces_the_packed_copy(isa: str, assign: bool) -> None:
    a, b = make(32), make(32)
    x = torch.randn(3, 96)
    expected = a(x)
    assert not torch.equal(b(x), expected)
    b.load_state_dict(a.state_dict(), assign=assign)
    assert torch.equal(b(x), expected)


def test_attributes_replace_the_packed_copy() -> None:
    a, b = make().weight, make().weight
    x = torch.randn(3, 96)
    for name in ("idx", "sign", "scale"):
        setattr(b, name, getattr(a, name).clone())
    assert torch.equal(alignops.ternary_linear(x, b), alignops.ternary_linear(x, a))


def test_writing_into_planes_needs_prepack() -> None:
    a, b = make().weight, make().weight
    x = torch.randn(3, 96)
    for mine, other in zip(planes(b), planes(a), strict=True):
        mine.copy_(other)
    b.prepack()
    assert torch.equal(alignops.ternary_linear(x, b), alignops.ternary_linear(x, a))


def test_loading_across_instruction_sets(tmp_path: Path) -> None:
    """Files hold no bytes that depend on the machine."""
    x = torch.randn(3, 96)
    for first in testing.available_isas():
        with testing.use_isa(first):
            layer = make(32)
            expected = layer(x)
            save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        for second in testing.available_isas():
            with testing.use_isa(second):
                other = ternary.TernaryLinear(96, 40, group=32)
                other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
                assert torch.equal(other(x), expected)
                assert torch.equal(layer(x), expected)


def test_safetensors_model(tmp_path: Path) -> None:
    model = nn.Sequential(make(), nn.ReLU(), ternary.Int8Linear.from_linear(nn.Linear(40, 7)))
    other = nn.Sequential(ternary.TernaryLinear(96, 40), nn.ReLU(), ternary.Int8Linear(40, 7))
    save_model(model, str(tmp_path / "m.safetensors"))
    load_model(other, str(tmp_path / "m.safetensors"))
    x = torch.randn(2, 96)
    assert torch.equal(model(x), other(x))


def test_mismatched_state_is_refused() -> None:
    layer = make()
    before = [p.clone() for p in planes(layer.weight)]
    dense = layer.weight.dequantize()
    for other in (make(32), ternary.TernaryLinear.from_linear(nn.Linear(64, 40))):
        with pytest.raises(RuntimeError, match="format must be"):
            layer.load_state_dict(other.state_dict())
    state = layer.state_dict()
    state["weight.format"] = torch.tensor([2, 40, 96, 96, 1])
    with pytest.raises(RuntimeError, match="format must be"):
        layer.load_state_dict(state)
    del state["weight.format"], state["weight.idx"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight.idx"):
        layer.load_state_dict(state)
    assert same(planes(layer.weight), before)
    y = alignops.ternary_linear(torch.eye(96), layer.weight).t()
    assert torch.equal(y, dense)  # so does the packed copy


# Copies


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, through_pickle, through_torch_save]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("release", [False, True])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], release: bool) -> None:
    layer, head = make(32), ternary.Int8Linear.from_linear(nn.Linear(96, 7))
    layer.weight.prepack(release)
    x = torch.randn(3, 96)
    for module in (layer, head):
        other = duplicate(module)
        assert torch.equal(other(x), module(x))
        assert same(list(other.state_dict().values()), list(module.state_dict().values()))
    if duplicate is not copy.copy:
        other = duplicate(layer)
        expected = layer(x)
        other.load_state_dict(make(32).state_dict())
        assert torch.equal(layer(x), expected)  # nothing is shared
    assert (layer.weight.idx is None) == release


def test_pickles_hold_no_packed_copy() -> None:
    weight = ternary.quantize(torch.randn(256, 1024))
    for release in (False, True):
        weight.prepack(release)
        assert len(pickle.dumps(weight)) < weight.nbytes + 8000


def test_shared_weight_stays_shared() -> None:
    layer = make()
    model = nn.ModuleDict({"a": layer, "b": ternary.TernaryLinear.from_weight(layer.weight)})
    other = copy.deepcopy(model)
    assert other["a"].weight is other["b"].weight
    new = make()
    state = {f"a.{k}": v for k, v in new.state_dict().items()}
    other.load_state_dict(state, strict=False)
    x = torch.randn(1, 96)
    assert torch.equal(other["b"](x), alignops.ternary_linear(x, new.weight))


# Release of the planes


def test_release_keeps_everything_but_memory(isa: str) -> None:
    layer = make(32)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(3, 96)
    expected, dense, size = layer(x), layer.weight.dequantize(), layer.weight.nbytes
    layer.weight.prepack(release=True)
    assert layer.weight.idx is None
    assert layer.weight.sign is None
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight.dequantize(), dense)
    assert layer.weight.nbytes == size
    after = layer.state_dict()
    assert list(after) == list(before)
    assert same(list(after.values()), list(before.values()))
    other = make(32)
    layer.load_state_dict(other.state_dict())
    assert layer.weight.idx is None
    assert torch.equal(layer(x), other(x))
    for name in testing.available_isas():
        with testing.use_isa(name):
            assert torch.equal(layer(x), other(x))
    layer.half()
    assert layer.weight.idx is None
    assert layer.weight.scale.dtype == torch.float32


# Devices and dtypes


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float", "to", "type"])
def test_conversions_leave_the_weight_alone(convert: str) -> None:
    model = nn.ModuleDict({"a": make(32), "h": ternary.Int8Linear.from_linear(nn.Linear(96, 7))})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if convert in ("to", "type"):
        getattr(model, convert)(torch.float16)
    else:
        getattr(model, convert)()
    for name, value in model.state_dict().items():
        if not name.endswith("bias"):
            assert same([value], [before[name]]), name
    dtype = model["a"].bias.dtype
    if dtype != torch.float64:
        y = model["a"](torch.randn(2, 96).to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_meta_and_back() -> None:
    source = make(32)
    with torch.device("meta"):
        layer = ternary.TernaryLinear(96, 40, group=32)
        head = ternary.Int8Linear(96, 7)
    assert {b.device.type for b in (*layer.buffers(), *head.buffers())} == {"meta"}
    assert layer(torch.randn(2, 5, 96, device="meta")).shape == (2, 5, 40)
    assert head(torch.randn(2, 96, device="meta")).shape == (2, 7)
    x = torch.randn(3, 96)
    assigned = copy.deepcopy(layer)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned(x), source(x))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_quantize_on_meta_gives_shapes() -> None:
    weight = ternary.quantize(torch.empty(40, 96, device="meta"), 32)
    assert weight.scale.shape == (40, 3)
    assert weight.scale.is_meta
    assert weight.dequantize().shape == (40, 96)


def test_moves_that_change_nothing_keep_the_packed_copy() -> None:
    weight = make().weight
    pack = weight.ready()
    weight.to("cpu").float().half()
    assert weight.ready() is pack


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_cuda_and_back() -> None:
    layer = make(32)
    x = torch.randn(3, 96)
    expected = layer(x)
    before = [p.clone() for p in planes(layer.weight)]
    layer.cuda()
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    layer.cpu()
    assert same(planes(layer.weight), before)
    assert torch.equal(layer(x), expected)


# Siblings


def siblings(rows: tuple[int, ...] = (64, 128, 64), act: str = "auto") -> nn.ModuleList:
    layers = nn.ModuleList(
        ternary.TernaryLinear.from_linear(nn.Linear(96, n, bias=i != 1), act=act)
        for i, n in enumerate(rows)
    )
    Siblings(tuple(layers))
    return layers


def alone(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    return [alignops.ternary_linear(x, m.weight, m.bias, m.act) for m in layers]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the rows of each matmul."""
    seen: list[tuple[int, ...]] = []
    real = ternary.ops.ternary_linear

    def spy(x: Tensor, weight: TernaryWeight, *rest: object) -> Tensor:
        seen.append(tuple(weight.shape))
        return real(x, weight, *rest)

    monkeypatch.setattr(ternary.ops, "ternary_linear", spy)
    return seen


@pytest.mark.parametrize("rows", [(64, 128, 64), (40, 7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siblings_are_exact_and_one_call(
    isa: str, rows: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = siblings(rows).to(dtype)
    keys = list(layers.state_dict())
    expected_keys = list(nn.ModuleList(make() for _ in rows).state_dict())
    assert [k for k in expected_keys if k != "1.bias"] == keys
    for x in (torch.randn(1, 96), torch.randn(2, 5, 96)):
        x = x.to(dtype)
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            with torch.no_grad():
                expected = alone(layers, x)
                seen = calls(monkeypatch)
                got = {i: layers[i](x) for i in order}
                monkeypatch.undo()
            assert seen == [(sum(rows), 96)]
            assert all(torch.equal(got[i], expected[i]) for i in order)
            assert not layers[0]._siblings._kept


def test_siblings_notice_other_inputs() -> None:
    layers = siblings()
    x, z = torch.randn(2, 96), torch.randn(2, 96)
    with torch.no_grad():
        layers[0](x)
        assert torch.equal(layers[1](z), alone(layers, z)[1])
        layers[0](x)
        x.add_(1)  # in place: the same object, another version
        assert torch.equal(layers[1](x), alone(layers, x)[1])
        first = layers[0](x)
        again = layers[0](x)
        assert again is not first
        assert torch.equal(again, first)


def test_siblings_notice_changes_of_weights_and_modes() -> None:
    layers, other = siblings(), siblings()
    x = torch.randn(2, 96)
    with torch.no_grad():
        layers[0](x)
        layers[1].load_state_dict(other[1].state_dict())
        assert torch.equal(layers[1](x), alone(layers, x)[1])
        layers[0](x)
        for name in ("idx", "sign", "scale"):
            setattr(layers[2].weight, name, getattr(other[2].weight, name).clone())
        expected = alignops.ternary_linear(x, other[2].weight, layers[2].bias)
        for _ in range(2):  # each on its own, then together again
            layers[0](x)
            assert torch.equal(layers[2](x), expected)
        assert layers[0]._siblings.weight() is not None
        layers[0](x)
        layers[2].weight = other[2].weight
        assert torch.equal(layers[2](x), alone(layers, x)[2])
        layers[0](x)
        layers[1].act = "a8"
        assert torch.equal(layers[1](x), alone(layers, x)[1])
        layers[1].act = "auto"
    layers[0](x)
    with torch.no_grad():
        assert not layers[2](x).requires_grad
    y = [layer(x.requires_grad_()) for layer in layers]
    assert all(t.requires_grad for t in y)


def test_siblings_of_different_inputs_stop_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross attention: q reads one tensor, k and v another."""
    layers = siblings()
    with torch.no_grad():
        for _ in range(20):
            x, z = torch.randn(1, 96), torch.randn(1, 96)
            got = [layers[0](x), layers[1](z), layers[2](z)]
            expected = [alone(layers, x)[0], *alone(layers, z)[1:]]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        seen = calls(monkeypatch)
        for layer in layers:
            layer(torch.randn(1, 96))
        assert seen == [(64, 96), (128, 96), (64, 96)]


def test_siblings_under_inference_mode() -> None:
    layers = siblings()
    with torch.inference_mode():
        x = torch.randn(2, 96)
        for layer, y in zip(layers, alone(layers, x), strict=True):
            assert torch.equal(layer(x), y)
        layers[0](x)
        x.add_(1)
        assert torch.equal(layers[1](x), alone(layers, x)[1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_siblings_are_copied_with_their_layers(
    duplicate: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = siblings()
    x = torch.randn(2, 96)
    with torch.no_grad():
        layers[0](x)  # leaves results behind, which are not copied
        other = duplicate(layers)
        assert other[0]._siblings.layers == tuple(other)
        assert not other[0]._siblings._kept
        other[1].load_state_dict(make_state())
        seen = calls(monkeypatch)
        got = [layer(x) for layer in other]
        monkeypatch.undo()
        assert seen == [(256, 96)]
        assert all(torch.equal(a, b) for a, b in zip(got, alone(other, x), strict=True))


def make_state() -> dict[str, Tensor]:
    layer = ternary.TernaryLinear.from_linear(nn.Linear(96, 128, bias=False))
    return layer.state_dict()


def test_siblings_share_memory() -> None:
    layers = siblings()
    storages = {m.weight.ready()[0].untyped_storage().data_ptr() for m in layers}
    assert len(storages) == 1
    with torch.no_grad():
        layers[0](torch.randn(1, 96))
    layers[1].load_state_dict(make_state())
    storages = {m.weight.ready()[0].untyped_storage().data_ptr() for m in layers}
    assert len(storages) == 1


def test_siblings_gradients() -> None:
    layers = siblings()
    x = torch.randn(3, 96, requires_grad=True)
    got = [layer(x) for layer in layers]
    expected = alone(layers, x)
    wanted = [x, layers[0].bias, layers[2].bias]
    a = torch.autograd.grad(sum(y.square().sum() for y in got), wanted)
    b = torch.autograd.grad(sum(y.square().sum() for y in expected), wanted)
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs)
