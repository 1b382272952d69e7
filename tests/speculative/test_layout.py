"""Positions, masks and trees equal their definitions, entry by entry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignops.reference.speculative import layout as reference
from alignops.speculative import layout
from alignops.speculative.layout import build_mask, build_positions, build_tree, select_tree

INTS = st.sampled_from((torch.int32, torch.int64))
WINDOWS = (0, 1, 2, 5)


@st.composite
def trees(draw: st.DrawFn, rows: int, nodes: int, padded: bool = True) -> list[list[int]]:
    """Parents of each row, -1 behind the tree."""
    found = []
    for _ in range(rows):
        used = draw(st.integers(1, nodes)) if padded else nodes
        parents = [-1, *(draw(st.integers(0, n - 1)) for n in range(1, used))]
        found.append(parents + [-1] * (nodes - used))
    return found


@st.composite
def forwards(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of masks: lengths, and what there is of padding, holes and padding queries."""
    rows, q_len, dtype = draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(INTS)

    def column(*bounds: tuple[int, int]) -> Tensor:
        return torch.tensor([draw(st.integers(*b)) for b in bounds], dtype=dtype)

    c = column(*[(0, 8)] * rows)
    found: dict[str, Any] = {"c": c, "q_len": q_len}
    counts = pad = None
    if draw(st.booleans()):
        counts = found["counts"] = column(*[(0, q_len)] * rows)
    if draw(st.booleans()):
        pad = found["pad"] = column(*[(0, 4)] * rows)
    start = (c - 1).clamp(min=0) + (0 if pad is None else pad)
    if draw(st.booleans()):
        start = found["first"] = start + column(*[(0, 3)] * rows)
    end = start + (q_len if counts is None else counts)
    slots = max([0, *end.tolist()]) + draw(st.integers(0, 3))
    found["slots"] = slots
    if draw(st.booleans()):
        found["slot_positions"] = torch.tensor(
            [[draw(st.integers(-1, 9)) for _ in range(slots)] for _ in range(rows)], dtype=dtype
        ).view(rows, slots)
    return found


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def bits(visible: Tensor) -> Tensor:
    """Bools (..., S) as words."""
    slots = visible.shape[-1]
    padded = torch.nn.functional.pad(visible, (0, -slots % 32)).unflatten(-1, (-1, 32))
    return (padded.long() << torch.arange(32)).sum(-1).to(torch.int32)


def check_kinds(forward: dict[str, Any], expected: list[Tensor], **tree: Any) -> None:
    """All kinds of masks; `expected` for each of WINDOWS."""
    for kind, dtype in (("bool4d", torch.float32), *(("additive", t) for t in layout._ADDITIVE)):
        masks = build_mask(kind=kind, dtype=dtype, windows=WINDOWS, **forward, **tree)
        for mask, visible in zip(masks, expected, strict=True):
            wanted = visible[:, None]
            assert torch.equal(mask, additive(wanted, dtype) if kind == "additive" else wanted)
    words = build_mask(kind="bits32", windows=WINDOWS, **forward, **tree)
    for mask, visible in zip(words, expected, strict=True):
        assert torch.equal(mask, bits(visible))


@given(forwards())
def test_masks_of_chains(forward: dict[str, Any]) -> None:
    expected = [reference.mask(window=w, **forward) for w in WINDOWS]
    check_kinds(forward, expected)
    (rows,) = build_mask(kind="mask2d", **forward)
    assert torch.equal(rows, reference.row_mask(**forward))


@given(st.data(), forwards(), st.booleans())
def test_masks_of_trees(data: st.DataObject, forward: dict[str, Any], shared: bool) -> None:
    rows, q_len = len(forward["c"]), max(forward["q_len"], 1)
    forward |= {"q_len": q_len, "slots": forward["slots"] - forward["q_len"] + q_len}
    forward.pop("slot_positions", None)
    parents = torch.tensor(data.draw(trees(1 if shared else rows, q_len, padded=False)))
    tables = build_tree(parents[0] if shared else parents.long().view(rows, q_len))
    depth, block = tables.depth, tables.block
    expected = [reference.mask(window=w, depth=depth, block=block, **forward) for w in WINDOWS]
    check_kinds(forward, expected, depth=depth, ancestors=tables.ancestors)
    positions = build_positions(forward["c"], q_len, counts=forward.get("counts"), depth=depth)
    assert torch.equal(
        positions,
        reference.query_positions(forward["c"], q_len, forward.get("counts"), depth),
    )


