"""Positions, attention masks and tree tables from lengths, over `torch.ops.alignops.speculative_*`.

Row b has c[b] committed tokens. All but the last lie in the cache, at slots pad .. pad + c - 2; the
queries of a forward are the last committed token and what follows it, at slots `first` .., by
default right behind. The position of a token is the number of tokens before it in its row, so that
of query 0 is c - 1, however many columns of padding or holes there are.

Query j sees a slot iff it holds a committed token or a query on j's own path, and, in a layer with
a window w > 0, position(j) - position(slot) < w. Queries from `counts[b]` on, and those of a row
with c = 0, are padding: they see one slot, their own, so that no softmax is empty.

Shape letters: B rows, Q queries, S slots, W kinds of windows, n nodes of a tree.

Integers are int32 or int64. On the CPU their values are checked, on a GPU nothing is read back and
what does not fit is left out. Nothing here is differentiable.

Source: arXiv 2510.22876 (positions and masks of ragged batches), 2305.09781 (tree masks),
2406.16858 (the best nodes of a tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alignops._checks import check, check_layout, dtype_name
from alignops.speculative import cache_checks as checks

_op = torch.ops.alignops

#: Codes of the kinds of masks that are filled slot by slot (csrc/speculative/layout.h).
_KINDS = {"bool4d": 0, "additive": 1, "bits32": 2, "mask2d": 3}
KINDS = (*_KINDS, "cu_seqlens")
_ADDITIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build_positions(
    c: Tensor,
    q_len: int,
    pad: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    depth: Tensor | None = None,
) -> Tensor:
    """Position ids of the queries of a forward, or of the columns of left-padded rows.

    Args:
        c: (B,) committed tokens. The first query is the last of them.
        q_len: Q.
        pad: (B,) columns of padding. With it, the Q columns are the padded rows themselves, from
            column 0 on, not queries behind them.
        counts: (B,) queries that are not padding; None: all.
        depth: (Q,) or (B, Q), levels of the tree nodes that are the queries; None: a chain.

    Returns:
        int64 (B, Q); 0 for padding.

    Raises:
        ValueError: shapes or dtypes do not fit, or on the CPU values.

    Example:
        >>> import torch
        >>> build_positions(torch.tensor([4, 2]), 3).tolist()
        [[3, 4, 5], [1, 2, 3]]
        >>> build_positions(torch.tensor([4, 2]), 4, pad=torch.tensor([0, 2])).tolist()
        [[0, 1, 2, 3], [0, 0, 0, 1]]
    """
    result: Tensor = _op.speculative_positions(c, q_len, pad, counts, depth)
    return result


def build_mask(
    c: Tensor,
    q_len: int,
    slots: int = 0,
    *,
    kind: str = "bool4d",
    dtype: torch.dtype = torch.float32,
    windows: Sequence[int] = (0,),
    pad: Tensor | None = None,
    first: Tensor | None = None,
    counts: Tensor | None = None,
    slot_positions: Tensor | None = None,
    depth: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Which slots the queries of a forward see.

    Args:
        c: (B,) committed tokens.
        q_len: Q.
        slots: S, slots that the forward attends to, its own queries included.
        kind: "bool4d": bool (B, 1, Q, S), True is visible;
            "additive": `dtype` (B, 1, Q, S), 0 is visible, the dtype's lowest value is not;
            "bits32": int32 (B, Q, ceil(S / 32)), slot s is bit s % 32 of word s // 32;
            "mask2d": bool (B, S), True for committed tokens and queries: one mask for all layers,
            causality and windows are the model's own work;
            "cu_seqlens": int32 (B + 1) twice, offsets of each row's queries, and of the tokens that
            they attend to, in packed rows; `slots`, `pad` and `first` play no part.
        dtype: of an additive mask: float32, bfloat16, float16 or float64.
        windows: for each kind of layer the number of latest positions that it sees, 0: all.
        pad: (B,) slots of padding before the first token; None: 0.
        first: (B,) slot of query 0; None: right behind the committed tokens.
        counts: (B,) queries that are not padding; None: all.
        slot_positions: (B, S) positions of the committed tokens; below 0: a hole. None: slot s
            holds position s - pad. Positions from c - 1 on are not visible, and slots of queries
            are not looked up.
        depth: of `build_tree`, (Q,) for all rows or (B, Q), if the queries are a tree.
        ancestors: of `build_tree`, with `depth`.

    Returns:
        One mask for each of `windows`; ("mask2d") one; ("cu_seqlens") two tensors.

    Raises:
        ValueError: shapes or dtypes do not fit, or on the CPU values: queries beyond the slots, or
            on top of committed tokens.

    Example:
        >>> import torch
        >>> (mask,) = build_mask(torch.tensor([2]), 2, 4)
        >>> mask.int().tolist()
        [[[[1, 1, 0, 0], [1, 1, 1, 0]]]]
        >>> everything, last_two = build_mask(torch.tensor([2]), 2, 4, windows=(0, 2))
        >>> last_two.int().tolist()
        [[[[1, 1, 0, 0], [0, 1, 1, 0]]]]
    """
    if kind not in KINDS:
        raise ValueError(f"build_mask: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "cu_seqlens":
        offsets: tuple[Tensor, Tensor] = _op.speculative_cu_seqlens(c, q_len, counts)
        return tuple(offsets)
    result: Tensor = _op.speculative_mask(
        c,
        q_len,
        slots,
        _KINDS[kind],
        dtype,
        list(windows),
        pad,
        first,
        counts,
        slot_positions,
        depth,
        ancestors,
    )
    return (result,) if kind == "mask2d" else result.unbind(0)


class TreeTables(NamedTuple):
    """Tables of trees with n <= 64 nodes, for attention and for the walk of `verify_tree`.

    Attributes:
        depth: int32 (B, n), 0 for the root.
        ancestors: int64 (B, n), bits: bit i of entry j is set iff node i is j or above it.
        first_child: int32 (B, n), the first child of each node; -1: none.
        next_sibling: int32 (B, n), the next child of its parent; -1: none.
        block: bool (B, n, n), the bits of `ancestors`: which queries see which.
    """

    depth: Tensor
    ancestors: Tensor
    first_child: Tensor
    next_sibling: Tensor
    block: Tensor


def build_tree(parent: Tensor) -> TreeTables:
    """Tables of trees from their parents.

    Args:
        parent: (B, n) for 1 to 64 nodes, or (n,) for one tree: node 0 is the root, with parent -1;
            parents come before their children; nodes behind the tree have parent -1, and are on
            nobody's path.

    Returns:
        Tables with the dimensions of `parent`.

    Raises:
        ValueError: the shape or dtype does not fit, or on the CPU a parent.

    Example:
        >>> import torch
        >>> tree = build_tree(torch.tensor([-1, 0, 0, 1]))
        >>> tree.depth.tolist(), tree.ancestors.tolist(), tree.next_sibling.tolist()
        ([0, 1, 1, 2], [1, 3, 5, 11], [-1, 2, -1, -1])
    """
    if parent.dim() == 1:
        return TreeTables(*(t[0] for t in _op.speculative_tree_tables(parent[None])))
    return TreeTables(*_op.speculative_tree_tables(parent))


class SelectedTree(NamedTuple):
    """Chosen candidates int32 (B, n), rising, and parents int32 (B, n + 1) of the root and them."""

    nodes: Tensor
    parent: Tensor


def select_tree(scores: Tensor, parents: Tensor, n: int) -> SelectedTree:
    """The best n candidates of a beam, as a tree.

    Node 0 of the tree is the root, the last committed token; node i is candidate `nodes[:, i - 1]`.
    The score of a candidate must not be above its parent's, as sums of log-probabilities are not:
    then the best n hold all their ancestors.

    Args:
        scores: (B, m) float32 or float64; among equals, the earlier candidate is better.
        parents: (B, m) the candidate that each one follows, which comes before it; -1: the root.
        n: at most m, and at most 63.

    Returns:
        The candidates, and `parent` for `build_tree`.

    Raises:
        ValueError: shapes or dtypes do not fit; on the CPU, a score is NaN, a parent comes after
            its child, or a candidate is chosen and its parent is not.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[-1.0, -2.0, -1.5, -9.0]])
        >>> tree = select_tree(scores, torch.tensor([[-1, -1, 0, 0]]), 3)
        >>> tree.nodes.tolist(), tree.parent.tolist()
        ([[0, 1, 2]], [[-1, 0, 0, 1]])
    """
    return SelectedTree(*_op.speculative_tree_select(scores, parents, n))


# Fake kernels


def _check_queries(
    c: Tensor, q_len: int, counts: Tensor | None, depth: Tensor | None, op: str
) -> int:
    check(q_len >= 0, f"{op}: q_len must not be negative, got {q_len}")
    rows = checks.check_vector(c, op, "c")
    checks.check_ints(c, (rows,), op, "c")
    checks.check_ints(counts, (rows,), op, "counts")
    if depth is not None:
        checks.check_shared(depth, rows, q_len, op, "depth")
        checks.check_ints(depth, tuple(depth.shape), op, "depth")
    return rows


@torch.library.register_fake("alignops::speculative_positions")
def _(
    c: Tensor, q_len: int, pad: Tensor | None, counts: Tensor | None, depth: Tensor | None
) -> Tensor:
    op = "speculative_positions"
    rows = _check_queries(c, q_len, counts, depth, op)
    checks.check_ints(pad, (rows,), op, "pad")
    check(
        pad is None or (counts is None and depth is None),
        f"{op}: pad must be given without counts and depth: it is of columns, they of queries",
    )
    return c.new_empty((rows, q_len), dtype=torch.int64)


@torch.library.register_fake("alignops::speculative_mask")
def _(
    c: Tensor,
    q_len: int,
    slots: int,
    kind: int,
    dtype: torch.dtype,
    windows: list[int],
    pad: Tensor | None,
    first: Tensor | None,
    counts: Tensor | None,
    slot_positions: Tensor | None,
    depth: Tensor | None,
    ancestors: Tensor | None,
) -> Tensor:
    op = "speculative_mask"
    rows = _check_queries(c, q_len, counts, depth, op)
    check(slots >= 0, f"{op}: slots must not be negative, got {slots}")
    check(
        0 <= kind <= 3,
        f"{op}: kind must be 0 (bool), 1 (additive), 2 (bits) or 3 (rows), got {kind}",
    )
    for window in windows:
        check(window >= 0, f"{op}: windows must not be negative, got {window}")
    checks.check_ints(pad, (rows,), op, "pad")
    checks.check_ints(first, (rows,), op, "first")
    checks.check_ints(slot_positions, (rows, slots), op, "slot_positions")
    check(
        (ancestors is None) == (depth is None),
        f"{op}: ancestors must be given exactly if depth is, got "
        f"{'none' if ancestors is None else 'them'}",
    )
    if ancestors is not None:
        check(
            q_len <= checks.MAX_NODES,
            f"{op}: ancestors must be of at most {checks.MAX_NODES} nodes, got {q_len}",
        )
        checks.check_shared(ancestors, rows, q_len, op, "ancestors")
        check_layout(ancestors, torch.int64, tuple(ancestors.shape), op, "ancestors")
    if kind == _KINDS["additive"]:
        check(
            dtype in _ADDITIVE,
            f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype_name(dtype)}",
        )
        return c.new_empty((len(windows), rows, 1, q_len, slots), dtype=dtype)
    if kind == _KINDS["bits32"]:
        words = (slots + 31) // 32
        return c.new_empty((len(windows), rows, q_len, words), dtype=torch.int32)
    if kind == _KINDS["mask2d"]:
        return c.new_empty((rows, slots), dtype=torch.bool)
    return c.new_empty((len(windows), rows, 1, q_len, slots), dtype=torch.bool)


