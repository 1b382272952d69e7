"""What has to hold in every round, checked on what the model is really given.

A shadow of the cache holds token and position of each slot; it is written and moved together with
keys and values. After a forward, what each query has seen must be the text before it, in order, and
nothing else: no padding, no hole, no rejected draft, nobody else's token.

Shape letters: B rows, Q query columns, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignops.speculative.adapter import Batch, ModelAdapter
from alignops.speculative.caches import RaggedCache


class CheckedAdapter:
    """A model that remembers what its last forward was given.

    Args:
        inner: the model.
    """

    def __init__(self, inner: ModelAdapter) -> None:
        self.inner = inner
        self.vocab_size = inner.vocab_size
        self.max_length = inner.max_length
        self.device = inner.device
        self.dtype = inner.dtype
        self.windows = inner.windows
        self.mask_kind = inner.mask_kind
        self.layouts = inner.layouts
        self._positions = torch.empty(0, 0)
        self._masks: Sequence[Tensor] = ()
        self._cache: RaggedCache | None = None

    def new_cache(self, rows: int, capacity: int, fixed: bool = False) -> RaggedCache:
        """An empty cache with a shadow."""
        cache = self.inner.new_cache(rows, capacity, fixed)
        cache.shadow = [
            torch.full((rows, 1, cache.capacity, 1), -1, dtype=torch.int64, device=self.device)
            for _ in range(2)
        ]
        return cache

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Sequence[Tensor],
        cache: RaggedCache,
        last: int,
    ) -> Tensor:
        """As the model's own."""
        cache.record(input_ids, positions)
        self._positions, self._masks, self._cache = positions, mask, cache
        return self.inner.forward(input_ids, positions, mask, cache, last)

    def check(self, batch: Batch, inputs: Tensor, counts: Tensor) -> None:
        """Compare what the last forward saw with the text.

        Args:
            batch: its rows.
            inputs: (B, Q): last token and drafts.
            counts: (B,) how many of them are meant.

        Raises:
            AssertionError: an invariant is broken; says which, where, and what was seen.
        """
        assert self._cache is not None
        ids, slots = (t[:, 0, :, 0].tolist() for t in self._cache.shadow)
        starts: list[int] = self._cache.starts.tolist()
        for row in range(len(inputs)):
            if not batch.active[row]:
                continue
            length = int(batch.lengths[row])
            committed = batch.tokens[row, : length - 1].tolist()
            for column in range(int(counts[row])):
                text = committed + inputs[row, : column + 1].tolist()
                position = int(self._positions[row, column])
                where = f"row {row}, query {column}"
                _require(
                    position == len(text) - 1,
                    f"I2 (positions): {where} must be at {len(text) - 1}, got {position}",
                )
                for window, mask in zip(self.windows, self._masks, strict=False):
                    seen = self._seen(mask, row, column, starts[row])
                    pairs = sorted((slots[row][s], ids[row][s]) for s in seen)
                    shortened = self.mask_kind != "mask2d" and window > 0
                    begin = max(0, len(text) - window) if shortened else 0
                    wanted = list(enumerate(text))[begin:]
                    _require(
                        pairs == wanted,
                        f"I3, I4 (visible text): {where} must see (position, token) {wanted}, "
                        f"sees {pairs}",
                    )

    def _seen(self, mask: Tensor, row: int, column: int, start: int) -> list[int]:
        """Slots that a query sees."""
        if self.mask_kind == "mask2d":
            visible = mask[row, : start + column + 1]
        else:
            visible = mask[row, 0, column]
            if self.mask_kind == "additive":
                visible = visible == 0
        found: list[int] = visible.nonzero()[:, 0].tolist()
        return found


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)
