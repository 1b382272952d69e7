"""Caches of named models, and what is timed on them: moves, appends and masks, as contestants.

Traffic is bytes read and written. Copies are compared by it: a plain copy, `copy_` of one buffer to
another one, is what the machine can do.

    python -m benchmarks.speculative_kv_cases      # ratios, alternating medians
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from alignops.speculative import kv
from alignops.speculative.layout import build_mask
from benchmarks import memory
from benchmarks.shapes import CACHES, CacheShape
from benchmarks.timing import Runner, alternate

ROWS, DRAFTS = 8, 5
SLOTS = (512, 1024, 2048, 4096)
#: Layers are left out of larger caches; the tensors that are there have the model's shape.
CACHE_BYTES = 1 << 30


@dataclasses.dataclass
class Cache:
    """Keys and values of some layers: (ROWS, H, S, D) bfloat16."""

    shape: CacheShape
    slots: int
    layers: int
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        return self.nbytes // (ROWS * self.slots)


def make_cache(shape: CacheShape, slots: int, limit: int = CACHE_BYTES) -> Cache:
    """As many layers as fit into `limit` bytes, at least one."""
    layers = max(
        1, min(shape.layers, limit // (shape.bytes_per_token * ROWS * slots // shape.layers))
    )
    size = (ROWS, shape.heads, slots, shape.head_size)
    tensors = [torch.randn(size).bfloat16() for _ in range(2)]
    tensors += [tensors[i % 2].clone() for i in range(2 * (layers - 1))]
    return Cache(shape, slots, layers, tensors)


Plan = tuple[Tensor, Tensor, Tensor]


def realignment(cache: Cache, seed: int = 0) -> tuple[Plan, Plan]:
    """A round's shift in which every row moves, to the right or to the left, and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.randint(1, DRAFTS + 1, (ROWS,), generator=generator)
    right = torch.arange(ROWS) % 2 == 0
    src = torch.where(right, 0, distance).int()
    dst = torch.where(right, distance, 0).int()
    length = (cache.slots - distance).int()
    return (src, dst, length), (dst, src, length)


def moved_bytes(cache: Cache, plan: Plan) -> int:
    """Read and written."""
    return 2 * cache.bytes_per_token * int(plan[2][plan[0] != plan[1]].sum())


def shift(cache: Cache) -> Runner:
    """There and back again."""
    there, back = realignment(cache)

    def run() -> None:
        kv.kv_shift_(cache.tensors, *there)
        kv.kv_shift_(cache.tensors, *back)

    return Runner("kv_shift_ in place", run, 2, moved_bytes(cache, there))


def plain_copy(cache: Cache) -> Runner:
    """Half of the tensors are copied over the other half, and the other way round."""
    half = len(cache.tensors) // 2
    pairs = list(zip(cache.tensors[:half], cache.tensors[half:], strict=True))

    def run() -> None:
        for a, b in pairs:
            b.copy_(a)
        for a, b in pairs:
            a.copy_(b)

    return Runner("copy_", run, 1, 2 * cache.nbytes)


def loop_of_copies(cache: Cache) -> Runner:
    """As public code realigns: per layer a new tensor, per row a copy, with the plan read back."""
    there, back = realignment(cache)

    def realigned(t: Tensor, plan: Plan) -> Tensor:
        out = torch.zeros_like(t)
        for row in range(ROWS):
            src, dst, length = (int(p[row].item()) for p in plan)
            out[row, :, dst : dst + length] = t[row, :, src : src + length]
        return out

    def run() -> None:
        for plan in (there, back):
            for t in cache.tensors:
                realigned(t, plan)

    return Runner("new tensors, copies row by row", run, 2, moved_bytes(cache, there))


def new_columns(cache: Cache) -> list[Tensor]:
    """Keys and values of a forward, as projections leave them: (ROWS, H, Q, D), strided."""
    shape = cache.shape
    size = (ROWS, DRAFTS + 1, shape.heads, shape.head_size)
    return [torch.randn(size).bfloat16().transpose(1, 2) for _ in cache.tensors]


