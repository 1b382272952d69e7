"""How the attention layers of a transformers model reach the step that is being computed.

Models call the function that their configuration names, with the keys and values of the new tokens
only, since `HogwildCache` returns what it is given. Who handles the call is kept in a context
variable: each thread has its own, and not every model hands arguments down to its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from alignops.attention import UnsupportedModel

NAME = "alignops_concurrent"


class LayerHandler(Protocol):
    """Computes the attention of one layer."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Out (1, R, Hq, Dv) of query (1, Hq, R, D), key (1, Hkv, R, D), value (1, Hkv, R, Dv)."""
        ...


_HANDLER: ContextVar[LayerHandler | None] = ContextVar("alignops_concurrent_handler", default=None)


@contextmanager
def handled_by(handler: LayerHandler) -> Iterator[None]:
    """In this thread, attention layers of views call the handler."""
    token = _HANDLER.set(handler)
    try:
        yield
    finally:
        _HANDLER.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers.

    Raises:
        RuntimeError: called outside a forward of a concurrent model, or with a mask.
    """
    handler = _HANDLER.get()
    if handler is None or attention_mask is not None:
        raise RuntimeError(
            f"{NAME}: this attention function works inside `ConcurrentModel.forward` and without "
            f"a mask, got {'no step' if handler is None else 'a mask'}"
        )
    layer: Any = getattr(module, "layer_idx", None)
    return handler(
        layer,
        query,
        key,
        value,
        scaling,
        kwargs.get("softcap"),
        kwargs.get("sliding_window"),
        kwargs.get("s_aux"),
    ), None


# No mask function goes with it: without one the library makes no masks, which it would derive from
# positions that are all zero here.
AttentionInterface.register(NAME, attend)


class HogwildCache(Cache):
    """What a model gets for its cache: a witness that earlier tokens exist.

    Keys and values are not here but in the pool; the attention function puts them there, because
    only it sees them as they are attended to: models with compressed caches expand them after
    `update`. All new tokens of all workers are one batch row.

    Args:
        length: positions before the first new token, at most.
    """

    is_compileable = False

    def __init__(self, length: int) -> None:
        # Releases differ in what the base class asks for; nothing of it is used.
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self._length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The same keys and values."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the first new token."""
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Positions before the first new token."""
        return self._length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Positions in all, and the first of them; older releases hand over the new positions."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self._length + int(new), 0


@dataclass(frozen=True)
class LayerGeometry:
    """Sizes of the keys and values of a layer."""

    kv_heads: int
    head_dim: int
    v_head_dim: int


class Recorder:
    """Handles a forward by noting what the layers hand over; attention is to the token itself."""

    def __init__(self) -> None:
        self.layers: list[LayerGeometry] = []

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The values themselves, which is what attention to a single key without sinks gives."""
        if layer != len(self.layers):
            raise UnsupportedModel(
                "concurrent_model: layers must call attention once each and in order, got layer "
                f"{layer} as call {len(self.layers)}"
            )
        self.layers.append(LayerGeometry(key.shape[1], key.shape[-1], value.shape[-1]))
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2)
