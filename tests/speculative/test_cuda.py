"""Moves of cache slots, positions, masks and trees on a GPU, equal to the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alignops import speculative
from alignops.reference.speculative import kv as reference
from tests.speculative.samples_kv import INVALID, VALID

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = "cuda:0"
INT = torch.int32


def to_gpu(args: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(GPU), args)


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.alignops, name)


def same(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("name", sorted(VALID))
def test_samples_equal_those_of_the_cpu(name: str) -> None:
    """What is returned, and what is left in the arguments."""
    for args in VALID[name]():
        on_gpu = to_gpu(args)
        expected = op(name)(*args)
        assert same(op(name)(*on_gpu), expected)
        assert same(on_gpu, args)


# Caches of real sizes: views into buffers with a guard around every dimension


class Cache:
    """Keys and values of a few layers on the GPU, and copies of them on the CPU."""

    def __init__(
        self,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        layout: str,
        layers: int = 3,
        offset: int = 0,
    ) -> None:
        torch.manual_seed(rows * slots)
        self.buffers, self.tensors, self.layout = [], [], layout
        for i in range(2 * layers):
            heads, size = (8, 128) if i < 4 else (3, 20)
            inner = (heads, slots + 1) if layout == "bhsd" else (slots + 1, heads)
            shape = (rows + 1, *inner, size + offset)
            raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize))
            buffer = raw.to(torch.uint8).view(dtype).to(GPU)
            self.buffers.append(buffer)
            slot = 2 if layout == "bhsd" else 1
            self.tensors.append(buffer[:rows].narrow(slot, 0, slots)[..., offset:])
        self.before = [b.cpu() for b in self.buffers]

    def bhsd(self, t: Tensor) -> Tensor:
        return t if self.layout == "bhsd" else t.transpose(1, 2)

    def check(self, expected: Callable[[Tensor], Tensor]) -> None:
        """Tensors hold `expected` of what they held, and the guards are as they were."""
        for buffer, before, view in zip(self.buffers, self.before, self.tensors, strict=True):
            old = torch.as_strided(before, view.shape, view.stride(), view.storage_offset())
            new = self.bhsd(old)
            new.copy_(expected(new.clone()))
            bits = torch.uint8
            assert torch.equal(buffer.cpu().view(bits), before.view(bits))


CACHES = [
    (8, 700, torch.bfloat16, "bhsd", 0),
    (8, 700, torch.bfloat16, "bshd", 0),
    (3, 257, torch.float32, "bhsd", 4),
    (3, 257, torch.float16, "bshd", 1),
    (2, 100, torch.uint8, "bhsd", 3),
    (1, 4096, torch.bfloat16, "bhsd", 0),
]


def plan(rows: int, slots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    length = torch.randint(0, slots + 1, (rows,))
    src, dst = (torch.rand(rows).mul(slots - length + 1).long() for _ in range(2))
    return src.to(INT), dst.to(INT), length.to(INT)


@pytest.mark.parametrize("case", CACHES)
@pytest.mark.parametrize("seed", range(4))
def test_shift(case: tuple[int, int, torch.dtype, str, int], seed: int) -> None:
    rows, slots, dtype, layout, offset = case
    cache = Cache(rows, slots, dtype, layout, offset=offset)
    moves = plan(rows, slots, seed)
    if seed == 3:  # one slot, both ways: every chunk overlaps the next one
        moves = tuple(torch.full((rows,), n, dtype=INT) for n in (0, 1, slots - 1))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    used = torch.cuda.max_memory_allocated()
    on_gpu = to_gpu(moves)
    used += 3 * 512
    speculative.kv_shift_(cache.tensors, *on_gpu, layout=layout)
    assert torch.cuda.max_memory_allocated() <= used
    cache.check(lambda t: reference.shift(t, *moves))


@pytest.mark.parametrize("case", CACHES)
def test_rows_that_do_not_fit_are_left_out(case: tuple[int, int, torch.dtype, str, int]) -> None:
    rows, slots, dtype, layout, offset = case
    cache = Cache(rows, slots, dtype, layout, offset=offset)
    good = torch.arange(rows) % 2 == 0
    src, dst, length = plan(rows, slots, 7)
    bad = torch.tensor([-1, slots + 1, 2**31 - 1, -(2**31)], dtype=INT)[torch.arange(rows) % 4]
    place = torch.arange(rows) % 3
    spoilt = [torch.where(good | (place != i), t, bad) for i, t in enumerate((src, dst, length))]
    speculative.kv_shift_(cache.tensors, *to_gpu(spoilt), layout=layout)
    kept = torch.where(good, length, 0)
    cache.check(lambda t: reference.shift(t, src, dst, kept))


@pytest.mark.parametrize("case", CACHES)
def test_tree(case: tuple[int, int, torch.dtype, str, int]) -> None:
    rows, slots, dtype, layout, offset = case
    cache = Cache(rows, slots, dtype, layout, offset=offset)
    nodes = slots // 2
    path = torch.stack([torch.randperm(slots - 3)[:nodes].sort().values for _ in range(rows)])
    base, length = torch.arange(rows) % 3, torch.randint(0, nodes + 1, (rows,))
    path[torch.arange(nodes) >= length[:, None]] = -1
    speculative.kv_tree_(cache.tensors, *to_gpu((base, path, length)), layout=layout)
    cache.check(lambda t: reference.tree(t, base, path, length))


@pytest.mark.parametrize("case", CACHES)
def test_append(case: tuple[int, int, torch.dtype, str, int]) -> None:
    rows, slots, dtype, layout, offset = case
    cache = Cache(rows, slots, dtype, layout, offset=offset)
    new = [cache.bhsd(t)[:, :, :6].flip(2).contiguous() for t in cache.tensors]
    lens = torch.randint(0, slots - 6, (rows,), dtype=INT)
    counts = torch.randint(0, 7, (rows,), dtype=INT)
    given = [t if layout == "bhsd" else t.transpose(1, 2) for t in new]
    speculative.ragged_append_(cache.tensors, given, *to_gpu((lens, counts)), layout=layout)
    expected = iter([t.cpu() for t in new])
    cache.check(lambda t: reference.append(t, next(expected), lens, counts))


@pytest.mark.parametrize("case", CACHES)
@pytest.mark.parametrize("shifted", [False, True])
def test_gather(case: tuple[int, int, torch.dtype, str, int], shifted: bool) -> None:
    rows, slots, dtype, layout, offset = case
    source = Cache(rows, slots, dtype, layout, offset=offset)
    target = Cache(rows + 2, slots, dtype, layout, offset=offset)
    row_map = torch.arange(rows + 2).flip(0) % (rows + 1) - 1
    moves = plan(rows + 2, slots, 11) if shifted else ()
    speculative.kv_gather(
        source.tensors,
        to_gpu(row_map),
        *to_gpu(moves),
        out=target.tensors,
        layout=layout,
    )
    held = iter([source.bhsd(t).cpu() for t in source.tensors])
    target.check(lambda t: reference.gather(next(held), row_map, t, *moves))
    source.check(lambda t: t)


def test_hundreds_of_tensors() -> None:
    caches = [torch.randn(2, 1 + i % 3, 9, 4) for i in range(430)]
    on_gpu = to_gpu(caches)
    moves = plan(2, 9, 3)
    speculative.kv_shift_(caches, *moves)
    speculative.kv_shift_(on_gpu, *to_gpu(moves))
    assert same(on_gpu, caches)


# Masks


@pytest.mark.parametrize("kind", ["bool4d", "additive", "bits32", "mask2d"])
@pytest.mark.parametrize("slots", [40, 3000])
def test_wide_masks(kind: str, slots: int) -> None:
    c = torch.randint(0, slots - 8, (7,), dtype=INT)
    windows = list(range(0, 40, 4))  # more than one launch takes
    if kind == "mask2d":
        windows = [0]
    expected = speculative.build_mask(c, 6, slots=slots, kind=kind, windows=windows)
    found = speculative.build_mask(c.to(GPU), 6, slots=slots, kind=kind, windows=windows)
    assert same(found, expected)


def test_lengths_that_do_not_fit_are_harmless() -> None:
    bad = torch.tensor([-5, 2**31 - 1, 10**6, 0], dtype=INT, device=GPU)
    for kind in range(4):
        op("speculative_mask")(
            bad, 6, 100, kind, torch.float32, [0, 7], None, bad, bad, None, None, None
        )
    op("speculative_tree_tables")(bad.repeat(16).view(1, 64))
    op("speculative_cu_seqlens")(bad, 6, bad)
    torch.cuda.synchronize()


# As torch sees them


@pytest.mark.parametrize("name", sorted(VALID))
def test_opcheck(name: str) -> None:
    for args in VALID[name]():
        torch.library.opcheck(op(name).default, to_gpu(args))


@pytest.mark.parametrize("name", sorted(INVALID))
def test_invalid_arguments(name: str) -> None:
    for sample in INVALID[name]():
        with pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            op(name)(*to_gpu(sample.args))


@pytest.mark.parametrize("name", sorted(VALID))
def test_mixed_devices_are_refused(name: str) -> None:
    args = next(iter(VALID[name]()))
    for i, value in enumerate(args):
        if i == 0 or not isinstance(value, Tensor):
            continue
        mixed = [v if j == i else to_gpu(v) for j, v in enumerate(args)]
        with pytest.raises(ValueError, match=f"^{name}: .* must be on "):
            op(name)(*mixed)


def test_cuda_graph() -> None:
    """A captured round moves what its plan holds at each replay; nothing is read back."""
    cache = Cache(4, 300, torch.bfloat16, "bhsd")
    c, pad, emitted = (torch.zeros(4, dtype=INT, device=GPU) for _ in range(3))

    def step() -> None:
        moves = speculative.plan_realign(c, pad, emitted)
        speculative.kv_shift_(cache.tensors, moves.src, moves.dst, moves.length)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    lengths = torch.tensor([100, 240, 7, 180], dtype=INT)
    padding, new = 240 - lengths, torch.tensor([5, 0, 3, 1], dtype=INT)
    for held, value in zip((c, pad, emitted), (lengths, padding, new), strict=True):
        held.copy_(value)
    graph.replay()
    moves = reference.plan_realign(lengths, padding, new)
    cache.check(lambda t: reference.shift(t, *moves[:3]))


def test_current_stream() -> None:
    cache = Cache(4, 300, torch.bfloat16, "bhsd")
    moves = plan(4, 300, 5)
    later = to_gpu([torch.zeros_like(t) for t in moves])
    on_gpu = to_gpu(moves)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for held, value in zip(later, on_gpu, strict=True):
            held.copy_(value)
        speculative.kv_shift_(cache.tensors, *later)
        for held in later:
            held.zero_()
    torch.cuda.synchronize()
    cache.check(lambda t: reference.shift(t, *moves))
