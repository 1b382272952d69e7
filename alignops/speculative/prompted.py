"""A model as a drafter that reads a prompt of its own, in ids of its own.

Shape letters: B rows, n first rows that take part, V ids of the target, Vd of the drafter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Batch, Drafts, ModelAdapter, Sampling
from alignops.speculative.model_drafter import ModelDrafter

#: Target id -> the ids of the drafter that spell it.
IdMap = Mapping[int, Sequence[int]]


def id_map_of(target_tokenizer: Any, draft_tokenizer: Any) -> dict[int, list[int]]:
    """How a drafter spells the tokens of a target, from tokenizers of transformers.

    Tokens of the same string are the same token; any other is spelled by the drafter's tokenizer.

    Returns:
        target id -> ids of the drafter, for every token of the target.
    """
    own = draft_tokenizer.get_vocab()
    spelled = {}
    for piece, token in target_tokenizer.get_vocab().items():
        if piece in own:
            spelled[token] = [own[piece]]
        else:
            text = target_tokenizer.decode([token])
            spelled[token] = list(draft_tokenizer.encode(text, add_special_tokens=False))
    return spelled


class PromptedDrafter(ModelDrafter):
    """A model that continues the target's text after a prompt of its own.

    `assign` names the prompt of a row before a session adds it. Only tokens that both models have
    are drafted: those of the target that the drafter spells with one id, which spells no other. Of
    the rest the drafter's distribution has probability 0.

    Args:
        adapter: the model.
        vocab_size: V of the target.
        id_map: target id -> ids of the drafter; ids that are not in it are the same in both
            vocabularies, and ids that the drafter does not have are not read.
        greedy: draft what is most likely, whatever the session samples.

    Raises:
        ValueError: an id is out of range.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        vocab_size: int,
        id_map: IdMap | None = None,
        greedy: bool = False,
    ) -> None:
        super().__init__(adapter)
        self._map = {int(k): [int(i) for i in ids] for k, ids in (id_map or {}).items()}
        size = adapter.vocab_size
        for token, ids in self._map.items():
            check(
                0 <= token < vocab_size and all(0 <= i < size for i in ids),
                f"PromptedDrafter: id_map must map ids below V={vocab_size} to ids below Vd={size},"
                f" got {token}: {ids}",
            )
        self._greedy = greedy
        self._size = size
        self.most_following = max([1, *map(len, self._map.values())])
        self._shared: tuple[Tensor, Tensor] | None = None
        if self._map:
            pairs = self._pairs(vocab_size)
            target, own = torch.tensor(pairs, device=adapter.device).reshape(-1, 2).T
            self._shared = (target, own)
            self._own = torch.zeros(vocab_size, dtype=torch.int64, device=adapter.device)
            self._own[target] = own
        self._vocab_size = vocab_size
        self._prompts: list[tuple[Tensor, int]] = []
        self._texts: list[list[int]] = []
        self._seen: list[int] = []
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)

    def _pairs(self, vocab_size: int) -> list[tuple[int, int]]:
        """(target id, own id) of all tokens that may be drafted, rising."""
        taken: dict[int, int] = {}
        for token in sorted(self._map):
            if len(self._map[token]) == 1:
                taken.setdefault(self._map[token][0], token)
        spells_several = {i for ids in self._map.values() if len(ids) == 1 for i in ids}
        pairs = [(token, own) for own, token in taken.items()]
        for token in range(min(vocab_size, self._size)):
            if token not in self._map and token not in spells_several:
                pairs.append((token, token))
        return sorted(pairs)

    def spell(self, tokens: Sequence[int]) -> list[int]:
        """Tokens of the target in ids of the drafter."""
        ids: list[int] = []
        for token in tokens:
            ids += self._map.get(token, [token] if token < self._size else [])
        return ids

    def assign(self, row: int, prompt: Tensor, target_prompt: int) -> None:
        """The prompt (L,) of the next sequence in a row, and the length of the target's own one."""
        self._prompts[row] = (prompt, target_prompt)

    def full(self, row: int) -> bool:
        """Whether the row is as long as the model allows for, so that nothing is drafted."""
        limit = self.adapter.max_length
        return limit is not None and len(self._texts[row]) >= limit

    def start(self, rows: int, capacity: int, sampling: Sampling) -> None:
        """Forget everything, and prepare for `rows` rows of up to `capacity` tokens."""
        sampling = replace(sampling, temperature=0.0) if self._greedy else sampling
        super().start(rows, capacity, sampling)
        self._prompts = [(torch.zeros(0, dtype=torch.int64), 0)] * rows
        self._texts = [[] for _ in range(rows)]
        self._seen = [0] * rows
        self._tokens = torch.zeros(rows, capacity, dtype=torch.int64, device=self.adapter.device)

    def add(self, row: int, tokens: Tensor) -> None:
        """A sequence begins, or goes on, with the prompt that was assigned to the row."""
        prompt, length = self._prompts[row]
        self._texts[row] = []
        self._write(row, [*prompt.tolist(), *self.spell(tokens[length:].tolist())])
        self._seen[row] = tokens.numel()
        super().add(row, self._tokens[row, : len(self._texts[row])])

    def _write(self, row: int, ids: list[int]) -> None:
        text = self._texts[row]
        begin, end = len(text), len(text) + len(ids)
        text += ids
        if end > self._tokens.shape[1]:
            more = self._tokens.new_zeros(len(self._tokens), end + self._tokens.shape[1] // 2)
            more[:, : self._tokens.shape[1]] = self._tokens
            self._tokens = more
        self._tokens[row, begin:end] = torch.tensor(ids, dtype=torch.int64)

    def _own_batch(self, batch: Batch) -> Batch:
        """The batch as this model reads it."""
        n = len(batch.lengths)
        lengths = [max(1, len(text)) for text in self._texts[:n]]
        own = torch.tensor(lengths, device=batch.lengths.device)
        return Batch(self._tokens[:n], own, batch.seeds, batch.active, lengths)

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        """Drafts of every active row; they do not depend on earlier proposals."""
        return self.propose_at(self._own_batch(batch), batch.lengths, k, width)

    def law(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of the target's tokens; -inf: not shared."""
        if self._shared is None:
            return super().law(logits)
        target, own = self._shared
        out = logits.new_full((*logits.shape[:-1], self._vocab_size), -torch.inf)
        out[..., target] = logits[..., own]
        return out

    def fed(self, ids: Tensor) -> Tensor:
        """Drafts in ids of the drafter."""
        return ids if self._shared is None else self._own[ids]

    def commit(self, batch: Batch, accepted: Tensor) -> None:
        """Spell the new tokens, and keep what was read of them."""
        active, lengths = batch.active.tolist(), batch.lengths.tolist()
        for row, (on, length) in enumerate(zip(active, lengths, strict=True)):
            if on:
                self._write(row, self.spell(batch.tokens[row, self._seen[row] : length].tolist()))
                self._seen[row] = length
        super().commit(self._own_batch(batch), accepted)

    def remove(self, row: int) -> None:
        """The sequence of the row has ended."""
        self._texts[row] = []
        super().remove(row)

    def park(self, row: int) -> Any:
        """The text and its keys and values, to go on later."""
        text, seen = self._texts[row], self._seen[row]
        return text, seen, super().park(row)

    def resume(self, row: int, tokens: Tensor, parked: Any) -> None:
        """Put a parked sequence into an empty row."""
        text, self._seen[row], kept = parked
        self._texts[row] = []
        self._write(row, text)
        super().resume(row, self._tokens[row, : len(text)], kept)
