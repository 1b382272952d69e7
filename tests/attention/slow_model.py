"""The same semantics by brute force: a stock model whose cache is put together anew in each layer.

Every block keeps its keys unrotated. In each forward, each layer of each entry gets all keys of the
entry's view, rotated to their positions in it and concatenated, and a mask; attention is the
library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tests.attention.models import Rotation, cache_name, rotations, windows


class SlowBlock:
    """Unrotated keys and values of each layer, (Hkv, n, D) float64."""

    def __init__(self, layers: int) -> None:
        self.tokens: list[int] = []
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]


class SlowModel:
    """Same calls as the engine of `tests.attention.scenario`."""

    def __init__(self, name: str, net: Any) -> None:
        self.net = net
        self.rotations = rotations(name, net)
        self.windows = windows(net)

    def block(self) -> SlowBlock:
        return SlowBlock(len(self.rotations))

    def prefill(self, block: SlowBlock, ids: Sequence[int], view: Sequence[SlowBlock]) -> None:
        self.step([[*view]], [ids], "inclusive")

    def move(self, src: SlowBlock, dst: SlowBlock) -> None:
        dst.tokens += src.tokens
        for layer in range(len(self.rotations)):
            dst.keys[layer] += src.keys[layer]
            dst.values[layer] += src.values[layer]
        vars(src).update(vars(self.block()))

    def truncate(self, block: SlowBlock, length: int) -> None:
        block.tokens = block.tokens[:length]
        for lists in (block.keys, block.values):
            for layer, parts in enumerate(lists):
                lists[layer] = [torch.cat(parts, 1)[:, :length]] if parts else []

    @torch.no_grad()
    def step(
        self,
        views: Sequence[Sequence[SlowBlock]],
        inputs: Sequence[Sequence[int]],
        visibility: str = "inclusive",
    ) -> list[Tensor | None]:
        """Logits (V,) of the last token of each entry, None without tokens."""
        active = [i for i, ids in enumerate(inputs) if ids]
        entries = [_Entry(views[i], inputs[i]) for i in active]
        new = {id(e.view[-1]): len(e.ids) for e in entries} if visibility == "inclusive" else {}
        for e in entries:
            e.lengths = [len(b.tokens) + new.get(id(b), 0) for b in e.view[:-1]]
            e.first = sum(e.lengths) + len(e.view[-1].tokens)
        longest = max(len(e.ids) for e in entries)
        pad = [longest - len(e.ids) for e in entries]
        input_ids = torch.tensor([[0] * n + e.ids for n, e in zip(pad, entries, strict=True)])
        positions = torch.tensor(
            [[0] * n + [*range(e.first, e.end)] for n, e in zip(pad, entries, strict=True)]
        )
        cache = _Cache(self, entries)
        logits = self.net(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=self._masks(entries, positions),
            use_cache=True,
            **{cache_name(self.net): cache},
        ).logits[:, -1]
        for e in entries:
            e.view[-1].tokens += e.ids
        result: list[Tensor | None] = [None] * len(inputs)
        for row, i in enumerate(active):
            result[i] = logits[row]
        return result

    def _masks(self, entries: Sequence[_Entry], positions: Tensor) -> Any:
        """Additive (W, 1, T, S): of keys from 0 on, the first up to the query's own."""
        columns = torch.arange(max(e.end for e in entries))
        distance = positions[:, None, :, None] - columns
        masks = {}
        for window in {*self.windows}:
            visible = (distance >= 0) & (distance < (window or len(columns)))
            masks[window] = torch.zeros(visible.shape, dtype=self.net.dtype).masked_fill_(
                ~visible, torch.finfo(self.net.dtype).min
            )
        if getattr(self.net.config, "layer_types", None) is None:
            return masks[self.windows[0]]
        kinds = zip(self.net.config.layer_types, self.windows, strict=True)
        return {kind: masks[window] for kind, window in kinds}


class _Entry:
    def __init__(self, view: Sequence[SlowBlock], ids: Sequence[int]) -> None:
        self.view, self.ids = view, list(ids)
        self.lengths: list[int] = []
        self.first = 0

    @property
    def end(self) -> int:
        return self.first + len(self.ids)


class _Cache(DynamicCache):
    def __init__(self, model: SlowModel, entries: Sequence[_Entry]) -> None:
        super().__init__()
        self.model, self.entries = model, entries

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        rotation = self.model.rotations[layer]
        for row, e in enumerate(self.entries):
            n, own = len(e.ids), e.view[-1]
            k = keys[row, :, -n:]
            own.keys[layer].append(_turn(rotation, k, -torch.arange(e.first, e.end)))
            own.values[layer].append(values[row, :, -n:].double())
        longest = max(e.end for e in self.entries)
        shape = (len(self.entries), keys.shape[1], longest)
        all_keys = keys.new_zeros(*shape, keys.shape[-1])
        all_values = values.new_zeros(*shape, values.shape[-1])
        for row, e in enumerate(self.entries):
            k = _joined([block.keys[layer] for block in e.view], e.lengths)
            v = _joined([block.values[layer] for block in e.view], e.lengths)
            all_keys[row, :, : e.end] = _turn(rotation, k, torch.arange(e.end)).to(keys.dtype)
            all_values[row, :, : e.end] = v.to(values.dtype)
        return all_keys, all_values


def _turn(rotation: Rotation | None, x: Tensor, positions: Tensor) -> Tensor:
    return x.double() if rotation is None else rotation.turn(x, positions)


def _joined(blocks: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> Tensor:
    """So many tokens of each block but the last, and all of that."""
    visible = [torch.cat([*parts], 1) for parts in blocks if parts]
    counts = [n for n, parts in zip(lengths, blocks, strict=False) if parts]
    return torch.cat([x[:, :n] for x, n in zip(visible, [*counts, None], strict=True)], 1)
