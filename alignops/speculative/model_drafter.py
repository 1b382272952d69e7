"""A model as a drafter, with keys and values of its own.

Shape letters: B rows, n first rows that take part, K drafts, Q columns of a forward, Vd ids of the
drafter.

Source: arXiv 2211.17192; which keys and values stay: arXiv 2510.22876.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Batch, Drafts, ModelAdapter, Sampling
from alignops.speculative.caches import run_model
from alignops.speculative.verify import Proposal, propose

# Prompts are read in pieces, so that masks stay small.
_CHUNK = 512


@dataclass(frozen=True)
class _Round:
    """A proposal that waits for its commit: lengths (n,) and drafts (n,) of each row."""

    lengths: Tensor
    k: Tensor


class ModelDrafter:
    """Drafts drawn from a language model, by the same sampling as the target's tokens.

    The model reads every committed token once; a round begins with the one or two tokens that it
    has not read yet (two where everything was accepted: the last draft was never fed), or with more
    after rounds without drafts. Near the longest sequence that the model allows for, drafts become
    fewer, and end.

    Args:
        adapter: the model, whose layouts must include "ragged". Ids must mean the same as in the
            target; it may have more of them, or fewer: those that it lacks it reads as id 0.

    Raises:
        ValueError: the model does not take rows of their own lengths.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.integrations.speculative import HFAdapter
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> drafter = ModelDrafter(HFAdapter(model.eval()))
        >>> drafter.start(rows=1, capacity=16, sampling=Sampling(temperature=0))
        >>> text, one = torch.tensor([[5, 6, 7]]), torch.tensor([1])
        >>> drafter.add(0, text[0])
        >>> drafter.propose(Batch(text, one * 3, one, one.bool(), [3]), one * 4, width=4).ids.shape
        torch.Size([1, 4])
    """

    #: Most tokens that may follow the accepted drafts of a round.
    most_following = 1

    def __init__(self, adapter: ModelAdapter) -> None:
        check(
            "ragged" in adapter.layouts,
            "ModelDrafter: layouts of the adapter must include ragged, got "
            f"{', '.join(adapter.layouts)}",
        )
        self.adapter = adapter
        self._sampling = Sampling()
        self._cache: Any = None
        # Tokens of each row that the model has read, on its device, and how many it may be behind.
        self._read = torch.zeros(0, dtype=torch.int64)
        self._behind = 1
        self._begun: list[int] = []  # tokens of each row when it was added, on the host
        self._round: _Round | None = None

    def start(self, rows: int, capacity: int, sampling: Sampling) -> None:
        """Forget everything, and prepare for `rows` rows of up to `capacity` tokens."""
        limit = self.adapter.max_length
        capacity = capacity if limit is None else min(capacity, limit)
        self._cache = self.adapter.new_cache(rows, capacity)
        self._sampling = sampling
        self._read = torch.zeros(rows, dtype=torch.int64, device=self.adapter.device)
        self._behind = 1
        self._begun = [0] * rows
        self._round = None

    def add(self, row: int, tokens: Tensor) -> None:
        """A sequence begins in an empty row: all tokens but the last are read."""
        self._begun[row] = tokens.numel()
        self._read_upto(row, tokens, tokens.numel() - 1)

    def _read_upto(self, row: int, tokens: Tensor, end: int) -> None:
        """Read tokens [0, end) of a row, as far as the model allows for."""
        end = end if self.adapter.max_length is None else min(end, self.adapter.max_length)
        tokens = tokens.to(self.adapter.device)
        for begin in range(0, end, _CHUNK):
            piece = tokens[begin : min(begin + _CHUNK, end)]
            at = torch.full((1,), begin, dtype=torch.int32, device=piece.device)
            self._forward(piece[None], at, slice(row, row + 1), begin + piece.numel(), 1)
        self._read[row] = end

    @torch.no_grad()
    def _forward(self, ids: Tensor, at: Tensor, rows: slice, upto: int, last: int) -> Tensor:
        """Logits of the last columns; the first one of each row is written at slot `at`."""
        ids = torch.where(ids < self.adapter.vocab_size, ids, 0)
        logits = run_model(
            self.adapter, self._cache, ids, at.int(), rows=rows, upto=upto, last=last
        )
        return self.law(logits)

    def law(self, logits: Tensor) -> Tensor:
        """Logits (..., V) over the target's ids, before sampling, from those of the model."""
        return logits[..., : self._sampling.vocab_size]

    def fed(self, ids: Tensor) -> Tensor:
        """What the model reads for drafts (n, 1)."""
        return ids

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        """Drafts of every active row; they do not depend on earlier proposals."""
        return self.propose_at(batch, batch.lengths, k, width)

    def propose_at(self, batch: Batch, positions: Tensor, k: Tensor, width: int) -> Drafts:
        """Drafts of every active row, drawn with the random words of given positions.

        Args:
            batch: as the model reads it.
            positions: (n,) int64: position of the token that draft 0 guesses.
            k: (n,) int32, most drafts of each row.
            width: most drafts of any row.
        """
        home, device = batch.tokens.device, self.adapter.device
        lengths, limit = batch.lengths.to(device), self.adapter.max_length
        positions, seeds = positions.to(device), batch.seeds.to(device)
        k = torch.where(batch.active, k, 0).to(device, torch.int64)
        if limit is not None:
            k = torch.minimum(k, (limit - lengths).clamp(min=0))
        self._round = _Round(lengths, k)
        longest = max(batch.host_lengths)
        logits = self._catch_up(batch, lengths, longest)
        ids = torch.full((len(k), width), -1, dtype=torch.int64, device=device)
        keeps = self._sampling.temperature > 0 and not self._sampling.race
        kept = logits.new_empty(len(k), width, logits.shape[1]) if keeps else None
        stats: list[Tensor] = []
        for i in range(width):
            if i > 0:
                # A row that has all its drafts goes on, in slots that nobody will read.
                feed = self.fed(ids[:, i - 1 : i].clamp(min=0))
                slots, upto = self._within(lengths - 1 + i, 1), self._upto(longest + i)
                logits = self._forward(feed, slots, slice(0, len(k)), upto, 1)[:, 0]
            if kept is not None:
                kept[:, i] = logits
            drawn = self._draw(logits, seeds, positions + i)
            ids[:, i] = drawn.ids
            stats.append(drawn.stats)
        steps = torch.arange(width, device=device)
        ids = torch.where(steps < k[:, None], ids, -1)
        if kept is None:
            return Drafts(ids.to(home))
        return Drafts(ids.to(home), kept.to(home), torch.stack(stats, 1).to(home))

    def _draw(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Proposal:
        how = self._sampling
        return propose(
            logits,
            seeds=seeds,
            positions=positions,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
            race=how.race,
        )

    def _catch_up(self, batch: Batch, lengths: Tensor, longest: int) -> Tensor:
        """Read what was committed since: logits (n, Vd) behind the last token.

        Rows end in the same column where they can: a row that is less behind reads tokens again.
        """
        n = len(lengths)
        behind = self._behind
        if lengths.device.type == "cpu":
            gaps = self._within(lengths, 0) - self._read[:n]
            behind = max(1, int(torch.where(batch.active, gaps, 1).max()))
        start = self._within((lengths - behind).clamp(min=0), behind)
        columns = start[:, None] + torch.arange(behind, device=start.device)
        tokens = batch.tokens.to(start.device)
        ids = tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1))
        known = (columns < lengths[:, None]) & batch.active.to(start.device)[:, None]
        ids = torch.where(known, ids, 0)
        # A row of fewer tokens than columns ends in an earlier one.
        short = any(0 < begun < behind for begun in self._begun[:n])
        last = behind if short else 1
        upto = self._upto(max(longest, behind))
        logits = self._forward(ids, start, slice(0, n), upto, last)
        at = (lengths - 1 - start - (behind - last)).clamp(0, last - 1)
        return logits.gather(1, at[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]

    def _within(self, slots: Tensor, columns: int) -> Tensor:
        """Slots of rows that are too long for the model, moved to where it can write."""
        limit = self.adapter.max_length
        return slots if limit is None else slots.clamp(max=limit - columns)

    def _upto(self, slots: int) -> int:
        limit = self.adapter.max_length
        return slots if limit is None else min(slots, limit)

    def commit(self, batch: Batch, accepted: Tensor) -> None:
        """Keep the keys and values of committed tokens."""
        if self._round is None:
            self._behind += 1
            return
        before, k = self._round.lengths, self._round.k
        n, device = len(before), self.adapter.device
        read = torch.minimum(before + (k - 1).clamp(min=0), before + accepted.to(device))
        self._read[:n] = torch.minimum(read, batch.lengths.to(device) - 1)
        self._behind = 1 + self.most_following
        self._round = None

    def remove(self, row: int) -> None:
        """The sequence of the row has ended."""
        self._read[row] = self._begun[row] = 0

    def park(self, row: int) -> Any:
        """Keys and values of the row, to go on later."""
        read = int(self._read[row])
        self.remove(row)
        return self._cache.park(row, 0, read)

    def resume(self, row: int, tokens: Tensor, parked: Any) -> None:
        """Put a parked sequence into an empty row."""
        read = int(parked[0].shape[1]) if parked else 0
        if parked:
            self._cache.resume(row, 0, parked)
        self._read[row], self._begun[row] = read, tokens.numel()
        self._behind = max(self._behind, tokens.numel() - read)
