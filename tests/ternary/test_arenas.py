"""Arenas: schedule, layer, preparation, end of training, diagnostics."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignops.reference import ternary as reference
from alignops.ternary import TernaryLinear
from alignops.ternary.arenas import ArenasLinear, ArenasSchedule, finalize, prepare_arenas
from alignops.ternary.diagnostics import (
    GradientRank,
    codes,
    effective_rank,
    flip_rate,
    latent_shares,
)

SHAPES = ("warmup_cosine", "linear", "cosine", "exponential", "constant")


def effective_weight(w: torch.Tensor, lam: float, group: int | None, stride: int) -> torch.Tensor:
    """alpha T + lambda W from the reference, straight through for autograd."""
    lanes, alpha = reference.quantize(w.detach(), group, stride)
    t = reference.from_blocks(lanes, w.shape[1], stride)
    scale = alpha.repeat_interleave(group or w.shape[1], 1)[:, : w.shape[1]]
    quantized = scale.to(w.dtype) * t + lam * w.detach()
    return quantized + (1 + lam) * (w - w.detach())


def at_step(schedule: ArenasSchedule, t: int) -> ArenasSchedule:
    for _ in range(t):
        schedule.step()
    return schedule


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, 48)
        self.second = nn.Linear(48, 48, bias=False)
        self.lm_head = nn.Linear(48, width)

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        h = F.silu(self.first(x))
        h = checkpoint(self.second, h, use_reentrant=False) if recompute else self.second(h)
        return self.lm_head(F.silu(h))


class Training:
    """A small regression with everything a checkpoint has to hold."""

    def __init__(self, steps: int = 40, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.schedule = ArenasSchedule(steps)
        prepare_arenas(self.model, self.schedule)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2, weight_decay=0.0)
        self.schedule.attach(self.optimizer)
        self.x = torch.randn(64, 32)
        self.y = torch.randn(64, 8) @ torch.randn(8, 32)

    def step(self, recompute: bool = False, micro_batches: int = 1) -> float:
        total = 0.0
        for x, y in zip(self.x.chunk(micro_batches), self.y.chunk(micro_batches), strict=True):
            loss = F.mse_loss(self.model(x, recompute), y) / micro_batches
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def state(self) -> dict[str, object]:
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        return copy.deepcopy(parts)

    def load(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


# Schedule


@pytest.mark.parametrize(
    ("t", "expected"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (325, 0.853553), (550, 0.5), (1000, 0.0), (1001, 0.0)],
)
def test_schedule_known_values(t, expected):
    assert ArenasSchedule(1000).at(t) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 9, 10, 977])
def test_schedule_ends_at_zero_and_stays_in_range(shape, total):
    schedule = ArenasSchedule(total, max_lambda=0.7, shape=shape)
    values = [schedule.at(t) for t in range(total + 3)]
    assert all(0 <= v <= 0.7 for v in values)
    assert values[total:] == [0.7 if shape == "constant" else 0.0] * 3
    assert values == pytest.approx(
        [reference.arenas_lambda(t, total, peak=0.7, kind=shape) for t in range(total + 3)]
    )
    if shape not in ("warmup_cosine", "constant"):
        assert values[0] == pytest.approx(0.7)
        assert all(a > b for a, b in itertools.pairwise(values[: total + 1]))


def test_schedule_callable():
    schedule = ArenasSchedule(10, max_lambda=2.0, shape=lambda t: 1 / (1 + t))
    assert [schedule.at(t) for t in (0, 1, 3)] == [2.0, 1.0, 0.5]
    assert schedule.at(10) == schedule.at(11) == 0.0
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="shape must return"):
            ArenasSchedule(10, shape=lambda t, bad=bad: bad).at(1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": -1}, "total_steps"),
        ({"total_steps": 10, "warmup_steps": 10}, "warmup_steps"),
        ({"total_steps": 10, "warmup_steps": 11}, "warmup_steps"),
        ({"total_steps": 10, "warmup_steps": -1}, "warmup_steps"),
        ({"total_steps": 10, "warmup_steps": 1, "shape": "linear"}, "warmup_steps"),
        ({"total_steps": 10, "max_lambda": -1e-9}, "max_lambda"),
        ({"total_steps": 10, "max_lambda": math.nan}, "max_lambda"),
        ({"total_steps": 10, "shape": "triangle"}, "shape"),
    ],
)
def test_schedule_rejects(arguments, name):
    with pytest.raises(ValueError, match=f"ArenasSchedule: {name} must"):
        ArenasSchedule(**arguments)


def test_schedule_writes_one_tensor_for_all_layers():
    model = Net()
    schedule = ArenasSchedule(10, warmup_steps=2)
    prepare_arenas(model, schedule)
    assert model.first.lam is model.second.lam
    seen = []
    for _ in range(4):
        seen.append(model.second.lam.item())
        schedule.step()
    assert seen == [0.0, 0.5, 1.0, pytest.approx(schedule.at(3))]
    assert schedule.t == 4


def test_schedule_refuses_a_state_of_other_settings():
    state = ArenasSchedule(100).state_dict()
    with pytest.raises(ValueError, match="total_steps must be 50"):
        ArenasSchedule(50).load_state_dict(state)
    with pytest.raises(ValueError, match="shape must be 'linear'"):
        ArenasSchedule(100, shape="linear", max_lambda=1.0).load_state_dict(
            {**state, "warmup_steps": 0}
        )


def test_attached_schedule_ignores_steps_that_a_scaler_skips():
    layer = ArenasLinear(8, 4, schedule=ArenasSchedule(10))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.schedule.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for scale, expected in ((math.inf, 0), (1.0, 1)):
        loss = layer(torch.ones(1, 8)).sum() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert layer.schedule.t == expected


def test_detached_schedule_stands_still():
    layer = ArenasLinear(8, 4, schedule=ArenasSchedule(10))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    handle = layer.schedule.attach(optimizer)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert layer.schedule.t == 1


# Layer


@pytest.mark.parametrize("lam", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(
    ("n", "k", "group", "stride"),
    [(5, 8, None, 1), (7, 13, None, 1), (3, 96, 32, 1), (4, 72, 32, 1), (6, 128, 64, 16)],
)
@pytest.mark.parametrize("leading", [(9,), (2, 3), ()])
def test_gradients_are_those_of_the_reference(n, k, group, stride, lam, leading):
    generator = torch.Generator().manual_seed(n * k)
    schedule = ArenasSchedule(10, max_lambda=lam, shape="constant")
    layer = ArenasLinear(k, n, schedule=schedule, group=group, stride=stride)
    x = torch.randn(*leading, k, generator=generator, requires_grad=True)
    y = layer(x)
    g = torch.randn(y.shape, generator=generator)
    got = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)

    w, b, xr = (v.detach().double().requires_grad_() for v in (layer.weight, layer.bias, x))
    expected_y = F.linear(xr, effective_weight(w, schedule.value, group, stride), b)
    expected = torch.autograd.grad(expected_y, (xr, w, b), g.double())
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_zeroed_lanes_and_dead_rows_unclipped():
    layer = ArenasLinear(8, 2, bias=False, schedule=ArenasSchedule(4, shape="constant"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0] * 8, [9.0, -7.0, 1e-3, 5.0, 0.0, 0.0, 0.0, 0.0]]))
    layer(torch.ones(1, 8)).backward(torch.tensor([[3.0, 100.0]]))
    assert layer.weight.grad.tolist() == [[6.0] * 8, [200.0] * 8]


def test_only_the_parameters_are_saved_for_backward():
    layer = ArenasLinear(64, 32, schedule=ArenasSchedule(4))
    x = torch.randn(16, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, layer.weight, layer.lam)}
    assert sum(t.numel() for t in saved) == x.numel() + layer.weight.numel() + 1


def test_no_gradient_where_none_is_asked():
    layer = ArenasLinear(8, 4, schedule=ArenasSchedule(4)).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_latent_weights_and_gradients_in_float32(dtype, training):
    layer = at_step(ArenasSchedule(10, warmup_steps=2), 1)
    layer = ArenasLinear(64, 32, schedule=layer).train(training)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == torch.float32
    exact = layer(x)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("latent", [torch.float32, torch.bfloat16])
def test_activation_dtype_decides_the_output(latent):
    layer = ArenasLinear(64, 32, schedule=ArenasSchedule(10), dtype=latent)
    y = layer(torch.randn(8, 64, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == latent
    assert layer.lam.dtype == torch.float32


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "meta"])
def test_lambda_stays_shared_float32_when_the_model_moves(move):
    model = Net()
    schedule = at_step(ArenasSchedule(10, warmup_steps=4), 1)
    prepare_arenas(model, schedule)
    model = model.to("meta") if move == "meta" else getattr(model, move)()
    assert model.first.lam is model.second.lam
    assert model.first.lam.dtype == torch.float32
    assert model.first.lam.device == model.first.weight.device
    schedule.step()
    if move != "meta":
        assert model.first.lam.item() == 0.5


def test_state_dict_is_that_of_the_dense_model():
    dense, model = Net(), Net()
    prepare_arenas(model, ArenasSchedule(10))
    assert list(model.state_dict()) == list(dense.state_dict())
    model.load_state_dict(dense.state_dict())
    dense.load_state_dict(model.state_dict())


def test_deepcopy_has_its_own_schedule():
    model = Net()
    schedule = ArenasSchedule(10, warmup_steps=5)
    prepare_arenas(model, schedule)
    twin = copy.deepcopy(model)
    schedule.step()
    assert model.first.lam.item() == pytest.approx(0.2)
    assert twin.first.lam is twin.second.lam
    assert twin.first.lam.item() == 0.0
    twin.first.schedule.step()
    assert twin.second.lam.item() == pytest.approx(0.2)


def test_compiled_layer_does_not_recompile_as_lambda_moves():
    model = Net()
    schedule = ArenasSchedule(8, warmup_steps=2)
    prepare_arenas(model, schedule)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 32)
    for _ in range(6):
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        schedule.step()
    assert compilations == 1


def test_compiled_gradients_equal_eager_ones():
    model = Net()
    prepare_arenas(model, at_step(ArenasSchedule(8, warmup_steps=4), 2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 32)
    gradients = []
    for f in (model, compiled):
        model.zero_grad()
        f(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, aot in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, aot)


# Eval and finalize


def test_compiled_eval_equals_eager():
    model = Net()
    prepare_arenas(model, ArenasSchedule(8))
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 32)
    expected = model(x)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize(("group", "stride"), [(None, 1), (32, 1), (64, 16)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_eval_ignores_lambda_and_equals_finalize_bit_for_bit(group, stride, rows):
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
    if stride == 16:
        model[2] = nn.Linear(96, 64)  # 96 columns do not divide into chunks of 64
    schedule = at_step(ArenasSchedule(10), 3)
    include = ["0"] if stride == 16 else None
    prepare_arenas(model, schedule, include=include, exclude=(), group=group, stride=stride)
    assert schedule.value > 0
    model.eval()
    x = torch.randn(rows, 128)
    before = model(x)
    schedule.step()
    assert torch.equal(model(x), before)
    assert not torch.equal(model.train()(x), before)
    finalize(model.eval(), force=True)
    assert isinstance(model[0], TernaryLinear)
    assert torch.equal(model(x), before)


def test_eval_sees_every_change_of_the_weight():
    layer = ArenasLinear(32, 8, schedule=ArenasSchedule(10)).eval()
    x = torch.randn(2, 32)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.neg_()  # does not advance the version counter of the parameter
        torch.testing.assert_close(layer(x) - layer.bias, -(before - layer.bias))


def test_eval_is_differentiable_with_lambda_zero():
    schedule = at_step(ArenasSchedule(10, warmup_steps=2), 1)
    layer = ArenasLinear(64, 8, schedule=schedule).eval()
    x = torch.randn(4, 64, requires_grad=True)
    g = torch.randn(4, 8)
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, g.T @ x)
    torch.testing.assert_close(x.grad, g @ effective_weight(layer.weight, 0.0, None, 1))


def test_finalize_waits_for_lambda_zero():
    model = Net()
    schedule = at_step(ArenasSchedule(4, warmup_steps=1), 2)
    prepare_arenas(model, schedule)
    with pytest.raises(RuntimeError, match=r"lambda is 0\.75 at step 2 of 4"):
        finalize(model)
    assert isinstance(model.first, ArenasLinear)
    at_step(schedule, 2)
    finalize(model)
    assert isinstance(model.first, TernaryLinear)
    assert isinstance(model.second, TernaryLinear)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="no ArenasLinear"):
        finalize(model)


def test_prepare_shares_parameters_and_keeps_what_is_excluded():
    model = Net()
    parameters = dict(model.named_parameters())
    prepare_arenas(model, ArenasSchedule(4))
    assert isinstance(model.first, ArenasLinear)
    assert type(model.lm_head) is nn.Linear
    assert all(parameters[name] is p for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="include"):
        prepare_arenas(Net(), ArenasSchedule(4), include=["nothing"])


def test_shared_module_is_prepared_once():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)})
    prepare_arenas(model, ArenasSchedule(4))
    assert isinstance(model["a"], ArenasLinear)
    assert model["a"] is model["b"]
    finalize(model, force=True)
    assert isinstance(model["a"], TernaryLinear)
    assert model["a"] is model["b"]


# Training


def test_regression_trains_and_settles():
    training = Training(steps=120)
    losses, flips = [], []
    before = codes(training.model)
    for _ in range(120):
        losses.append(training.step())
        after = codes(training.model)
        flips.append(flip_rate(before, after))
        before = after
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert sum(flips[-20:]) < sum(flips[:20])
    assert training.schedule.value == 0.0
    training.model.eval()
    with torch.no_grad():
        deployed = F.mse_loss(training.model(training.x), training.y).item()
    assert deployed == pytest.approx(losses[-1], rel=0.3)


def test_accumulation_and_checkpointing_do_not_advance_the_schedule():
    plain, split, recomputed = Training(), Training(), Training()
    for _ in range(12):
        a = plain.step()
        b = split.step(micro_batches=4)
        c = recomputed.step(recompute=True)
        assert c == a
        assert b == pytest.approx(a, rel=1e-3)
    assert plain.schedule.t == split.schedule.t == recomputed.schedule.t == 12


@pytest.mark.parametrize("at", [2, 17])
def test_resumed_training_has_the_same_loss_curve(at):
    whole = Training()
    for _ in range(at):
        whole.step()
    resumed = Training(seed=1)
    resumed.x, resumed.y = whole.x, whole.y
    resumed.load(whole.state())
    assert resumed.schedule.t == at
    assert [whole.step() for _ in range(40 - at)] == [resumed.step() for _ in range(40 - at)]


# Diagnostics


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(37)) == pytest.approx(37)
    assert effective_rank(torch.ones(5, 9)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(1.7548, abs=1e-4)
    gaussian = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    assert effective_rank(gaussian) == pytest.approx(0.805 * 512, rel=0.01)
    assert effective_rank(gaussian.bfloat16() * 1e30) == pytest.approx(0.805 * 512, rel=0.01)
    assert effective_rank(torch.zeros(3, 4)) == 0.0
    assert effective_rank(gaussian) == pytest.approx(reference.effective_rank(gaussian), rel=1e-4)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([[1.0, math.nan]])])
def test_effective_rank_rejects(bad):
    with pytest.raises(ValueError, match="effective_rank: g must be"):
        effective_rank(bad)


@pytest.mark.parametrize("kind", ["gaussian", "wide", "tall", "rank 1", "rank 60", "power 1"])
def test_randomised_effective_rank_is_close_to_the_exact_one(kind):
    generator = torch.Generator().manual_seed(1)
    n = 400
    square = torch.randn(n, n, generator=generator)
    u, _, v = torch.linalg.svd(square)
    g = {
        "gaussian": square,
        "wide": torch.randn(n, 2 * n, generator=generator),
        "tall": torch.randn(2 * n, n, generator=generator),
        "rank 1": square[:, :1] @ square[:1],
        "rank 60": square[:, :60] @ square[:60],
        "power 1": u @ torch.diag(1 / torch.arange(1.0, n + 1)) @ v,
    }[kind]
    assert effective_rank(g, exact_up_to=0) == pytest.approx(effective_rank(g), rel=0.03)
    assert effective_rank(g, exact_up_to=0) == effective_rank(g, exact_up_to=0)


def test_gradient_rank_is_measured_every_n_optimizer_steps():
    training = Training()
    ranks = GradientRank(training.model, training.optimizer, every=3)
    for _ in range(7):
        training.step(micro_batches=2)
    assert [step for step, _ in ranks.history] == [0, 3, 6]
    assert set(ranks.history[0][1]) == {"first", "second"}
    assert all(1 <= r <= 48 for _, layers in ranks.history for r in layers.values())
    ranks.remove()
    training.step()
    assert len(ranks.history) == 3


def test_flip_rate_counts_changed_codes():
    layer = ArenasLinear(64, 2, bias=False, schedule=ArenasSchedule(10))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(2, 16))
    before = codes(layer)
    assert flip_rate(before, codes(layer)) == 0.0
    with torch.no_grad():
        layer.weight[0, 0] = 5.0  # another lane is the smallest
        layer.weight[1, 5:8] *= -1  # a sign and both relative signs
        layer.weight[1, 60] = -1.5  # stays the smallest: the code stays
    assert flip_rate(before, codes(layer)) == pytest.approx(2 / 32)
    with pytest.raises(ValueError, match="flip_rate"):
        flip_rate(before, {})


def test_latent_shares():
    layer = ArenasLinear(8, 1, bias=False, schedule=ArenasSchedule(10))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, -1.1, 0.1, 0.9, 2.0, 0.0, 0.0]]))
    # alpha = (1 + 1 + 1.1 + 0.9 + 2 + 0) / 6 = 1
    shares = latent_shares(layer)
    assert shares.near_scale == pytest.approx(4 / 8)
    assert shares.near_zero == pytest.approx(3 / 8)