def test_a_row_of_a_mask_is_never_empty() -> None:
    (mask,) = build_mask(torch.tensor([0, 3, 5]), 3, 8, counts=torch.tensor([3, 1, 3]))
    assert mask.any(-1).all()
    assert mask.sum(-1).flatten().tolist() == [1, 1, 1, 3, 1, 1, 5, 6, 7]


def test_wide_masks_cross_words() -> None:
    c, slots = torch.tensor([100, 64, 33, 32]), 130
    for window in (0, 40):
        visible = reference.mask(c, 3, slots, window=window)
        (words,) = build_mask(c, 3, slots, kind="bits32", windows=(window,))
        assert torch.equal(words, bits(visible))


@given(st.data(), st.integers(0, 4), st.integers(0, 6), INTS)
def test_positions(data: st.DataObject, rows: int, q_len: int, dtype: torch.dtype) -> None:
    def column(most: int) -> Tensor:
        values = data.draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows))
        return torch.tensor(values, dtype=dtype)

    c, pad, counts = column(9), column(5), column(q_len)
    assert torch.equal(build_positions(c, q_len), reference.query_positions(c, q_len))
    assert torch.equal(
        build_positions(c, q_len, counts=counts), reference.query_positions(c, q_len, counts)
    )
    assert torch.equal(build_positions(c, q_len, pad), reference.column_positions(c, pad, q_len))


@given(st.data(), st.integers(0, 4), st.integers(0, 6))
def test_cu_seqlens(data: st.DataObject, rows: int, q_len: int) -> None:
    c = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))).long()
    counts = torch.tensor(
        data.draw(st.lists(st.integers(0, q_len), min_size=rows, max_size=rows))
    ).long()
    for chosen in (None, counts):
        queries, slots = build_mask(c, q_len, kind="cu_seqlens", counts=chosen)
        used = torch.full_like(c, q_len) if chosen is None else chosen
        used = torch.where(c > 0, used, 0)
        seen = torch.where(used > 0, c - 1 + used, 0)
        zero = torch.zeros(1).long()
        assert torch.equal(queries, torch.cat((zero, used.cumsum(0))).int())
        assert torch.equal(slots, torch.cat((zero, seen.cumsum(0))).int())


@given(st.data(), st.integers(0, 3), st.integers(1, 64), INTS)
def test_tree_tables(data: st.DataObject, rows: int, nodes: int, dtype: torch.dtype) -> None:
    parents = data.draw(trees(rows, nodes))
    tables = build_tree(torch.tensor(parents, dtype=dtype).view(rows, nodes))
    for b, parent in enumerate(parents):
        above = reference.ancestors(parent)
        assert tables.block[b].tolist() == above
        assert tables.depth[b].tolist() == [sum(row) - 1 for row in above]
        words = [int(x) % 2**64 for x in tables.ancestors[b]]
        assert words == [sum(1 << i for i, set_ in enumerate(row) if set_) for row in above]
        for node in range(nodes):
            walked, child = [], int(tables.first_child[b, node])
            while child >= 0:
                walked.append(child)
                child = int(tables.next_sibling[b, child])
            assert walked == reference.children(parent, node)


@pytest.mark.parametrize(
    ("parent", "match"),
    [
        ([0, 0], "parent must be -1 for node 0"),
        ([-1, 1], "parent must come before its child"),
        ([-1, -2], "parent must come before its child"),
        ([-1, 2**40], "parent must come before its child"),
        ([-1, 0, -1, 0], "parent must be -1 for all nodes behind the tree"),
    ],
)
def test_bad_trees(parent: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=f"speculative_tree_tables: {match}"):
        build_tree(torch.tensor(parent))


