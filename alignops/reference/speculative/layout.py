"""Positions, masks and trees by definition: every entry by itself.

Shape letters: B rows, Q queries, S slots, n nodes of a tree. Integers are tensors on the CPU.

Source: arXiv 2510.22876 (positions and masks of ragged batches), 2305.09781 (trees).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _count(c: Tensor, q_len: int, counts: Tensor | None, b: int) -> int:
    """Queries of a row that are not padding."""
    if c[b] == 0:
        return 0
    return q_len if counts is None else int(counts[b])


def _level(depth: Tensor | None, b: int, j: int) -> int:
    """Levels between the last committed token and query j."""
    if depth is None:
        return j
    return int(depth[j] if depth.dim() == 1 else depth[b, j])


def query_positions(
    c: Tensor, q_len: int, counts: Tensor | None = None, depth: Tensor | None = None
) -> Tensor:
    """(B, Q): a token's position is the number of tokens before it; 0 for padding."""
    out = torch.zeros(len(c), q_len, dtype=torch.int64)
    for b in range(len(c)):
        for j in range(_count(c, q_len, counts, b)):
            out[b, j] = int(c[b]) - 1 + _level(depth, b, j)
    return out


def column_positions(c: Tensor, pad: Tensor, columns: int) -> Tensor:
    """(B, columns) of left-padded rows; 0 for padding."""
    out = torch.zeros(len(c), columns, dtype=torch.int64)
    for b in range(len(c)):
        for i in range(int(c[b])):
            if int(pad[b]) + i < columns:
                out[b, int(pad[b]) + i] = i
    return out


def mask(
    c: Tensor,
    q_len: int,
    slots: int,
    *,
    window: int = 0,
    pad: Tensor | None = None,
    first: Tensor | None = None,
    counts: Tensor | None = None,
    slot_positions: Tensor | None = None,
    depth: Tensor | None = None,
    block: Tensor | None = None,
) -> Tensor:
    """Bool (B, Q, S): whether a query sees a slot. `block` (n, n) or (B, n, n) is of the tree."""
    out = torch.zeros(len(c), q_len, slots, dtype=torch.bool)
    for b in range(len(c)):
        begin = 0 if pad is None else int(pad[b])
        committed = max(int(c[b]) - 1, 0)
        own = begin + committed if first is None else int(first[b])
        count = _count(c, q_len, counts, b)
        for j in range(q_len):
            if j >= count:
                if slots:
                    out[b, j, min(own + j, slots - 1)] = True
                continue
            position = committed + _level(depth, b, j)
            for s in range(slots):
                at = s - begin if slot_positions is None else int(slot_positions[b, s])
                visible = 0 <= at < committed and not own <= s < own + q_len
                if own <= s < own + count:
                    i = s - own
                    path = block if block is None or block.dim() == 2 else block[b]
                    if i <= j if path is None else bool(path[j, i]):
                        visible, at = True, committed + _level(depth, b, i)
                if visible and (window == 0 or position - at < window):
                    out[b, j, s] = True
    return out


def row_mask(
    c: Tensor,
    q_len: int,
    slots: int,
    *,
    pad: Tensor | None = None,
    first: Tensor | None = None,
    counts: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> Tensor:
    """Bool (B, S): slots of committed tokens and of queries."""
    out = torch.zeros(len(c), slots, dtype=torch.bool)
    for b in range(len(c)):
        begin = 0 if pad is None else int(pad[b])
        committed = max(int(c[b]) - 1, 0)
        own = begin + committed if first is None else int(first[b])
        for s in range(slots):
            at = s - begin if slot_positions is None else int(slot_positions[b, s])
            if own <= s < own + q_len:
                out[b, s] = s < own + _count(c, q_len, counts, b)
            else:
                out[b, s] = 0 <= at < committed
    return out


def ancestors(parent: list[int]) -> list[list[bool]]:
    """For each node which nodes are it or above it."""
    out = [[False] * len(parent) for _ in parent]
    for node in range(len(parent)):
        above = node
        while above >= 0:
            out[node][above] = True
            above = parent[above]
    return out


def children(parent: list[int], node: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, len(parent)) if parent[n] == node]


def select_tree(scores: list[float], parents: list[int], n: int) -> tuple[list[int], list[int]]:
    """The best n candidates, rising, and the parents of the tree of the root and them.

    Raises:
        ValueError: a candidate is chosen and its parent is not.
    """
    nodes = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n])
    tree = [-1]
    for node in nodes:
        if parents[node] >= 0 and parents[node] not in nodes:
            raise ValueError(f"select_tree: candidate {node} is chosen, {parents[node]} is not")
        tree.append(0 if parents[node] < 0 else nodes.index(parents[node]) + 1)
    return nodes, tree
