"""Keys and values in buffers that are allocated once, and the forward that fills them.

A library's dynamic cache concatenates: every forward copies all keys and values, and all rows have
one length. Here a forward writes Q columns of each row where the row wants them, and attends to a
view of the buffer; what must not be seen is masked by position.

Shape letters: B rows, n rows of a forward, Q columns of it, S slots it attends to, H heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.kv import ragged_append_
from alignops.speculative.layout import build_mask, build_positions

if TYPE_CHECKING:
    from alignops.speculative.adapter import ModelAdapter

_BLOCK = 64  # capacities are multiples of it


class RaggedCache:
    """A cache of keys and values whose rows have lengths of their own.

    It is what transformers models take as a cache, without being one of theirs: `update` writes the
    new columns of each row at the slots that `begin` has named, and returns all that is attended
    to. Slots that were written and are not wanted are written again later.

    Args:
        rows: B.
        capacity: slots of a row to begin with.
        fixed: never grow, and attend to all slots in every forward.
        limit: most slots that the model can attend to; None: any number.

    Attributes:
        tensors: keys, values of layer 0, of layer 1 ...: (rows, H, capacity, D).
        shadow: more tensors that are moved alike: what `record` is told, if it is to be kept.
        starts: first slot that each row of the last forward wrote.

    Example:
        >>> cache = RaggedCache(rows=2, capacity=64)
        >>> cache.begin(torch.tensor([3, 0], dtype=torch.int32), 5, slice(0, 2))
        5
        >>> new = torch.ones(2, 1, 2, 4)  # two columns of both rows
        >>> keys, values = cache.update(new, new, 0)
        >>> keys[:, 0, :, 0]
        tensor([[0., 0., 0., 1., 1.],
                [1., 1., 0., 0., 0.]])
    """

    is_compileable = False

    def __init__(
        self, rows: int, capacity: int, fixed: bool = False, limit: int | None = None
    ) -> None:
        self.rows = rows
        self.fixed = fixed
        self.limit = limit
        self.tensors: list[Tensor] = []
        self.shadow: list[Tensor] = []
        self.starts = torch.zeros(rows, dtype=torch.int32)
        self._capacity = -(-capacity // _BLOCK) * _BLOCK if not fixed else capacity
        if limit is not None:
            self._capacity = min(self._capacity, limit)
        self._rows = slice(0, rows)
        self._upto = 0
        self._shared = 0

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self._capacity

    def begin(self, starts: Tensor, upto: int, rows: slice, shared: int = 0) -> int:
        """Say where the next forward writes, before it runs.

        Args:
            starts: (n,) int32, first slot that each row of the forward writes.
            upto: slots that it attends to at least; the cache grows if it has fewer.
            rows: the n rows of the cache that take part.
            shared: the common value of `starts` where the library's own mask depends on it.

        Returns:
            S: slots that the forward attends to, columns of its mask.

        Raises:
            ValueError: the cache is of fixed capacity, and too small.
        """
        if upto > self._capacity:
            self._grow(upto)
        self.starts, self._rows, self._shared = starts, rows, shared
        self._upto = self._capacity if self.fixed else upto
        return self._upto

    def _grow(self, upto: int) -> None:
        check(not self.fixed, f"cache: {upto} slots are needed, its fixed capacity {self.capacity}")
        check(
            self.limit is None or upto <= self.limit,
            f"cache: {upto} slots are needed, the model attends to at most {self.limit}",
        )
        wanted = max(upto, self._capacity + self._capacity // 2)
        self._capacity = -(-wanted // _BLOCK) * _BLOCK
        if self.limit is not None:
            self._capacity = min(self._capacity, self.limit)
        self.tensors = [self._grown(t) for t in self.tensors]
        self.shadow = [self._grown(t) for t in self.shadow]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self._capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def _layer(self, layer: int, like: list[Tensor]) -> list[Tensor]:
        while len(self.tensors) <= 2 * layer + 1:
            # Not `empty`: a masked NaN is still a NaN after it was multiplied by 0.
            t = like[len(self.tensors) % 2]
            self.tensors.append(t.new_zeros(self.rows, t.shape[1], self._capacity, t.shape[3]))
        return self.tensors[2 * layer : 2 * layer + 2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new columns of a layer, (n, H, Q, D), and return what it attends to."""
        buffers = [t[self._rows] for t in self._layer(layer_idx, [key_states, value_states])]
        ragged_append_(buffers, [key_states, value_states], self.starts)
        keys, values = (t[:, :, : self._upto] for t in buffers)
        return keys, values

    @property
    def moved(self) -> list[Tensor]:
        """All that has to move when a row moves."""
        return self.tensors + self.shadow

    def record(self, ids: Tensor, positions: Tensor) -> None:
        """Write tokens and positions (n, Q) of a forward to the shadow."""
        new = [t[:, None, :, None].contiguous() for t in (ids, positions)]
        ragged_append_([t[self._rows] for t in self.shadow], new, self.starts)

    def park(self, row: int, begin: int, length: int) -> list[Tensor]:
        """A copy of some slots of a row, each tensor (H, length, D)."""
        return [t[row, :, begin : begin + length].clone() for t in self.moved]

    def resume(self, row: int, begin: int, parked: list[Tensor]) -> None:
        """Write back what `park` has copied."""
        for t, values in zip(self.moved, parked, strict=True):
            t[row, :, begin : begin + values.shape[1]] = values

    def reserve(self, upto: int) -> None:
        """Grow to at least this many slots."""
        if upto > self._capacity:
            self._grow(upto)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of all layers for one token."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in self.tensors)

    # What a model of transformers asks a cache for. Where masks are given in full, the answers are
    # not used; where the library builds them, all rows of a forward begin at the same slot.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before those that the forward writes."""
        return self._shared

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Slot of the first query."""
        return self._shared

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Slots that are attended to, and the first of them."""
        return self._upto, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit of the library's kind."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit of the library's kind."""
        return -1

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
        """Slots before those that the forward writes."""
        return self._shared

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops what is out of its window: masks do."""
        return [False] * max(1, len(self))

    @property
    def is_linear(self) -> list[bool]:
        """No layer has a recurrent state."""
        return [False] * max(1, len(self))

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer holds keys and values."""
        return [False] * max(1, len(self))

    def __len__(self) -> int:
        return len(self.tensors) // 2


def run_model(
    adapter: ModelAdapter,
    cache: RaggedCache,
    ids: Tensor,
    lengths: Tensor,
    *,
    rows: slice,
    upto: int,
    last: int,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    shared: int = 0,
    pad: Tensor | None = None,
    slot_positions: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """A forward of the next tokens of some rows, with the positions and masks that it needs.

    Args:
        adapter: the model.
        cache: of the model.
        ids: (n, Q) int64, below V.
        lengths: (n,) int32: tokens of each row that have keys and values already.
        rows: the n rows of the cache.
        upto: slots to attend to at least.
        last: columns whose logits are wanted.
        counts: (n,) int32 ids that are meant; those behind are padding, and what they write is to
            be written again. None: all.
        starts: (n,) int32 slots that the ids go to; None: `lengths`, slots are positions.
        shared: the value of `starts` where it is the same for all rows.
        pad: (n,) int32 slots before the first token of each row; None: 0.
        slot_positions: called with S, gives (n, S) positions of the tokens in the slots, -1: none;
            None: they are in order.

    Returns:
        (n, last, V).
    """
    starts = lengths if starts is None else starts
    slots = cache.begin(starts, upto, rows, shared)
    committed = lengths + 1  # the first id is the last committed token
    positions = build_positions(committed, ids.shape[1], counts=counts)
    masks = build_mask(
        committed,
        ids.shape[1],
        slots,
        kind=adapter.mask_kind,
        dtype=adapter.dtype,
        windows=adapter.windows,
        pad=pad,
        first=starts,
        counts=counts,
        slot_positions=None if slot_positions is None else slot_positions(slots),
    )
    return adapter.forward(ids, positions, masks, cache, last)
