"""Random steps for the Triton kernels: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.triton_kernels import attention as kernels
from tests.attention import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernels.Tiles(16, 16, 4, 1)


@dataclass
class Result:
    """out (R, Hq, Dv), lse (R, Hq), mass (R, Hq, B), float64 in `expected`."""

    out: Tensor
    lse: Tensor
    mass: Tensor


class Case:
    """A step, the pool that it is over, and queries; unused slots of the pool hold NaN.

    `change` alters the tables of the plan before it is written. With `two_types` the rotations are
    those of a second rope type.
    """

    def __init__(
        self,
        shape: plans.Shape | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
        spread: float = 1.0,
        change: Callable[[dict[str, Any]], None] | None = None,
        two_types: bool = False,
        **options: Any,
    ) -> None:
        self.shape = shape = shape or plans.Shape(d=16, dv=16, pairs=8)
        options = {"longest": 3, "length": 25, "blocks": 2} | options
        self.step = plans.make(np.random.default_rng(seed), pairs=shape.pairs, **options)
        if change is not None:
            change(self.step.tables)
            self.step = plans.encode(self.step.tables, self.step.page_size, self.step.pages)
        generator = torch.Generator().manual_seed(seed)
        kv_dtype = kv_dtype or dtype
        self.q = plans.queries(self.step, shape, dtype, generator) * spread
        self.k, self.v = plans.pool(self.step, shape, kv_dtype, generator, math.nan)
        self.k *= spread
        self.sinks = torch.randn(shape.heads, generator=generator) if shape.sinks else None
        self.plan, self.rope = self.step.words, 0 if shape.rope else -1
        if two_types:
            self.plan, self.rope = with_two_types(self.plan), 1

    @property
    def rows(self) -> int:
        return self.step.rows

    def run(
        self,
        parts: int = 1,
        tiles: kernels.Tiles = SMALL,
        spare_rows: int = 0,
        spare_blocks: int = 0,
        scale: float | None = None,
    ) -> Result:
        """What the kernels make of it, in buffers that hold NaN."""
        shape, rows = self.shape, self.rows + spare_rows
        blocks = self.step.tables["blocks"] + spare_blocks
        q = self.q
        if spare_rows:
            q = torch.full((rows, shape.heads, shape.d), math.nan, dtype=q.dtype)
            q[: self.rows] = self.q
        result = Result(
            torch.full((rows, shape.heads, shape.dv), math.nan, dtype=q.dtype, device=DEVICE),
            torch.full((rows, shape.heads), math.nan, device=DEVICE),
            torch.full((rows, shape.heads, blocks), math.nan, device=DEVICE),
        )
        size = kernels.Shape(
            *(rows, shape.heads, shape.kv_heads, shape.d, shape.dv, q.element_size(), blocks)
        ).scratch_bytes(parts, tiles)
        kernels.attend(
            *(t.to(DEVICE) for t in (q, self.k, self.v, self.plan)),
            None if self.sinks is None else self.sinks.to(DEVICE),
            *(self.rope, shape.offset, shape.interleaved),
            *(shape.d**-0.5 if scale is None else scale, shape.softcap, shape.window),
            *(result.out, result.lse, result.mass),
            torch.full((size,), 255, dtype=torch.uint8, device=DEVICE),
            tiles=tiles,
            parts=parts,
        )
        return Result(result.out.cpu(), result.lse.cpu(), result.mass.cpu())

    def expected(self, scale: float | None = None) -> Result:
        """By the formula, in float64."""
        scale = self.shape.d**-0.5 if scale is None else scale
        found = plans.expected(self.step, self.shape, self.q, self.k, self.v, scale, self.sinks)
        return Result(*(torch.from_numpy(t) for t in found))

    def check(self, scale: float | None = None, **options: Any) -> None:
        """Equal to the formula; what lies behind the rows and blocks of the plan is empty."""
        found, expected = self.run(scale=scale, **options), self.expected(scale)
        rows, blocks = self.rows, self.step.tables["blocks"]
        exact = self.q.dtype == torch.float32
        # Logits of some size are not exact in float32, either.
        largest = float(expected.lse.nan_to_num(neginf=0.0).abs().sum(-1).max()) if rows else 0.0
        atol = (2e-5 if exact else 2e-2) * max(1.0, largest / 30)
        for name in ("out", "lse", "mass"):
            t = getattr(found, name)[:rows]
            t = t[..., :blocks] if name == "mass" else t
            torch.testing.assert_close(t.double(), getattr(expected, name), rtol=0, atol=atol)
        assert found.out[rows:].eq(0).all()
        assert found.lse[rows:].eq(-math.inf).all()
        assert found.mass[rows:].eq(0).all()
        assert found.mass[..., blocks:].eq(0).all()

    def own_key(self, worker: int, t: int) -> tuple[int, int, Tensor]:
        """Page and slot of the key of row t of a worker, and which rows see it (R,)."""
        tables = self.step.tables
        row = tables["row_ptr"][worker] + t
        _, _, slot, _ = tables["rows"][row]
        sees = []
        for w, other, _, _ in tables["rows"]:
            visible = False
            for s, (_, n, first, _, _, pages) in enumerate(tables["segments"]):
                pair = tables["pairs"][s][w]
                end = min(n, pair["limit0"] + (other if pair["state"] == plans.RISING else 0))
                for i in range(end if pair["state"] != plans.HIDDEN else 0):
                    page, place = divmod(first + i, self.step.page_size)
                    visible |= pages[page] * self.step.page_size + place == slot
            sees.append(visible)
        return *divmod(slot, self.step.page_size), torch.tensor(sees)


def with_two_types(plan: Tensor) -> Tensor:
    """The plan with its rope type as the second of two."""
    pairs, table = plan[int(plan[18]) :][:2].tolist()
    out = torch.cat([plan, torch.tensor([1, table, pairs, table])])
    out[1], out[11], out[18] = len(out), 2, len(plan)
    return out