def lengths(slots: int) -> Tensor:
    """Of rows that leave room for the queries of a round."""
    generator = torch.Generator().manual_seed(1)
    most = slots - DRAFTS - 1
    return torch.randint(most // 2, most, (ROWS,), generator=generator).int()


def _append_bytes(cache: Cache) -> int:
    return 2 * cache.bytes_per_token * ROWS * (DRAFTS + 1)


def append(cache: Cache, new: list[Tensor], lens: Tensor) -> Runner:
    """One call for each layer, as models do."""
    pairs = [(cache.tensors[i : i + 2], new[i : i + 2]) for i in range(0, len(new), 2)]

    def run() -> None:
        for tensors, columns in pairs:
            kv.ragged_append_(tensors, columns, lens)

    return Runner("ragged_append_", run, 1, _append_bytes(cache))


def append_by_index(cache: Cache, new: list[Tensor], lens: Tensor) -> Runner:
    """The same with torch's own indexing."""
    rows = torch.arange(ROWS)[:, None]
    slots = lens.long()[:, None] + torch.arange(DRAFTS + 1)
    by_row = [t.transpose(1, 2) for t in cache.tensors]

    def run() -> None:
        for t, columns in zip(by_row, new, strict=True):
            t.index_put_((rows, slots), columns.transpose(1, 2))

    return Runner("index_put_", run, 1, _append_bytes(cache))


def append_by_slices(cache: Cache, new: list[Tensor], lens: Tensor) -> Runner:
    """A copy for each row of each tensor."""
    starts = lens.tolist()

    def run() -> None:
        for t, columns in zip(cache.tensors, new, strict=True):
            for row, start in enumerate(starts):
                t[row, :, start : start + DRAFTS + 1] = columns[row]

    return Runner("slices", run, 1, _append_bytes(cache))


def append_by_concatenation(cache: Cache, new: list[Tensor]) -> Runner:
    """What caches that grow do: everything is copied."""

    def run() -> None:
        for t, columns in zip(cache.tensors, new, strict=True):
            torch.cat((t, columns), 2)

    return Runner("cat", run, 1, _append_bytes(cache))


def appends(cache: Cache, new: list[Tensor], lens: Tensor) -> list[Runner]:
    """Ours first."""
    return [
        append(cache, new, lens),
        append_by_index(cache, new, lens),
        append_by_slices(cache, new, lens),
        append_by_concatenation(cache, new),
    ]


def mask_ours(c: Tensor, slots: int, dtype: torch.dtype, window: int) -> Runner:
    def run() -> None:
        build_mask(c, DRAFTS + 1, slots, kind="additive", dtype=dtype, windows=(window,))

    size = torch.empty(0, dtype=dtype).element_size()
    return Runner("build_mask", run, 1, len(c) * (DRAFTS + 1) * slots * size)


def mask_expression(c: Tensor, slots: int, dtype: torch.dtype, window: int) -> Tensor:
    """The mask in torch's own."""
    position = (c - 1)[:, None] + torch.arange(DRAFTS + 1)
    at = torch.arange(slots)
    visible = at <= position[..., None]
    if window:
        visible &= position[..., None] - at < window
    out = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype)
    return out.masked_fill_(visible, 0.0)[:, None]


def mask_torch(c: Tensor, slots: int, dtype: torch.dtype, window: int) -> Runner:
    size = torch.empty(0, dtype=dtype).element_size()
    return Runner(
        "torch expression",
        lambda: mask_expression(c, slots, dtype, window),
        1,
        len(c) * (DRAFTS + 1) * slots * size,
    )


def allocated(cache: Cache) -> int:
    """Bytes that torch allocates during a shift."""
    there, _ = realignment(cache)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kv.kv_shift_(cache.tensors, *there)
    return sum(max(event.self_cpu_memory_usage, 0) for event in found.events())


def resident_growth(cache: Cache) -> int:
    """Bytes by which the process's peak memory grows during a shift."""
    there, back = realignment(cache)

    def run() -> None:
        kv.kv_shift_(cache.tensors, *there)
        kv.kv_shift_(cache.tensors, *back)

    return memory.peak_growth(run)


def ratio(runners: Sequence[Runner], rounds: int = 5) -> dict[str, float]:
    """Bytes per second of each contestant, taken alternately."""
    seconds = alternate(runners, rounds, seconds_per_turn=0.2)
    return {r.name: r.weight_bytes / seconds[r.name] for r in runners}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="*", default=SLOTS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s), B = {ROWS}, GB/s read and written")
    for shape in CACHES.values():
        for slots in options.slots:
            cache = make_cache(shape, slots)
            found = ratio([shift(cache), plain_copy(cache), loop_of_copies(cache)], options.rounds)
            ours, copy, loop = found.values()
            print(
                f"{shape.name}, S = {slots}, {cache.layers} layers: kv_shift_ {ours / 1e9:.1f}, "
                f"copy_ {copy / 1e9:.1f}, ratio {ours / copy:.2f}; {ours / loop:.1f} x the loop of "
                f"copies; allocated {allocated(cache)} bytes, peak {resident_growth(cache)} bytes"
            )
            runners = appends(cache, new_columns(cache), lengths(slots))
            found = ratio([plain_copy(cache), *runners], options.rounds)
            copy, ours, index, slices, cat = found.values()
            print(
                f"    ragged_append_ {ours / 1e9:.1f}, copy_ {copy / 1e9:.1f}, ratio "
                f"{ours / copy:.2f}; {ours / index:.1f} x index_put_, {ours / slices:.1f} x "
                f"slices, {ours / cat:.1f} x cat"
            )
    c = lengths(4096)
    for dtype in (torch.float32, torch.bfloat16):
        for window in (0, 1024):
            pair = [f(c, 4096, dtype, window) for f in (mask_ours, mask_torch)]
            ours, theirs = ratio(pair, options.rounds).values()
            print(
                f"build_mask {dtype}, S = 4096, window {window}: {ours / 1e9:.1f} GB/s written, "
                f"{ours / theirs:.1f} x torch"
            )


if __name__ == "__main__":
    main()
