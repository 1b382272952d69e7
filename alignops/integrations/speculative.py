"""Models of transformers for speculative decoding.

The adapter passes positions and masks to the model explicitly and gives it a cache that writes the
columns of each row where that row ends (`RaggedCache`), so the model needs no changes. What a model
can do is found out by looking at it, not at version numbers: releases from 4.51 on differ in names
of arguments and in which objects they take as caches and masks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from alignops._checks import check
from alignops.speculative.adapter import LAYOUTS
from alignops.speculative.caches import RaggedCache

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Rows of a matrix product are a multiple of this in stable mode.
_ROWS = 16


class HFAdapter:
    """A causal language model of transformers as generation sees it; see `ModelAdapter`.

    | model                                   | mask         | layouts                         |
    |-----------------------------------------|--------------|---------------------------------|
    | rotary or learned positions             | 4-D          | all                             |
    | the same, with flash attention          | 2-D          | defer, realign, rollback        |
    | the same, some layers with windows      | 4-D per kind | all                             |
    | ALiBi by distance of columns (MPT)      | 4-D          | ragged, realign, rollback       |
    | ALiBi from a 2-D mask (Bloom, Falcon)   | 2-D          | defer, realign, rollback        |

    In releases of transformers before 5, models that take tuples of tensors as caches (GPT-2, MPT
    in 4.51), and those that make the masks of windows themselves (Gemma 2 there), are refused.

    Args:
        model: in evaluation mode. It must not be used by another thread meanwhile.
        layouts: restrict the layouts, or change which one is the best; None: as in the table.

    Raises:
        ValueError: the model is in training mode.
        NotImplementedError: the model is of a kind that is not supported: encoder-decoder, layers
            with recurrent states or chunked attention, flex attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> HFAdapter(model.eval()).layouts[0]
        'ragged'
    """

    def __init__(self, model: PreTrainedModel, layouts: Sequence[str] | None = None) -> None:
        check(not model.training, "HFAdapter: model must be in evaluation mode: call model.eval()")
        self.model = model
        config = _text_config(model)
        _refuse(model, config)
        self.vocab_size = int(_head_size(model, config))
        self.dtype = model.dtype
        self.device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._positions = "position_ids" in parameters
        self._keep = next(
            (n for n in ("logits_to_keep", "num_logits_to_keep") if n in parameters), None
        )
        self._kinds, self.windows = _kinds(config)
        alibi = _alibi(model, config, self._positions)
        attention = str(getattr(config, "_attn_implementation", "") or "")
        flash = "flash" in attention
        self.mask_kind = "mask2d" if flash or alibi == "mask" else "additive"
        self.max_length = None if alibi == "mask" else _max_length(config)
        self._slots = self.max_length if alibi == "columns" else None
        self.layouts = _layouts(self.mask_kind, alibi, self.windows)
        if layouts is not None:
            check(
                set(layouts) <= set(self.layouts),
                f"HFAdapter: layouts must be among {self.layouts} for this model, got {layouts}",
            )
            self.layouts = tuple(layouts)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, of the model's generation settings."""
        ids = getattr(self._generation, "eos_token_id", None)
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def pad_id(self) -> int | None:
        """Id that pads, of the model's generation settings."""
        pad: int | None = getattr(self._generation, "pad_token_id", None)
        return pad

    @property
    def _generation(self) -> Any:
        return getattr(self.model, "generation_config", None) or self.model.config

    def new_cache(self, rows: int, capacity: int, fixed: bool = False) -> RaggedCache:
        """An empty cache; `fixed`: it does not grow, and every forward sees all of it."""
        return _cache_class()(rows, capacity, fixed, self._slots)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Sequence[Tensor],
        cache: RaggedCache,
        last: int,
    ) -> Tensor:
        """Logits of the last columns (B, last, V); see `ModelAdapter.forward`."""
        check(not self.model.training, "HFAdapter: model must be in evaluation mode")
        attention_mask: Any = mask[0]
        if len(mask) > 1 and self.mask_kind != "mask2d":
            attention_mask = {
                kind: mask[self.windows.index(window)] for kind, window in self._kinds.items()
            }
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if self._positions:
            arguments["position_ids"] = positions
        if self._keep is not None:
            arguments[self._keep] = last
        with _PaddedRows() if cache.fixed else contextlib.nullcontext():
            logits: Tensor = self.model(
                input_ids=input_ids, attention_mask=attention_mask, **arguments
            ).logits
        return logits[:, -last:]


