"""`convert`: replace the linear layers of a model by ternary ones, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alignops.ternary import checks
from alignops.ternary.layers import Int8Linear, Siblings, TernaryLinear
from alignops.ternary.select import (
    DEFAULT_EXCLUDE,
    is_conv1d,
    matches,
    replace,
    select_layers,
)
from alignops.ternary.weight import TernaryWeight, quantize

# Names of layers that read the same input inside one block.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass
class Swapped:
    """A converted layer: its kind ("ternary" or "int8"), shape (N, K), bytes before and after."""

    kind: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass
class ConvertReport:
    """What `convert` did. `str(report)` is a table.

    Attributes:
        swapped: by the first name of each layer.
        skipped: linear layers left alone, name to reason.
        fused: names of layers computed in one call.
        bytes_before, bytes_after: parameters and buffers of the whole model.
    """

    swapped: dict[str, Swapped] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: list[tuple[str, ...]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[int]] = {}
        for name, s in self.swapped.items():
            key = (_pattern(name), s.kind, f"{s.shape[0]} x {s.shape[1]}")
            sums = groups.setdefault(key, [0, 0, 0])
            for i, value in enumerate((1, s.bytes_before, s.bytes_after)):
                sums[i] += value
        table = [("layer", "now", "shape", "count", "MB before", "MB after")]
        for key, (count, before, after) in groups.items():
            table.append((*key, str(count), _megabytes(before), _megabytes(after)))
        total = (_megabytes(self.bytes_before), _megabytes(self.bytes_after))
        table.append(("whole model", "", "", str(len(self.swapped)), *total))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = []
        for row in table:
            left = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
            right = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
            lines.append("  ".join((*left, *right)).rstrip())
        reasons: dict[tuple[str, str], int] = {}
        for name, reason in self.skipped.items():
            reasons[_pattern(name), reason] = reasons.get((_pattern(name), reason), 0) + 1
        for (name, reason), count in reasons.items():
            lines.append(f"skipped {name} ({count}): {reason}")
        if self.fused:
            lines.append(f"computed in one call: {len(self.fused)} sets of layers")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str = DEFAULT_EXCLUDE,
    group: int | None = None,
    head: str | None = None,
    act: str = "auto",
    fuse: bool = False,
    progress: bool = True,
    stride: int = 1,
    scale_dtype: torch.dtype = torch.float32,
) -> ConvertReport:
    """Replace `torch.nn.Linear` (and GPT-2's Conv1D) by `TernaryLinear`, in place.

    A pattern is a shell-style glob that must match the dotted name of a layer or a run of its
    parts: "mlp", "layers.0", "*.q_proj". Layers are skipped, with a reason in the report, if they
    are tied to another module, of a subclass, parametrized, hooked, or quantized already.

    Args:
        model: changed in place; a layer used in several places stays shared.
        include: patterns of layers to convert; None: all.
        exclude: patterns of layers to leave alone.
        group: columns that share a scale; None: one scale per row.
        head: "int8" makes the output layer (`get_output_embeddings()`, else `lm_head`) an
            `Int8Linear`, whatever the patterns say. An embedding tied to it stays as it is.
        act: of the new layers, see `alignops.ternary_linear`.
        fuse: compute q/k/v and gate/up in one call each, with the same results, see `Siblings`.
        progress: show a bar, if tqdm is installed.
        stride: see `alignops.ternary.quantize`.
        scale_dtype: see `alignops.ternary.quantize`.

    Returns:
        A `ConvertReport`.

    Raises:
        ValueError: a pattern matches no layer, there is no output layer for `head`, a weight cannot
            be quantized (its name is in the message), or an option is unknown.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> report = convert(model, progress=False)
        >>> model[0]
        TernaryLinear(
          in_features=64, out_features=64, bias=True, act=auto
          (weight): TernaryWeight((64, 64))
        )
    """
    checks.check_act(act, "convert")
    if head not in (None, "int8"):
        raise ValueError(f'convert: head must be None or "int8", got {head!r}')
    if isinstance(model, nn.Linear):
        raise ValueError(
            "convert: model must contain layers, got a Linear; see TernaryLinear.from_linear"
        )
    report = ConvertReport(bytes_before=model_bytes(model))
    head_layer = _find_head(model) if head else None
    selected, report.skipped = select_layers(
        model, include, exclude, group, stride, "convert", head_layer
    )
    new: dict[nn.Module, TernaryLinear | Int8Linear] = {}
    for layer, names in _bar(selected, progress):
        weight, bias = _weight_and_bias(layer)
        try:
            if layer is head_layer:
                new[layer] = Int8Linear.from_weight(weight, bias, act)
            else:
                packed = quantize(weight, group, stride, scale_dtype)
                new[layer] = TernaryLinear.from_weight(packed, bias, act)
        except ValueError as error:
            raise ValueError(f"convert: {names[0]}: {error}") from error

    for layer, made in new.items():
        replace(model, selected[layer], made.train(layer.training))
        weight, _ = _weight_and_bias(layer)
        report.swapped[selected[layer][0]] = Swapped(
            "int8" if isinstance(made, Int8Linear) else "ternary",
            (made.out_features, made.in_features),
            weight.numel() * weight.element_size(),
            _weight_bytes(made),
        )
    if fuse:
        report.fused = fuse_siblings(model)
    report.bytes_after = model_bytes(model)
    return report


def fuse_siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Compute q/k/v and gate/up of a converted model in one call each, see `Siblings`.

    Returns:
        The names of the layers that now belong together, those that did before not among them.
    """
    fused = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for names in SIBLINGS:
            layers = tuple(m for n in names if isinstance(m := children.get(n), TernaryLinear))
            kinds = {(m.in_features, m.weight.group, m.weight.stride, m.act) for m in layers}
            free = all(m._siblings is None for m in layers)
            if len(set(layers)) == len(names) and len(kinds) == 1 and free:
                Siblings(layers)
                fused.append(tuple(f"{name}.{n}".removeprefix(".") for n in names))
    return fused


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once; of ternary weights those of the planes."""
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, TernaryWeight):
            total += module.nbytes
            continue
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                total += t.numel() * t.element_size()
    return total


def _weight_bytes(layer: TernaryLinear | Int8Linear) -> int:
    """Bytes of a converted layer's weight with its scales."""
    if isinstance(layer, TernaryLinear):
        return layer.weight.nbytes
    return layer.weight.numel() + 4 * layer.scale.numel()


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None:
        raise ValueError(f"convert: weight must be a parameter, got None in {layer}")
    return (weight.t() if is_conv1d(layer) else weight), bias


def _find_head(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        head = next((m for name, m in model.named_modules() if matches(name, "lm_head")), None)
    if not isinstance(head, (nn.Linear, Int8Linear)):
        raise ValueError(
            "convert: head must be None for a model without a linear output layer "
            "(get_output_embeddings() or lm_head)"
        )
    return head


def _bar(layers: dict[nn.Module, list[str]], show: bool) -> Iterable[tuple[nn.Module, list[str]]]:
    if show:
        try:
            from tqdm import tqdm
        except ImportError:
            return layers.items()
        bar: Iterable[tuple[nn.Module, list[str]]] = tqdm(
            layers.items(), "quantizing", unit=" layers"
        )
        return bar
    return layers.items()


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"
