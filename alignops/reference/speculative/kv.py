"""Moves of cache slots by definition: copies by index, one cache tensor at a time, out of place.

Shape letters: B rows, H heads, S slots, D head size, Q new columns, n nodes of a path. A tensor is
(B, H, S, D); plans are tensors of integers on the CPU.

Source: arXiv 2510.22876, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plan_realign(c: Tensor, pad: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """src, dst, length and new padding of rows that are to end in the same column again."""
    new_c = c + emitted
    new_pad = new_c.max() - new_c if len(c) else new_c
    length = (new_c - 1).clamp(min=0)  # the last token has no keys and values yet
    src, dst, length, new_pad = (t.to(torch.int32) for t in (pad, new_pad, length, new_pad))
    return src, dst, length, new_pad


def shift(cache: Tensor, src: Tensor, dst: Tensor, length: Tensor) -> Tensor:
    """Slots [src, src + length) of each row go to [dst, dst + length)."""
    out = cache.clone()
    for b in range(len(src)):
        for i in range(int(length[b])):
            out[b, :, int(dst[b]) + i] = cache[b, :, int(src[b]) + i]
    return out


def gather(
    cache: Tensor,
    rows: Tensor,
    out: Tensor,
    src: Tensor | None = None,
    dst: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """`out` with row i taken from row rows[i], if that is not -1."""
    out = out.clone()
    for i, row in enumerate(rows.tolist()):
        count = cache.shape[2] if length is None else int(length[i])
        for s in range(count if row >= 0 else 0):
            target = s if dst is None else int(dst[i]) + s
            out[i, :, target] = cache[row, :, s if src is None else int(src[i]) + s]
    return out


def tree(cache: Tensor, base: Tensor, path: Tensor, length: Tensor) -> Tensor:
    """Slots base + path[j] go to base + j."""
    out = cache.clone()
    for b in range(len(base)):
        for j in range(int(length[b])):
            out[b, :, int(base[b]) + j] = cache[b, :, int(base[b]) + int(path[b, j])]
    return out


def paged_tree(
    pages: Tensor, block_table: Tensor, base: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    """The same in pages (P, H, page, D): slot s is s % page of page block_table[b, s // page]."""
    out, size = pages.clone(), pages.shape[2]
    for b in range(len(base)):
        for j in range(int(length[b])):
            s, t = int(base[b]) + int(path[b, j]), int(base[b]) + j
            source = pages[int(block_table[b, s // size]), :, s % size]
            out[int(block_table[b, t // size]), :, t % size] = source
    return out


def packed(cache: Tensor, cu: Tensor, new_cu: Tensor, out: Tensor) -> Tensor:
    """`out` (S', H, D) with row b of `cache` (S, H, D) at new_cu[b], as far as both are long."""
    out = out.clone()
    for b in range(len(cu) - 1):
        count = min(int(cu[b + 1] - cu[b]), int(new_cu[b + 1] - new_cu[b]))
        for i in range(count):
            out[int(new_cu[b]) + i] = cache[int(cu[b]) + i]
    return out


def append(cache: Tensor, new: Tensor, lens: Tensor, counts: Tensor | None = None) -> Tensor:
    """Columns of `new` (B, H, Q, D) at slots lens .. of each row."""
    out = cache.clone()
    for b in range(len(lens)):
        for q in range(new.shape[2] if counts is None else int(counts[b])):
            out[b, :, int(lens[b]) + q] = new[b, :, q]
    return out
