"""Tables of draft trees as SGLang holds them.

Shape letters: B requests, n nodes of a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignops.speculative import TreeTables, build_tree

FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING = range(3)


def tree_parents(next_token: Tensor, next_sibling: Tensor) -> Tensor:
    """Parents of the nodes of trees that are given as linked lists.

    Args:
        next_token: int64 (B, n), first child of each node; -1: none.
        next_sibling: int64 (B, n), the next child of the same parent; -1: none.

    Returns:
        int64 (B, n); -1 for the root and for nodes that no list names.

    Example:
        >>> first, following = torch.tensor([[1, 3, -1, -1]]), torch.tensor([[-1, 2, -1, -1]])
        >>> tree_parents(first, following)
        tensor([[-1,  0,  0,  1]])
    """
    rows, size = next_token.shape
    node = torch.arange(size, device=next_token.device).expand(rows, size)

    def inverse(links: Tensor) -> Tensor:
        """Which node names each one; what is -1 is written to a column that nobody reads."""
        out = torch.full((rows, size + 1), -1, dtype=torch.int64, device=links.device)
        return out.scatter_(1, torch.where(links < 0, size, links), node)[:, :size]

    before = inverse(next_sibling)
    head = torch.where(before < 0, node, before)  # towards the first of the siblings
    for _ in range(size.bit_length()):
        head = head.gather(1, head)
    return inverse(next_token).gather(1, head)


def build_tree_kernel_efficient(
    bonus_tokens: Tensor,
    parent_list: Tensor,
    top_scores_index: Tensor,
    draft_tokens: Tensor,
    seq_lens: Tensor,
    seq_lens_sum: int,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int = FULL_MASK,
    tree_mask_buf: Tensor | None = None,
    fill_prefix_mask: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tables of the drafts that were selected from a beam. Experimental.

    A node whose parent was not selected becomes a child of the root, which is a draft like any
    other.

    Args:
        bonus_tokens: (B,), last committed tokens, the roots.
        parent_list: int64 (B, topk * (spec_steps - 1) + 1): for each group of `topk` candidates,
            the candidate that they follow.
        top_scores_index: int64 (B, n - 1), the candidates that were selected, ascending.
        draft_tokens: (B, n - 1), their ids.
        seq_lens: int64 (B,), tokens before the root.
        seq_lens_sum: their sum.
        topk: children of a node of the beam.
        spec_steps: not used, shapes say it.
        num_verify_tokens: n, at most 64.
        tree_mask_mode: 0: for each node all tokens before the root, then the nodes; 1: the nodes;
            2: the nodes as bits, up to 32.
        tree_mask_buf: a mask to write; None: a new one.
        fill_prefix_mask: False: the part of mode 0 before the root is not written.

    Returns:
        The mask, one-dimensional; positions int64 (B * n,); `retrieve_index`,
        `retrieve_next_token` and `retrieve_next_sibling`, int64 (B, n); ids (B * n,).

    Raises:
        ValueError: a mode that does not exist, or too many nodes.
    """
    rows, size = seq_lens.shape[0], num_verify_tokens
    limit = 32 if tree_mask_mode == QLEN_ONLY_BITPACKING else 64
    if tree_mask_mode not in (FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING):
        raise ValueError(f"build_tree: tree_mask_mode must be 0, 1 or 2, got {tree_mask_mode}")
    if not 1 <= size <= limit:
        raise ValueError(f"build_tree: num_verify_tokens must be 1 to {limit}, got {size}")
    device, selected = seq_lens.device, top_scores_index.long()
    group = selected // topk
    if parent_list.shape[1] > 0:
        wanted = parent_list.long().gather(1, group.clamp(max=parent_list.shape[1] - 1))
        same = selected[:, None, :] == wanted[:, :, None]
        known = (group > 0) & same.any(-1)
        place = torch.where(known, same.int().argmax(-1) + 1, 0)
    else:
        place = torch.zeros_like(selected)
    # Parents come before their children, since candidates are numbered level by level.
    place = place * (place <= torch.arange(size - 1, device=device))
    parent = torch.nn.functional.pad(place, (1, 0), value=-1)
    tree = build_tree(parent.int())
    positions = (seq_lens.long()[:, None] + tree.depth).flatten()
    mask = _tree_mask(
        tree, seq_lens.long(), seq_lens_sum, tree_mask_mode, tree_mask_buf, fill_prefix_mask
    )
    index = torch.arange(rows * size, device=device).view(rows, size)
    ids = torch.cat((bonus_tokens.unsqueeze(1), draft_tokens), dim=1).flatten()
    return mask, positions, index, tree.first_child.long(), tree.next_sibling.long(), ids


def _tree_mask(
    tree: TreeTables, lengths: Tensor, total: int, mode: int, out: Tensor | None, fill: bool
) -> Tensor:
    rows, size = tree.depth.shape
    if mode == QLEN_ONLY_BITPACKING:
        dtype = torch.uint8 if size <= 8 else torch.uint16 if size <= 16 else torch.uint32
        bits = tree.ancestors.flatten()
        if out is None:
            out = torch.empty(rows * size, dtype=dtype, device=bits.device)
        # Views, since few operators know unsigned integers.
        signed = {torch.uint8: torch.uint8, torch.uint16: torch.int16, torch.uint32: torch.int32}
        out.view(signed[out.dtype]).copy_(bits)
        return out
    if mode == QLEN_ONLY:
        if out is None:
            out = torch.empty(rows * size * size, dtype=torch.bool, device=lengths.device)
        out.copy_(tree.block.flatten())
        return out
    count = size * (total + rows * size)
    if out is None:
        out = torch.ones(count, dtype=torch.bool, device=lengths.device)
    elif fill:
        out.fill_(True)
    node = torch.arange(size, device=lengths.device)
    begin = size * (lengths.cumsum(0) - lengths + torch.arange(rows, device=lengths.device) * size)
    line = begin[:, None] + node * (lengths[:, None] + size) + lengths[:, None]
    out.scatter_(0, (line[:, :, None] + node).flatten(), tree.block.flatten())
    return out
