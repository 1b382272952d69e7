"""Prompt lookup as a custom proposer of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alignops.speculative.adapter import Batch
from alignops.speculative.drafters import PromptLookup


class PromptLookupProposer:
    """Drafts from the text so far, for `speculative_config={"method": "custom_class", ...}`.

    Experimental, as the engine's option is:
    `"custom_proposer_backend": "alignops.integrations.vllm.PromptLookupProposer"`. The engine's
    `prompt_lookup_max` and `prompt_lookup_min` say how many tokens are compared; without them, 3
    and 1. Its drafts are certain, so every exact rule serves them, "coupled" token for token.

    Args:
        vllm_config: the engine's VllmConfig.

    Example:
        >>> from types import SimpleNamespace as S
        >>> config = S(model_config=S(max_model_len=64))
        >>> config.speculative_config = S(num_speculative_tokens=3)
        >>> text = np.array([[7, 1, 2, 3, 4, 9, 1, 2, 3, 0]])
        >>> PromptLookupProposer(config).propose([[3]], np.array([9]), text)
        [[4, 9, 1]]
    """

    def __init__(self, vllm_config: Any) -> None:
        options = vllm_config.speculative_config
        self.width: int = options.num_speculative_tokens
        self.longest: int = vllm_config.model_config.max_model_len
        n = getattr(options, "prompt_lookup_max", None) or 3
        self._lookup = PromptLookup(n, getattr(options, "prompt_lookup_min", None) or 1)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each request.

        Args:
            sampled_token_ids: what each request has just got; nothing: it gets no drafts.
            num_tokens_no_spec: (R,), tokens of each request.
            token_ids_cpu: (R or more, L or more), their ids.
            slot_mappings: not used.
        """
        rows = len(sampled_token_ids)
        lengths = np.broadcast_to(np.asarray(num_tokens_no_spec, np.int64).reshape(-1), (rows,))
        room = np.minimum(self.width, self.longest - lengths)
        active = np.array([len(ids) > 0 for ids in sampled_token_ids], bool)
        active &= (lengths > 0) & (room > 0)
        if not active.any():
            return [[] for _ in range(rows)]
        upto = int(lengths[active].max())
        tokens = torch.from_numpy(np.asarray(token_ids_cpu)[:rows, :upto].astype(np.int64))
        kept = np.where(active, lengths, 1)
        batch = Batch(
            tokens,
            torch.from_numpy(kept),
            torch.zeros(rows, dtype=torch.int64),
            torch.from_numpy(active),
            kept.tolist(),
        )
        ids = self._lookup.propose(batch, torch.from_numpy(room), self.width).ids.tolist()
        return [[i for i in row if i >= 0] for row in ids]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""
