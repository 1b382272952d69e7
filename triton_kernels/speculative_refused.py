"""What is left of a law behind the children of a node of a tree that have been refused.

Nothing of the size of the vocabulary is kept: a refused child leaves two integers behind, the
totals of what is left of target and drafter, from which every probability is computed again.
Source: arXiv 2305.09781.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .speculative_laws import fixed_point


@triton.jit
def normalized(r, total):
    """The quotient R / total, R in units of 2^-40, rounded to float32."""
    return (fixed_point(r).to(tl.float64) / total.to(tl.float64)).to(tl.float32)


@triton.jit
def left_of(p, q, ids, node, upto, nodes, parents, p_totals, q_totals, REPLACEMENT: tl.constexpr):
    """(p, q) at ids (a block or one) behind the refused children of `node` that are below `upto`.

    nodes: tokens of the tree; totals (N,) of what each refused child has left, 0: all of it.
    """
    for child in range(1, upto):
        token = tl.load(nodes + child)
        if (tl.load(parents + child) == node) & (token >= 0):
            beyond = tl.maximum(p - q, 0.0)
            total = tl.load(p_totals + child)
            if total > 0:
                p = normalized(beyond, total)
            if REPLACEMENT == 0:
                total = tl.load(q_totals + child)
                if total > 0:
                    q = tl.where(ids == token, 0.0, normalized(q, total))
    return p, q


@triton.jit
def without_children(p, ids, node, nodes, parents, N):
    """P at ids, 0 at the tokens of the children of `node`."""
    for child in range(1, N):
        token = tl.load(nodes + child)
        if (tl.load(parents + child) == node) & (token >= 0):
            p = tl.where(ids == token, 0.0, p)
    return p
