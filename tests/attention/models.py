"""Tiny random models of transformers, and how their layers rotate, by hand.

The rotations are written down here rather than asked of the package, so that tests of the package
against stock models do not inherit its mistakes.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB = 61
LAYERS = 2
_SLIDING = ["sliding_attention", "full_attention"]
_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Name of the class, and what its configuration says besides the sizes. Windows are short, so that
# they end within every test.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 17}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 17, "layer_types": _SLIDING}),
    "glm": ("Glm", {"head_dim": 16}),
    "phi": ("Phi", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "sliding_window": 17, "layer_types": _SLIDING, **_MOE}
        | {"rope_parameters": _YARN},
    ),
}
# Soft caps, neighbours paired, values narrower than keys of which only the end rotates. These are
# compared with themselves, not by brute force.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 17, "attn_logit_softcapping": 2.0}),
    "cohere2": ("Cohere2", {"sliding_window": 17, "layer_types": _SLIDING, "logit_scale": 1.0}),
    "deepseek_v3": (
        "DeepseekV3",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": LAYERS},
    ),
}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model in evaluation mode, with weights that make attention matter."""
    import transformers as tf

    kind, more = (MODELS | MORE)[name]
    kind_config = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(tf, f"{kind_config}Config")(**(_SIZE | more))
    torch.manual_seed(11)
    net = getattr(tf, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.normal_(0, 0.3 if p.dim() > 1 else 0.1)
            if p.dim() == 1 and "bias" not in key and "sinks" not in key and "Gemma" not in kind:
                p.add_(1)
        # Logits of about 1: bounds of tests are absolute.
        net.lm_head.weight.mul_(0.15)
    return net.to(dtype).eval()


def cache_name(net: Any) -> str:
    """What this release of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(net.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Rotation:
    """How a layer rotates: frequencies (F,) float64, and whether pairs are neighbours."""

    inv_freq: Tensor
    interleaved: bool = False

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., n, D) by positions (n,), in float64."""
        wide, d = x.double(), 2 * len(self.inv_freq)
        angle = positions.double()[:, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        rotary, rest = wide[..., :d], wide[..., d:]
        if self.interleaved:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
            rotary = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = rotary[..., : d // 2], rotary[..., d // 2 :]
            rotary = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([rotary, rest], -1)


def rotations(name: str, net: Any) -> list[Rotation | None]:
    """Of each layer; None: it does not rotate."""
    embedding = net.model.rotary_emb
    if name == "gemma3":
        kinds = net.config.layer_types
        return [Rotation(getattr(embedding, f"{kind}_inv_freq").double()) for kind in kinds]
    rotation = Rotation(embedding.inv_freq.double(), interleaved=name == "glm")
    if name == "smollm3":
        return [rotation if rotates else None for rotates in net.config.no_rope_layers]
    return [rotation] * LAYERS


def windows(net: Any) -> list[int | None]:
    """Of each layer: how many keys up to its own a query sees; None: all."""
    window = getattr(net.config, "sliding_window", None)
    kinds = getattr(net.config, "layer_types", None)
    if kinds is None:
        return [window] * LAYERS
    return [window if kind == "sliding_attention" else None for kind in kinds]
