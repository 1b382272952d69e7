"""Moves of cache slots equal copies by index, and touch nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignops.reference.speculative import kv as reference
from alignops.speculative import kv
from tests.speculative.cache_views import View, columns, guarded, layouts, paths, ranges, tables

INTS = st.sampled_from((torch.int32, torch.int64))


def expect(caches: list[View], call: Callable[[], object], expected: list[Tensor]) -> None:
    """`call` makes the tensors hold what is expected, and leaves the rest of the buffers alone."""
    wanted = [view.after(e) for view, e in zip(caches, expected, strict=True)]
    call()
    for view, buffer in zip(caches, wanted, strict=True):
        assert torch.equal(view.buffer, buffer)


def unchanged(caches: list[View], call: Callable[[], object], match: str) -> None:
    """`call` is refused, and nothing was written."""
    before = [view.buffer.clone() for view in caches]
    with pytest.raises(ValueError, match=match):
        call()
    assert all(torch.equal(v.buffer, b) for v, b in zip(caches, before, strict=True))


@given(st.data(), st.integers(0, 4), st.integers(0, 12), layouts(), INTS)
def test_shift(data: st.DataObject, rows: int, slots: int, layout: str, dtype: torch.dtype) -> None:
    caches = data.draw(tables(rows, slots))
    plans = data.draw(st.lists(ranges(slots), min_size=rows, max_size=rows))
    plan = columns(plans, dtype) if rows else [torch.zeros(0, dtype=dtype)] * 3
    expected = [reference.shift(v.tensor, *plan) for v in caches]
    tensors = [v.in_layout(layout) for v in caches]
    expect(caches, lambda: kv.kv_shift_(tensors, *plan, layout=layout), expected)


@given(st.data(), st.integers(1, 3), st.integers(1, 8))
def test_a_bad_shift_changes_nothing(data: st.DataObject, rows: int, slots: int) -> None:
    caches = data.draw(tables(rows, slots))
    plan = columns(data.draw(st.lists(ranges(slots), min_size=rows, max_size=rows)))
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 2))
    plan[place][row] = data.draw(st.sampled_from((-1, -(2**31), 2**31 - 1, slots + 1)))
    unchanged(caches, lambda: kv.kv_shift_([v.tensor for v in caches], *plan), "kv_shift_: .* must")


@given(st.data(), st.integers(1, 4), st.integers(0, 4), st.integers(0, 8), layouts(), st.booleans())
def test_gather(
    data: st.DataObject, rows: int, new_rows: int, slots: int, layout: str, shifted: bool
) -> None:
    caches = data.draw(tables(rows, slots))
    targets = [
        guarded(v.tensor.dtype, new_rows, v.tensor.shape[1], slots, v.tensor.shape[3])
        for v in caches
    ]
    row_map = data.draw(st.lists(st.integers(-1, rows - 1), min_size=new_rows, max_size=new_rows))
    rows_tensor = torch.tensor(row_map, dtype=torch.int64)
    plan: list[Tensor] = []
    if shifted:
        drawn = data.draw(st.lists(ranges(slots), min_size=new_rows, max_size=new_rows))
        plan = columns(drawn) if new_rows else [torch.zeros(0, dtype=torch.int32)] * 3
    expected = [
        reference.gather(v.tensor, rows_tensor, t.tensor, *plan)
        for v, t in zip(caches, targets, strict=True)
    ]
    before = [v.buffer.clone() for v in caches]
    sources, out = ([v.in_layout(layout) for v in group] for group in (caches, targets))
    expect(
        targets,
        lambda: kv.kv_gather(sources, rows_tensor, *plan, out=out, layout=layout),
        expected,
    )
    assert all(torch.equal(v.buffer, b) for v, b in zip(caches, before, strict=True))


def test_gather_allocates() -> None:
    cache = torch.arange(24.0).view(3, 2, 4, 1)
    (taken,) = kv.kv_gather([cache], torch.tensor([2, 0]), slots=6)
    assert taken.shape == (2, 2, 6, 1)
    assert torch.equal(taken[:, :, :4], cache[[2, 0]])


@given(st.data(), st.integers(1, 4), st.integers(1, 8))
def test_gather_in_place_is_a_shift(data: st.DataObject, rows: int, slots: int) -> None:
    caches = data.draw(tables(rows, slots))
    plan = columns(data.draw(st.lists(ranges(slots), min_size=rows, max_size=rows)))
    expected = [reference.shift(v.tensor, *plan) for v in caches]
    tensors = [v.tensor for v in caches]
    rows_tensor = torch.arange(rows)
    expect(caches, lambda: kv.kv_gather(tensors, rows_tensor, *plan, out=tensors), expected)


def test_gather_refuses_shared_memory() -> None:
    cache = torch.zeros(3, 2, 4, 1)
    with pytest.raises(ValueError, match="kv_gather_: out must not share memory"):
        kv.kv_gather([cache], torch.tensor([1, 2]), out=[cache[:2]])
    with pytest.raises(ValueError, match=r"rows must be 0, 1, 2, \.\.\. where out is caches"):
        kv.kv_gather([cache], torch.tensor([0, 2, 1]), out=[cache])


@given(st.data(), st.integers(0, 3), st.integers(1, 10), st.integers(0, 5), layouts(), INTS)
def test_tree(
    data: st.DataObject, rows: int, slots: int, nodes: int, layout: str, dtype: torch.dtype
) -> None:
    caches = data.draw(tables(rows, slots))
    plans = data.draw(st.lists(paths(slots, nodes), min_size=rows, max_size=rows))
    base, path, length = (torch.tensor([p[i] for p in plans], dtype=dtype) for i in range(3))
    path = path.view(rows, nodes)
    expected = [reference.tree(v.tensor, base, path, length) for v in caches]
    tensors = [v.in_layout(layout) for v in caches]
    expect(caches, lambda: kv.kv_tree_(tensors, base, path, length, layout=layout), expected)


@pytest.mark.parametrize(
    ("base", "path", "length", "match"),
    [
        ([0, 0], [[0, 2, 2], [0, 1, 2]], [3, 3], "path must rise"),
        ([0, 0], [[0, 2, 1], [0, 1, 2]], [3, 3], "path must rise"),
        ([0, 0], [[-1, 0, 1], [0, 1, 2]], [3, 3], "path must rise"),
        ([0, 0], [[0, 1, 2], [0, 1, 6]], [3, 3], "base must leave room"),
        ([0, 4], [[0, 1, 2], [0, 1, 2]], [3, 3], "base must leave room"),
        ([-1, 0], [[0, 1, 2], [0, 1, 2]], [3, 3], "base must leave room"),
        ([0, 0], [[0, 1, 2], [0, 1, 2]], [3, 4], "length must lie in"),
        ([0, 0], [[0, 1, 2], [0, 1, 2]], [-1, 3], "length must lie in"),
        ([0, 2**62], [[0, 1, 2], [0, 1, 2**62]], [3, 3], "base must leave room"),
    ],
)
@given(data=st.data())
def test_a_bad_tree_changes_nothing(
    data: st.DataObject, base: list[int], path: list[list[int]], length: list[int], match: str
) -> None:
    caches = data.draw(tables(2, 6))
    plan = [torch.tensor(t) for t in (base, path, length)]
    unchanged(caches, lambda: kv.kv_tree_([v.tensor for v in caches], *plan), match)
    table = torch.tensor([[0], [1]])
    unchanged(
        caches,
        lambda: kv.kv_paged_tree_([v.tensor for v in caches], table, *plan, layout="hnd"),
        match,
    )


@given(st.data(), st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_paged_tree(data: st.DataObject, rows: int, page: int, per_row: int, nodes: int) -> None:
    layout = data.draw(st.sampled_from(("nhd", "hnd")))
    pages = rows * per_row + 2
    caches = data.draw(tables(pages, page))
    table = torch.tensor(data.draw(st.permutations(range(pages)))[: rows * per_row]).int()
    table = table.view(rows, per_row)
    plans = data.draw(st.lists(paths(page * per_row, nodes), min_size=rows, max_size=rows))
    base, path, length = (torch.tensor([p[i] for p in plans]).int() for i in range(3))
    plan = (table, base, path.view(rows, nodes), length)
    expected = [reference.paged_tree(v.tensor, *plan) for v in caches]
    tensors = [v.in_layout(layout) for v in caches]
    expect(caches, lambda: kv.kv_paged_tree_(tensors, *plan, layout=layout), expected)


def test_rows_may_share_pages_that_do_not_change() -> None:
    pages = torch.arange(16.0).view(4, 4, 1, 1)
    table = torch.tensor([[0, 1], [0, 2]])
    plan = (torch.tensor([4, 4]), torch.tensor([[0, 2], [0, 3]]), torch.tensor([2, 2]))
    expected = reference.paged_tree(pages.transpose(1, 2), table, *plan).transpose(1, 2)
    kv.kv_paged_tree_([pages], table, *plan)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ([[0, 1], [0, 1]], "block_table must not share a page whose slots move"),
        ([[0, 1], [1, 2]], "block_table must not share a page whose slots move"),
        ([[0, 0], [2, 3]], "block_table must not share a page whose slots move"),
        ([[0, 4], [2, 3]], "block_table must hold pages"),
        ([[0, -1], [2, 3]], "block_table must hold pages"),
    ],
)
def test_pages_that_do_not_fit(table: list[list[int]], match: str) -> None:
    pages = torch.arange(16.0).view(4, 4, 1, 1)
    before = pages.clone()
    plan = (torch.tensor([2, 2]), torch.tensor([[0, 2], [0, 3]]), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=match):
        kv.kv_paged_tree_([pages], torch.tensor(table), *plan)
    assert torch.equal(pages, before)


OFFSETS = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(
    lambda lengths: torch.tensor([0, *itertools.accumulate(lengths)])
)


@given(st.data(), OFFSETS)
def test_packed(data: st.DataObject, cu: Tensor) -> None:
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=len(cu) - 1, max_size=len(cu) - 1))
    new_cu = torch.tensor([0, *itertools.accumulate(lengths)])
    caches = data.draw(tables(1, int(cu[-1])))
    targets = [
        guarded(v.tensor.dtype, int(new_cu[-1]), v.tensor.shape[1], v.tensor.shape[3])
        for v in caches
    ]
    rows = [v.tensor[0].transpose(0, 1) for v in caches]
    expected = [
        reference.packed(r, cu, new_cu, t.tensor) for r, t in zip(rows, targets, strict=True)
    ]
    out = [t.tensor for t in targets]
    expect(targets, lambda: kv.kv_packed(rows, cu, new_cu, out=out), expected)


@given(st.data(), OFFSETS)
def test_packed_in_place(data: st.DataObject, cu: Tensor) -> None:
    lengths = torch.diff(cu).tolist()
    kept = [data.draw(st.integers(0, n)) for n in lengths]
    new_cu = torch.tensor([0, *itertools.accumulate(kept)])
    caches = data.draw(tables(1, int(cu[-1])))
    rows = [v.tensor[0].transpose(0, 1) for v in caches]
    expected = [reference.packed(r, cu, new_cu, r).transpose(0, 1)[None] for r in rows]
    expect(caches, lambda: kv.kv_packed(rows, cu, new_cu, out=rows), expected)


def test_packed_in_place_goes_left_only() -> None:
    cache = torch.zeros(9, 1, 1)
    cu, new_cu = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 5])
    with pytest.raises(ValueError, match="new_cu must not exceed cu where out is caches"):
        kv.kv_packed([cache], cu, new_cu, out=[cache])
    with pytest.raises(ValueError, match="cu must not decrease"):
        kv.kv_packed([cache], torch.tensor([0, 3, 2]), new_cu)
    with pytest.raises(ValueError, match=r"new_cu must lie in \[0, 4\]"):
        kv.kv_packed([cache], cu, new_cu, slots=4)


@given(st.data(), st.integers(0, 4), st.integers(0, 8), st.integers(0, 4), layouts(), st.booleans())
def test_append(
    data: st.DataObject, rows: int, slots: int, width: int, layout: str, all_columns: bool
) -> None:
    width = min(width, slots)
    caches = data.draw(tables(rows, slots))
    new = []
    for view in caches:
        shape = (rows, width, view.tensor.shape[1], view.tensor.shape[3])
        count = torch.Size(shape).numel()
        new.append(torch.arange(count).to(view.tensor.dtype).view(shape).transpose(1, 2))
    counts = [width if all_columns else data.draw(st.integers(0, width)) for _ in range(rows)]
    lens = torch.tensor([data.draw(st.integers(0, slots - n)) for n in counts]).int()
    chosen = None if all_columns else torch.tensor(counts).int()
    expected = [
        reference.append(v.tensor, n, lens, chosen) for v, n in zip(caches, new, strict=True)
    ]
    tensors = [v.in_layout(layout) for v in caches]
    columns_in = [n if layout == "bhsd" else n.transpose(1, 2) for n in new]
    expect(
        caches,
        lambda: kv.ragged_append_(tensors, columns_in, lens, chosen, layout=layout),
        expected,
    )


@pytest.mark.parametrize(
    ("lens", "counts", "match"),
    [
        ([5, 0], None, "lens must leave room"),
        ([0, -1], None, "lens must leave room"),
        ([0, 2**62], None, "lens must leave room"),
        ([0, 6], [2, 1], "lens must leave room"),
        ([0, 0], [2, 3], "counts must lie in"),
        ([0, 0], [-1, 2], "counts must lie in"),
    ],
)
def test_a_bad_append_changes_nothing(
    lens: list[int], counts: list[int] | None, match: str
) -> None:
    caches, new = [torch.zeros(2, 3, 6, 4) for _ in range(2)], [torch.ones(2, 3, 2, 4)] * 2
    chosen = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=match):
        kv.ragged_append_(caches, new, torch.tensor(lens), chosen)
    assert all(int(t.count_nonzero()) == 0 for t in caches)


def test_tensors_of_one_cache_share_no_memory() -> None:
    cache = torch.zeros(2, 3, 6, 4)
    zero = torch.zeros(2).int()
    for caches in ([cache, cache], [cache, cache[:, :1]], [cache[:, :2], cache[:, 1:]]):
        with pytest.raises(ValueError, match="kv_shift_: caches must not share memory"):
            kv.kv_shift_(caches, zero, zero, zero)
    with pytest.raises(ValueError, match="ragged_append_: new must not share memory"):
        kv.ragged_append_([cache], [cache[:, :, :2]], zero)


@pytest.mark.parametrize("dim", range(5))
def test_views_of_one_buffer_are_a_cache(dim: int) -> None:
    """Keys and values of two layers, interleaved in any way."""
    shape = [2, 3, 6, 5]
    shape.insert(dim, 4)
    buffer = torch.arange(float(torch.Size(shape).numel())).view(shape)
    if dim == 4:
        buffer = buffer.view(2, 3, 6, 20)  # heads of 5 side by side
        caches = list(buffer.split(5, -1))
    else:
        caches = list(buffer.unbind(dim))
    plan = [torch.tensor(t) for t in ([0, 3], [2, 1], [4, 3])]
    expected = [reference.shift(t, *plan) for t in caches]
    kv.kv_shift_(caches, *plan)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    """Offsets are of 64 bits: a cache of 2.2 G elements, of which only the ends are touched."""
    slots = 1_100_000_000
    cache = torch.empty(
        1, 1, slots, 2, dtype=torch.uint8
    )  # pages that are not written cost nothing
    cache[0, 0, slots - 4 :] = torch.arange(8, dtype=torch.uint8).view(4, 2)
    plan = [torch.tensor([t]) for t in (slots - 4, 1, 3)]
    kv.kv_shift_([cache], *plan)
    assert cache[0, 0, 1:4].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    kv.kv_shift_([cache], plan[1], plan[0] + 1, plan[2])
    assert cache[0, 0, slots - 4 :].flatten().tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_gradients_are_refused() -> None:
    cache, zero = torch.zeros(1, 1, 2, 1, requires_grad=True), torch.zeros(1).int()
    with pytest.raises(ValueError, match="kv_shift_: caches must not require a gradient"):
        kv.kv_shift_([cache], zero, zero, zero)
    with pytest.raises(ValueError, match="ragged_append_: caches must not require a gradient"):
        kv.ragged_append_([cache], [torch.zeros(1, 1, 1, 1)], zero)


def test_layers_on_several_devices() -> None:
    """One call per device, with a copy of the plan."""
    cache, elsewhere = torch.arange(6.0).view(1, 1, 6, 1), torch.zeros(1, 1, 6, 1, device="meta")
    plan = [torch.tensor([i]) for i in (0, 2, 4)]
    kv.kv_shift_([elsewhere, cache], *plan)
    assert cache.flatten().tolist() == [0, 1, 0, 1, 2, 3]
    new = [torch.ones(1, 1, 1, 1, device=t.device) for t in (elsewhere, cache)]
    kv.ragged_append_([elsewhere, cache], new, torch.tensor([5]))
    assert cache.flatten().tolist() == [0, 1, 0, 1, 2, 1]
    taken = kv.kv_gather([elsewhere, cache], torch.tensor([0, 0]))
    assert [t.device.type for t in taken] == ["meta", "cpu"]


def test_wrong_types_and_layouts() -> None:
    cache, zero = torch.zeros(1, 1, 2, 1), torch.zeros(1).int()
    with pytest.raises(TypeError, match="kv_shift_: caches must be tensors, got list at 0"):
        kv.kv_shift_([[1]], zero, zero, zero)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="kv_shift_: layout must be 'bhsd' or 'bshd', got 'hbsd'"):
        kv.kv_shift_([cache], zero, zero, zero, layout="hbsd")
    with pytest.raises(ValueError, match="kv_paged_tree_: layout must be 'nhd' or 'hnd'"):
        kv.kv_paged_tree_([cache], zero[None], zero, zero[None], zero, layout="bhsd")
    with pytest.raises(ValueError, match="ragged_append_: new must have 1 tensors"):
        kv.ragged_append_([cache], [], zero)
    with pytest.raises(ValueError, match="kv_gather: out must have 1 tensors"):
        kv.kv_gather([cache], zero, out=[])
    with pytest.raises(ValueError, match="kv_packed: out must have 1 tensors"):
        kv.kv_packed([cache[0]], zero, zero, out=[])
