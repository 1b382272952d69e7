"""Where the keys and values of a batch lie: the four layouts.

After a round rows have accepted different numbers of drafts. A layout says at which slots a row
keeps the keys and values of its committed tokens, all but those of the last one, which has none
yet; where a forward writes; and what has to move.

  ragged    token i of a row is in slot i; nothing ever moves
  realign   rows end at the same slot: a row whose end is elsewhere is shifted before the forward
  rollback  as realign, and all rows commit as many tokens as the slowest, so that none is shifted
  defer     rejected drafts stay behind as holes that are masked; holes are squeezed out when
            they are too many

Shape letters: B rows, n rows of a forward, Q columns of it, V ids, c tokens of a row.

Source: arXiv 2510.22876 sections 3 and 4 (realign).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import LAYOUTS, ModelAdapter
from alignops.speculative.caches import run_model
from alignops.speculative.kv import kv_shift_, kv_tree_
from alignops.speculative.stats import SpecStats

#: Share of holes that `defer` bears.
HOLE_FRACTION = 0.125
# Prompts are computed together if padding makes the work at most this much larger.
_PADDING = 1.25


@dataclass(frozen=True)
class Parked:
    """Keys and values of a sequence that waits, and the padding it had: (H, c - 1, D) each."""

    tensors: list[Tensor]
    length: int
    pad: int


class Placement:
    """Keys and values of a batch in the layout "ragged", and what all layouts share.

    Args:
        adapter: the model.
        rows: B.
        capacity: slots of a row to begin with.
        stats: told of bytes moved.

    Attributes:
        lengths: c of each row; 1 for a row without a sequence, or with one token.
        grouped: whether the rows of the last forward had their ends at one slot already; None: the
            layout does not care.
    """

    fixed = False

    def __init__(self, adapter: ModelAdapter, rows: int, capacity: int, stats: SpecStats) -> None:
        self.adapter = adapter
        self.rows = rows
        self.stats = stats
        self.cache = adapter.new_cache(rows, capacity, fixed=self.fixed)
        self.lengths = [1] * rows
        self.grouped: bool | None = None

    # What a session calls

    def prefill(self, rows: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """Compute keys and values of all tokens but the last of new sequences, (c,) each."""
        for row, tokens in zip(rows, prompts, strict=True):
            self.lengths[row] = len(tokens)
        for group in self._groups(rows):
            self._prefill_group(group, [prompts[rows.index(row)] for row in group])

    def forward(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Logits of the last token and the drafts of the first n rows.

        Args:
            ids: (n, Q).
            counts: (n,) int32: how many ids of each row are meant.

        Returns:
            (n, Q, V).
        """
        n, q = ids.shape
        starts = self._starts(n)
        return self._run(slice(0, n), ids, self.lengths[:n], starts, last=q, counts=counts)

    def commit(self, emitted: Sequence[int]) -> None:
        """The first n rows have grown by so many tokens."""
        for row, count in enumerate(emitted):
            self.lengths[row] += count

    def cut(self, emitted: Sequence[int], running: Sequence[bool]) -> list[int]:
        """How many of the tokens that rows have emitted they may commit; others are running on."""
        return list(emitted)

    def clear(self, row: int) -> None:
        """The sequence of the row has ended."""
        self.lengths[row] = 1

    def aligned(self, row: int) -> int:
        """Slot behind the row's last token: rows that share it form a rectangle."""
        return self.lengths[row]

    def park(self, row: int) -> Parked:
        """Take the sequence of a row out."""
        length = self.lengths[row] - 1
        parked = Parked(self.cache.park(row, self._begin(row), length), length + 1, self._pad(row))
        self._record(2 * length, 0)
        self.clear(row)
        return parked

    def resume(self, row: int, parked: Parked) -> None:
        """Put a sequence into an empty row."""
        self.lengths[row] = parked.length
        self.cache.reserve(parked.pad + parked.length)
        self.cache.resume(row, parked.pad, parked.tensors)
        self._record(2 * (parked.length - 1), 0)

    # What layouts differ in

    def _starts(self, n: int) -> list[int]:
        """Slots that the last tokens of n rows go to."""
        return [c - 1 for c in self.lengths[:n]]

    def _begin(self, row: int) -> int:
        return 0

    def _pad(self, row: int) -> int:
        return 0

    def _pads(self, rows: slice) -> list[int] | None:
        return None

    def _stored(self, rows: slice) -> Callable[[int], Tensor] | None:
        """For a number of slots: positions of the tokens in them; None: they are in order."""
        return None

    def _prompt_starts(self, group: list[int]) -> list[int]:
        """Slots that the first tokens of new sequences go to."""
        return [0] * len(group)

    # Shared parts

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Adjacent rows with prompts of similar lengths; rows of one token have nothing to do."""
        groups: list[list[int]] = []
        for row in sorted(r for r in rows if self.lengths[r] > 1):
            group = [*groups[-1], row] if groups and groups[-1][-1] == row - 1 else []
            lengths = [self.lengths[r] for r in group]
            if group and len(group) * max(lengths) <= _PADDING * sum(lengths):
                groups[-1] = group
            else:
                groups.append([row])
        return groups

    def _prefill_group(self, group: list[int], prompts: list[Tensor]) -> None:
        """Prompts of adjacent rows, padded behind."""
        width = max(len(tokens) for tokens in prompts) - 1
        ids = torch.zeros(len(group), width, dtype=torch.int64, device=self.adapter.device)
        for i, tokens in enumerate(prompts):
            ids[i, : len(tokens) - 1] = tokens[:-1]
        counts = self._ints([len(tokens) - 1 for tokens in prompts])
        rows = slice(group[0], group[-1] + 1)
        starts = self._prompt_starts(group)
        self._run(rows, ids, [1] * len(group), starts, last=1, counts=counts)

    def _run(
        self,
        rows: slice,
        ids: Tensor,
        lengths: list[int],
        starts: list[int],
        last: int,
        counts: Tensor | None = None,
    ) -> Tensor:
        """A forward of rows, each of which has keys and values of all but its last token."""
        pads = self._pads(rows)
        logits = run_model(
            self.adapter,
            self.cache,
            ids,
            self._ints([c - 1 for c in lengths]),
            rows=rows,
            upto=max(starts) + ids.shape[1],
            last=last,
            counts=counts,
            starts=self._ints(starts),
            shared=starts[0],
            pad=None if pads is None else self._ints(pads),
            slot_positions=self._stored(rows),
        )
        self._record(2 * ids.numel(), 2 * ids.numel())
        return logits

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.adapter.device)

    def _record(self, moved: int, floor: int) -> None:
        size = self.cache.bytes_per_token
        self.stats.record_move(moved * size, floor * size)


class StablePlacement(Placement):
    """The layout "ragged" where every forward has the same shape, and thus the same rounding.

    All rows take part in each forward, with Q columns, and attend to all slots; prompts are
    computed in pieces of Q columns.

    Args:
        columns: Q.
    """

    fixed = True

    def __init__(
        self, adapter: ModelAdapter, rows: int, capacity: int, stats: SpecStats, columns: int
    ) -> None:
        super().__init__(adapter, rows, capacity, stats)
        self.columns = columns

    def prefill(self, rows: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """Compute keys and values of new sequences, Q tokens of each per forward."""
        done = dict.fromkeys(rows, 0)
        device, q = self.adapter.device, self.columns
        for _ in range(-(-(max(map(len, prompts)) - 1) // q)):
            ids = torch.zeros(self.rows, q, dtype=torch.int64, device=device)
            starts = self._starts(self.rows)  # rows that run write where they will write again
            for row, tokens in zip(rows, prompts, strict=True):
                piece = tokens[done[row] : min(done[row] + q, len(tokens) - 1)]
                ids[row, : len(piece)] = piece
                starts[row] = done[row]
                done[row] += len(piece)
            self.forward_at(ids, starts)
        for row, tokens in zip(rows, prompts, strict=True):
            self.lengths[row] = len(tokens)

    def forward_at(self, ids: Tensor, starts: list[int]) -> Tensor:
        """Logits (B, Q, V) of tokens (B, Q) that are put at the slots from `starts` on."""
        lengths = [start + 1 for start in starts]
        return self._run(slice(0, self.rows), ids, lengths, starts, last=self.columns)


class Realign(Placement):
    """Rows end at the same slot, as a rectangular batch with padding on the left.

    The shift waits until a forward needs it: rows may be replaced before, and a batch whose rows
    happen to end at one slot is not touched.
    """

    def __init__(self, adapter: ModelAdapter, rows: int, capacity: int, stats: SpecStats) -> None:
        super().__init__(adapter, rows, capacity, stats)
        self.pads = [0] * rows

    def aligned(self, row: int) -> int:
        """Slot behind the row's last token: rows that share it form a rectangle."""
        return self.pads[row] + self.lengths[row]

    def resume(self, row: int, parked: Parked) -> None:
        """Put a sequence into an empty row, at the slots it had."""
        super().resume(row, parked)
        self.pads[row] = parked.pad

    def clear(self, row: int) -> None:
        """The sequence of the row has ended."""
        super().clear(row)
        self.pads[row] = 0

    def _begin(self, row: int) -> int:
        return self.pads[row]

    def _pad(self, row: int) -> int:
        return self.pads[row]

    def _pads(self, rows: slice) -> list[int]:
        return self.pads[rows]

    def _ends(self, n: int) -> set[int]:
        """Slots behind the last tokens of rows that have keys and values."""
        return {self.aligned(row) for row in range(n) if self.lengths[row] > 1}

    def _starts(self, n: int) -> list[int]:
        ends = self._ends(n)
        end = longest = max(self.lengths[:n])
        self.grouped = len(ends) <= 1
        if self.grouped and ends:
            end = ends.pop()
        # A wide margin, of rows that have gone, is not dragged along.
        if not self.grouped or end - longest > longest // 4 + 32:
            end = longest
            self._shift(n, end)
        self.pads[:n] = [end - c for c in self.lengths[:n]]
        return [end - 1] * n

    def _shift(self, n: int, end: int) -> None:
        lengths, pads = self.lengths[:n], self.pads[:n]
        src, dst = self._ints(pads), self._ints([end - c for c in lengths])
        with self.stats.clock.phase("compact"):
            length = self._ints([c - 1 for c in lengths])
            kv_shift_([t[:n] for t in self.cache.moved], src, dst, length)
        moved = sum(c - 1 for c, pad in zip(lengths, pads, strict=True) if pad + c != end)
        self._record(2 * moved, 2 * moved)

    def _prompt_starts(self, group: list[int]) -> list[int]:
        """So that new rows end where the others do, if these have one end."""
        others = self._ends(self.rows) - {self.aligned(row) for row in group}
        end = max([self.lengths[row] for row in group] + (list(others) if len(others) == 1 else []))
        for row in group:
            self.pads[row] = end - self.lengths[row]
        return [self.pads[row] for row in group]

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        groups = super()._groups(rows)
        if self.adapter.mask_kind != "mask2d":
            return groups
        return [[row] for group in groups for row in group]  # their first slots differ


