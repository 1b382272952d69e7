"""Drafters that need no model of their own: the text so far, or any function.

A model as a drafter is in `alignops.speculative.model_drafter`.

Shape letters: B rows, K drafts, L tokens of the longest row, Vd ids of the drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check, dtype_name
from alignops.speculative.adapter import Batch, Drafts, Sampling

#: (tokens (B, L), lengths (B,), k) -> ids (B, up to k), or (ids, logits (B, up to k, Vd)).
DraftFunction = Callable[[Tensor, Tensor, int], "Tensor | tuple[Tensor, Tensor]"]


class StatelessDrafter:
    """A drafter whose proposals depend on nothing but the committed tokens."""

    vocab_size: int | None = None

    def start(self, rows: int, capacity: int, sampling: Sampling) -> None:
        """Nothing to prepare."""

    def add(self, row: int, tokens: Tensor) -> None:
        """Nothing to keep."""

    def commit(self, batch: Batch, accepted: Tensor) -> None:
        """Nothing to keep."""

    def remove(self, row: int) -> None:
        """Nothing to forget."""

    def park(self, row: int) -> Any:
        """Nothing to take along."""
        return None

    def resume(self, row: int, tokens: Tensor, parked: Any) -> None:
        """Nothing to put back."""


class PromptLookup(StatelessDrafter):
    """Guesses that the text goes on as it did the last time that it said the same words.

    The last n tokens of a row are looked up in the row itself; of all earlier places, the one where
    most of them agree is continued, and of equals the latest. A continuation that reaches the end
    of the row goes on with the drafts themselves, so text that repeats itself is drafted to any
    length. One pass over the tokens of all rows, on their device, without a read from it.

    Args:
        n: most tokens that are compared.
        min_n: fewest tokens that must agree; 1 to n.

    Raises:
        ValueError: n or min_n is out of range.

    Example:
        >>> text = torch.tensor([[7, 1, 2, 3, 4, 9, 1, 2, 3]])
        >>> one = torch.tensor([1])
        >>> batch = Batch(text, one * 9, one, one.bool(), [9])
        >>> PromptLookup(n=3).propose(batch, one * 4, width=4).ids
        tensor([[4, 9, 1, 2]])

    Source: prompt lookup decoding (Saxena 2023); LLMA, arXiv 2304.04487.
    """

    def __init__(self, n: int = 3, min_n: int = 1) -> None:
        check(1 <= min_n <= n, f"PromptLookup: min_n must be 1 to n={n}, got {min_n}")
        self.n = n
        self.min_n = min_n

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        """Drafts of every active row; their kind is the number of tokens that agree."""
        tokens = batch.tokens[:, : min(max(batch.host_lengths), batch.tokens.shape[1])]
        last = (batch.lengths - 1).unsqueeze(1)
        place, agreement = self._longest(tokens, last)
        step = torch.arange(width, device=tokens.device)
        # What follows the place, up to the last token; then again from there.
        source = place + 1 + step % (last - place).clamp(min=1)
        ids = tokens.gather(1, source.clamp(max=tokens.shape[1] - 1))
        drafted = (agreement >= self.min_n) & batch.active.unsqueeze(1) & (step < k.unsqueeze(1))
        ids = torch.where(drafted, ids, -1)
        if ids.device.type == "cpu":
            ids = ids[:, : int(drafted.sum(1).max())]
        return Drafts(ids, kind=agreement[:, 0])

    def _longest(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Where the longest agreement ends, and its length: (B, 1) each."""
        size = tokens.shape[1]
        columns = torch.arange(size, device=tokens.device, dtype=torch.int32)
        agrees = (tokens == tokens.gather(1, last)) & (columns < last)
        # Length of the agreement times L, plus the column: the largest is the longest, latest one.
        score = agrees * size + columns
        for i in range(1, min(self.n, size)):
            agrees[:, :i] = False
            agrees[:, i:] &= tokens[:, :-i] == tokens.gather(1, (last - i).clamp(min=0))
            score += agrees * size
        best = score.amax(1, keepdim=True)
        return best % size, best // size


class FunctionDrafter(StatelessDrafter):
    """Drafts by any function of the tokens.

    Args:
        function: gets tokens (B, L) int64, lengths (B,) int64 and k, the most drafts of any row. It
            returns ids (B, up to k), -1 from where a row has no more drafts, and optionally the
            logits (B, up to k, Vd) that they were drawn from; without logits they are certain.
            What is behind the lengths is undefined, and so are rows that are not active.
        vocab_size: ids that it may return; None: those of the target.

    Example:
        >>> again = FunctionDrafter(lambda tokens, lengths, k: tokens[:, :k])
        >>> one = torch.tensor([1])
        >>> batch = Batch(torch.tensor([[5, 6, 7]]), one * 3, one, one.bool(), [3])
        >>> again.propose(batch, one * 2, width=3).ids
        tensor([[ 5,  6, -1]])
    """

    def __init__(self, function: DraftFunction, vocab_size: int | None = None) -> None:
        self.function = function
        self.vocab_size = vocab_size

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        """What the function says, cut to k drafts.

        Raises:
            TypeError: it does not return integers, or a pair of tensors.
            ValueError: the result has another shape than asked for.
        """
        tokens = batch.tokens[:, : min(max(batch.host_lengths), batch.tokens.shape[1])]
        result = self.function(tokens, batch.lengths, width)
        ids, logits = result if isinstance(result, tuple) else (result, None)
        _check_result(ids, logits, tokens.shape[0], width)
        steps = torch.arange(ids.shape[1], device=ids.device)
        drafted = batch.active.unsqueeze(1) & (steps < k.unsqueeze(1))
        return Drafts(torch.where(drafted, ids.long(), -1), logits)


def _check_result(ids: Tensor, logits: Tensor | None, rows: int, width: int) -> None:
    op = "propose: the draft function must return"
    for name, value in (("ids", ids), ("logits", logits)):
        if not isinstance(value, Tensor) and not (name == "logits" and value is None):
            raise TypeError(f"{op} {name} as a Tensor, got {type(value).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op} ids of int32 or int64, got {dtype_name(ids.dtype)}")
    check(
        ids.dim() == 2 and ids.shape[0] == rows and ids.shape[1] <= width,
        f"{op} ids of shape ({rows}, up to {width}), got {tuple(ids.shape)}",
    )
    check(
        logits is None or (logits.dim() == 3 and logits.shape[:2] == ids.shape),
        f"{op} logits of shape {(*ids.shape, 'Vd')}, got {tuple(getattr(logits, 'shape', ()))}",
    )
