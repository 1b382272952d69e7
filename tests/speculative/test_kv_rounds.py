"""Whole rounds on caches that hold what they stand for: (position, token) of every slot.

A row grows by a chain of drafts of which some are accepted; afterwards its visible slots must hold
exactly the committed text without its last token, in every layout, for all accept lengths.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from alignops.speculative import kv
from alignops.speculative.layout import build_mask, build_positions, build_tree

ROWS, DRAFTS = 2, 3
ACCEPTED = list(itertools.product(range(DRAFTS + 1), repeat=ROWS))
ROUNDS = 3


class Text:
    """What rows have committed, and the tokens that the next forward is fed."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.rows = [[1000 * (b + 1) + i for i in range(n)] for b, n in enumerate(lengths)]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.rows])

    def fed(self, width: int) -> Tensor:
        """(B, width): last token, then drafts that are accepted or not."""
        return torch.tensor(
            [[row[-1], *(row[-1] + 7 * (j + 1) for j in range(width - 1))] for row in self.rows]
        )

    def commit(self, fed: Tensor, accepted: tuple[int, ...]) -> Tensor:
        """Accepted drafts and a token that was not fed."""
        for row, tokens, count in zip(self.rows, fed.tolist(), accepted, strict=True):
            row += [*tokens[1 : 1 + count], row[-1] + 100_000]
        return torch.tensor(accepted) + 1


def entries(positions: Tensor, tokens: Tensor) -> Tensor:
    """What a model would write: (B, 1, Q, 2)."""
    return torch.stack((positions, tokens), -1)[:, None]


def check(cache: Tensor, mask: Tensor, text: Text, fed: Tensor) -> None:
    """Every query sees the text before it, once, and nothing else."""
    for b, row in enumerate(text.rows):
        for j in range(fed.shape[1]):
            seen = sorted(tuple(e) for e in cache[b, 0][mask[b, 0, j]].tolist())
            wanted = [*row[:-1], *fed[b, : j + 1].tolist()]
            assert seen == list(enumerate(wanted))


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_ragged(accepted: tuple[int, ...]) -> None:
    text = Text((3, 5))
    cache = torch.full((ROWS, 1, 40, 2), -1)
    for b, row in enumerate(text.rows):
        known = torch.tensor([list(enumerate(row[:-1]))])[:, None]
        kv.ragged_append_([cache[b : b + 1]], [known], torch.tensor([0]))
    for turn in range(ROUNDS):
        c = text.lengths
        fed = text.fed(DRAFTS + 1)
        kv.ragged_append_([cache], [entries(build_positions(c, DRAFTS + 1), fed)], c - 1)
        (mask,) = build_mask(c, DRAFTS + 1, 40)
        check(cache, mask, text, fed)
        text.commit(fed, accepted if turn % 2 == 0 else accepted[::-1])


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("accepted", ACCEPTED)
def test_realigned(accepted: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    text = Text(lengths)
    pad = text.lengths.max() - text.lengths
    cache = torch.full((ROWS, 1, 40, 2), -1)
    for b, row in enumerate(text.rows):
        for i, token in enumerate(row[:-1]):
            cache[b, 0, int(pad[b]) + i] = torch.tensor([i, token])
    for turn in range(ROUNDS):
        c = text.lengths
        width = int((pad + c).max())
        fed = text.fed(DRAFTS + 1)
        positions = build_positions(c, DRAFTS + 1)
        # All rows write the same columns.
        cache[:, :, width - 1 : width + DRAFTS] = entries(positions, fed)
        (mask,) = build_mask(c, DRAFTS + 1, width + DRAFTS, pad=pad)
        check(cache[:, :, : width + DRAFTS], mask, text, fed)
        emitted = text.commit(fed, accepted if turn % 2 == 0 else accepted[::-1])
        plan = kv.plan_realign(c, pad, emitted)
        kv.kv_shift_([cache], *plan[:3])
        pad = plan.new_pad
        assert torch.equal(pad + text.lengths, text.lengths.max().expand(ROWS))


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_packed(accepted: tuple[int, ...]) -> None:
    """Rows one after the other: rejected drafts are cut off, room for the next ones is made."""
    text = Text((3, 5))
    q = DRAFTS + 1
    cu = torch.tensor([0, 2, 6])
    known = [list(enumerate(row[:-1])) for row in text.rows]
    cache = torch.tensor(known[0] + known[1]).view(-1, 1, 2)
    for turn in range(ROUNDS):
        c, fed = text.lengths, text.fed(q)
        grown = torch.cat((torch.zeros(1).long(), (c - 1 + q).cumsum(0)))
        (cache,) = kv.kv_packed([cache], cu, grown, slots=int(grown[-1]))
        new = entries(build_positions(c, q), fed)
        for b in range(ROWS):
            cache[grown[b + 1] - q : grown[b + 1], 0] = new[b, 0]
        queries, slots = build_mask(c, q, kind="cu_seqlens")
        assert torch.equal(slots, grown.int())
        assert queries.tolist() == [0, q, 2 * q]
        text.commit(fed, accepted if turn % 2 == 0 else accepted[::-1])
        cu = torch.cat((torch.zeros(1).long(), (text.lengths - 1).cumsum(0)))
        kv.kv_packed([cache], grown, cu, out=[cache])
        for b, row in enumerate(text.rows):
            assert cache[cu[b] : cu[b + 1], 0].tolist() == [list(e) for e in enumerate(row[:-1])]


PARENT = [-1, 0, 0, 1, 1, 2, 4]


def paths() -> list[list[int]]:
    """From the root to every node."""
    found = []
    for node in range(len(PARENT)):
        path = [node]
        while PARENT[path[0]] >= 0:
            path.insert(0, PARENT[path[0]])
        found.append(path)
    return found


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("first", paths())
@pytest.mark.parametrize("second", paths()[::2])
def test_trees(first: list[int], second: list[int], paged: bool) -> None:
    text, n = Text((3, 6)), len(PARENT)
    tree = build_tree(torch.tensor(PARENT))
    c, table = text.lengths, torch.randperm(10).view(2, 5)
    fed = text.fed(n)
    cache = torch.full((ROWS, 1, 20, 2), -1)
    for b, row in enumerate(text.rows):
        for i, token in enumerate(row[:-1]):
            cache[b, 0, i] = torch.tensor([i, token])
    positions = build_positions(c, n, depth=tree.depth)
    kv.ragged_append_([cache], [entries(positions, fed)], c - 1)
    (mask,) = build_mask(c, n, 20, depth=tree.depth, ancestors=tree.ancestors)
    for b, row in enumerate(text.rows):
        for j, path in enumerate(paths()):
            seen = sorted(tuple(e) for e in cache[b, 0][mask[b, 0, j]].tolist())
            assert seen == list(enumerate([*row[:-1], *fed[b, path].tolist()]))
    chosen = torch.tensor([p + [-1] * (n - len(p)) for p in (first, second)])
    length = torch.tensor([len(first), len(second)])
    if paged:
        pages = cache.view(ROWS, 5, 4, 1, 2).flatten(0, 1)[table.flatten().argsort()].clone()
        kv.kv_paged_tree_([pages], table, c - 1, chosen, length)
        cache = pages[table].view(ROWS, 1, 20, 2)
    else:
        kv.kv_tree_([cache], c - 1, chosen, length)
    for b, path in enumerate((first, second)):
        text.rows[b] += [*fed[b, path[1:]].tolist(), 5]
        kept = cache[b, 0, : len(text.rows[b]) - 1].tolist()
        assert kept == [list(e) for e in enumerate(text.rows[b][:-1])]
