"""Moves of cache slots, over `torch.ops.alignops.speculative_*`, with fake kernels.

A cache is a list of tensors, such as keys and values of every layer, and one plan moves the slots
of all of them. The operators see bytes: elements of 1, 2, 4 or 8 bytes, whatever they mean, so
scales of a quantized cache go along as tensors of their own.

Shape letters: B rows, S slots of a row, H heads, D head size, T tensors, Q new columns, n nodes of
a path. H, S and D may differ from tensor to tensor. A tensor is (B, H, S, D), or (B, S, H, D) with
`layout="bshd"`, with any strides but 1 for D.

Integers of a plan are int32 or int64. On the CPU all of them are checked before any byte moves, and
an error leaves everything as it was. On a GPU nothing is read back: a row whose plan does not fit
is left out. Tensors of one cache may be on several devices; the plan is copied to each of them.
Nothing here is differentiable.

Source: arXiv 2510.22876, section 3 (unpad, append, repad); the moves in place are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative import cache_checks as checks

_op = torch.ops.alignops


class RealignPlan(NamedTuple):
    """How the slots of left-padded rows move: int32 (B,) each, for `kv_shift_`, and the padding."""

    src: Tensor
    dst: Tensor
    length: Tensor
    new_pad: Tensor


def plan_realign(c: Tensor, pad: Tensor, emitted: Tensor) -> RealignPlan:
    """How rows move so that all of them end in the same column again after a round.

    Row b holds `pad[b]` columns of padding and `c[b]` tokens, of which all but the last have keys
    and values; `emitted[b]` tokens are added. The new width is that of the longest row.

    Args:
        c: (B,) committed tokens.
        pad: (B,) columns of padding; `pad + c` is the same for all rows.
        emitted: (B,) new tokens, 0 for rows that are finished.

    Raises:
        ValueError: shapes or dtypes differ, a value is negative, or the rows do not end in the same
            column.

    Example:
        >>> import torch
        >>> c, pad = torch.tensor([5, 3]), torch.tensor([0, 2])
        >>> plan = plan_realign(c, pad, torch.tensor([1, 3]))
        >>> plan.dst.tolist(), plan.length.tolist()
        ([0, 0], [5, 5])
    """
    return RealignPlan(*_op.speculative_plan_realign(c, pad, emitted))


def _call(
    op: str, caches: Sequence[Tensor], run: Callable[[list[int], torch.device], None]
) -> None:
    """Calls `run(indices, device)` for the tensors of each device."""
    groups: dict[torch.device, list[int]] = {}
    for i, t in enumerate(caches):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: caches must be tensors, got {type(t).__name__} at {i}")
        check(not t.requires_grad, f"{op}: caches must not require a gradient, got one at {i}")
        groups.setdefault(t.device, []).append(i)
    for device, indices in groups.items():
        run(indices, device)


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    """The plan where the tensors are."""
    return t if t is None or t.device == device else t.to(device, non_blocking=True)


def kv_shift_(
    caches: Sequence[Tensor], src: Tensor, dst: Tensor, length: Tensor, *, layout: str = "bhsd"
) -> None:
    """Slots [src, src + length) of each row go to [dst, dst + length), in place.

    Either direction, each row its own; the two ranges may overlap, and nothing is allocated. What
    was in slots that are not written stays.

    Args:
        caches: T tensors that share no memory.
        src: (B,) first slot of each row that moves.
        dst: (B,) where it goes.
        length: (B,) slots that move.
        layout: "bhsd" or "bshd".

    Raises:
        ValueError: a tensor does not fit, or on the CPU a range leaves the slots.

    Example:
        >>> import torch
        >>> cache = torch.tensor([1, 2, 3, 4, 5]).view(1, 1, 5, 1)
        >>> kv_shift_([cache], *(torch.tensor([i]) for i in (0, 1, 3)))
        >>> cache.flatten().tolist()
        [1, 1, 2, 3, 5]
    """
    dim = checks.slot_dim(layout, "kv_shift_")

    def run(indices: list[int], device: torch.device) -> None:
        plan = [_on(t, device) for t in (src, dst, length)]
        _op.speculative_kv_shift_([caches[i] for i in indices], *plan, dim)

    _call("kv_shift_", caches, run)


def kv_gather(
    caches: Sequence[Tensor],
    rows: Tensor,
    src: Tensor | None = None,
    dst: Tensor | None = None,
    length: Tensor | None = None,
    *,
    out: Sequence[Tensor] | None = None,
    slots: int | None = None,
    layout: str = "bhsd",
) -> list[Tensor]:
    """Rows of a cache in another order: a group out of a pool, finished rows dropped, beams.

    Args:
        caches: T tensors (B, H, S, D).
        rows: (B',) for each row of the result the row that it comes from; -1: it is not written.
        src: (B',) with `dst` and `length`: slots [src, src + length) go to [dst, dst + length).
            None: all slots keep their places, and all tensors have as many.
        dst: (B',) or None.
        length: (B',) or None.
        out: T tensors for the result. They may not share memory with `caches`, or must be `caches`
            themselves; then every row comes from itself.
        slots: slots of the result if `out` is not given; None: as many as `caches` have.
        layout: "bhsd" or "bshd".

    Returns:
        `out`, or new tensors; slots of these that are not written are undefined.

    Raises:
        ValueError: tensors do not fit or share memory, or on the CPU a row does not exist or a
            range leaves the slots.

    Example:
        >>> import torch
        >>> cache = torch.arange(3).view(3, 1, 1, 1)
        >>> kv_gather([cache], torch.tensor([2, 0]))[0].flatten().tolist()
        [2, 0]
    """
    dim = checks.slot_dim(layout, "kv_gather")
    if out is None:
        out = []
        for t in caches:
            shape = list(t.shape)
            shape[0] = rows.shape[0]
            shape[dim] = shape[dim] if slots is None else slots
            out.append(t.new_empty(shape))
    targets = list(out)
    check(
        len(targets) == len(caches),
        f"kv_gather: out must have {len(caches)} tensors (as caches), got {len(targets)}",
    )

    def run(indices: list[int], device: torch.device) -> None:
        plan = [_on(t, device) for t in (rows, src, dst, length)]
        _op.speculative_kv_gather_(
            [caches[i] for i in indices], *plan, [targets[i] for i in indices], dim
        )

    _call("kv_gather", caches, run)
    return targets


def kv_tree_(
    caches: Sequence[Tensor], base: Tensor, path: Tensor, length: Tensor, *, layout: str = "bhsd"
) -> None:
    """Slots base + path[j] of each row go to base + j, in place: the accepted path of a tree.

    Args:
        caches: T tensors that share no memory.
        base: (B,) slot of node 0.
        path: (B, n) nodes, rising; entries from `length` on are not read.
        length: (B,) nodes of the path, the root included.
        layout: "bhsd" or "bshd".

    Raises:
        ValueError: a tensor does not fit, or on the CPU a path does not rise or leaves the slots.

    Example:
        >>> import torch
        >>> cache = torch.tensor([9, 0, 1, 2, 3, 4]).view(1, 1, 6, 1)
        >>> kv_tree_([cache], torch.tensor([1]), torch.tensor([[0, 2, 4]]), torch.tensor([3]))
        >>> cache.flatten().tolist()
        [9, 0, 2, 4, 3, 4]
    """
    dim = checks.slot_dim(layout, "kv_tree_")

    def run(indices: list[int], device: torch.device) -> None:
        plan = [_on(t, device) for t in (base, path, length)]
        _op.speculative_kv_tree_([caches[i] for i in indices], *plan, dim)

    _call("kv_tree_", caches, run)


def kv_paged_tree_(
    caches: Sequence[Tensor],
    block_table: Tensor,
    base: Tensor,
    path: Tensor,
    length: Tensor,
    *,
    layout: str = "nhd",
) -> None:
    """`kv_tree_` of a paged cache, across the borders of pages.

    Slot s of row b is slot s % page of page block_table[b, s // page]. Chains need no move in a
    paged cache: the length of the row says what counts.

    Args:
        caches: T tensors (P, page, H, D), or (P, H, page, D) with `layout="hnd"`, that share no
            memory; P pages.
        block_table: (B, most pages of a row); entries whose slots do not move are not read.
        base: (B,) slot of node 0.
        path: (B, n) nodes, rising.
        length: (B,) nodes of the path, the root included.
        layout: "nhd" or "hnd".

    Raises:
        ValueError: a tensor does not fit, or on the CPU a path does not rise or leaves the table, a
            page does not exist, or two rows share a page that one of them changes.

    Example:
        >>> import torch
        >>> pages = torch.tensor([4, 5, 0, 1, 2, 3]).view(3, 2, 1, 1)
        >>> table = torch.tensor([[1, 2, 0]])
        >>> kv_paged_tree_([pages], table, *(torch.tensor(t) for t in ([1], [[0, 2, 3]], [3])))
        >>> pages.flatten().tolist()
        [4, 5, 0, 1, 3, 4]
    """
    if layout not in ("nhd", "hnd"):
        raise ValueError(f"kv_paged_tree_: layout must be 'nhd' or 'hnd', got {layout!r}")
    dim = 1 if layout == "nhd" else 2

    def run(indices: list[int], device: torch.device) -> None:
        plan = [_on(t, device) for t in (block_table, base, path, length)]
        _op.speculative_kv_paged_tree_([caches[i] for i in indices], *plan, dim)

    _call("kv_paged_tree_", caches, run)


def kv_packed(
    caches: Sequence[Tensor],
    cu: Tensor,
    new_cu: Tensor,
    *,
    out: Sequence[Tensor] | None = None,
    slots: int | None = None,
) -> list[Tensor]:
    """Rows one after the other, [cu[b], cu[b + 1]), go to [new_cu[b], new_cu[b + 1]).

    A row that gets shorter loses its end, such as rejected drafts; one that gets longer has slots
    at its end that are not written.

    Args:
        caches: T tensors (S, H, D).
        cu: (B + 1,) offsets that do not fall.
        new_cu: (B + 1,) the same of the result.
        out: T tensors for the result, in other memory; or `caches` themselves, if no row goes right
            (new_cu <= cu).
        slots: slots of the result if `out` is not given; None: as many as `caches` have.

    Returns:
        `out`, or new tensors.

    Raises:
        ValueError: tensors do not fit or share memory, or on the CPU offsets fall, leave the slots,
            or go right in place.

    Example:
        >>> import torch
        >>> cache = torch.tensor([1, 2, 3, 4, 5]).view(5, 1, 1)
        >>> cu, new_cu = torch.tensor([0, 3, 5]), torch.tensor([0, 1, 3])
        >>> kv_packed([cache], cu, new_cu, slots=3)[0].flatten().tolist()
        [1, 4, 5]
    """
    targets = (
        [t.new_empty((t.shape[0] if slots is None else slots, *t.shape[1:])) for t in caches]
        if out is None
        else list(out)
    )
    check(
        len(targets) == len(caches),
        f"kv_packed: out must have {len(caches)} tensors (as caches), got {len(targets)}",
    )

    def run(indices: list[int], device: torch.device) -> None:
        plan = [_on(t, device) for t in (cu, new_cu)]
        _op.speculative_kv_packed_(
            [caches[i] for i in indices], *plan, [targets[i] for i in indices]
        )

    _call("kv_packed", caches, run)
    return targets


def ragged_append_(
    caches: Sequence[Tensor],
    new: Sequence[Tensor],
    lens: Tensor,
    counts: Tensor | None = None,
    *,
    layout: str = "bhsd",
) -> None:
    """Write new columns of each row behind its own length, in place.

    Args:
        caches: T tensors (B, H, S, D) that share no memory.
        new: T tensors (B, H, Q, D), in other memory.
        lens: (B,) slot of the first new column of each row.
        counts: (B,) columns of each row that are written, the first ones; None: all Q.
        layout: "bhsd" or "bshd", of both.

    Raises:
        ValueError: tensors do not fit or share memory, or on the CPU columns leave the slots.

    Example:
        >>> import torch
        >>> cache, new = torch.zeros(2, 1, 4, 1), torch.ones(2, 1, 2, 1)
        >>> ragged_append_([cache], [new], torch.tensor([2, 0]), torch.tensor([2, 1]))
        >>> cache.view(2, 4).tolist()
        [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    dim = checks.slot_dim(layout, "ragged_append_")
    check(
        len(new) == len(caches),
        f"ragged_append_: new must have {len(caches)} tensors (as caches), got {len(new)}",
    )

    def run(indices: list[int], device: torch.device) -> None:
        _op.speculative_ragged_append_(
            [caches[i] for i in indices],
            [new[i] for i in indices],
            _on(lens, device),
            _on(counts, device),
            dim,
        )

    _call("ragged_append_", caches, run)


# Fake kernels


@torch.library.register_fake("alignops::speculative_plan_realign")
def _(c: Tensor, pad: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "speculative_plan_realign"
    rows = checks.check_vector(c, op, "c")
    for name, t in (("c", c), ("pad", pad), ("emitted", emitted)):
        checks.check_ints(t, (rows,), op, name)
    src, dst, length, new_pad = (c.new_empty((rows,), dtype=torch.int32) for _ in range(4))
    return src, dst, length, new_pad


@torch.library.register_fake("alignops::speculative_kv_shift_")
def _(caches: list[Tensor], src: Tensor, dst: Tensor, length: Tensor, slot_dim: int) -> None:
    op = "speculative_kv_shift_"
    checks.check_slot_dim(slot_dim, op)
    checks.check_table(caches, 4, True, op, "caches")
    rows = checks.rows_of(caches) if caches else checks.check_vector(src, op, "src")
    for name, t in (("src", src), ("dst", dst), ("length", length)):
        checks.check_ints(t, (rows,), op, name)


@torch.library.register_fake("alignops::speculative_kv_gather_")
def _(
    caches: list[Tensor],
    rows: Tensor,
    src: Tensor | None,
    dst: Tensor | None,
    length: Tensor | None,
    out: list[Tensor],
    slot_dim: int,
) -> None:
    op = "speculative_kv_gather_"
    checks.check_slot_dim(slot_dim, op)
    checks.check_table(caches, 4, False, op, "caches")
    checks.check_table(out, 4, True, op, "out")
    checks.check_pairs(out, caches, 3 - slot_dim, op, "out")
    count = checks.check_vector(rows, op, "rows")
    check(
        not out or checks.rows_of(out) == count,
        f"{op}: out must have {count} rows (those of rows), got {checks.rows_of(out)}",
    )
    check(
        (src is None) == (length is None) == (dst is None),
        f"{op}: length must be given exactly if src and dst are, got "
        f"{'none' if length is None else 'it'}",
    )
    if length is None:
        slots = min((t.shape[slot_dim] for t in caches), default=0)
        for i, (source, target) in enumerate(zip(caches, out, strict=True)):
            check(
                source.shape[slot_dim] == slots,
                f"{op}: length must be given for tensors of {slots} and {source.shape[slot_dim]} "
                "slots, got none",
            )
            check(
                target.shape[slot_dim] >= slots,
                f"{op}: out must have at least {slots} slots (those of caches), got "
                f"{target.shape[slot_dim]} at {i}",
            )
    for name, t in (("rows", rows), ("src", src), ("dst", dst), ("length", length)):
        checks.check_ints(t, (count,), op, name)


def _check_tree_plan(base: Tensor, path: Tensor, length: Tensor, op: str) -> int:
    rows = checks.check_vector(base, op, "base")
    nodes = checks.check_matrix(path, rows, op, "path")
    checks.check_ints(base, (rows,), op, "base")
    checks.check_ints(path, (rows, nodes), op, "path")
    checks.check_ints(length, (rows,), op, "length")
    return rows


@torch.library.register_fake("alignops::speculative_kv_tree_")
def _(caches: list[Tensor], base: Tensor, path: Tensor, length: Tensor, slot_dim: int) -> None:
    op = "speculative_kv_tree_"
    checks.check_slot_dim(slot_dim, op)
    checks.check_table(caches, 4, True, op, "caches")
    rows = _check_tree_plan(base, path, length, op)
    check(
        not caches or checks.rows_of(caches) == rows,
        f"{op}: base must have shape ({checks.rows_of(caches)},), got {tuple(base.shape)}",
    )


@torch.library.register_fake("alignops::speculative_kv_paged_tree_")
def _(
    caches: list[Tensor],
    block_table: Tensor,
    base: Tensor,
    path: Tensor,
    length: Tensor,
    slot_dim: int,
) -> None:
    op = "speculative_kv_paged_tree_"
    checks.check_slot_dim(slot_dim, op)
    checks.check_table(caches, 4, True, op, "caches")
    rows = _check_tree_plan(base, path, length, op)
    per_row = checks.check_matrix(block_table, rows, op, "block_table")
    checks.check_ints(block_table, (rows, per_row), op, "block_table")
    for t in caches:
        check(
            t.shape[slot_dim] == caches[0].shape[slot_dim],
            f"{op}: caches must have pages of the same size, got {caches[0].shape[slot_dim]} and "
            f"{t.shape[slot_dim]} slots",
        )


@torch.library.register_fake("alignops::speculative_kv_packed_")
def _(caches: list[Tensor], cu: Tensor, new_cu: Tensor, out: list[Tensor]) -> None:
    op = "speculative_kv_packed_"
    checks.check_table(caches, 3, False, op, "caches")
    checks.check_table(out, 3, True, op, "out")
    checks.check_pairs(out, caches, 1, op, "out")
    offsets = checks.check_vector(cu, op, "cu")
    check(offsets >= 1, f"{op}: cu must have shape (rows + 1,), got (0,)")
    checks.check_ints(cu, (offsets,), op, "cu")
    checks.check_ints(new_cu, (offsets,), op, "new_cu")


@torch.library.register_fake("alignops::speculative_ragged_append_")
def _(
    caches: list[Tensor], new: list[Tensor], lens: Tensor, counts: Tensor | None, slot_dim: int
) -> None:
    op = "speculative_ragged_append_"
    checks.check_slot_dim(slot_dim, op)
    checks.check_table(caches, 4, True, op, "caches")
    checks.check_table(new, 4, False, op, "new")
    checks.check_pairs(new, caches, 3 - slot_dim, op, "new")
    rows = checks.rows_of(caches) if caches else checks.check_vector(lens, op, "lens")
    for t in new:
        check(
            t.shape[0] == rows and t.shape[slot_dim] == new[0].shape[slot_dim],
            f"{op}: new must have {rows} rows (as caches) and equally many columns, got "
            f"{t.shape[0]} rows and {t.shape[slot_dim]} columns where the first has "
            f"{new[0].shape[slot_dim]}",
        )
    checks.check_ints(lens, (rows,), op, "lens")
    checks.check_ints(counts, (rows,), op, "counts")
