"""The sampler of vLLM's V1 model runner: rows of all requests one after the other.

Shape letters: R requests of a step, N rows (a request has one more than drafts), K drafts, V ids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignops.integrations._vllm_requests import RequestRule

if TYPE_CHECKING:
    from alignops.integrations.vllm import Verifier

_UNSERVED = ("coupled", "nudge")


class PackedSampler:
    """`forward` of the engine's RejectionSampler, by the rules of alignops.

    `make_rejection_sampler` puts it before the engine's class, whose handling of penalties, of
    words that are not allowed, and of log-probabilities it uses.
    """

    verifier: Verifier
    requests: Any = None  # a function: SamplingParams of each row; None: all have the engine's rule

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> Any:
        """Emitted ids of a step.

        Args:
            metadata: the engine's SpecDecodeMetadata.
            draft_probs: (sum of drafts, V), or None: the drafts are certain.
            logits: (N, V).
            sampling_metadata: the engine's SamplingMetadata.

        Returns:
            The engine's SamplerOutput; ids int32 (R, K + 1), -1 where nothing was emitted.

        Raises:
            ValueError: a request asks for a rule that needs positions.
        """
        counts, width = torch.tensor(metadata.num_draft_tokens), metadata.max_spec_len
        rules = self._rules()
        rows = self._processed(metadata, logits, sampling_metadata)
        temperature = _per_request(sampling_metadata.temperature, counts, 0.0, rows)
        warp = {
            "top_k": _per_request(sampling_metadata.top_k, counts, 0, rows),
            "top_p": _per_request(sampling_metadata.top_p, counts, 1.0, rows),
        }
        draft = None
        if draft_probs is not None:
            # The drafter's law is not filtered; the target's is, before they are compared.
            rows = self._warped(rows, counts, temperature, **warp)
            temperature, warp = (temperature > 0).float(), {}
            draft = _padded(draft_probs, counts, width, 0).log()
        tokens, _, _ = self.verifier.verify(
            rows,
            torch.nn.functional.pad(metadata.cu_num_sampled_tokens, (1, 0)),
            _padded(metadata.draft_token_ids.long(), counts, width, -1),
            counts.to(rows.device),
            draft,
            self.verifier.numbers(rules, len(counts), rows.device),
            self.verifier.options.rule,
            torch.zeros(len(counts), dtype=torch.uint8, device=rows.device),
            seeds=_keys(sampling_metadata, len(counts), rows.device),
            positions=torch.zeros(len(counts), dtype=torch.int64, device=rows.device),
            temperature=temperature,
            **warp,
        )
        ids = tokens.to(torch.int32)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            shown = rows if getattr(self, "is_processed_logprobs_mode", False) else logits
            logprobs = self._get_logprobs_tensors(  # type: ignore[attr-defined]
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                shown[metadata.target_logits_indices],
                shown[metadata.bonus_logits_indices],
                ids,
            )
        return self._engine().SamplerOutput(sampled_token_ids=ids, logprobs_tensors=logprobs)

    def _engine(self) -> Any:
        return sys.modules[type(self).__mro__[2].__module__]

    def _rules(self) -> list[RequestRule]:
        if self.requests is None:
            return []
        default = RequestRule(self.verifier.options.rule)
        rules = [RequestRule.of(params, default) for params in self.requests()]
        for rule in rules:
            if rule.name in _UNSERVED:
                raise ValueError(
                    f"vllm: alignops_rule must not be {rule.name!r} with the V1 runner, which does "
                    "not say where a request is"
                )
        return rules

    def _processed(self, metadata: Any, logits: Tensor, sampling_metadata: Any) -> Tensor:
        """All rows float32 after penalties, bad words and the like: of drafts, and of bonuses."""
        rows = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        target, bonus = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
        rows[target] = self.apply_logits_processors(  # type: ignore[attr-defined]
            logits[target].float(), sampling_metadata, metadata
        )
        rows[bonus] = self.sampler.apply_logits_processors(  # type: ignore[attr-defined]
            logits[bonus].float(), sampling_metadata, True
        )
        return rows

    def _warped(
        self, rows: Tensor, counts: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
    ) -> Tensor:
        def each(values: Tensor) -> Tensor:
            return values.repeat_interleave((counts + 1).to(values.device))

        divisor = torch.where(temperature > 0, temperature, 1.0)
        k = torch.where(top_k > 0, top_k, rows.shape[1]).clamp(max=rows.shape[1])
        warped: Tensor = self._engine().apply_top_k_top_p(
            rows / each(divisor)[:, None], each(k), each(top_p)
        )
        return warped


def _per_request(values: Tensor | None, counts: Tensor, default: float, rows: Tensor) -> Tensor:
    if values is None:
        dtype = torch.int32 if isinstance(default, int) else torch.float32
        return torch.full((len(counts),), default, dtype=dtype, device=rows.device)
    return values


def _padded(flat: Tensor, counts: Tensor, width: int, fill: float) -> Tensor:
    """(R, K, ...) of values (sum of drafts, ...), one row after the other."""
    out = flat.new_full((len(counts), width, *flat.shape[1:]), fill)
    out[(torch.arange(width) < counts[:, None]).to(flat.device)] = flat
    return out


def _keys(sampling_metadata: Any, number: int, device: torch.device) -> Tensor:
    """A random 64-bit word per request, from its own generator if it has one."""

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        halves = torch.randint(2**32, (n, 2), device=device, generator=generator)
        return (halves[:, 0] << 32) | halves[:, 1]

    keys = draw(number, None)
    for row, generator in sampling_metadata.generators.items():
        keys[row] = draw(1, generator)[0]
    return keys


def rows_of(runner: Any) -> Sequence[Any]:
    """SamplingParams of the requests of a V1 runner's batch, row by row."""
    return [runner.requests[name].sampling_params for name in runner.input_batch.req_ids]
