"""Greedy decoding of transformers models with one compiled graph per token.

What makes it fast: the step from token to token is one graph; norms, rotary positions, attention
and activations between the products are fused into few loops; attention reads only the filled part
of the key-value cache, whose length is dynamic, so nothing is compiled twice and no mask is needed;
Dynamo's guards are checked once per call of `generate`, not once per token.

Works with decoder-only models that take their attention from `transformers.AttentionInterface` and
attend to all earlier positions (llama and its kin; no sliding windows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

_NAME = "alignops_decode"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")

# Keys and values of one layer, (B, heads, slots, D).
_Cache = dict[int, tuple[Tensor, Tensor]]
_Step = Callable[[Tensor, Tensor], Tensor]  # token (1, 1), positions so far: next token (1, 1)


class GreedyDecoder:
    """Greedy generation of one sequence, compiled once.

    The tokens are those of `model.generate(..., do_sample=False)`, unless two of them are so close
    that rounding decides: attention sums in another order here. The first call compiles, for 30
    layers about a minute; inductor keeps most of it for later processes. Another number of threads
    compiles again. While `generate` runs, nothing else may use the model.

    Args:
        model: a decoder-only model; convert it with `fuse=True` for the fewest operator calls.
        max_length: most tokens, prompt included, of one call.
        compiled: False runs the same step without `torch.compile`.

    Raises:
        ValueError: max_length is below 2.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> decoder = GreedyDecoder(model, max_length=32, compiled=False)
        >>> decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape
        torch.Size([1, 8])
    """

    def __init__(
        self, model: PreTrainedModel, max_length: int = 512, compiled: bool = True
    ) -> None:
        if max_length < 2:
            raise ValueError(f"GreedyDecoder: max_length must be at least 2, got {max_length}")
        self.model = model
        self.max_length = max_length
        self._cache: _Cache = {}
        self._positions = torch.arange(max_length, device=model.device)
        self._graph = _Graph()
        self._step: _Step = self._next_token
        if compiled:
            step = _own_code(lambda token, window: self._next_token(token, window))
            self._step = torch.compile(step, fullgraph=True, dynamic=False, backend=self._graph)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """The prompt and up to `max_new_tokens` more tokens.

        Args:
            input_ids: (1, L) integer.
            max_new_tokens: at least 1.
            eos_token_id: stop after this token; None: never.

        Returns:
            (1, L + new) int64.

        Raises:
            ValueError: input_ids is not one sequence, the total exceeds `max_length`, or the
                model's attention is of a kind that is not supported.
        """
        length = input_ids.shape[-1]
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or length == 0:
            raise ValueError(
                f"generate: input_ids must have shape (1, L), got {tuple(input_ids.shape)}"
            )
        if max_new_tokens < 1 or length + max_new_tokens > self.max_length:
            raise ValueError(
                f"generate: max_new_tokens must be 1 to {self.max_length - length} after a prompt "
                f"of {length} tokens (max_length={self.max_length}), got {max_new_tokens}"
            )
        with _attention(self.model):
            token = self._next_token(input_ids.long(), self._positions[:length])
            tokens = [input_ids.long(), token]
            step: _Step = self._first_step
            for filled in range(length + 1, length + max_new_tokens):
                if eos_token_id is not None and token.item() == eos_token_id:
                    break
                token = step(token, self._positions[:filled])
                tokens.append(token)
                step = self._graph.again or self._step
        return torch.cat(tokens, dim=1)

    def _first_step(self, token: Tensor, window: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(window, 0)
        result = self._step(token, window)
        self._graph.find(token, window)
        return result

    def _next_token(self, tokens: Tensor, window: Tensor) -> Tensor:
        """Best token (1, 1) after `tokens`, which are at the end of the positions `window`."""
        logits = self.model(
            input_ids=tokens,
            position_ids=window[-tokens.shape[1] :].unsqueeze(0),
            use_cache=False,
            logits_to_keep=1,
            alignops_cache=self._cache,
            alignops_window=window,
            alignops_slots=self.max_length + 1,
        ).logits
        best: Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return best


class _Graph:
    """A backend of `torch.compile`: inductor, and a way to call its graph again for the next token.

    Dynamo checks thousands of properties of the model before a call, which takes as long as all
    products of a small model. `generate` has that done for its first token; the other tokens go to
    the same graph with the same tensors of the model.
    """

    again: _Step | None = None

    def __init__(self) -> None:
        self._called: tuple[Callable[..., Any], list[Any]] | None = None

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled = torch._dynamo.lookup_backend("inductor")(graph, examples)

        def run(*args: Any) -> Any:
            self._called = compiled, list(args)
            return compiled(*args)

        return run

    def find(self, token: Tensor, window: Tensor) -> None:
        """Make `again` from the call that was just made with these arguments."""
        if self._called is None:
            return
        compiled, args = self._called
        self._called = None
        places = {id(a): i for i, a in enumerate(args)}
        numbers = [i for i, a in enumerate(args) if isinstance(a, int)]
        at_token, at_window = places[id(token)], places[id(window)]
        (at_length,) = numbers

        def again(token: Tensor, window: Tensor) -> Tensor:
            args[at_token], args[at_window], args[at_length] = token, window, window.shape[0]
            result: Tensor
            (result,) = compiled(*args)
            return result

        self.again = again


def _own_code(function: Any) -> _Step:
    """The same function with a code object of its own, for which Dynamo counts recompilations."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, closure=function.__closure__)


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    alignops_cache: _Cache | None = None,
    alignops_window: Tensor | None = None,
    alignops_slots: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to key and value (B, heads, M, D) and all earlier ones, which the cache holds."""
    if alignops_cache is None or alignops_window is None:
        raise ValueError("GreedyDecoder: model must pass keyword arguments on to its attention")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"GreedyDecoder: model must not use {name}, got {kwargs[name]}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if layer not in alignops_cache:
        shape = (*key.shape[:2], alignops_slots)  # one more than ever filled: a slice stays a slice
        alignops_cache[layer] = (
            key.new_zeros(*shape, key.shape[3]),
            value.new_zeros(*shape, value.shape[3]),
        )
    keys, values = alignops_cache[layer]
    new, filled = key.shape[2], alignops_window.shape[0]
    keys.index_copy_(2, alignops_window[-new:], key)
    values.index_copy_(2, alignops_window[-new:], value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if new > 1:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    # Products and sums instead of matrix products: they become one vectorized loop, in float32.
    b, heads, _, d = query.shape
    grouped = query.view(b, key.shape[1], heads // key.shape[1], 1, d).float()
    scores = (grouped * keys[:, :, None, :filled].float()).sum(-1) * scale
    weights = scores.softmax(-1).unsqueeze(-1)
    out = (weights * values[:, :, None, :filled].float()).sum(-2)
    return out.to(query.dtype).reshape(b, 1, heads, value.shape[3]), None


AttentionInterface.register(_NAME, _cached_attention)
