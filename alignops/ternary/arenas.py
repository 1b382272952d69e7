"""Arenas: training 3:4 ternary weights with an annealed full-precision residual.

Forward uses `W_eff = alpha T + lambda W` in one matmul, with T and alpha quantized from the latent
weight W at every call; lambda rises from 0, returns to 0 before the end, and what is left is the
1.25-bit layer.

Source: Sherry, arXiv 2601.07892, section 3.2, eq. 7 (forward) and eq. 8 (backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignops.ternary import ops
from alignops.ternary.layers import TernaryLinear
from alignops.ternary.ops import ternary_linear
from alignops.ternary.select import DEFAULT_EXCLUDE, replace, select_layers
from alignops.ternary.weight import quantize

Shape = str | Callable[[int], float]

_EXPONENTIAL_RATE = (
    5.0  # exp(-5) of the initial lambda is what the exponential decay subtracts to end at 0
)


class ArenasSchedule:
    """lambda over the optimizer steps t = 0..T, one object for all layers of a model.

    | shape | lambda(t), 0 <= t <= T |
    |---|---|
    | `"warmup_cosine"` | `max t / Tw` to Tw, then `max (1 + cos(pi (t - Tw) / (T - Tw))) / 2` |
    | `"linear"` | `max (1 - t / T)` |
    | `"cosine"` | `max (1 + cos(pi t / T)) / 2` |
    | `"exponential"` | `max (exp(-5 t / T) - exp(-5)) / (1 - exp(-5))` |
    | `"constant"` (for ablations) | `max`, also after T |
    | callable | `max` times what it returns for t < T |

    All but `"constant"` are exactly 0 at T and after. The step is counted here and nowhere else:
    call `step()` once after every optimizer step, or let the optimizer do it (`attach`). Forward
    passes, gradient accumulation and activation checkpointing never advance it. Save `state_dict()`
    next to the optimizer's.

    Args:
        total_steps: T, optimizer steps of the whole training.
        warmup_steps: Tw of `"warmup_cosine"`, default T // 10.
        max_lambda: largest lambda.
        shape: name or callable of the table.

    Raises:
        ValueError: T <= 0, Tw < 0 or Tw >= T, max_lambda < 0, unknown shape, or warmup_steps for
            another shape.

    Source: arXiv 2601.07892, section 3.2.

    Example:
        >>> schedule = ArenasSchedule(1000)
        >>> [round(schedule.at(t), 6) for t in (0, 50, 100, 325, 550, 1000)]
        [0.0, 0.5, 1.0, 0.853553, 0.5, 0.0]
    """

    def __init__(
        self,
        total_steps: int,
        warmup_steps: int | None = None,
        max_lambda: float = 1.0,
        shape: Shape = "warmup_cosine",
    ) -> None:
        if total_steps <= 0:
            raise ValueError(f"ArenasSchedule: total_steps must be positive, got {total_steps}")
        if not callable(shape) and shape not in _SHAPES:
            raise ValueError(
                f"ArenasSchedule: shape must be one of {', '.join(_SHAPES)} or a callable, "
                f"got {shape!r}"
            )
        if warmup_steps is None:
            warmup_steps = total_steps // 10 if shape == "warmup_cosine" else 0
        elif shape != "warmup_cosine":
            raise ValueError(
                f"ArenasSchedule: warmup_steps must be left out for shape {shape!r}, "
                f"got {warmup_steps}"
            )
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                "ArenasSchedule: warmup_steps must be at least 0 and below "
                f"total_steps={total_steps}, got {warmup_steps}"
            )
        if not 0 <= max_lambda < math.inf:
            raise ValueError(
                f"ArenasSchedule: max_lambda must be finite and not negative, got {max_lambda}"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.max_lambda = max_lambda
        self.shape = shape
        self.t = 0
        self._values: dict[torch.device, Tensor] = {}

    def at(self, t: int) -> float:
        """Lambda after t optimizer steps.

        Raises:
            ValueError: t < 0, or a callable shape returned a negative or non-finite value.
        """
        if t < 0:
            raise ValueError(f"ArenasSchedule.at: t must not be negative, got {t}")
        if t >= self.total_steps and self.shape != "constant":
            return 0.0
        if not callable(self.shape):
            return self.max_lambda * _SHAPES[self.shape](t, self.total_steps, self.warmup_steps)
        value = self.max_lambda * self.shape(t)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"ArenasSchedule.at: shape must return finite values >= 0, got {value} at t={t}"
            )
        return value

    @property
    def value(self) -> float:
        """Lambda now."""
        return self.at(self.t)

    def tensor(self, device: torch.device) -> Tensor:
        """The float32 0-dim tensor on `device` that holds lambda, the same at every call."""
        if device not in self._values:
            self._values[device] = torch.full((), self.value, dtype=torch.float32, device=device)
        return self._values[device]

    def step(self) -> None:
        """One optimizer step was taken: advances t and writes lambda into the shared tensors."""
        self._set(self.t + 1)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Lets `optimizer.step()` call `step()`; returns a handle whose `remove()` undoes it.

        A step that a gradient scaler skips does not reach the optimizer and so does not count.
        """
        return optimizer.register_step_post_hook(self._after_optimizer_step)

    def _after_optimizer_step(self, *_: Any) -> None:
        self.step()

    def _set(self, t: int) -> None:
        value = self.at(t)
        self.t = t
        for tensor in self._values.values():
            tensor.fill_(value)

    def state_dict(self) -> dict[str, Any]:
        """T and the settings that define lambda(t); a callable shape itself is not stored."""
        return {
            "t": self.t,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "max_lambda": self.max_lambda,
            "shape": "callable" if callable(self.shape) else self.shape,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved: the same t and from then on the same lambda.

        Raises:
            ValueError: `state` was saved by a schedule with other settings.
        """
        own = self.state_dict()
        different = [key for key in own if key != "t" and state.get(key) != own[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"ArenasSchedule.load_state_dict: {key} must be {own[key]!r} as in this schedule, "
                f"got {state.get(key)!r}"
            )
        self._set(int(state["t"]))

    def __repr__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in self.state_dict().items())
        return f"ArenasSchedule({fields})"


def _warmup_cosine(t: int, total: int, warmup: int) -> float:
    if t < warmup:
        return t / warmup
    return (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2


def _exponential(t: int, total: int, warmup: int) -> float:
    end = math.exp(-_EXPONENTIAL_RATE)
    return (math.exp(-_EXPONENTIAL_RATE * t / total) - end) / (1 - end)


_SHAPES: dict[str, Callable[[int, int, int], float]] = {
    "warmup_cosine": _warmup_cosine,
    "linear": lambda t, total, warmup: 1 - t / total,
    "cosine": lambda t, total, warmup: (1 + math.cos(math.pi * t / total)) / 2,
    "exponential": _exponential,
    "constant": lambda t, total, warmup: 1.0,
}


class _ArenasFunction(torch.autograd.Function):
    """`y = x W_eff^T + b`; saves x, W and lambda only, W_eff is computed again for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lam: Tensor,
        group: int,
        stride: int,
        training: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lam)
        ctx.group, ctx.stride = group, stride
        if training:
            return F.linear(x, ops.ternary_fake_quant(weight, lam, group, stride, x.dtype), bias)
        return ternary_linear(x, quantize(weight, group, stride), bias, act="none")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lam = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            effective = ops.ternary_fake_quant(weight, lam, ctx.group, ctx.stride, grad.dtype)
            grad_x = grad @ effective
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) * (1 + lam)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class ArenasLinear(nn.Linear):
    """Linear layer that trains 1.25-bit weights; latent `weight` (N, K) and bias of `nn.Linear`.

    In training mode `y = x (alpha T + lambda W)^T + b`, T and alpha quantized from W at every call;
    `dL/dX = g (alpha T + lambda W)` and, straight through, `dL/dW = (1 + lambda) g^T x` for all of
    W. The output has the dtype of x, or autocast's; statistics are float32. In eval mode lambda
    counts as 0 and the layer computes what `finalize` will: with the packed weight in mode `none`,
    quantized at every call so that it is never stale.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it is not quantized.
        schedule: source of lambda, shared by all layers of a model.
        group: columns per scale, default one scale per row.
        stride: columns between the weights of a block, 1 or 16.
        device, dtype: of the parameters.

    Source: arXiv 2601.07892, section 3.2, eq. 7-8.

    Example:
        >>> layer = ArenasLinear(64, 8, schedule=ArenasSchedule(100))
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 8])
    """

    lam: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        schedule: ArenasSchedule,
        group: int | None = None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.schedule = schedule
        self.group = group
        self.stride = stride
        self.register_buffer("lam", schedule.tensor(self.weight.device), persistent=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, schedule: ArenasSchedule, group: int | None = None, stride: int = 1
    ) -> ArenasLinear:
        """An ArenasLinear that shares the parameters of `linear`."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            schedule=schedule,
            group=group,
            stride=stride,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.lam = schedule.tensor(linear.weight.device)
        return layer.train(linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ArenasLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.lam = self.schedule.tensor(self.weight.device)  # stays shared, stays float32
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y: (..., N) for x: (..., K)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        lam = self.lam if self.training else torch.zeros_like(self.lam)
        group = self.group or self.in_features
        y: Tensor = _ArenasFunction.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), self.weight, bias, lam, group, self.stride, self.training
        )
        return y

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, group={self.group}, stride={self.stride}"


class Prepared(NamedTuple):
    """What `prepare_arenas` did: names of swapped layers, and why others were left alone."""

    swapped: list[str]
    skipped: dict[str, str]


def prepare_arenas(
    model: nn.Module,
    schedule: ArenasSchedule,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str = DEFAULT_EXCLUDE,
    group: int | None = None,
    stride: int = 1,
) -> Prepared:
    """Replace `torch.nn.Linear` by `ArenasLinear`, in place, with the same parameter objects.

    Patterns, and what is skipped, are those of `convert`; Conv1D is skipped, too.

    Args:
        model: changed in place; a layer used in several places stays shared.
        schedule: of lambda, for all layers.
        include: patterns of layers to swap; None: all.
        exclude: patterns of layers to leave alone.
        group: columns that share a scale; None: one scale per row.
        stride: distance of the four columns of a block, 1 or 16.

    Returns:
        Prepared: names of the swapped layers, and of those left alone with the reason.

    Raises:
        ValueError: a pattern matches no layer, or no layer is left to swap.

    Source: arXiv 2601.07892, section 3.2.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> prepare_arenas(model, ArenasSchedule(100), exclude="2")
        Prepared(swapped=['0'], skipped={'2': 'excluded'})
    """
    selected, skipped = select_layers(model, include, exclude, group, stride, "prepare_arenas")
    prepared = Prepared([], skipped)
    for layer, names in selected.items():
        if isinstance(layer, nn.Linear) and names[0]:
            replace(model, names, ArenasLinear.from_linear(layer, schedule, group, stride))
            prepared.swapped.append(names[0])
        else:
            skipped[names[0]] = "not a torch.nn.Linear inside the model"
    if not prepared.swapped:
        raise ValueError(
            f"prepare_arenas: model must contain a layer to swap, skipped {prepared.skipped}"
        )
    return prepared


def finalize(model: nn.Module, force: bool = False, act: str = "auto") -> list[str]:
    """Replace every `ArenasLinear` by a `TernaryLinear` with its weight quantized, in place.

    In mode `none` at float32 the model computes what it computed in eval mode, bit for bit.

    Args:
        model: changed in place.
        force: also while lambda is not 0, that is while layers still lean on the residual.
        act: of the new layers, see `alignops.ternary_linear`.

    Returns:
        Names of the replaced layers.

    Raises:
        RuntimeError: lambda is not 0 and `force` is not set.
        ValueError: there is no ArenasLinear inside `model`.
    """
    places: dict[ArenasLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ArenasLinear) and name:
            places.setdefault(module, []).append(name)
    if not places:
        raise ValueError("finalize: model must contain ArenasLinear layers, got no ArenasLinear")
    for layer, names in places.items():
        if not force and layer.schedule.value > 0:
            raise RuntimeError(
                f"finalize: {names[0]}: lambda is {layer.schedule.value:.3g} at step "
                f"{layer.schedule.t} of {layer.schedule.total_steps}; train until it is 0, or pass "
                "force=True"
            )
    for layer, names in places.items():
        weight = quantize(layer.weight, layer.group, layer.stride)
        made = TernaryLinear.from_weight(weight, layer.bias, act)
        replace(model, names, made.train(layer.training))
    return [names[0] for names in places.values()]
