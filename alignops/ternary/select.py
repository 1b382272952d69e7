"""Which layers of a model can be made ternary, and which should be."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from alignops.ternary.layers import Int8Linear, TernaryLinear

DEFAULT_EXCLUDE = ("lm_head",)


def select_layers(
    model: nn.Module,
    include: Iterable[str] | str | None,
    exclude: Iterable[str] | str,
    group: int | None,
    stride: int,
    op: str,
    head: nn.Module | None = None,
) -> tuple[dict[nn.Module, list[str]], dict[str, str]]:
    """The layers to convert with all their names, and the reason for each of the others.

    `head` is a layer that patterns and tied weights do not hold back. Raises ValueError, in the
    name of `op`, for a pattern that matches no layer.
    """
    places = _linear_places(model)
    chosen = _choose(places, include, exclude, op)
    bound = _bound(model)
    selected, skipped = {}, {}
    for layer, names in places.items():
        if layer is head:
            reason = _unfit(layer, None, 1)
        else:
            reason = chosen[names[0]] or bound.get(layer) or _unfit(layer, group, stride)
        if reason is None:
            selected[layer] = names
        else:
            skipped[names[0]] = reason
    return selected, skipped


def replace(model: nn.Module, names: list[str], layer: nn.Module) -> None:
    """Put `layer` in all places of `model` called `names`."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer in transformers: y = x W + b with W (K, N)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linear_places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Everything that is a linear layer in some way, with all its names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (
            isinstance(module, (nn.Linear, TernaryLinear, Int8Linear))
            or is_conv1d(module)
            or hasattr(module, "qweight")
        ):
            places.setdefault(module, []).append(name)
    return places


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a dotted name or a run of its parts."""
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(run, pattern) for run in runs)


def _choose(
    places: dict[nn.Module, list[str]],
    include: Iterable[str] | str | None,
    exclude: Iterable[str] | str,
    op: str,
) -> dict[str, str | None]:
    """Why the patterns leave a layer out, by its first name; None: they do not."""
    wanted = _patterns(include) if include is not None else None
    unwanted = _patterns(exclude)
    for option, patterns in (("include", wanted or ()), ("exclude", unwanted)):
        for pattern in patterns:
            known = any(matches(name, pattern) for names in places.values() for name in names)
            if not known and not (option == "exclude" and pattern in DEFAULT_EXCLUDE):
                raise ValueError(
                    f"{op}: {option} must match layers, got {pattern!r}, which matches none"
                )
    chosen: dict[str, str | None] = {}
    for names in places.values():
        reason = None
        if any(matches(name, pattern) for name in names for pattern in unwanted):
            reason = "excluded"
        elif wanted is not None and not any(matches(n, p) for n in names for p in wanted):
            reason = "not included"
        chosen[names[0]] = reason
    return chosen


def _patterns(patterns: Iterable[str] | str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _bound(model: nn.Module) -> dict[nn.Module, str]:
    """Reason for every module whose weight another module uses, too."""
    owners: dict[int, dict[nn.Module, str]] = {}
    bound: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), {})[module] = name
        if isinstance(module, nn.TransformerEncoderLayer):  # its fast path
            reader = f"{type(module).__name__} reads its weight"
            bound.update(dict.fromkeys((module.linear1, module.linear2), reader))
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            others = [name for m, name in owners[id(weight)].items() if m is not module]
            if others:
                bound[module] = f"weight is tied to {others[0]}"
    return bound


def _unfit(layer: nn.Module, group: int | None, stride: int) -> str | None:
    """Why a layer cannot be converted, None if it can."""
    if isinstance(layer, (TernaryLinear, Int8Linear)):
        return "already converted"
    if nn.utils.parametrize.is_parametrized(layer):
        return "parametrized"
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if hasattr(layer, "qweight") or kind.startswith("bitsandbytes."):
        return f"quantized already ({kind})"
    if type(layer) is not nn.Linear and not is_conv1d(layer):
        return f"a subclass of Linear ({kind})"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "weight is not a parameter"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks"
    k = weight.shape[0 if is_conv1d(layer) else 1]
    if weight.dtype == torch.float64:
        return "weight is float64"
    if weight.numel() == 0:
        return "weight is empty"
    if (group or k) > k or (stride == 16 and k % 64):
        return f"K={k} does not fit group={group}, stride={stride}"
    return None