@torch.library.register_fake("alignops::speculative_cu_seqlens")
def _(c: Tensor, q_len: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = _check_queries(c, q_len, counts, None, "speculative_cu_seqlens")
    queries, slots = (c.new_empty((rows + 1,), dtype=torch.int32) for _ in range(2))
    return queries, slots


@torch.library.register_fake("alignops::speculative_tree_tables")
def _(parent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "speculative_tree_tables"
    check(
        parent.dim() == 2,
        f"{op}: parent must have shape (rows, nodes), got {tuple(parent.shape)}",
    )
    rows, nodes = parent.shape
    check(
        1 <= nodes <= checks.MAX_NODES,
        f"{op}: parent must have 1 to {checks.MAX_NODES} nodes, got {nodes}",
    )
    checks.check_ints(parent, (rows, nodes), op, "parent")
    ints = [parent.new_empty((rows, nodes), dtype=torch.int32) for _ in range(3)]
    ancestors = parent.new_empty((rows, nodes), dtype=torch.int64)
    block = parent.new_empty((rows, nodes, nodes), dtype=torch.bool)
    return ints[0], ancestors, ints[1], ints[2], block


@torch.library.register_fake("alignops::speculative_tree_select")
def _(scores: Tensor, parents: Tensor, n: int) -> tuple[Tensor, Tensor]:
    op = "speculative_tree_select"
    check(
        scores.dim() == 2,
        f"{op}: scores must have shape (rows, candidates), got {tuple(scores.shape)}",
    )
    rows, candidates = scores.shape
    wide = scores.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    check_layout(scores, dtype, (rows, candidates), op, "scores")
    check(
        0 <= n <= candidates and n < checks.MAX_NODES,
        f"{op}: n must lie in [0, {min(candidates, checks.MAX_NODES - 1)}], got {n}",
    )
    checks.check_ints(parents, (rows, candidates), op, "parents")
    return (
        scores.new_empty((rows, n), dtype=torch.int32),
        scores.new_empty((rows, n + 1), dtype=torch.int32),
    )
