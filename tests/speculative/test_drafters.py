"""Drafts by functions: what they are given, how it is cut, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignops.speculative.drafters import FunctionDrafter
from tests.speculative.test_prompt_lookup import batch_of


def propose(function: Any, k: tuple[int, ...] = (3, 1), width: int = 3) -> Any:
    batch = batch_of([[1, 2, 3], [4, 5]])
    return FunctionDrafter(function).propose(batch, torch.tensor(k, dtype=torch.int32), width)


def test_function_sees_tokens_lengths_and_width() -> None:
    seen: list[Any] = []

    def function(tokens: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
        seen.extend([tokens[0].tolist(), tokens[1, :2].tolist(), lengths.tolist(), k])
        return torch.tensor([[7, 8, 9], [7, 8, 9]], dtype=torch.int32)

    drafts = propose(function)
    assert seen == [[1, 2, 3], [4, 5], [3, 2], 3]
    assert drafts.ids.tolist() == [[7, 8, 9], [7, -1, -1]]
    assert drafts.ids.dtype == torch.int64
    assert drafts.logits is None


def test_logits_are_passed_on() -> None:
    logits = torch.randn(2, 2, 11)
    drafts = propose(lambda tokens, lengths, k: (torch.ones(2, 2, dtype=torch.long), logits))
    assert drafts.logits is logits


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        ([[1, 2]], TypeError, "ids as a Tensor, got list"),
        (torch.ones(2, 2), TypeError, "ids of int32 or int64, got float32"),
        (torch.ones(2, 4).long(), ValueError, r"ids of shape \(2, up to 3\), got \(2, 4\)"),
        (torch.ones(3, 2).long(), ValueError, r"ids of shape \(2, up to 3\), got \(3, 2\)"),
        (torch.ones(2).long(), ValueError, r"ids of shape \(2, up to 3\), got \(2,\)"),
        ((torch.ones(2, 2).long(), [1]), TypeError, "logits as a Tensor, got list"),
        (
            (torch.ones(2, 2).long(), torch.ones(2, 3, 5)),
            ValueError,
            r"logits of shape \(2, 2, 'Vd'\), got \(2, 3, 5\)",
        ),
    ],
)
def test_bad_results(result: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"propose: the draft function must return {text}"):
        propose(lambda tokens, lengths, k: result)
