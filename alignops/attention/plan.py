"""The plan of a step: which rows see which keys and by what rotation, for all layers of it.

Shape letters: W entries (workers) of the step, R new tokens of all, T the most of one entry, H
heads, D columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignops._checks import check
from alignops.attention import _triton
from alignops.attention.errors import StalePlan, StepError

if TYPE_CHECKING:
    from alignops._C import AttentionStep
    from alignops.attention.pool import KVPool
    from alignops.attention.workspace import Block

# csrc/attention/plan.h
# fmt: off
HEADER = (
    "magic", "words", "workers", "rows", "segments", "blocks", "page_size", "pages", "longest",
    "tokens", "step", "types",
    # Word offsets of the tables.
    "row_ptr", "segment", "pair", "weight", "page", "row", "rope",
)
# fmt: on
SEGMENT = np.dtype(
    [(name, np.int64) for name in ("block", "n", "page", "first", "s0", "r0", "token", "_")]
)
PAIR = np.dtype([(n, np.int64) for n in ("state", "limit0", "distance0", "delta0")])
WEIGHT = np.dtype([("bias", np.float32), ("gain", np.float32)])
ROW = np.dtype([(n, np.int64) for n in ("worker", "t", "slot", "index")])
_FIELDS = {name: i for i, name in enumerate(HEADER)}


class PlanMemory:
    """What a workspace keeps for the next plan: native step, buffers, scratch memory.

    Buffers at least double when they are too small, so that steps allocate nothing after a while.
    """

    def __init__(self, step: AttentionStep, device: torch.device) -> None:
        self.step = step
        self.device = device
        self.host = torch.empty(0, dtype=torch.int64)
        self.data = self.host
        self.words = self.host.numpy()
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._uploaded: Any = None  # when the device has read `host`

    def fill(self) -> None:
        """Write the plan of the step, on the host and on the device."""
        need, cuda = self.step.words, self.device.type == "cuda"
        if len(self.host) < need:
            room = max(need, 2 * len(self.host))
            self.host = torch.empty(room, dtype=torch.int64, pin_memory=cuda)
            self.words = self.host.numpy()
            self.data = (
                torch.empty(room, dtype=torch.int64, device=self.device) if cuda else self.host
            )
        elif self._uploaded is not None:
            self._uploaded.synchronize()
        self.step.fill(self.words)
        if self.data is not self.host:
            self.data[:need].copy_(self.host[:need], non_blocking=True)
        if cuda:
            if self._uploaded is None:
                self._uploaded = torch.cuda.Event()
            self._uploaded.record(torch.cuda.current_stream(self.device))


class Plan:
    """One step, from `Workspace.plan` to `commit` or `abort`; after that it is stale.

    Attributes:
        counts: new tokens of each entry.
        rows: R, all of them; packed rows are in the order of the entries.
        row_ptr: W + 1 numbers: rows of entry w are row_ptr[w] to row_ptr[w + 1].
        blocks: all that somebody has in its view: the columns of the attention mass.
        first_positions: of each entry the position of its first new token in its view.
        workers: of each entry the number of the worker, None for explicit views of nobody.
    """

    def __init__(
        self,
        memory: PlanMemory,
        pool: KVPool,
        blocks: tuple[Block, ...],
        workers: tuple[int | None, ...],
        local: bool,
    ) -> None:
        step = memory.step
        self._memory: PlanMemory | None = memory
        self._pool = pool
        self._local = local
        self._appended = 0
        self._fitting: set[tuple[int, int, int, bool]] = set()  # sizes that scratch is enough for
        self.rows: int = step.rows
        self.row_ptr = step.row_ptr
        self.counts = tuple(b - a for a, b in zip(self.row_ptr, self.row_ptr[1:], strict=False))
        self.blocks = blocks
        self.workers = workers
        self.first_positions = step.positions
        self._host = memory.host[: step.words]
        self._data = self._host if memory.data is memory.host else memory.data[: step.words]

    @property
    def open(self) -> bool:
        """Whether it has been neither committed nor aborted."""
        return self._memory is not None

    @property
    def host(self) -> Tensor:
        """The plan as int64 words (csrc/attention/plan.h) in the memory of the host."""
        self._open("host")
        return self._host

    @property
    def data(self) -> Tensor:
        """The same words on the device of the pool."""
        self._open("data")
        return self._data

    @property
    def local_index(self) -> Tensor:
        """(R,) int64 on the device of the pool: index of each new token in its block."""
        start = int(self.host[_FIELDS["row"]])
        return self.data[start + 3 : start + 4 * self.rows : 4]

    def position_ids(self) -> Tensor:
        """Positions that the model is to be run with.

        Returns:
            (W, T) int64 on the device of the pool, valid tokens last: zeros, so that queries and
            keys arrive unrotated; in a workspace with rope_mode "local" the index of each token in
            its block.
        """
        index = self.local_index
        longest = max(self.counts, default=0)
        out = torch.zeros(len(self.counts), longest, dtype=torch.int64, device=index.device)
        if self._local:
            for row, (start, count) in enumerate(zip(self.row_ptr, self.counts, strict=False)):
                if count > 0:
                    out[row, longest - count :] = index[start : start + count]
        return out

    def rows_of(self, x: Tensor) -> Tensor:
        """(R, H, D) of (W, H, T, D) whose valid tokens are the last ones of each row."""
        check(
            x.dim() == 4
            and x.shape[0] == len(self.counts)
            and x.shape[2] >= max(self.counts, default=0),
            f"rows_of: x must have shape (W={len(self.counts)}, H, "
            f"T>={max(self.counts, default=0)}, D), got {tuple(x.shape)}",
        )
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if len(flat) == self.rows else flat[self._places(x.shape[2], x.device)]

    def unpack(self, x: Tensor, longest: int | None = None, fill: float = 0.0) -> Tensor:
        """(W, H, T, ...) of (R, H, ...), valid tokens last, `fill` where there is none.

        Args:
            x: packed rows.
            longest: T; None: the most tokens of an entry.
            fill: value of what is not a token.
        """
        workers, longest = len(self.counts), longest or max(self.counts, default=0)
        check(
            x.dim() >= 2 and len(x) == self.rows,
            f"unpack: x must have shape (R={self.rows}, H, ...), got {tuple(x.shape)}",
        )
        if len(x) != workers * longest:
            flat = x.new_full((workers * longest, *x.shape[1:]), fill)
            flat[self._places(longest, x.device)] = x
            x = flat
        batch: Tensor = x.unflatten(0, (workers, longest))
        return batch.transpose(1, 2)

    def _places(self, longest: int, device: torch.device) -> Tensor:
        """(R,) row w T + t of each token in a batch whose rows end with their tokens."""
        ends = range(longest, longest * (len(self.counts) + 1), longest)
        return torch.tensor(
            [i for end, n in zip(ends, self.counts, strict=True) for i in range(end - n, end)],
            device=device,
            dtype=torch.int64,
        )

    def scratch(self, q_heads: int, kv_heads: int, v_head_dim: int, mass: bool) -> Tensor:
        """Memory for `concurrent_attention` on the pool's device: uint8, the same for each call."""
        memory, device = self._open("scratch"), self._pool.device
        sizes = (q_heads, kv_heads, v_head_dim, mass)
        if sizes in self._fitting:
            return memory.scratch
        if device.type == "cuda":
            widest = max(self._pool.head_dims)
            need = _triton.scratch_bytes(self._host, device, widest, *sizes)
        else:
            need = torch.ops.alignops.attention_scratch(self._host, *sizes)
        if len(memory.scratch) < need:
            memory.scratch = torch.empty(
                max(need, 2 * len(memory.scratch)), dtype=torch.uint8, device=device
            )
        self._fitting.add(sizes)
        return memory.scratch

    def require(self, layer: int, op: str) -> None:
        """Raise unless an operator may run on a layer now.

        Args:
            layer: number of the layer.
            op: "append", which goes through the layers once and in order, or "attend", which may
                follow as often as wanted.

        Raises:
            IndexError: there is no such layer.
            StalePlan: the plan was committed or aborted, or what it sees has changed.
            StepError: it is not the layer's turn.
        """
        memory = self._open(op)
        if not 0 <= layer < self._pool.num_layers:
            raise IndexError(f"{op}: layer must be below {self._pool.num_layers}, got {layer}")
        if not memory.step.fresh:
            raise StalePlan(
                f"{op}: the plan must see what it was made for, got lengths or a layout that have "
                "changed since; abort it and make a new one"
            )
        if op == "append":
            if layer != self._appended:
                raise StepError(
                    f"append: layer must be {self._appended}, the next of this step, got {layer}"
                )
            self._appended += 1
        elif layer >= self._appended and self.rows > 0:
            raise StepError(
                f"attend: layer must have been appended in this step ({self._appended} layers "
                f"have), got {layer}"
            )

    def decode(self) -> dict[str, Any]:
        """Numbers of the header and views of all tables (csrc/attention/plan.h) by their names.

        "segment" (S,), "pair" and "weight" (S, W) and "row" (R,) are structured arrays, "row_ptr"
        and "page" int64; "rope" is a list of float32 arrays (S W + T + R, F, 2), one per type.
        """
        words = self.host.numpy()
        out: dict[str, Any] = {name: int(words[i]) for i, name in enumerate(HEADER)}
        s, w, r = out["segments"], out["workers"], out["rows"]

        def table(name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
            start = out[name]
            return words[start : start + count * dtype.itemsize // 8].view(dtype)

        ropes = table("rope", np.dtype([("pairs", np.int64), ("table", np.int64)]), out["types"])
        turns = s * w + out["longest"] + r
        out["rope"] = [
            words[start : start + turns * pairs].view(np.float32).reshape(turns, pairs, 2)
            for pairs, start in ropes.tolist()
        ]
        out["row_ptr"] = table("row_ptr", np.dtype(np.int64), w + 1)
        out["segment"] = table("segment", SEGMENT, s)
        out["pair"] = table("pair", PAIR, s * w).reshape(s, w)
        out["weight"] = table("weight", WEIGHT, s * w).reshape(s, w)
        out["page"] = table("page", np.dtype(np.int64), out["pages"])
        out["row"] = table("row", ROW, r)
        return out

    def _open(self, op: str) -> PlanMemory:
        if self._memory is None:
            raise StalePlan(f"{op}: the plan must be open, got one that was committed or aborted")
        return self._memory

    def _written(self) -> None:
        """StepError unless all layers have been appended, or none (the caller wrote them)."""
        if 0 < self._appended < self._pool.num_layers:
            raise StepError(
                f"commit: all {self._pool.num_layers} layers must have been appended, got "
                f"{self._appended}"
            )

    def _close(self) -> PlanMemory:
        memory = self._open("close")
        self._memory = None
        return memory
