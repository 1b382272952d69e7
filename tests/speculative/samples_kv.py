"""Valid and invalid inputs of the operators that move cache slots and build positions and masks.

A valid sample is a tuple of arguments of `torch.ops.alignops.<op>`; an invalid one also names the
argument that the error message must name.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from alignops.speculative.cache_checks import MAX_NODES
from tests.spans.samples import Invalid

#: Elements of 8, 4, 2 and 1 bytes.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.uint8)


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Bytes that all differ from those of their neighbours; the values do not matter."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    raw = (torch.arange(count) * 37 % 97).to(torch.uint8)
    return raw.view(dtype).view(shape)


def cache(slot_dim: int = 2, rows: int = 2, slots: int = 6) -> list[Tensor]:
    """Tensors of several dtypes, heads and head sizes, and one that is a view with strides."""
    found = []
    for i, dtype in enumerate(DTYPES):
        shape = (rows, 1 + i, slots, 3 + i) if slot_dim == 2 else (rows, slots, 1 + i, 3 + i)
        found.append(tensor(dtype, *shape))
    found.append(tensor(torch.float32, rows, slots, 3, 8)[..., 1:6].transpose(1, slot_dim))
    return found


def packed_cache(slots: int) -> list[Tensor]:
    return [tensor(torch.float32, slots, 2, 3), tensor(torch.uint8, slots, 3, 4).transpose(0, 0)]


def _realign() -> Iterator[tuple[Any, ...]]:
    yield ints(5, 3), ints(0, 2), ints(1, 3)
    yield ints(5, 3, dtype=torch.int64), ints(1, 3), ints(0, 0, dtype=torch.int64)
    yield ints(), ints(), ints()
    yield ints(0), ints(4), ints(0)


def _bad_realign() -> Iterator[Invalid]:
    c, pad, emitted = ints(5, 3), ints(0, 2), ints(1, 3)
    yield Invalid("c as matrix", (c[None], pad, emitted), "c")
    yield Invalid("c of float32", (c.float(), pad, emitted), "c")
    yield Invalid("short pad", (c, pad[:1], emitted), "pad")
    yield Invalid("emitted with strides", (c, pad, ints(1, 2, 3, 4)[::2]), "emitted")


def _shift() -> Iterator[tuple[Any, ...]]:
    for dim in (1, 2):
        yield cache(dim), ints(0, 2), ints(1, 0), ints(4, 3), dim
        yield cache(dim), ints(0, 2, dtype=torch.int64), ints(0, 2), ints(6, 0), dim
    yield cache(2, 0), ints(), ints(), ints(), 2
    yield cache(2, 1, 0), ints(0), ints(0), ints(0), 2
    yield [], ints(1, 2), ints(1, 2), ints(1, 2), 2


def _bad_tables(args: tuple[Any, ...], written: bool = True) -> Iterator[Invalid]:
    """`args` begin with the caches of `cache(2)`."""
    caches, *rest = args
    yield Invalid("3 dimensions", ([t[0] for t in caches], *rest), "caches")
    yield Invalid("complex elements", ([tensor(torch.complex128, 2, 1, 6, 3)], *rest), "caches")
    yield Invalid("strides in D", ([tensor(torch.uint8, 2, 1, 6, 6)[..., ::2]], *rest), "caches")
    yield Invalid("rows that differ", ([caches[0], caches[1][:1]], *rest), "caches")
    if written:
        same = caches[0][:1].expand(2, -1, -1, -1)
        yield Invalid("expanded", ([same], *rest), "caches")
        windows = tensor(torch.uint8, 40).as_strided((2, 1, 6, 4), (16, 16, 2, 1))
        yield Invalid("slots that overlap", ([windows], *rest), "caches")


def _bad_ints(
    args: tuple[Any, ...], places: dict[int, str], argument: str | None = None
) -> Iterator[Invalid]:
    """Arguments (B,) at `places`, each spoilt in turn; `argument` may be named if one is longer."""
    for place, name in places.items():
        good = args[place]
        for label, bad in (
            ("float32", good.float()),
            ("with strides", torch.stack((good, good), -1)[..., 0]),
            ("longer", torch.cat((good, good))),
        ):
            changed = (*args[:place], bad, *args[place + 1 :])
            named = argument if argument and label == "longer" else name
            yield Invalid(f"{name} {label}", changed, named)


def _bad_shift() -> Iterator[Invalid]:
    args = (cache(), ints(0, 2), ints(1, 0), ints(4, 3), 2)
    yield from _bad_tables(args)
    yield from _bad_ints(args, {1: "src", 2: "dst", 3: "length"})
    yield Invalid("slot_dim of 3", (*args[:4], 3), "slot_dim")
    yield Invalid("src as matrix", ([], ints([0]), ints(0), ints(0), 2), "src")


def _gather() -> Iterator[tuple[Any, ...]]:
    for dim in (1, 2):
        yield cache(dim), ints(1, 1, 0), None, None, None, cache(dim, 3), dim
        shift = (ints(0, 2, 1), ints(1, 0, 3), ints(4, 3, 2))
        yield cache(dim), ints(1, -1, 0), *shift, cache(dim, 3), dim
    yield cache(2), ints(1), None, None, None, cache(2, 1, 9), 2
    yield cache(2), ints(), None, None, None, cache(2, 0), 2
    yield [], ints(1), None, None, None, [], 2


def _bad_gather() -> Iterator[Invalid]:
    shift = (ints(0, 2), ints(1, 0), ints(4, 3))
    args = (cache(), ints(1, 0), *shift, cache(), 2)
    yield from _bad_tables(args, written=False)
    yield from _bad_ints(args, {1: "rows", 2: "src", 3: "dst", 4: "length"}, "out|src|dst|length")
    head = args[:5]
    yield Invalid("tensors missing", (*head, args[5][1:], 2), "out")
    yield Invalid("another dtype", (*head, [t.to(torch.int8) for t in args[5]], 2), "out")
    yield Invalid("fewer heads", (*head, [t[:, :0] for t in args[5]], 2), "out")
    yield Invalid("fewer rows", (*head, [t[:1] for t in args[5]], 2), "out")
    yield Invalid("expanded", (*head, [t[:1].expand_as(t) for t in args[5]], 2), "out")
    yield Invalid("no length", (*args[:4], None, *args[5:]), "length")
    yield Invalid("slot_dim of 0", (*args[:6], 0), "slot_dim")
    whole = (ints(1, 0), None, None, None)
    uneven = [args[0][0], args[0][1][:, :, :5]]
    yield Invalid("other slots", (uneven, *whole, [t.clone() for t in uneven], 2), "length")
    yield Invalid("no room", (args[0], *whole, [t[:, :, :5] for t in cache()], 2), "out")


def _tree() -> Iterator[tuple[Any, ...]]:
    for dim in (1, 2):
        yield cache(dim), ints(1, 0), ints([0, 2, 3], [0, 1, 5]), ints(3, 3), dim
        yield cache(dim), ints(6, 0), ints([9, 9, 9], [1, -1, -1]), ints(0, 1), dim
    yield cache(2, 0), ints(), torch.zeros(0, 3).int(), ints(), 2
    yield [], ints(1), ints([1]), ints(1), 2


def _bad_path(args: tuple[Any, ...], places: dict[int, str]) -> Iterator[Invalid]:
    yield from _bad_ints(args, places, "base|path|length|block_table")
    place = next(i for i, name in places.items() if name == "path")
    yield Invalid("path as vector", (*args[:place], ints(1, 2), *args[place + 1 :]), "path")


def _bad_tree() -> Iterator[Invalid]:
    args = (cache(), ints(1, 0), ints([0, 2, 3], [0, 1, 5]), ints(3, 3), 2)
    yield from _bad_tables(args)
    yield from _bad_path(args, {1: "base", 2: "path", 3: "length"})
    yield Invalid("plan of one row", (args[0], *(t[:1] for t in args[1:4]), 2), "base")
    yield Invalid("slot_dim of 3", (*args[:4], 3), "slot_dim")


def _paged_tree() -> Iterator[tuple[Any, ...]]:
    path = ints([0, 2, 3], [0, 1, 5])
    for dim in (1, 2):
        pages = cache(dim, 5, 4)
        yield pages, ints([1, 4, -1], [2, 0, 3]), ints(3, 0), path, ints(3, 3), dim
        yield cache(dim, 5, 1), ints([1, 4, 0]), ints(0), ints([0, 2]), ints(2), dim
    yield [], ints([1]), ints(1), ints([1]), ints(0), 2


def _bad_paged_tree() -> Iterator[Invalid]:
    args = (
        cache(2, 2),
        ints([0], [1]),
        ints(1, 0),
        ints([0, 2, 3], [0, 1, 5]),
        ints(3, 3),
        2,
    )
    yield from _bad_tables(args)
    yield from _bad_path(args, {1: "block_table", 2: "base", 3: "path", 4: "length"})
    other = [args[0][0], args[0][1][:, :, :5]]
    yield Invalid("pages of two sizes", (other, *args[1:]), "caches")
    yield Invalid("slot_dim of 3", (*args[:5], 3), "slot_dim")


def _packed() -> Iterator[tuple[Any, ...]]:
    yield packed_cache(9), ints(0, 4, 9), ints(0, 3, 5), packed_cache(5)
    yield packed_cache(9), ints(1, 4, 4), ints(2, 9, 9, dtype=torch.int64), packed_cache(9)
    yield packed_cache(9), ints(0), ints(0), packed_cache(0)
    yield [], ints(0, 1), ints(0, 1), []


def _bad_packed() -> Iterator[Invalid]:
    args = (packed_cache(9), ints(0, 4, 9), ints(0, 3, 5), packed_cache(5))
    yield Invalid("4 dimensions", ([t[None] for t in args[0]], *args[1:]), "caches")
    yield Invalid("no offsets", (args[0], ints(), ints(), args[3]), "cu")
    yield from _bad_ints(args, {1: "cu", 2: "new_cu"}, "cu|new_cu")
    yield Invalid("tensors missing", (*args[:3], args[3][1:]), "out")
    yield Invalid("expanded", (*args[:3], [t[:1].expand_as(t) for t in args[3]]), "out")
    yield Invalid("other heads", (*args[:3], [t[:, :1] for t in args[3]]), "out")


def _append() -> Iterator[tuple[Any, ...]]:
    for dim in (1, 2):
        yield cache(dim), cache(dim, 2, 2), ints(1, 4), None, dim
        yield cache(dim), cache(dim, 2, 3), ints(4, 6), ints(2, 0, dtype=torch.int64), dim
    yield cache(2, 0), cache(2, 0, 2), ints(), None, 2
    yield cache(2), cache(2, 2, 0), ints(6, 0), None, 2
    yield [], [], ints(1), None, 2


def _bad_append() -> Iterator[Invalid]:
    args = (cache(), cache(2, 2, 2), ints(1, 4), ints(1, 2), 2)
    yield from _bad_tables(args)
    yield from _bad_ints(args, {2: "lens", 3: "counts"})
    yield Invalid("tensors missing", (args[0], args[1][1:], *args[2:]), "new")
    yield Invalid("another dtype", (args[0], [t.float() for t in args[1]], *args[2:]), "new")
    yield Invalid("other heads", (args[0], [t[:, :0] for t in args[1]], *args[2:]), "new")
    yield Invalid("fewer rows", (args[0], [t[:1] for t in args[1]], *args[2:]), "new")
    uneven = [args[1][0][:, :, :1], *args[1][1:]]
    yield Invalid("columns that differ", (args[0], uneven, *args[2:]), "new")
    yield Invalid("slot_dim of 3", (*args[:4], 3), "slot_dim")


def _positions() -> Iterator[tuple[Any, ...]]:
    yield ints(3, 1), 4, None, None, None
    yield ints(3, 0), 4, None, ints(2, 4, dtype=torch.int64), None
    yield ints(3, 1), 4, ints(1, 3), None, None
    yield ints(3, 1, dtype=torch.int64), 3, None, ints(3, 2), ints([0, 1, 1], [0, 1, 2])
    yield ints(3, 1), 3, None, None, ints(0, 1, 1)
    yield ints(), 3, None, None, None
    yield ints(3), 0, None, None, None


def _bad_queries(
    args: tuple[Any, ...], places: dict[int, str], depth: int | None
) -> Iterator[Invalid]:
    """`args` are c (2), q_len = 3 and more."""
    c, q_len, *rest = args
    yield Invalid("c as matrix", (c[None], q_len, *rest), "c")
    yield Invalid("c of float32", (c.float(), q_len, *rest), "c")
    yield Invalid("q_len below 0", (c, -1, *rest), "q_len")
    yield from _bad_ints(args, places)
    if depth is not None:
        for bad in (ints(0, 1), ints([0, 1, 1]), ints(0, 1, 1).float()):
            yield Invalid("depth", (*args[:depth], bad, *args[depth + 1 :]), "depth")


def _bad_positions() -> Iterator[Invalid]:
    args = (ints(3, 1), 3, None, ints(2, 1), ints(0, 1, 1))
    yield from _bad_queries(args, {3: "counts"}, 4)
    yield from _bad_ints((*args[:2], ints(0, 2), None, None), {2: "pad"})
    yield Invalid("pad and counts", (*args[:2], ints(0, 2), ints(1, 1), None), "pad")
    yield Invalid("pad and depth", (*args[:2], ints(0, 2), None, args[4]), "pad")


TREE = ([-1, 0, 0], [0, 1, 1], [1, 3, 5])  # parent, depth, ancestors


def _mask() -> Iterator[tuple[Any, ...]]:
    none = (None,) * 6
    for kind, dtype in (
        (0, torch.float32),
        *((1, t) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        (2, torch.float32),
        (3, torch.float32),
    ):
        yield ints(5, 1), 3, 40, kind, dtype, [0, 2], *none
    chain = (torch.bool, [0])
    yield ints(5, 1), 3, 9, 0, *chain, ints(0, 4), None, ints(2, 0), None, None, None
    where = torch.arange(9, dtype=torch.int64).repeat(2, 1) - 1
    yield ints(5, 1), 3, 9, 0, *chain, None, ints(6, 6), None, where, None, None
    depth, bits = ints(*TREE[1]), ints(*TREE[2], dtype=torch.int64)
    yield ints(5, 1), 3, 9, 0, *chain, None, None, None, None, depth, bits
    both = (depth.repeat(2, 1), bits.repeat(2, 1))
    yield ints(5, 1), 3, 9, 0, torch.bool, [], None, None, None, None, *both
    yield ints(), 3, 9, 0, *chain, *none
    yield ints(0), 0, 0, 0, *chain, *none


def _bad_mask() -> Iterator[Invalid]:
    depth, bits = ints(*TREE[1]), ints(*TREE[2], dtype=torch.int64)
    where = torch.zeros(2, 9).int()
    options = (ints(0, 4), ints(4, 4), ints(3, 1), where, depth, bits)
    args = (ints(5, 1), 3, 9, 1, torch.float32, [0], *options)
    yield from _bad_queries(args, {6: "pad", 7: "first", 8: "counts"}, 10)
    yield Invalid("slots below 0", (*args[:2], -1, *args[3:]), "slots")
    yield Invalid("kind of 4", (*args[:3], 4, *args[4:]), "kind")
    yield Invalid("window below 0", (*args[:5], [-1], *args[6:]), "windows")
    yield Invalid("mask of int32", (*args[:4], torch.int32, *args[5:]), "dtype")
    short = (*args[:9], where[:, :8].contiguous(), *args[10:])
    yield Invalid("short slot_positions", short, "slot_positions")
    yield Invalid("ancestors without depth", (*args[:10], None, bits), "ancestors")
    yield Invalid("depth without ancestors", (*args[:11], None), "ancestors")
    yield Invalid("ancestors of int32", (*args[:11], bits.int()), "ancestors")
    yield Invalid("short ancestors", (*args[:11], bits[:2]), "ancestors")
    long = torch.zeros(MAX_NODES + 1).long()
    yield Invalid("65 nodes", (args[0], MAX_NODES + 1, *args[2:10], long, long), "ancestors")


def _cu_seqlens() -> Iterator[tuple[Any, ...]]:
    yield ints(3, 1), 4, None
    yield ints(3, 0, 1, dtype=torch.int64), 4, ints(2, 4, 0)
    yield ints(), 4, None


def _bad_cu_seqlens() -> Iterator[Invalid]:
    yield from _bad_queries((ints(3, 1), 3, ints(2, 1)), {2: "counts"}, None)


def _tree_tables() -> Iterator[tuple[Any, ...]]:
    yield (ints([-1, 0, 0, 1, 3], [-1, 0, 1, -1, -1]),)
    yield (torch.arange(-1, 63)[None],)
    yield (torch.zeros(0, 3).int(),)
    yield (ints([-1]),)


def _bad_tree_tables() -> Iterator[Invalid]:
    yield Invalid("parent as vector", (ints(-1, 0),), "parent")
    yield Invalid("no nodes", (torch.zeros(2, 0).int(),), "parent")
    yield Invalid("65 nodes", (torch.zeros(2, MAX_NODES + 1).int(),), "parent")
    yield Invalid("parent of float32", (torch.zeros(2, 3),), "parent")
    yield Invalid("parent with strides", (torch.zeros(3, 2).int().t(),), "parent")


def _tree_select() -> Iterator[tuple[Any, ...]]:
    scores = torch.tensor([[-1.0, -2.0, -1.5, -9.0], [-1.0, -1.0, -1.0, -1.0]])
    parents = ints([-1, -1, 0, 0], [-1, 0, 1, 2])
    yield scores, parents, 3
    yield scores.double(), parents.long(), 4
    yield scores, parents, 0
    yield scores[:0], parents[:0], 2


def _bad_tree_select() -> Iterator[Invalid]:
    scores, parents = -torch.rand(2, 4), ints([-1, -1, 0, 0], [-1, 0, 1, 2])
    yield Invalid("scores as vector", (scores[0], parents, 2), "scores")
    yield Invalid("scores of float16", (scores.half(), parents, 2), "scores")
    yield Invalid("scores with strides", (scores.repeat(1, 2)[:, ::2], parents, 2), "scores")
    yield Invalid("parents of float32", (scores, parents.float(), 2), "parents")
    yield Invalid("fewer parents", (scores, parents[:, :3].contiguous(), 2), "parents")
    yield Invalid("n of 5", (scores, parents, 5), "n")
    yield Invalid("n below 0", (scores, parents, -1), "n")
    many = torch.full((1, 70), -1)
    yield Invalid("n of 64", (many.float(), many, 64), "n")


VALID: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "speculative_plan_realign": _realign,
    "speculative_kv_shift_": _shift,
    "speculative_kv_gather_": _gather,
    "speculative_kv_tree_": _tree,
    "speculative_kv_paged_tree_": _paged_tree,
    "speculative_kv_packed_": _packed,
    "speculative_ragged_append_": _append,
    "speculative_positions": _positions,
    "speculative_mask": _mask,
    "speculative_cu_seqlens": _cu_seqlens,
    "speculative_tree_tables": _tree_tables,
    "speculative_tree_select": _tree_select,
}

INVALID: dict[str, Callable[[], Iterator[Invalid]]] = {
    "speculative_plan_realign": _bad_realign,
    "speculative_kv_shift_": _bad_shift,
    "speculative_kv_gather_": _bad_gather,
    "speculative_kv_tree_": _bad_tree,
    "speculative_kv_paged_tree_": _bad_paged_tree,
    "speculative_kv_packed_": _bad_packed,
    "speculative_ragged_append_": _bad_append,
    "speculative_positions": _bad_positions,
    "speculative_mask": _bad_mask,
    "speculative_cu_seqlens": _bad_cu_seqlens,
    "speculative_tree_tables": _bad_tree_tables,
    "speculative_tree_select": _bad_tree_select,
}
