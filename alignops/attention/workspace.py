"""Workspaces: blocks of tokens over a pool, and workers that each see some of them in an order.

Source: arXiv 2504.06261 (Hogwild! Inference), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from alignops import _native
from alignops._checks import check
from alignops.attention import files
from alignops.attention.errors import LayoutError
from alignops.attention.plan import Plan, PlanMemory
from alignops.attention.pool import KVPool

ROPE_MODES = ("raw", "local")
VISIBILITY = ("inclusive", "lagged")
KEEP = ("history", "frozen", "drop")

#: Segments of a block that a move leaves alone.
MAX_SEGMENTS = 32


class Block:
    """A sequence of tokens in a workspace; made by `Workspace.new_block`.

    Attributes:
        id: its number in the workspace.
        name: what it was called.
        workspace: whose it is.
    """

    __slots__ = ("__weakref__", "id", "name", "workspace")

    def __init__(self, workspace: Workspace, id: int, name: str) -> None:
        self.workspace, self.id, self.name = workspace, id, name

    @property
    def length(self) -> int:
        """Positions from the first to the end, gaps of evicted tokens included."""
        return self.workspace.native.length(self.id)

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens, -1 where none were given."""
        return [int(token) for token in self.workspace.native.tokens(self.id)]

    @property
    def segments(self) -> NDArray[Any]:
        """Structured array: n, first (slot), s0 (position), r0 (rotation), rewritten."""
        rows = self.workspace.native.segments(self.id)[0]
        dtype = [(name, np.int64) for name in ("n", "first", "s0", "r0", "rewritten")]
        return rows.view(dtype).reshape(-1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        return other.workspace is self.workspace and other.id == self.id

    def __hash__(self) -> int:
        return hash((id(self.workspace), self.id))

    def __repr__(self) -> str:
        return f"Block({self.id}, {self.name!r}, length {self.length})"


class Workspace:
    """Blocks over a pool, workers with their views of them, and steps that append.

    A step goes `plan`, then for each layer `append_kv` and `concurrent_attention`, then `commit`;
    `abort` leaves everything as it was. Steps of several threads may run at once if they write
    different blocks and are "lagged": each sees what had been committed when it was planned.

    Args:
        pool: where keys and values are.
        rope_mode: how queries and keys arrive. "raw": unrotated; "local": rotated by the index of
            the token in its block.

    Raises:
        ValueError: unknown `rope_mode`.

    Source: arXiv 2504.06261, section 3.

    Example:
        >>> pool = KVPool(1, 1, 8, dtype=torch.float32, num_pages=4)
        >>> ws = Workspace(pool)
        >>> common, own = ws.new_block("common"), ws.new_block("own")
        >>> worker = ws.add_worker("Alice", [common, own])
        >>> plan = ws.plan([2])
        >>> ws.commit(plan, [[7, 9]])
        >>> own.tokens, ws.stats()["pages_used"]
        ([7, 9], 1)
    """

    def __init__(self, pool: KVPool, *, rope_mode: str = "raw") -> None:
        check(
            rope_mode in ROPE_MODES,
            f"Workspace: rope_mode must be one of {ROPE_MODES}, got {rope_mode!r}",
        )
        self.pool, self.rope_mode = pool, rope_mode
        #: Bookkeeping: alignops._C.AttentionWorkspace.
        self.native = _native.library.AttentionWorkspace(
            pool.native, rope_mode == "local", [list(spec.inv_freq) for spec in pool.specs]
        )
        # Blocks know their workspace. It holds them weakly, so that its pages are free as soon as
        # nobody uses it, and makes those that are gone again.
        self._names: dict[int, str] = {}
        self._blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._spare: list[PlanMemory] = []

    # Blocks and workers

    def new_block(self, name: str = "") -> Block:
        """An empty block."""
        return self._new(self.native.new_block(name), name)

    def block(self, id: int) -> Block:
        """The block with this number; IndexError if there is none."""
        if id not in self._names:
            raise IndexError(f"block: id must be that of a block, got {id}")
        block = self._blocks.get(id)
        return self._new(id, self._names[id]) if block is None else block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in the order of their numbers."""
        return tuple(self.block(id) for id in list(self._names))

    def add_worker(self, name: str, view: Sequence[Block], at_index: int | None = None) -> int:
        """A worker takes part from the next plan on.

        Args:
            name: for messages.
            view: blocks that it sees, in order; the last one is its own, which nobody else writes.
            at_index: place among the active workers; None: the last.

        Returns:
            Its number, which stays.

        Raises:
            LayoutError: the view is empty, has a block twice or of another workspace, or ends with
                the block of another worker.
            IndexError: `at_index` is out of range.
        """
        return self.native.add_worker(name, self._ids("add_worker", view, name), at_index)

    def set_view(self, worker: int, blocks: Sequence[Block]) -> None:
        """Replace what a worker sees; the last block stays its own.

        Raises:
            LayoutError: as `add_worker`, or the last block is not the worker's.
            IndexError: there is no such worker.
        """
        name = self.native.worker_name(worker)
        self.native.set_view(worker, self._ids("set_view", blocks, name))

    @property
    def workers(self) -> tuple[int, ...]:
        """Numbers of the active workers, in order."""
        return self.native.workers

    def worker_name(self, worker: int) -> str:
        """Name of a worker."""
        return self.native.worker_name(worker)

    def view(self, worker: int) -> list[Block]:
        """What a worker sees."""
        return [self.block(id) for id in self.native.view(worker)]

    def set_weight(self, worker: int, block: Block, bias: float = 0.0, gain: float = 1.0) -> None:
        """How much attention a worker pays to a block: scores are gain * score + bias.

        Args:
            worker: its number.
            block: any block; kept while the worker does not see it.
            bias: -inf hides the block, which keeps its positions.
            gain: factor of the scores.

        Raises:
            ValueError: `bias` is not a number or +inf, or `gain` is not finite.
        """
        self.native.set_weight(worker, self._id("set_weight", block), bias, gain)

    def finish_worker(self, worker: int, keep: str = "history") -> None:
        """A worker takes part no more.

        Args:
            worker: its number.
            keep: what becomes of its block. "history": moves to the first block of its view;
                "frozen": stays for those who see it; "drop": is cleared.

        Raises:
            ValueError: unknown `keep`, or "history" without another block in the view.
            BlockBusy: a block is being written.
        """
        check(keep in KEEP, f"finish_worker: keep must be one of {KEEP}, got {keep!r}")
        view = self.view(worker)
        if keep == "history":
            check(
                len(view) > 1,
                f"finish_worker: the view of worker {self.worker_name(worker)!r} must have a block "
                "before its own to keep it in, got none",
            )
            self.move(view[-1], view[0])
        elif keep == "drop":
            self.clear(view[-1])
        self.native.retire_worker(worker)

    # Steps

    def plan(
        self,
        counts: Sequence[int],
        visibility: str = "inclusive",
        workers: Sequence[int] | None = None,
        views: Sequence[Sequence[Block]] | None = None,
        implicit_self: bool = False,
    ) -> Plan:
        """Reserve pages for a step and lay out what everybody sees in it.

        Args:
            counts: new tokens of each entry; 0 is allowed.
            visibility: "inclusive": entries see each other's tokens of this step; "lagged": they
                see other blocks as they are now.
            workers: who the entries are; None: all active workers in order, or nobody with `views`.
            views: blocks that each entry sees, instead of the workers' own; the last is written.
            implicit_self: an entry sees of the block that it writes only its new tokens.

        Returns:
            The plan, which must be committed or aborted. Its memory is used again afterwards.

        Raises:
            ValueError: `counts` and entries do not fit, or an argument is out of range.
            IndexError: there is no such worker.
            LayoutError: a view is not allowed, or two entries write one block.
            BlockBusy: another open plan writes a block.
            PoolExhausted: too few pages are free. Nothing has been reserved.
        """
        check(
            visibility in VISIBILITY,
            f"plan: visibility must be one of {VISIBILITY}, got {visibility!r}",
        )
        ids = None
        if views is not None:
            ids = [self._ids("plan", view, f"entry {i}") for i, view in enumerate(views)]
        memory = (
            self._spare.pop() if self._spare else PlanMemory(self.native.step(), self.pool.device)
        )
        step = memory.step
        try:
            step.begin(
                list(counts),
                None if workers is None else list(workers),
                ids,
                visibility == "lagged",
                implicit_self,
            )
            self.pool.wait()
            copies = step.copies()
            if len(copies) > 0:
                self.pool.rewrite(torch.from_numpy(copies))
            memory.fill()
        except BaseException:
            step.abort()
            self._spare.append(memory)
            raise
        entries: Sequence[int | None]
        if workers is not None:
            entries = workers
        else:
            entries = self.workers if views is None else [None] * len(views)
        blocks = tuple(self.block(id) for id in step.blocks)
        return Plan(memory, self.pool, blocks, tuple(entries), self.rope_mode == "local")

    def commit(self, plan: Plan, tokens: Sequence[Sequence[int]] | None = None) -> None:
        """Publish the new tokens of a step: lengths grow.

        Args:
            plan: of this workspace, open.
            tokens: their ids, one sequence per entry; None: not known.

        Raises:
            ValueError: the numbers of ids do not fit the plan.
            StepError: only some layers have been appended.
            StalePlan: the plan has ended, or what it sees has changed. It stays open.
        """
        memory = plan._open("commit")
        plan._written()
        ids = None
        if tokens is not None:
            given = [len(t) for t in tokens]
            check(
                given == list(plan.counts),
                f"commit: tokens must have {list(plan.counts)} ids, got {given}",
            )
            ids = np.fromiter((t for row in tokens for t in row), np.int64, plan.rows)
        self.pool.used()
        memory.step.commit(ids)
        self._spare.append(plan._close())

    def abort(self, plan: Plan) -> None:
        """End a step without its tokens: nothing has changed, its pages are free."""
        self.pool.used()
        plan._open("abort").step.abort()
        self._spare.append(plan._close())

    # Changes of blocks

    def move(
        self, src: Block, dst: Block, mode: str = "auto", max_segments: int = MAX_SEGMENTS
    ) -> None:
        """Everything of a block goes to the end of another; the first is empty afterwards.

        Args:
            src: is emptied.
            dst: grows.
            mode: "splice": no key or value is touched, `dst` has more segments; "rewrite": what
                moves is copied behind `dst`, keys rotated into place; "auto": splice, and when
                `dst` has too many segments, or a quarter of its pages is filled in part, copy all
                segments that can be joined. Keys are rotated again once at most in their life.
            max_segments: too many are more than these.

        Raises:
            ValueError: unknown `mode`, or the two are the same block.
            BlockBusy: one of them is being written.
            PoolExhausted: "rewrite" finds too few free pages. Nothing has changed.
        """
        move = self.native.begin_move(
            self._id("move", src), self._id("move", dst), mode, max_segments
        )
        if move is None:
            return
        try:
            self.pool.wait()
            self.pool.rewrite(torch.from_numpy(move.copies))
            self.pool.used()
        except BaseException:
            move.cancel()
            raise
        move.finish()

    def evict(self, block: Block, start: int, stop: int, close_gap: bool = True) -> None:
        """Drop the tokens at positions [start, stop) of a block.

        Args:
            block: is changed.
            start: first position.
            stop: position after the last.
            close_gap: later tokens move up; otherwise they keep their positions.

        Raises:
            IndexError: not positions of the block in order.
            BlockBusy: the block is being written.
        """
        self.native.evict(self._id("evict", block), start, stop, close_gap)

    def truncate(self, block: Block, length: int) -> None:
        """Drop what is at position `length` and later; IndexError and BlockBusy as `evict`."""
        self.native.truncate(self._id("truncate", block), length)

    def clear(self, block: Block) -> None:
        """Drop all tokens of a block; BlockBusy if it is being written."""
        self.native.truncate(self._id("clear", block), 0)

    # Copies that share pages

    def fork_block(self, block: Block) -> Block:
        """A new block with the same tokens, in the same pages until one of them grows."""
        return self._new(self.native.fork_block(self._id("fork_block", block)), block.name)

    def fork_worker(self, worker: int, name: str | None = None) -> int:
        """A new worker with the same view, but a fork of its own block; the last in order.

        Args:
            worker: its number.
            name: of the new worker; None: the same.
        """
        name = self.worker_name(worker) if name is None else name
        fork = self.native.fork_worker(worker, name)
        own = self.native.view(fork)[-1]
        self._new(own, self.view(worker)[-1].name)
        return fork

    def fork(self) -> Workspace:
        """A workspace over the same pool with the same blocks and workers, without open steps."""
        other = Workspace.__new__(Workspace)
        other.pool, other.rope_mode = self.pool, self.rope_mode
        other.native = self.native.fork()
        other._names = self._names.copy()
        other._blocks = WeakValueDictionary()
        other._spare = []
        return other

    # Files

    def save(self, path: str | Path) -> None:
        """Write blocks, keys, values and workers to a file, without open steps.

        Args:
            path: of the file, which is replaced at once when everything is written.
        """
        files.save(self, path)

    @classmethod
    def load(cls, path: str | Path, pool: KVPool | None = None) -> Workspace:
        """A workspace from a file that `save` wrote; blocks and workers keep their numbers.

        Args:
            path: of the file.
            pool: where it goes; None: a new pool on the CPU like that of the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, is damaged, or does not fit the pool.
            PoolExhausted: too few pages are free.
        """
        return files.load(path, pool, cls)

    def _adopt(self, names: Sequence[str]) -> None:
        """Block objects for those that the native side has."""
        for id, name in enumerate(names):
            self._new(id, name)

    def stats(self) -> dict[str, int]:
        """Numbers of blocks, workers, segments and tokens of this workspace, and its pages.

        "pages" counts those of all segments, "partial_pages" those of them that a segment fills in
        part; "pages_used" and "pages_shared" are of the whole pool, "bytes_used" is their memory.
        """
        stats = self.native.stats()
        stats["bytes_used"] = stats["pages_used"] * self.pool.page_size * self.pool.token_bytes
        return stats

    def _new(self, id: int, name: str) -> Block:
        self._names[id] = name
        block = self._blocks[id] = Block(self, id, name)
        return block

    def _id(self, op: str, block: Block) -> int:
        if block.workspace is not self:
            raise LayoutError(f"{op}: block must be one of this workspace, got {block}")
        return block.id

    def _ids(self, op: str, view: Sequence[Block], who: str) -> list[int]:
        for block in view:
            if block.workspace is not self:
                raise LayoutError(
                    f"{op}: the view of {who} must have blocks of this workspace, got {block}"
                )
        return [block.id for block in view]
