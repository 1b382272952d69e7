"""Shapes of named models: one table for every benchmark."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder: `linears` are the (out, in) shapes of one layer, `head` the output's."""

    name: str
    layers: int
    linears: tuple[tuple[str, int, int], ...]
    head: tuple[int, int]

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(n * k for _, n, k in self.linears)


def _llama(name: str, layers: int, hidden: int, kv: int, ffn: int, vocabulary: int) -> Model:
    linears = (
        ("q", hidden, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, hidden),
        ("gate", ffn, hidden),
        ("up", ffn, hidden),
        ("down", hidden, ffn),
    )
    return Model(name, layers, linears, (vocabulary, hidden))


MODELS = {
    model.name: model
    for model in (
        _llama("SmolLM2-135M", 30, 576, 192, 1536, 49152),
        _llama("bitnet-0.7B", 24, 1536, 1536, 4096, 32002),
        _llama("LLaMA-3.2-1B", 16, 2048, 512, 8192, 128256),
        _llama("LLaMA-3.2-3B", 28, 3072, 1024, 8192, 128256),
        _llama("bitnet-3B", 26, 3200, 3200, 8640, 32002),
        _llama("LLaMA-3-8B", 32, 4096, 1024, 14336, 128256),
    )
}

# Single matrices (out, in) of the models above: the gate/up and down projections of the 1B, 3B and
# 8B models.
MATRICES = ((8192, 2048), (2048, 8192), (8192, 3072), (14336, 4096))


def packed_bytes(n: int, k: int) -> int:
    """Bytes of an (n, k) weight at 5 bits per 4 weights, rows and columns not padded."""
    return n * k * 5 // 32


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Keys and values of a model: `heads` of `head_size` elements in each layer, bfloat16."""

    name: str
    layers: int
    heads: int
    head_size: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.heads * self.head_size


CACHES = {
    shape.name: shape
    for shape in (
        CacheShape("Qwen3-0.6B", 28, 8, 128),
        CacheShape("LLaMA-3-8B", 32, 8, 128),
    )
}


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Attention of a model: query heads share `kv_heads` heads of keys and values."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


ATTENTION = {
    shape.name: shape
    for shape in (
        AttentionShape("QwQ-32B", 64, 40, 8, 128),
        AttentionShape("LLaMA-3-8B", 32, 32, 8, 128),
        AttentionShape("Qwen3-4B", 36, 32, 8, 128),
        AttentionShape("Qwen2.5-0.5B", 24, 14, 2, 64),
    )
}
