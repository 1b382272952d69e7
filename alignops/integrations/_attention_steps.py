"""What the layers of a model do in one step: append, attend, and add up the mass of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignops.attention.ops import append_kv, concurrent_attention
from alignops.attention.plan import Plan
from alignops.attention.pool import KVPool
from alignops.reference import attention as reference


class KernelStep:
    """Handles the layers by the operators; see `LayerHandler`."""

    def __init__(self, plan: Plan, pool: KVPool, mass: bool) -> None:
        self.plan, self.pool = plan, pool
        self.return_mass = mass
        self.mass: Tensor | None = None

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Appends keys and values, and returns the attention (1, R, Hq, Dv)."""
        append_kv(self.pool, layer, self.plan, key[0].transpose(0, 1), value[0].transpose(0, 1))
        result = concurrent_attention(
            query[0].transpose(0, 1),
            self.pool,
            layer,
            self.plan,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=None if sinks is None else sinks.detach().float(),
            return_mass=self.return_mass,
        )
        if isinstance(result, Tensor):
            return result.unsqueeze(0)
        out, mass = result
        self._add(mass)
        return out.unsqueeze(0)

    def mass_by_entry(self) -> Tensor:
        """(n, B): the mean over layers, heads and rows; 0 for entries without rows."""
        counts = list(self.plan.counts)
        if self.mass is None:
            return torch.zeros(len(counts), len(self.plan.blocks), device=self.pool.k[0].device)
        parts = (self.mass / len(self.pool.k)).split(counts)
        return torch.stack([part.sum(0) / max(len(part), 1) for part in parts])

    def _add(self, mass: Tensor) -> None:
        """Of a layer: (R, Hq, B)."""
        rows = mass.mean(1, dtype=torch.float32)
        self.mass = rows if self.mass is None else self.mass.add_(rows)


class ReferenceStep(KernelStep):
    """The same by `alignops.reference.attention`, from views and lengths instead of rotations.

    Args:
        views: numbers of the blocks that each entry sees.
        lengths: of each block before the step, by number.
        lagged: other blocks are seen as they were.
        local: queries and keys arrive rotated by their index.
    """

    def __init__(
        self,
        plan: Plan,
        pool: KVPool,
        mass: bool,
        views: Sequence[Sequence[int]],
        lengths: Mapping[int, int],
        lagged: bool,
        local: bool,
    ) -> None:
        super().__init__(plan, pool, mass)
        self.local = local
        tables = plan.decode()
        self.rows, self.segments = tables["row"], tables["segment"]
        self.pages = torch.as_tensor(tables["page"], device=pool.k[0].device)
        columns = {block.id: i for i, block in enumerate(plan.blocks)}
        # Of the first segment of each block: bias and gain belong to blocks.
        weights = dict(zip(self.segments["block"][::-1], tables["weight"][::-1], strict=True))
        written = {view[-1]: n for view, n in zip(views, plan.counts, strict=True)}
        self.workers = []
        for entry, (view, count) in enumerate(zip(views, plan.counts, strict=True)):
            seen = []
            for block in view:
                new = 0 if lagged or block == view[-1] else written.get(block, 0)
                column = columns[block]
                bias, gain = weights[column][entry] if column in weights else (0.0, 1.0)
                end = lengths[block] + new
                seen.append(reference.Seen(column, end, bias=float(bias), gain=float(gain)))
            self.workers.append(reference.Worker(count, seen))

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Appends keys and values, and returns the attention (1, R, Hq, Dv)."""
        rotary = self._rotary(layer)
        self._append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), rotary)
        out, _, mass = reference.concurrent_attention(
            query[0].transpose(0, 1),
            self._blocks(layer),
            self.workers,
            rope=rotary,
            local=self.local,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=sinks,
        )
        if self.return_mass:
            self._add(mass)
        return out.unsqueeze(0)

    def _rotary(self, layer: int) -> reference.Rotary | None:
        index = self.pool.layer_spec[layer]
        if index is None:
            return None
        spec = self.pool.specs[index]
        inv_freq = torch.tensor(spec.inv_freq, device=self.pages.device)
        return reference.Rotary(inv_freq, spec.offset, spec.interleaved)

    def _append(
        self, layer: int, key: Tensor, value: Tensor, rotary: reference.Rotary | None
    ) -> None:
        self.plan.require(layer, "append")
        slot = torch.as_tensor(self.rows["slot"], device=key.device)
        if rotary is not None and not self.local:
            index = torch.as_tensor(self.rows["index"], device=key.device)
            angles = reference.rotations(rotary.inv_freq, index, torch.float32).unsqueeze(1)
            key = reference.rotate(
                key.float(), angles, offset=rotary.offset, interleaved=rotary.interleaved
            )
        for cache, x in ((self.pool.k[layer], key), (self.pool.v[layer], value)):
            size = cache.shape[2]
            cache[slot // size, :, slot % size] = x.to(cache.dtype)

    def _blocks(self, layer: int) -> list[list[reference.Segment]]:
        k, v = self.pool.k[layer], self.pool.v[layer]
        size = k.shape[2]
        blocks: list[list[reference.Segment]] = [[] for _ in self.plan.blocks]
        for segment in self.segments:
            block, n, page, first, s0, r0 = (
                int(segment[name]) for name in ("block", "n", "page", "first", "s0", "r0")
            )
            place = first + torch.arange(n, device=k.device)
            pages, slots = self.pages[page + place // size], place % size
            keys, values = (x[pages, :, slots].transpose(0, 1) for x in (k, v))
            blocks[block].append(reference.Segment(keys, values, s0, r0))
        return blocks
