"""A transformers model seen with another attention implementation, while the model stays as it is.

A model selects its attention function by its configuration, which all threads and all users of the
model share. A view has its own copies of the configuration and of the modules that hold it; all
weights, buffers and hooks are those of the model. So nothing is switched or restored around a
forward, and the model may be used as usual at the same time.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)


def attention_view(model: M, implementation: str) -> M:
    """A view of a model whose layers call another attention function.

    It takes no memory, and follows when the model is trained, or converted to another dtype or
    device. Layers that are replaced later are seen only below modules without a configuration.

    Args:
        model: any model that chooses its attention function from `AttentionInterface`.
        implementation: name of a function that is registered there.

    Returns:
        A model of the same class, ready for `forward`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> view = attention_view(model, "eager")
        >>> view.config._attn_implementation, model.config._attn_implementation
        ('eager', 'sdpa')
        >>> view.lm_head is model.lm_head
        True
    """
    configs: dict[int, Any] = {}
    views: dict[int, nn.Module] = {}
    view: M = _view(model, implementation, configs, views)
    return view


def _view(module: Any, implementation: str, configs: dict[int, Any], views: dict[int, Any]) -> Any:
    if id(module) in views:
        return views[id(module)]
    children = {
        name: None if child is None else _view(child, implementation, configs, views)
        for name, child in module._modules.items()
    }
    # Not by getattr: a module without the attribute looks it up in what it wraps.
    config = vars(module).get("config")
    view = module
    if isinstance(config, PretrainedConfig) or any(
        child is not module._modules[name] for name, child in children.items()
    ):
        view = copy.copy(module)
        # A shallow copy shares the dictionary of children.
        view._modules = children
        if isinstance(config, PretrainedConfig):
            # One memo for all, since a configuration contains those of the model's parts.
            view.config = copy.deepcopy(config, configs)
            view.config._attn_implementation_internal = implementation
    views[id(module)] = view
    return view
