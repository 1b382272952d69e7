"""Span vetoes in transformers: for `generate`, and a model as a step of `prov_decode`.

from alignops.integrations.spans import ModelStep, SpanVetoProcessor

veto = SpanVetoProcessor(shield, eos=model.generation_config.eos_token_id)
model.generate(**inputs, logits_processor=[veto])  # greedy, sampling or beams

prov_decode(ModelStep(model), prompt, shield, eos=...)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from alignops.spans.veto import SpanVeto


class SpanVetoProcessor(LogitsProcessor):
    """`SpanVeto` as a logits processor of `generate`.

    Works with greedy search, sampling and beams; rows that a beam search reorders are recognised by
    their tokens. `generate` cuts to the best tokens (top_k, top_p) after this processor, so samples
    come from what is left. With several prompts of unequal length, give `pad`. One object may serve
    several calls one after the other; call `reset` between them if a prompt goes on from the text
    of the call before.

    Args:
        shield: a `TraceShield`.
        options: of `SpanVeto`: mode, gamma, eos, pad, renormalize.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.spans import SpanIndex, TraceShield, build_index
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        >>> text = model.generate(torch.tensor([[5]]), **options)[0, 1:].tolist()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index([text], f"{folder}/u", vocab_size=99, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
        ...         shield = TraceShield(index, tau=1.0, min_len=4)
        ...         veto = SpanVetoProcessor(shield)
        ...         out = model.generate(torch.tensor([[5]]), logits_processor=[veto], **options)
        ...         shield.check(text).refused, shield.check(out[0, 1:]).refused
        (True, False)
    """

    def __init__(self, shield: Any, **options: Any) -> None:
        self.veto = SpanVeto(shield, **options)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores after the veto; see `SpanVeto`."""
        return self.veto(input_ids, scores)

    def reset(self) -> None:
        """Forget the generation."""
        self.veto.reset()


class ModelStep:
    """A causal language model as the `step` of `prov_decode`, with its key-value cache.

    One object serves one search at a time; each search begins with an empty cache.

    Args:
        model: a decoder-only model whose cache is a `DynamicCache`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> step = ModelStep(model)
        >>> step(torch.tensor([[1, 2, 3]]), None).shape
        torch.Size([1, 99])
        >>> step(torch.tensor([[4], [5]]), torch.tensor([0, 0])).shape
        torch.Size([2, 99])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # The argument was renamed within transformers 5.
        named = inspect.signature(model.forward).parameters
        self._argument = "cache" if "cache" in named else "past_key_values"
        self._cache: DynamicCache | None = None
        self._rows = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Logits (rows, V) after tokens (rows, new), which follow the rows `parents`."""
        if parents is None or self._cache is None:
            self._cache = DynamicCache(config=self.model.config)
        elif parents.tolist() != list(range(self._rows)):
            self._cache.reorder_cache(parents.long().to(self.model.device))  # type: ignore[arg-type]
        self._rows = len(tokens)
        logits: Tensor = self.model(
            input_ids=tokens.to(self.model.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._argument: self._cache},
        ).logits
        return logits[:, -1]
