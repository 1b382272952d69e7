"""The first layers of a transformers model as a smaller model that shares its weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from alignops._checks import check

M = TypeVar("M", bound=PreTrainedModel)


def early_exit(model: M, layers: int) -> M:
    """A view of the first layers of a model, its final norm and its head: a drafter for free.

    Every module is that of the model itself; only the containers on the way to the list of layers
    and the configuration are copied. So the view takes no memory, and follows when the model is
    trained, moved or converted in place.

    Args:
        model: any decoder-only model whose layers are one `ModuleList`.
        layers: how many of them; 1 to all.

    Returns:
        A model of the same class, ready for `forward`, `generate`, and to draft for `model`.

    Raises:
        ValueError: `layers` is out of range, or the list of layers cannot be told.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=99))
        >>> small = early_exit(model, 2)
        >>> len(small.model.layers), small.lm_head is model.lm_head
        (2, True)

    Source: self-speculative decoding, arXiv 2309.08168; LayerSkip, arXiv 2404.16710.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    check(1 <= layers <= depth, f"early_exit: layers must be 1 to {depth}, got {layers}")
    path = _layers_of(model, depth).split(".")
    _shorten(text, depth, layers)
    view: M = _container(model, config)
    module: nn.Module = view
    for name in path[:-1]:
        child = _container(module._modules[name], config)
        module._modules[name] = child
        module = child
    module._modules[path[-1]] = nn.ModuleList(module._modules[path[-1]][:layers])  # type: ignore[index]
    return view


def _layers_of(model: nn.Module, depth: int) -> str:
    """The name of the one outermost list of `depth` modules."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inner:
            found.append(name)
    check(
        len(found) == 1,
        f"early_exit: model must have one ModuleList of {depth} layers, got "
        f"{type(model).__name__} with {', '.join(found) or 'none'}",
    )
    return found[0]


def _shorten(config: Any, depth: int, layers: int) -> None:
    """Say in a configuration that there are fewer layers: their number, and lists about each."""
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def _container(module: Any, config: Any) -> Any:
    """A module with the same parameters and children, whose children can be replaced."""
    view = copy.copy(module)
    # A shallow copy shares the dictionary of children.
    view._modules = dict(module._modules)
    if hasattr(module, "config"):
        # A part of a model may have a configuration of its own, that of the text.
        whole = type(module.config) is type(config)
        view.config = config if whole else config.get_text_config()
    return view