class _PaddedRows(TorchFunctionMode):
    """Linear layers compute a multiple of 16 rows, of which the last ones are padding.

    Libraries of matrix products divide rows among threads, and have other kernels, which sum in
    another order, for what is left over: of 6 rows on two threads MKL computes 4 with one kernel
    and 2 with another. Where no thread gets a remainder, one kernel computes all rows.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.nn.functional.linear:
            x, *others = args
            return _padded(x, lambda rows: func(rows, *others, **options))
        if func is torch.addmm:
            bias, x, *others = args
            return _padded(x, lambda rows: func(bias, rows, *others, **options))
        return func(*args, **options)


def _padded(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % _ROWS))
    out = product(padded)[: len(rows)]
    return out.reshape(*x.shape[:-1], out.shape[-1])


class CacheView:
    """Keys and values inside a cache of transformers, as the operators that move slots want them.

    Finds them in `layers[i].keys` and `.values`, or in the lists `key_cache` and `value_cache` of
    older releases. The tensors are the cache's own: what moves in them moves in the cache. One that
    has to become longer or shorter is replaced with `replace`. Layers that drop what is out of a
    window do not keep slots where they were, and are refused.

    Args:
        cache: such as `DynamicCache` or `StaticCache`, with something in it.

    Raises:
        TypeError: it holds keys and values in no way that is known.
        NotImplementedError: a layer drops slots.

    Example:
        >>> from transformers import DynamicCache
        >>> from alignops.speculative import kv_shift_
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.arange(3.0).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), 0)
        >>> kv_shift_(CacheView(cache).tensors, *(torch.tensor([i]) for i in (0, 1, 2)))
        >>> CacheView(cache).tensors[0].flatten().tolist()
        [0.0, 0.0, 1.0]
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._layered = hasattr(cache, "layers")
        if not self._layered and not hasattr(cache, "key_cache"):
            raise TypeError(
                "CacheView: cache must have layers or key_cache and value_cache, got "
                f"{type(cache).__name__}"
            )
        sliding = getattr(cache, "is_sliding", False)
        if any(sliding) if isinstance(sliding, (list, tuple)) else sliding:
            raise NotImplementedError("CacheView: a layer of the cache drops slots")

    @property
    def tensors(self) -> list[Tensor]:
        """Keys, values of layer 0, of layer 1 ...: (B, H, S, D)."""
        if self._layered:
            return [t for layer in self._cache.layers for t in (layer.keys, layer.values)]
        pairs = zip(self._cache.key_cache, self._cache.value_cache, strict=True)
        return [t for pair in pairs for t in pair]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Put other tensors in their places, such as what `kv_gather` has returned.

        Raises:
            ValueError: there are more or fewer of them.
        """
        count = len(self.tensors)
        check(len(tensors) == count, f"CacheView: tensors must be {count}, got {len(tensors)}")
        for i, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            if self._layered:
                self._cache.layers[i].keys, self._cache.layers[i].values = keys, values
            else:
                self._cache.key_cache[i], self._cache.value_cache[i] = keys, values


def _text_config(model: PreTrainedModel) -> Any:
    config = model.config
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def _refuse(model: PreTrainedModel, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"HFAdapter: {name} is an encoder-decoder model")
    kinds = set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if kinds:
        raise NotImplementedError(
            f"HFAdapter: {name} has layers of kinds that cannot be rolled back: {sorted(kinds)}"
        )
    if getattr(model, "_is_stateful", False):
        raise NotImplementedError(f"HFAdapter: {name} has recurrent states")
    if getattr(config, "attention_chunk_size", None):
        raise NotImplementedError(f"HFAdapter: {name} has chunked attention")
    if getattr(config, "layer_types", None) is None and _mixes_windows(model, config):
        raise NotImplementedError(
            f"HFAdapter: {name} has layers with and without a window, and takes one mask for "
            "all of them in this release of transformers"
        )
    if getattr(model, "_supports_cache_class", True) is False:
        raise NotImplementedError(
            f"HFAdapter: {name} takes no cache objects in this release of transformers"
        )
    if "flex" in str(getattr(config, "_attn_implementation", "")):
        raise NotImplementedError(
            f"HFAdapter: {name} uses flex attention; load it with attn_implementation='sdpa'"
        )
    for option in ("num_beams", "num_return_sequences"):
        value = getattr(getattr(model, "generation_config", None), option, None) or 1
        if value > 1:
            raise NotImplementedError(f"HFAdapter: {option} must be 1, got {value}")


def _mixes_windows(model: PreTrainedModel, config: Any) -> bool:
    """Whether layers differ in what they attend to, where the configuration does not list them."""
    if getattr(config, "use_sliding_window", False) and hasattr(config, "max_window_layers"):
        return True
    return len({bool(m.is_sliding) for m in model.modules() if hasattr(m, "is_sliding")}) > 1


def _head_size(model: PreTrainedModel, config: Any) -> int:
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    return int(weight.shape[0] if isinstance(weight, Tensor) else config.vocab_size)


def _kinds(config: Any) -> tuple[dict[str, int], tuple[int, ...]]:
    """Window of each kind of layers, 0 for none, and the windows that occur."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        types = [_FULL if window is None else _SLIDING]
    kinds = {_FULL: 0, _SLIDING: int(window or 0)}
    return kinds, tuple(sorted({kinds[kind] for kind in types}))


def _alibi(model: PreTrainedModel, config: Any, positions: bool) -> str:
    """How a model without position ids knows positions; "": it has some."""
    if hasattr(model.base_model, "build_mpt_alibi_tensor"):
        return "columns"
    if hasattr(model.base_model, "build_alibi_tensor") or getattr(config, "alibi", False):
        return "mask"
    if positions:
        return ""
    raise NotImplementedError(
        f"HFAdapter: {type(model).__name__} takes no position_ids, so rows of different lengths "
        "cannot be told apart"
    )


def _max_length(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _layouts(mask_kind: str, alibi: str, windows: tuple[int, ...]) -> tuple[str, ...]:
    if mask_kind != "mask2d":
        return tuple(n for n in LAYOUTS if n != "defer" or not alibi)
    # By columns, as the library's masks count, a hole would make a window shorter.
    return ("realign", "rollback") if any(windows) else ("defer", "realign", "rollback")


def _cache_class() -> type[RaggedCache]:
    """`RaggedCache`, as a subclass of the library's caches for models that insist on one."""
    from transformers.cache_utils import Cache

    return type("RaggedCache", (RaggedCache, Cache), {"__init__": RaggedCache.__init__})
