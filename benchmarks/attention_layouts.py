"""What workers see in the attention benchmarks: blocks, the segments they consist of, views."""

from __future__ import annotations

import dataclasses

import numpy as np

#: Keys of short blocks: headers (step_header, pivot, own_header), and a step that is being written.
STEP_HEADER, PIVOT, OWN_HEADER, STEP = 12, 5, 10, 75


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks by the keys of their segments, and the blocks that each worker sees, its own last.

    Lengths are those that the measured step sees: of a worker's own block the last key is new.
    """

    name: str
    blocks: tuple[tuple[int, ...], ...]
    views: tuple[tuple[int, ...], ...]

    @property
    def workers(self) -> int:
        return len(self.views)

    @property
    def tokens(self) -> int:
        """Distinct keys."""
        return sum(map(sum, self.blocks))

    @property
    def segments(self) -> int:
        return sum(map(len, self.blocks))

    def block_starts(self) -> list[int]:
        """Where each block begins if the keys of all blocks are laid out one after another."""
        return _starts([sum(b) for b in self.blocks])

    def origins(self, worker: int) -> dict[int, int]:
        """Position of the first key of each block that the worker sees."""
        view = self.views[worker]
        starts = _starts([sum(self.blocks[b]) for b in view])
        return dict(zip(view, starts, strict=True))

    def position(self, worker: int) -> int:
        """Position of the worker's new token."""
        return sum(sum(self.blocks[b]) for b in self.views[worker]) - 1

    def readers(self, block: int) -> tuple[int, ...]:
        """Workers that see a block."""
        return tuple(w for w, view in enumerate(self.views) if block in view)


def _starts(lengths: list[int]) -> list[int]:
    return np.cumsum([0, *lengths[:-1]]).tolist()  # type: ignore[no-any-return]


def make(name: str, tokens: int, workers: int, seed: int = 0) -> Layout:
    """A layout of `PATTERNS` with so many distinct keys in all.

    "1 segment": a history of one segment and the workers' own blocks, which only they see.
    "headers": the combined layout, a history of one segment. "8 segments" and "64 segments": the
    same, with a history of so many spliced paragraphs of unequal lengths.
    """
    step = max(1, min(STEP, tokens // (8 * workers)))
    pieces = int(name.split()[0]) if name != "headers" else 1
    if name == "1 segment":
        history = tokens - workers * step
        blocks: list[tuple[int, ...]] = [(history,), *[(step,)] * workers]
        views = [(0, 1 + w) for w in range(workers)]
        return Layout(name, tuple(blocks), tuple(views))
    pivots = max(workers - 2, 0)  # between the others; a view names no block twice
    history = tokens - workers * step - STEP_HEADER - pivots * PIVOT - OWN_HEADER
    blocks = [
        _pieces(history, pieces, seed),
        (STEP_HEADER,),
        *[(PIVOT,)] * pivots,
        (OWN_HEADER,),
        *[(step,)] * workers,
    ]
    title = 2 + pivots
    own = [title + 1 + w for w in range(workers)]
    views = []
    for w in range(workers):
        others = [o for o in own if o != own[w]]
        between = [block for i, o in enumerate(others) for block in (o, 2 + i)][
            : 2 * len(others) - 1
        ]
        views.append((0, 1, *between, title, own[w]))
    return Layout(name, tuple(blocks), tuple(views))


PATTERNS = ("1 segment", "headers", "8 segments", "64 segments")


def _pieces(total: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` lengths, the longest about three times the shortest."""
    shares = 1.0 + 2.0 * np.random.default_rng(seed).random(count)
    ends = np.round(np.cumsum(shares) / shares.sum() * total).astype(int)
    lengths = np.diff(ends, prepend=0)
    if lengths.min() < 1:
        raise ValueError(f"{total} keys do not make {count} paragraphs")
    return tuple(int(n) for n in lengths)
