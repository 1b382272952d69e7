"""Random layouts of blocks, views and steps, by seed, for tests that compare with the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignops.attention import RopeSpec
from tests.attention.oracle import Array, Shape, Step, World

GROUPS = (1, 2, 3, 5, 7, 8)
HEAD_DIMS = (32, 64, 80, 128, 256)


@dataclass(frozen=True)
class Append:
    """New tokens of a block, as if written alone."""

    block: int
    k: Array
    v: Array


@dataclass(frozen=True)
class Move:
    """All of `source` behind `target`."""

    source: int
    target: int
    rewrite: bool


@dataclass(frozen=True)
class Evict:
    """Positions [start, stop) of a block."""

    block: int
    start: int
    stop: int
    close_gap: bool


@dataclass(frozen=True)
class Fork:
    """`target`, which is empty, becomes a copy of `source` that shares its pages."""

    source: int
    target: int


Op = Append | Move | Evict | Fork


@dataclass(frozen=True)
class Scenario:
    """How blocks came about, and a step over them."""

    seed: int
    shape: Shape
    page_size: int
    blocks: int
    ops: Sequence[Op]
    step: Step

    def world(self) -> World:
        """The blocks before the step."""
        world = World(self.shape, self.blocks)
        for op in self.ops:
            apply(world, op)
        return world


def apply(world: World, op: Op) -> None:
    """What the operation does to the blocks."""
    blocks = world.blocks
    if isinstance(op, Append):
        blocks[op.block] = blocks[op.block].appended(op.k, op.v)
    elif isinstance(op, Move):
        blocks[op.target] = blocks[op.target].moved(blocks[op.source], op.rewrite)
        blocks[op.source] = type(blocks[op.source])()
    elif isinstance(op, Evict):
        blocks[op.block] = blocks[op.block].evicted(op.start, op.stop, op.close_gap)
    else:
        blocks[op.target] = blocks[op.source]


class Maker:
    """Draws the parts of a scenario."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return bool(self.random.random() < p)

    def pick(self, choices: Sequence[int]) -> int:
        return int(choices[int(self.random.integers(len(choices)))])

    def between(self, low: int, high: int) -> int:
        """Of [low, high]."""
        return int(self.random.integers(low, high + 1))

    def normal(self, *shape: int) -> Array:
        """Numbers of float32, so that kernels can have the same."""
        return self.random.standard_normal(shape).astype(np.float32).astype(np.float64)

    def shape(self) -> Shape:
        d = self.pick(HEAD_DIMS)
        hkv = self.pick((1, 1, 2, 3))
        hq = hkv * self.pick(GROUPS)
        return Shape(
            hq=hq,
            hkv=hkv,
            d=d,
            dv=self.pick(HEAD_DIMS) if self.chance(0.4) else d,
            rope=self.rope(d),
            scale=0.25 if self.chance(0.2) else None,
            softcap=5.0 if self.chance(0.2) else None,
            window=self.pick((1, 7, 64, 200)) if self.chance(0.25) else None,
            sinks=self.normal(hq) if self.chance(0.2) else None,
        )

    def rope(self, d: int) -> RopeSpec | None:
        if self.chance(0.1):
            return None
        pairs = "half" if self.chance(0.5) else "interleaved"
        if self.chance(0.2):
            return RopeSpec.yarn(d, factor=4.0, original_length=64, pairs=pairs)
        if self.chance(0.4):
            return RopeSpec.default(d, theta=1e6, pairs=pairs)
        dim = self.pick([n for n in (4, 16, d // 2, d - 8) if n % 2 == 0])
        offset = d - dim if self.chance(0.5) else 0
        return RopeSpec.default(dim, theta=10000.0, pairs=pairs, offset=offset)

    def length(self, page: int) -> int:
        """Often at a border of pages."""
        kind = self.between(0, 5)
        if kind == 0:
            return 0
        if kind == 1:
            return max(0, page * self.between(1, 3) + self.between(-1, 1))
        return self.between(1, 300 if kind == 2 else 40)

    def ops(self, shape: Shape, page: int, blocks: int) -> list[Op]:
        world, ops = World(shape, blocks), []

        def do(op: Op) -> None:
            ops.append(op)
            apply(world, op)

        def append(block: int) -> None:
            n = self.length(page)
            do(
                Append(
                    block, self.normal(n, shape.hkv, shape.d), self.normal(n, shape.hkv, shape.dv)
                )
            )

        for block in range(blocks):
            append(block)
        for _ in range(self.between(0, 2 * blocks)):
            block, other = self.between(0, blocks - 1), self.between(0, blocks - 1)
            kind, length = self.between(0, 4), world.blocks[block].length
            if kind == 0:
                append(block)
            elif kind in (1, 2) and block != other and world.blocks[other].length < 600:
                do(Move(block, other, rewrite=self.chance(0.4)))
                append(block)
            elif kind == 3 and length > 2:
                start = self.between(0, length - 2)
                stop = self.between(start + 1, length - 1)  # no gap at the end
                do(Evict(block, start, stop, close_gap=self.chance(0.7)))
            elif kind == 4 and block != other and world.blocks[other].length == 0:
                do(Fork(block, other))
        return ops

    def step(self, shape: Shape, blocks: int, workers: int) -> Step:
        own = [int(b) for b in self.random.permutation(blocks)[:workers]]
        views = []
        for block in own:
            others = [int(b) for b in self.random.permutation(blocks) if b != block]
            views.append([*others[: self.between(0, len(others))], block])
        counts = [self.between(0, 9) if self.chance(0.5) else 1 for _ in own]
        weights = {}
        for worker, view in enumerate(views):
            for block in view:
                if self.chance(0.1):
                    weights[worker, block] = (float(self.normal(1)[0]), 1.0)
                elif self.chance(0.1):
                    weights[worker, block] = (0.0, self.pick((1, 2, 3)) / 2)
                elif self.chance(0.05):
                    weights[worker, block] = (-math.inf, 1.0)
        total = sum(counts)
        return Step(
            views=views,
            counts=counts,
            q=self.normal(total, shape.hq, shape.d),
            k=self.normal(total, shape.hkv, shape.d),
            v=self.normal(total, shape.hkv, shape.dv),
            lagged=self.chance(0.3),
            weights=weights,
        )


def scenario(seed: int) -> Scenario:
    """The random layout of a seed: 1-8 workers, 1-12 blocks of 0 to some hundred tokens."""
    maker = Maker(seed)
    shape, page = maker.shape(), maker.pick((16, 32))
    blocks = maker.between(1, 12)
    workers = maker.between(1, min(8, blocks))
    ops = maker.ops(shape, page, blocks)
    return Scenario(seed, shape, page, blocks, ops, maker.step(shape, blocks, workers))


def changed(case: Scenario, **changes: object) -> Scenario:
    """The scenario with another step."""
    return replace(case, step=replace(case.step, **changes))  # type: ignore[arg-type]