class Rollback(Realign):
    """As `Realign`, where all rows commit as many tokens as the slowest: nothing moves."""

    def cut(self, emitted: Sequence[int], running: Sequence[bool]) -> list[int]:
        """The smallest number of a row that is running on, for all of those."""
        counts = [count for count, runs in zip(emitted, running, strict=True) if runs]
        return [
            min(counts) if runs else count for count, runs in zip(emitted, running, strict=True)
        ]


class Defer(Placement):
    """All rows write at the same slots; what is not committed stays behind as a hole.

    Attributes:
        column: slot that the next forward begins at.
    """

    def __init__(self, adapter: ModelAdapter, rows: int, capacity: int, stats: SpecStats) -> None:
        super().__init__(adapter, rows, capacity, stats)
        self.column = 0
        self._positions = torch.full(
            (rows, self.cache.capacity), -1, dtype=torch.int64, device=adapter.device
        )

    def clear(self, row: int) -> None:
        """The sequence of the row has ended."""
        super().clear(row)
        self._positions[row] = -1

    def park(self, row: int) -> Parked:
        """Take the sequence of a row out, without holes."""
        kept = torch.nonzero(self._positions[row, : self.column] >= 0)[:, 0]
        tensors = [t[row][:, kept] for t in self.cache.moved]
        self._record(2 * len(kept), 0)
        parked = Parked(tensors, self.lengths[row], 0)
        self.clear(row)
        return parked

    def resume(self, row: int, parked: Parked) -> None:
        """Put a sequence into an empty row, from slot 0 on."""
        super().resume(row, parked)
        self._fill(row, parked.length - 1)

    def _stored(self, rows: slice) -> Callable[[int], Tensor]:
        def positions(slots: int) -> Tensor:
            self._reserve(slots)
            return self._positions[rows, :slots].contiguous()

        return positions

    def commit(self, emitted: Sequence[int]) -> None:
        """The first n rows have grown by so many tokens."""
        n, device = len(emitted), self.adapter.device
        width = max(emitted)
        columns = torch.arange(width, device=device)
        counts, lengths = (torch.tensor(x, device=device) for x in (emitted, self.lengths[:n]))
        self._reserve(self.column + width)
        positions = lengths[:, None] - 1 + columns
        positions = positions.masked_fill(columns >= counts[:, None], -1)
        self._positions[:n, self.column : self.column + width] = positions
        super().commit(emitted)
        self.column += width

    def _starts(self, n: int) -> list[int]:
        longest = max(self.lengths[:n]) - 1
        if self.column - longest > HOLE_FRACTION * self.column:
            self._squeeze(n, longest)
        return [self.column] * n

    def _squeeze(self, n: int, longest: int) -> None:
        """Move what is kept of each row to its beginning."""
        if longest > 0:
            holes = (self._positions[:n, : self.column] < 0).to(torch.int8)
            path = holes.argsort(dim=1, stable=True)[:, :longest].to(torch.int32).contiguous()
            length = self._ints([c - 1 for c in self.lengths[:n]])
            with self.stats.clock.phase("compact"):
                tensors = [t[:n] for t in self.cache.moved]
                kv_tree_(tensors, torch.zeros_like(length), path, length)
        moved = sum(c - 1 for c in self.lengths[:n])
        self._record(2 * moved, 2 * moved)
        self._positions[:n] = -1
        for row in range(n):
            self._fill(row, self.lengths[row] - 1)
        self.column = longest

    def _prefill_group(self, group: list[int], prompts: list[Tensor]) -> None:
        super()._prefill_group(group, prompts)
        for row, tokens in zip(group, prompts, strict=True):
            self._fill(row, len(tokens) - 1)

    def _fill(self, row: int, length: int) -> None:
        self._reserve(length)
        self._positions[row, :length] = torch.arange(length, device=self.adapter.device)
        self.column = max(self.column, length)

    def _reserve(self, slots: int) -> None:
        missing = slots - self._positions.shape[1]
        if missing > 0:
            more = self._positions.new_full((self.rows, missing + slots // 2), -1)
            self._positions = torch.cat([self._positions, more], dim=1)


PLACEMENTS: dict[str, type[Placement]] = {
    "ragged": Placement,
    "defer": Defer,
    "realign": Realign,
    "rollback": Rollback,
}


def choose_layout(adapter: ModelAdapter, layout: str, stable: bool) -> str:
    """The layout to use; "auto": the model's best.

    Raises:
        ValueError: the name is unknown, the model does not work with it, or `stable` does not.
    """
    names = ("auto", *LAYOUTS)
    check(layout in names, f"layout must be one of {', '.join(names)}, got {layout!r}")
    name = adapter.layouts[0] if layout == "auto" else layout
    check(
        name in adapter.layouts,
        f"layout must be one that the model works with ({', '.join(adapter.layouts)}), got {name}",
    )
    check(
        not stable or name == "ragged",
        f"layout must be ragged where stable=True, got {name}",
    )
    return name