@given(st.data(), st.integers(1, 12), st.booleans())
def test_best_nodes(data: st.DataObject, candidates: int, wide: bool) -> None:
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(candidates)]
    scores: list[float] = []
    for parent in parents:  # sums of log-probabilities; many are equal
        step = data.draw(st.sampled_from((0.0, 0.5, 1.0)))
        scores.append((scores[parent] if parent >= 0 else 0.0) - step)
    n = data.draw(st.integers(0, candidates))
    dtype = torch.float64 if wide else torch.float32
    tree = select_tree(torch.tensor([scores], dtype=dtype), torch.tensor([parents]), n)
    nodes, parent_of = reference.select_tree(scores, parents, n)
    assert tree.nodes.tolist() == [nodes]
    assert tree.parent.tolist() == [parent_of]
    build_tree(tree.parent)


def test_a_node_without_its_parent_is_an_error() -> None:
    scores, parents = torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([[-1, 0, -1]])
    with pytest.raises(ValueError, match="candidate 1 in row 0 is among the best 2, its parent 0"):
        select_tree(scores, parents, 2)
    assert select_tree(scores, parents, 3).nodes.tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="scores must not be NaN, got it for candidate 1 in row 0"):
        select_tree(torch.tensor([[0.0, float("nan")]]), torch.tensor([[-1, -1]]), 1)
    with pytest.raises(ValueError, match="parents must come before their children, got 1"):
        select_tree(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, -1]]), 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"c": [-1, 2]}, "c must lie in"),
        ({"c": [2**62, 2]}, "c must lie in"),
        ({"counts": [4, 0]}, r"counts must lie in \[0, 3\]"),
        ({"counts": [-1, 0]}, "counts must lie in"),
        ({"slots": 6}, "slots must be at least 7"),
        ({"pad": [0, -1]}, "pad must lie in"),
        ({"pad": [3, 0]}, "slots must be at least 10"),
        ({"first": [3, 3]}, "first must be at least 4"),
        ({"first": [6, 3]}, "slots must be at least 9"),
        ({"first": [2**62, 3]}, "first must lie in"),
    ],
)
def test_masks_with_values_that_do_not_fit(change: dict[str, Any], match: str) -> None:
    forward: dict[str, Any] = {"c": [5, 2], "slots": 7, **change}
    arguments = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in forward.items()}
    with pytest.raises(ValueError, match=f"speculative_mask: {match}"):
        build_mask(q_len=3, **arguments)


def test_more_values_that_do_not_fit() -> None:
    c = torch.tensor([5, 2])
    depth, ancestors = torch.tensor([0, 1, 1]), torch.tensor([1, 3, 5])
    for bad in (torch.tensor([1, 3, 3]), torch.tensor([1, 3, 13]), torch.tensor([1, 3, 0])):
        with pytest.raises(ValueError, match="ancestors must have bit 2 as the highest one"):
            build_mask(c, 3, 9, depth=depth, ancestors=bad)
    with pytest.raises(ValueError, match="depth must lie in"):
        build_mask(c, 3, 9, depth=depth - 1, ancestors=ancestors)
    with pytest.raises(ValueError, match="speculative_positions: c must lie in"):
        build_positions(c - 6, 3)
    with pytest.raises(ValueError, match=r"c must sum up to less than 2\*\*31 slots"):
        build_mask(torch.tensor([2**30, 2**30]), 1, kind="cu_seqlens")
    with pytest.raises(ValueError, match="build_mask: kind must be one of bool4d, additive"):
        build_mask(c, 3, 9, kind="bool")


def test_every_position_of_two_rows() -> None:
    """Windows and padding, exhaustively, on a small grid."""
    for c, pad, window in itertools.product(
        itertools.product(range(4), repeat=2), itertools.product(range(2), repeat=2), range(4)
    ):
        arguments = {"c": torch.tensor(c), "q_len": 2, "slots": 6, "pad": torch.tensor(pad)}
        (mask,) = build_mask(windows=(window,), **arguments)
        assert torch.equal(mask[:, 0], reference.mask(window=window, **arguments))
