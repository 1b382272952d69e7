"""Prompt lookup against a search in plain Python, over random rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignops.speculative.adapter import Batch
from alignops.speculative.drafters import PromptLookup


def batch_of(rows: Sequence[Sequence[int]], active: Sequence[bool] | None = None) -> Batch:
    """Rows in a buffer with other tokens behind them."""
    lengths = [len(row) for row in rows]
    tokens = torch.full((len(rows), max(lengths) + 3), rows[0][-1])
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    on = torch.tensor([True] * len(rows) if active is None else active)
    zeros = torch.zeros(len(rows), dtype=torch.long)
    return Batch(tokens, torch.tensor(lengths), zeros, on, lengths)


def looked_up(row: Sequence[int], n: int, min_n: int, k: int) -> list[int]:
    """Drafts by definition: the longest agreement, then the latest."""
    for length in range(n, min_n - 1, -1):
        for end in range(len(row) - 1, length - 1, -1):  # tokens [end - length, end)
            if list(row[end - length : end]) == list(row[len(row) - length :]):
                text = list(row)
                for i in range(k):
                    text.append(text[end + i])
                return text[len(row) :]
    return []


ROWS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=1, max_size=4)


@given(
    rows=ROWS,
    n=st.integers(1, 4),
    min_n=st.integers(1, 4),
    width=st.integers(1, 6),
    data=st.data(),
)
def test_drafts_are_those_of_the_definition(
    rows: list[list[int]], n: int, min_n: int, width: int, data: st.DataObject
) -> None:
    min_n = min(n, min_n)
    size = len(rows)
    k = data.draw(st.lists(st.integers(0, width), min_size=size, max_size=size))
    active = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    drafter = PromptLookup(n, min_n)
    drafts = drafter.propose(batch_of(rows, active), torch.tensor(k, dtype=torch.int32), width)
    ids, lengths = drafts.ids, drafts.kind.tolist()
    expected = [
        looked_up(row, n, min_n, count) if on else []
        for row, count, on in zip(rows, k, active, strict=True)
    ]
    for row, length in zip(rows, lengths, strict=True):
        assert bool(looked_up(row, n, 1, 1)) == (length > 0)
        assert not length or looked_up(row, length, length, 1)
        assert length == n or not looked_up(row, length + 1, length + 1, 1)
    # No more columns than the longest row of drafts.
    assert ids.shape == (size, max(len(drafts) for drafts in expected))
    for got, drafts in zip(ids.tolist(), expected, strict=True):
        assert got == drafts + [-1] * (len(got) - len(drafts))


def test_host_lengths_may_be_too_large() -> None:
    rows = [[1, 2, 9, 1, 2], [5, 5, 5]]
    batch = batch_of(rows)
    loose = Batch(batch.tokens, batch.lengths, batch.seeds, batch.active, [9, 9])
    k = torch.tensor([3, 3], dtype=torch.int32)
    ids = PromptLookup(2).propose(loose, k, 3).ids
    assert ids.tolist() == [[9, 1, 2], [5, 5, 5]]


def test_one_token_has_no_drafts() -> None:
    ids = PromptLookup().propose(batch_of([[4]]), torch.tensor([2], dtype=torch.int32), 2).ids
    assert ids.shape == (1, 0)


@pytest.mark.parametrize(("n", "min_n"), [(0, 1), (2, 3), (2, 0)])
def test_bad_sizes(n: int, min_n: int) -> None:
    with pytest.raises(ValueError, match=f"PromptLookup: min_n must be 1 to n={n}, got {min_n}"):
        PromptLookup(n, min_n)
