"""Tiny random models of transformers for the probe and for tests of whole models."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

LAYERS = 4
# Sizes by the names that configurations have for them.
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "d_model": 64,
    "n_layers": LAYERS,
    "n_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@functools.cache
def known() -> tuple[str, ...]:
    """Kinds of causal language models that the installed release has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(kind: str, **options: Any) -> Any:
    """A random float32 model of a kind in evaluation mode, with these options changed."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    other = getattr(config_class, "attribute_map", {})
    # A size that is another name of one in the list is given once.
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if name in names and (other.get(name, name) == name or other[name] not in _SIZES)
    }
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_class(**(sizes | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3) if p.dim() > 1 else p.normal_(1, 0.1)
    return model.float().eval()
