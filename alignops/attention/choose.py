"""The next token of each worker: processors, forbidden tokens, sampling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from alignops.attention.prompts import Texts, thinking_markers
from alignops.attention.tokens import Forbidden
from alignops.attention.workers import Worker
from alignops.speculative.adapter import Sampling
from alignops.speculative.verify import propose

Processor = Callable[[Tensor, Tensor], Tensor]


class Chooser:
    """Chooses tokens of workers that have logits.

    The random words of a token depend on its worker's seed and on how many tokens the worker has.

    Args:
        sampling: temperature and cuts.
        forbidden: what no worker may write.
        processor: called with a worker's ids (1, c), those of the prompt first, and scores (1, V).
    """

    def __init__(
        self, sampling: Sampling, forbidden: Forbidden, processor: Processor | None
    ) -> None:
        self._sampling = sampling
        self._forbidden = forbidden
        self._processor = processor

    def choose(self, workers: Sequence[Worker], prompt: Sequence[int]) -> list[int]:
        """A token for each worker.

        Raises:
            ValueError: logits are NaN, or all tokens are forbidden.
        """
        rows = [worker.logits for worker in workers if worker.logits is not None]
        if not rows:
            return []
        scores = torch.stack(rows).float()
        device = scores.device
        if self._processor is not None:
            processed = [
                self._processor(torch.tensor([[*prompt, *worker.tokens]], device=device), row[None])
                for worker, row in zip(workers, scores, strict=True)
            ]
            scores = torch.cat(processed)
        scores = self._forbidden.apply(scores, [worker.tail for worker in workers])
        found = propose(
            scores,
            seeds=torch.tensor([worker.seed for worker in workers]).to(device),
            positions=torch.tensor([len(worker.tokens) for worker in workers]).to(device),
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            min_p=self._sampling.min_p,
        )
        found.raise_errors()
        ids: list[int] = found.ids.tolist()
        return ids


def default_forbidden(tokenizer: Any, texts: Texts, eos_ids: Collection[int]) -> list[str | int]:
    """What workers may not write: titles, the end of thinking, the beginning and end of text."""
    found: list[str | int] = [texts.heading] if texts.heading else []
    markers = thinking_markers(texts, tokenizer)
    if markers is not None:
        found.append(markers[1])
    bos = getattr(tokenizer, "bos_token_id", None)
    return [*found, *sorted({*eos_ids, *([] if bos is None else [bos])})]


def end_of_text(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text, as the tokenizer says."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)
