"""The dense oracle: every worker's view as one sequence, keys rotated to where it sees them.

Blocks hold keys that were never rotated, so nothing of the trick under test is in here: for each
worker the blocks are put one behind the other, all keys are rotated to their positions in that
sequence, queries too, and one softmax is taken, in float64 with NumPy.

Shape letters: R rows, Hq and Hkv heads, D and Dv sizes, n tokens, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alignops.attention import RopeSpec
from alignops.reference import attention as reference

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a layer; the layout does not matter to them."""

    hq: int
    hkv: int
    d: int
    dv: int
    rope: RopeSpec | None = None
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: Array | None = None

    @property
    def score_scale(self) -> float:
        return self.d**-0.5 if self.scale is None else self.scale


def rotated(x: Array, positions: npt.NDArray[np.int64], rope: RopeSpec | None) -> Array:
    """A query's or key's only rotation: x (n, H, D) by one position per token, and the factor a."""
    if rope is None:
        return x
    x = x * rope.attention_factor
    f, d = rope.offset, rope.rotary_dim
    part, out = x[..., f : f + d], x.copy()
    pairs = part[..., 0::2] + 1j * part[..., 1::2]
    if not rope.interleaved:
        pairs = part[..., : d // 2] + 1j * part[..., d // 2 :]
    turned = pairs * np.exp(1j * np.outer(positions, np.array(rope.inv_freq)))[:, None]
    if rope.interleaved:
        out[..., f : f + d : 2], out[..., f + 1 : f + d : 2] = turned.real, turned.imag
    else:
        out[..., f : f + d // 2], out[..., f + d // 2 : f + d] = turned.real, turned.imag
    return out


@dataclass(frozen=True)
class Piece:
    """Tokens in a row: token i stands at s0 + i of its block; a cache holds R(r0 + i) k of it."""

    k: Array  # (n, Hkv, D), never rotated
    v: Array
    s0: int
    r0: int

    def __len__(self) -> int:
        return len(self.k)

    def part(self, start: int, stop: int) -> Piece:
        """Tokens [start, stop)."""
        return Piece(self.k[start:stop], self.v[start:stop], self.s0 + start, self.r0 + start)


@dataclass(frozen=True)
class Cells:
    """A block: pieces in order, and how many positions it takes."""

    pieces: tuple[Piece, ...] = ()
    length: int = 0

    def appended(self, k: Array, v: Array) -> Cells:
        piece = Piece(k, v, self.length, self.length)
        return Cells((*self.pieces, *([piece] if len(k) else [])), self.length + len(k))

    def moved(self, source: Cells, rewrite: bool) -> Cells:
        """With `source` behind it."""
        added = [replace(p, s0=p.s0 + self.length) for p in source.pieces]
        if rewrite:
            added = [replace(p, r0=p.s0) for p in added]
        return Cells((*self.pieces, *added), self.length + source.length)

    def evicted(self, start: int, stop: int, close_gap: bool) -> Cells:
        """Without positions [start, stop)."""
        kept = []
        for piece in self.pieces:
            first = min(max(start - piece.s0, 0), len(piece))
            last = min(max(stop - piece.s0, 0), len(piece))
            for part in (piece.part(0, first), piece.part(last, len(piece))):
                if len(part):
                    shift = stop - start if close_gap and part.s0 >= stop else 0
                    kept.append(replace(part, s0=part.s0 - shift))
        return Cells(tuple(kept), self.length - (stop - start if close_gap else 0))

    def split(self, at: int) -> Cells:
        """With another piece beginning at position `at`."""
        parts = []
        for piece in self.pieces:
            cut = min(max(at - piece.s0, 0), len(piece))
            parts += [p for p in (piece.part(0, cut), piece.part(cut, len(piece))) if len(p)]
        return Cells(tuple(parts), self.length)


@dataclass(frozen=True)
class Step:
    """What happens in one step.

    Attributes:
        views: of each worker, block names; the last one is written.
        counts: new tokens of each worker.
        q, k, v: (R, heads, size) of the new tokens, in worker order, never rotated.
        lagged: others' new tokens are not seen.
        weights: (worker, block): (bias, gain).
    """

    views: Sequence[Sequence[int]]
    counts: Sequence[int]
    q: Array
    k: Array
    v: Array
    lagged: bool = False
    weights: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def first(self, worker: int) -> int:
        """First row of a worker."""
        return sum(self.counts[:worker])

    def rows(self, worker: int) -> slice:
        return slice(self.first(worker), self.first(worker) + self.counts[worker])


class World:
    """Blocks by name, and what attention over them is."""

    def __init__(self, shape: Shape, blocks: int) -> None:
        self.shape = shape
        self.blocks = [Cells() for _ in range(blocks)]

    def after(self, step: Step) -> list[Cells]:
        """The blocks with the new tokens of a step."""
        out = list(self.blocks)
        for worker, view in enumerate(step.views):
            rows = step.rows(worker)
            out[view[-1]] = out[view[-1]].appended(step.k[rows], step.v[rows])
        return out

    def commit(self, step: Step) -> None:
        self.blocks = self.after(step)

    def dense(self, step: Step) -> tuple[Array, Array, Array]:
        """The oracle's out (R, Hq, Dv), lse (R, Hq), mass (R, Hq, B)."""
        shape, after = self.shape, self.after(step)
        total = sum(step.counts)
        out = np.zeros((total, shape.hq, shape.dv))
        lse = np.full((total, shape.hq), -math.inf)
        mass = np.zeros((total, shape.hq, len(self.blocks)))
        for worker, view in enumerate(step.views):
            before = [self.blocks[b] if step.lagged else after[b] for b in view[:-1]]
            keys, values, places, owners, bias, gain = [], [], [], [], [], []
            origin = 0
            for b, cells in zip(view, [*before, after[view[-1]]], strict=True):
                for piece in cells.pieces:
                    n = len(piece)
                    keys.append(piece.k)
                    values.append(piece.v)
                    places.append(origin + piece.s0 + np.arange(n))
                    owners.append(np.full(n, b))
                    weight = step.weights.get((worker, b), (0.0, 1.0))
                    bias.append(np.full(n, weight[0]))
                    gain.append(np.full(n, weight[1]))
                origin += cells.length
            if step.counts[worker] == 0:
                continue
            place = np.concatenate(places)
            key = rotated(np.concatenate(keys), place, shape.rope)
            value, owner = np.concatenate(values), np.concatenate(owners)
            # The last tokens of the sequence are the new ones.
            position = origin - step.counts[worker] + np.arange(step.counts[worker])
            query = rotated(step.q[step.rows(worker)], position, shape.rope)
            for t, row in enumerate(range(step.first(worker), step.first(worker + 1))):
                seen = place <= position[t]
                if shape.window is not None:
                    seen &= position[t] - place < shape.window
                for head in range(shape.hq):
                    kv = head // (shape.hq // shape.hkv)
                    score = key[:, kv] @ query[t, head] * shape.score_scale
                    score = score * np.concatenate(gain)
                    if shape.softcap is not None:
                        score = shape.softcap * np.tanh(score / shape.softcap)
                    score = np.where(seen, score + np.concatenate(bias), -math.inf)
                    sink = -math.inf if shape.sinks is None else shape.sinks[head]
                    top = max(score.max(), sink)
                    if top == -math.inf:
                        continue
                    weight = np.exp(score - top)
                    sum_ = weight.sum() + np.exp(sink - top)
                    out[row, head] = weight @ value[:, kv] / sum_
                    lse[row, head] = top + np.log(sum_)
                    mass[row, head] = np.bincount(owner, weight, len(self.blocks)) / sum_
        return out, lse, mass

    def described(
        self, step: Step, dtype: torch.dtype, local: bool = False
    ) -> tuple[torch.Tensor, list[list[reference.Segment]], list[reference.Worker], Any]:
        """Arguments of the reference operator: q, blocks, workers, and options."""
        shape = self.shape
        blocks = [
            [
                reference.Segment(
                    _tensor(rotated(p.k, p.r0 + np.arange(len(p)), shape.rope), dtype),
                    _tensor(p.v, dtype),
                    p.s0,
                    p.r0,
                )
                for p in cells.pieces
            ]
            for cells in self.after(step)
        ]
        a = 1.0 if shape.rope is None else shape.rope.attention_factor
        workers, q = [], step.q * a
        for worker, view in enumerate(step.views):
            ends = [(self.blocks if step.lagged else self.after(step))[b].length for b in view[:-1]]
            ends.append(self.blocks[view[-1]].length)
            weights = [step.weights.get((worker, b), (0.0, 1.0)) for b in view]
            workers.append(
                reference.Worker(
                    step.counts[worker],
                    [
                        reference.Seen(b, end, bias=w[0], gain=w[1])
                        for b, end, w in zip(view, ends, weights, strict=True)
                    ],
                )
            )
            if local:
                rows, index = step.rows(worker), ends[-1] + np.arange(step.counts[worker])
                q[rows] = rotated(step.q[rows], index, shape.rope)
        rope = shape.rope and reference.Rotary(
            torch.tensor(shape.rope.inv_freq), shape.rope.offset, shape.rope.interleaved
        )
        options = {
            "rope": rope,
            "local": local,
            "scale": shape.scale,
            "softcap": shape.softcap,
            "window": shape.window,
            "sinks": None if shape.sinks is None else torch.from_numpy(shape.sinks),
        }
        return torch.from_numpy(q).to(dtype), blocks, workers, options


def _tensor(x: Array, dtype: torch.dtype) -> torch.Tensor:
    """(n, heads, size) as (heads, n, size)."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(1, 0, 2))).to(dtype)
