"""The blocks of a session: prompt and history, headers, each worker's own, and who sees which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from alignops._checks import check
from alignops.attention.adapter import ConcurrentModel
from alignops.attention.errors import LayoutError
from alignops.attention.layouts import Cells, as_layout
from alignops.attention.prompts import Texts
from alignops.attention.tokens import Vocabulary
from alignops.attention.workers import Keep, Worker

if TYPE_CHECKING:
    from alignops.attention.workspace import Block


class Board:
    """Blocks and views of the workers of a session.

    Args:
        model: that encodes headers.
        texts: of the headers.
        layout: see `layouts.as_layout`.
        encode: "in_context": a header is encoded with the blocks before it, in the first view that
            has it; "isolated": alone, from position 0 on.
        vocabulary: that tokens are from.

    Attributes:
        ws: the workspace.
        layout: what arranges the blocks.
        common: prompt and history.
        workers: in order of their index, also those that have left.
        labels: what the blocks are, by their id: "common", or the name of a worker or of a header.

    Source: arXiv 2504.06261, section 3.2.
    """

    def __init__(
        self,
        model: ConcurrentModel,
        texts: Texts,
        layout: Any,
        encode: Literal["in_context", "isolated"],
        vocabulary: Vocabulary,
    ) -> None:
        check(
            encode in ("in_context", "isolated"),
            f"encode must be in_context or isolated, got {encode!r}",
        )
        self.layout = as_layout(layout)
        self.ws = model.workspace()
        self.common = self.ws.new_block("common")
        self.workers: list[Worker] = []
        self._model = model
        self._texts = texts
        self._isolated = encode == "isolated"
        self._vocabulary = vocabulary
        self._extra: dict[str, Block] = {}
        self._encoded: dict[str, Block] = {}  # the first block of each text
        self._aside: Block | None = None

    @property
    def labels(self) -> dict[int, str]:
        """See the class."""
        extra = {block.id: name for name, block in self._extra.items()}
        own = {worker.own.id: worker.name for worker in self.workers}
        return {self.common.id: "common", **extra, **own}

    def extend(self, block: Block, ids: Sequence[int], view: Sequence[Block] | None = None) -> None:
        """Given tokens become part of a block, in the context of a view."""
        if ids:
            self._model.prefill(self.ws, block, ids, view)

    def join(self, workers: Sequence[Worker], at: int | None = None) -> None:
        """New workers, whose own blocks are empty, get views, and headers that these need.

        Raises:
            LayoutError: the layout makes a view that is not allowed.
        """
        before = list(self.workers)
        at = len(before) if at is None else at
        self.workers[at:at] = workers
        try:
            views = self._views()
            for worker in workers:
                view = views[self.workers.index(worker)]
                worker.id = self.ws.add_worker(worker.name, view)
            self._show(views)
        except BaseException:
            self.workers[:] = before
            raise

    def leave(self, worker: Worker, keep: Keep) -> None:
        """A worker stops. Its block stays visible if it is kept and holds anything."""
        worker.active = False
        worker.visible = keep != "drop" and worker.own.length > 0
        self._show(self._views())
        self.ws.finish_worker(worker.id, "frozen" if worker.visible else "drop")

    def file(self, worker: Worker) -> None:
        """The step of a worker goes where the layout says, if it says so."""
        history = self.layout.history(self.workers.index(worker), self._cells())
        if history is not None:
            self.ws.move(worker.own, history)

    @contextmanager
    def aside(self) -> Iterator[Callable[[Sequence[int]], Tensor]]:
        """A block behind everything that is visible: a function from its new tokens to logits."""
        if self._aside is None:
            self._aside = self.ws.new_block("aside")
        block = self._aside
        view = [self.common, *(w.own for w in self.workers if w.visible), block]

        def ask(ids: Sequence[int]) -> Tensor:
            logits: Tensor = self._model.forward(self.ws, [ids], views=[view]).logits[0]
            return logits

        try:
            yield ask
        finally:
            self.ws.clear(block)

    def fork(self) -> Board:
        """The same in a workspace of its own, which shares pages."""
        twin = copy(self)
        twin.ws = self.ws.fork()
        twin.common = twin.ws.block(self.common.id)
        twin._extra = {name: twin.ws.block(b.id) for name, b in self._extra.items()}
        twin._encoded = {text: twin.ws.block(b.id) for text, b in self._encoded.items()}
        twin._aside = None
        twin.workers = [worker.fork(twin.ws.block(worker.own.id)) for worker in self.workers]
        return twin

    def _cells(self) -> Cells:
        own = {i: worker.own for i, worker in enumerate(self.workers) if worker.visible}
        return Cells(self.common, own, self._extra)

    def _views(self) -> dict[int, list[Block]]:
        """Views of the active workers by index; all blocks in them exist and are encoded."""
        names = [worker.name for worker in self.workers if worker.visible]
        asked = self.layout.blocks(names, self._texts)
        texts = {name: self._texts.filled(text) for name, text in asked.items()}
        new = [name for name in texts if name not in self._extra]
        for name in new:
            self._extra[name] = self.ws.new_block(name)
        views = self._arranged()
        twins = self._encode({self._extra[name].id: texts[name] for name in new}, views)
        for name in new:
            if self._extra[name].id in twins:
                # One copy of its keys and values is enough.
                self._extra[name] = self.ws.fork_block(self._encoded[texts[name]])
        return self._arranged() if twins else views

    def _arranged(self) -> dict[int, list[Block]]:
        cells = self._cells()
        views = {}
        for i, worker in enumerate(self.workers):
            if worker.active:
                views[i] = list(self.layout.view(i, cells))
                if not views[i] or views[i][-1].id != worker.own.id:
                    raise LayoutError(
                        f"view of worker {worker.name!r} must end with its own block, got "
                        f"{[block.name for block in views[i]]}"
                    )
        return views

    def _encode(self, texts: dict[int, str], views: dict[int, list[Block]]) -> set[int]:
        """Prefill new blocks in the order in which views show them.

        Returns:
            Blocks that stayed empty, because an encoded one has their text.
        """
        twins = set()
        waiting = {block: text for block, text in texts.items() if text}
        for view in views.values():
            for place, block in enumerate(view):
                text = waiting.pop(block.id, None)
                if text is None:
                    continue
                if text in self._encoded:
                    twins.add(block.id)
                    continue
                context = None if self._isolated else view[: place + 1]
                self.extend(block, self._vocabulary.encode(text), context)
                self._encoded[text] = block
        check(not waiting, "layout: blocks with a text must be in a view")
        return twins

    def _show(self, views: dict[int, list[Block]]) -> None:
        for i, view in views.items():
            self.ws.set_view(self.workers[i].id, view)
