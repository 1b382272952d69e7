"""Inputs of the attention benchmarks, and what is timed on them, as contestants.

One new token per worker. PyTorch has three ways to the same result:

B0  each worker rotates the keys of all blocks to its own positions, concatenates, and calls SDPA
B1  dense copies of keys and values for each worker, rotated before; the query heads that share a
    head of keys folded into the query axis of SDPA. Keeping the copies up to date is not counted.
B2  one call of the flash operator per segment, with the queries of all workers that see it folded
    into the query axis, and a merge of the results by their logsumexp. Queries are rotated before,
    which is not counted, but in "B2 with rotations". "B2 by matmul" takes two products and a
    softmax instead of that operator: for 16 bits, its scores are rounded to them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from alignops.attention.rope import RopeSpec
from benchmarks.attention_layouts import Layout
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Runner, ring_length

THETA = 1e6
#: Difference of two contestants by norm, relative.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@functools.cache
def rope(head_size: int) -> RopeSpec:
    """Of all cases: every dimension rotates."""
    return RopeSpec.default(head_size, THETA)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x (..., D) in pairs (i, i + D/2) by `positions` (...), computed in float64, x's dtype."""
    half = x.shape[-1] // 2
    frequency = torch.tensor(rope(x.shape[-1]).inv_freq, dtype=torch.float64)
    angle = positions.double()[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.double().split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Keys first..first+n of all distinct ones, rotated by 0..n-1 where they are stored."""

    block: int
    first: int
    n: int
    offset: int  # in the block


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys before any rotation, and the values.

    q (W, Hq, D), k and v (Hkv, S, D): the distinct keys of all blocks, one block after another.
    """

    shape: AttentionShape
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def bytes(self) -> int:
        """Of the distinct keys and values: what must be read."""
        return self.k.nbytes + self.v.nbytes

    @property
    def layers(self) -> int:
        """Copies that do not fit into the caches of the CPU together."""
        return ring_length(self.bytes, cold=True)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        tokens = self.layout.tokens
        size = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
        name = self.layout.name
        return f"{self.shape.name}, S={size}, {name}, {dtype}, W={self.layout.workers}"

    def segments(self) -> list[Segment]:
        found = []
        for block, start in enumerate(self.layout.block_starts()):
            offset = 0
            for n in self.layout.blocks[block]:
                found.append(Segment(block, start + offset, n, offset))
                offset += n
        return found

    def rotation(self, worker: int, segment: Segment) -> int:
        """Of the worker's query for a segment whose stored keys are rotated by 0..n-1."""
        origin = self.layout.origins(worker)[segment.block]
        return self.layout.position(worker) - origin - segment.offset

    @functools.cached_property
    def stored_keys(self) -> Tensor:
        """k rotated by the index in the segment."""
        index = torch.cat([torch.arange(s.n) for s in self.segments()])
        return rotate(self.k, index)

    def query(self, worker: int, rotation: int) -> Tensor:
        """A worker's query, rotated: (1, Hkv, g, D)."""
        q = rotate(self.q[worker], torch.tensor(rotation))
        return q.view(1, self.shape.kv_heads, self.shape.group, -1)

    def dense(self, worker: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What a worker sees, rotated to its positions: keys and values (Hkv, L, D)."""
        origins, starts = self.layout.origins(worker), self.layout.block_starts()
        tokens, positions = [], []
        for block, origin in origins.items():
            index = torch.arange(sum(self.layout.blocks[block]))
            tokens.append(starts[block] + index)
            positions.append(origin + index)
        token = torch.cat(tokens)
        k, v = self.k[:, token], self.v[:, token]
        if dtype is not None:
            k, v = k.to(dtype), v.to(dtype)
        return rotate(k, torch.cat(positions)), v


def make(shape: AttentionShape, layout: Layout, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random queries, keys and values; scores have a standard deviation of about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    d, kv = shape.head_size, (shape.kv_heads, layout.tokens, shape.head_size)
    return Case(shape, layout, normal(layout.workers, shape.heads, d), normal(*kv), normal(*kv))


def _flat(out: Tensor) -> Tensor:
    """(..., Hkv, g, D) as (..., Hq, D)."""
    return out.flatten(-3, -2)


# A contestant takes the copy of keys and values to read and returns (W, Hq, D).
Contestant = Callable[[int], Tensor]


def oracle(case: Case) -> Tensor:
    """(W, Hq, D) in float64, densely."""
    found = []
    for worker in range(case.layout.workers):
        k, v = case.dense(worker, torch.float64)
        q = case.query(worker, 0).double()[0]
        q = rotate(q, torch.tensor(case.layout.position(worker)))
        scores = q @ k.transpose(-1, -2) / case.shape.head_size**0.5
        found.append(_flat(torch.softmax(scores, -1) @ v))
    return torch.stack(found)


def per_worker_concatenation(case: Case) -> Contestant:
    """B0. Rotations are tables made before; keys are rotated in float32, as models do."""
    half = case.shape.head_size // 2
    segments = case.segments()
    layers = [_split(case, segments) for _ in range(case.layers)]
    plans = []
    for worker in range(case.layout.workers):
        position = case.layout.position(worker)
        seen = [i for i, s in enumerate(segments) if s.block in case.layout.views[worker]]
        tables = []
        for i in seen:
            ones = torch.cat([torch.ones(half), torch.zeros(half)]).double()
            turned = rotate(ones, torch.tensor(position - case.rotation(worker, segments[i])))
            cos, sin = turned.float().split(half)
            tables.append((cos.to(case.dtype), sin.to(case.dtype)))
        plans.append((case.query(worker, position), seen, tables))

    def turn(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = k.split(half, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def run(layer: int) -> Tensor:
        found = []
        for q, seen, tables in plans:
            parts = [layers[layer % len(layers)][i] for i in seen]
            k = torch.cat([turn(p[0], *t) for p, t in zip(parts, tables, strict=True)], 2)
            v = torch.cat([p[1] for p in parts], 2)
            found.append(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        return _flat(torch.cat(found))

    return run


def dense_copies(case: Case) -> Contestant:
    """B1. Workers whose views are equally long share a call."""
    workers = range(case.layout.workers)
    queries = [case.query(w, case.layout.position(w)) for w in workers]
    copies = [case.dense(w) for w in workers]
    if len({k.shape for k, _ in copies}) == 1:
        groups = [(torch.cat(queries), *(torch.stack(side) for side in zip(*copies, strict=True)))]
    else:
        groups = [(q, k[None], v[None]) for q, (k, v) in zip(queries, copies, strict=True)]
    ring = ring_length(sum(k.nbytes + v.nbytes for _, k, v in groups), cold=True)
    layers = [groups, *([(q, k.clone(), v.clone()) for q, k, v in groups] for _ in range(ring - 1))]

    def run(layer: int) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return _flat(torch.cat([attend(*group) for group in layers[layer % ring]]))

    return run


def _split(case: Case, segments: list[Segment]) -> list[tuple[Tensor, Tensor]]:
    """Stored keys and values of each segment, contiguous: (1, Hkv, n, D)."""
    return [
        tuple(t[None, :, s.first : s.first + s.n].clone() for t in (case.stored_keys, case.v))
        for s in segments
    ]  # type: ignore[misc]


def _by_matmul(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    lse = torch.logsumexp(scores.float(), -1)
    return torch.matmul(torch.softmax(scores, -1), v), lse


def per_segment(
    case: Case,
    attend: Callable[..., tuple[Tensor, Tensor]] = _flash,
    rotations: bool = False,
) -> Contestant:
    """B2. A segment costs nothing to workers that do not see it."""
    shape, workers = case.shape, case.layout.workers
    segments = case.segments()
    layers = [_split(case, segments) for _ in range(case.layers)]
    size = (1, shape.kv_heads, workers * shape.group)
    plans = []
    for s in segments:
        readers = case.layout.readers(s.block)
        first, last = readers[0], readers[-1] + 1
        if readers != tuple(range(first, last)):
            raise ValueError("workers that see a segment must be neighbours")
        q = torch.cat([case.query(w, case.rotation(w, s)) for w in readers], 2)
        rows = None
        if len(readers) < workers:  # rows of the others stay empty
            out = torch.zeros(*size, shape.head_size, dtype=case.dtype)
            lse = torch.full(size, -torch.inf)
            index = slice(first * shape.group, last * shape.group)
            rows = (out, lse, out[:, :, index], lse[:, :, index])
        plans.append((q, slice(first, last), rows))
    queries = [q for q, _, _ in plans]
    turn = _turns(case, segments)

    def run(layer: int) -> Tensor:
        if rotations:
            for q, turned, (_, readers, _) in zip(queries, turn(), plans, strict=True):
                q.unflatten(2, (-1, shape.group)).copy_(turned[:, :, readers])
        outs, sums = [], []
        for (q, _, rows), (k, v) in zip(plans, layers[layer % len(layers)], strict=True):
            out, lse = attend(q, k, v)
            if rows is not None:
                rows[2].copy_(out)
                rows[3].copy_(lse)
                out, lse = rows[:2]
            outs.append(out)
            sums.append(lse)
        weights = torch.softmax(torch.stack(sums, -1), -1).to(case.dtype)
        merged = torch.matmul(weights[..., None, :], torch.stack(outs, -2))[0, :, :, 0]
        return _flat(merged.unflatten(1, (workers, shape.group)).transpose(0, 1))

    return run


def _turns(case: Case, segments: list[Segment]) -> Callable[[], Tensor]:
    """Rotates all queries for all segments at once: (segments, 1, Hkv, W, g, D)."""
    shape, workers = case.shape, case.layout.workers
    half = shape.head_size // 2
    # Of a worker that does not see a segment, anything will do.
    positions = torch.tensor(
        [
            [case.rotation(w, s) if s.block in case.layout.views[w] else 0 for w in range(workers)]
            for s in segments
        ]
    )
    table = rope(shape.head_size).rotations(positions)[:, None, None, :, None]
    cos, sin = table.unbind(-1)
    q = case.q.unflatten(1, (shape.kv_heads, shape.group)).transpose(0, 1)[None]

    def run() -> Tensor:
        a, b = q.float().split(half, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return run


PEERS: dict[str, Callable[[Case], Contestant]] = {
    "B0": per_worker_concatenation,
    "B1": dense_copies,
    "B2": per_segment,
    "B2 with rotations": functools.partial(per_segment, rotations=True),
    "B2 by matmul": functools.partial(per_segment, attend=_by_matmul),
}


def difference(a: Tensor, b: Tensor) -> float:
    """Of a from b by norm, relative."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(case: Case, contestants: dict[str, Contestant]) -> None:
    """Raises unless all contestants compute the same."""
    expected = contestants["B2"](0)
    for name, contestant in contestants.items():
        found = difference(contestant(0), expected)
        if not found <= TOLERANCE[case.dtype]:
            raise AssertionError(f"{case}: {name} differs from B2 by {found:.1e}")


def runner(case: Case, name: str, contestant: Contestant) -> Runner:
    """Visits the copies of keys and values in turn, so that none is in a cache."""

    def run() -> None:
        for layer in range(case.layers):
            contestant(layer)

    return Runner(name, run, case.layers, case.bytes)
