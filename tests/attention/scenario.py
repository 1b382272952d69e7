"""A scripted job of several workers, for any engine: greedy tokens, steps that end by the script.

An engine has `block`, `prefill(block, ids, view)`, `move(src, dst)` and `step(views, inputs,
visibility)`, which returns the logits of the last token of each entry; see `SlowModel`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignops.attention import Workspace
from alignops.integrations.attention import HFConcurrentModel
from tests.attention.models import VOCAB

LAYOUTS = ("contiguous", "interleaved", "combined")


class Engine:
    """The package's own, with workers whose views are set once."""

    def __init__(self, model: HFConcurrentModel, move: str = "auto") -> None:
        self.model = model
        self.ws: Workspace = model.workspace()
        self.mode = move
        self.workers: dict[int, int] = {}

    def block(self) -> Any:
        return self.ws.new_block()

    def prefill(self, block: Any, ids: Sequence[int], view: Sequence[Any]) -> None:
        self.model.prefill(self.ws, block, ids, view, chunk=7)

    def move(self, src: Any, dst: Any) -> None:
        self.ws.move(src, dst, self.mode)

    def truncate(self, block: Any, length: int) -> None:
        self.ws.truncate(block, length)

    def step(
        self,
        views: Sequence[Sequence[Any]],
        inputs: Sequence[Sequence[int]],
        visibility: str = "inclusive",
    ) -> list[Tensor | None]:
        for i, view in enumerate(views):
            if i not in self.workers:
                self.workers[i] = self.ws.add_worker(f"worker {i}", view)
        workers = [self.workers[i] for i in range(len(views))]
        logits = self.model.forward(self.ws, inputs, workers=workers, visibility=visibility).logits
        return [row if ids else None for row, ids in zip(logits, inputs, strict=True)]


def views_of(layout: str, engine: Any, common: Any, owns: Sequence[Any]) -> list[list[Any]]:
    """Each worker's view; headers are made and prefilled where the layout has some."""
    if layout == "interleaved":
        return [[common, own] for own in owns]
    pivots = [_header(engine, common, [5 + i, 7]) for i in range(len(owns) - 1)]
    before, after = [], []
    if layout == "combined":
        before, after = [_header(engine, common, [3, 4, 9])], [_header(engine, common, [8, 2])]
    views = []
    for own in owns:
        others = [other for other in owns if other is not own]
        closed = [b for pair in zip(others, pivots, strict=True) for b in pair]
        views.append([common, *before, *closed, *after, own])
    return views


def _header(engine: Any, common: Any, ids: list[int]) -> Any:
    block = engine.block()
    engine.prefill(block, ids, [common, block])
    return block


def play(
    engine: Any, layout: str, workers: int, steps: int = 64, seed: int = 0, visibility: str = ""
) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of each step, -1 where a worker pauses, and all logits (n, V)."""
    script = random.Random(seed)
    common = engine.block()
    engine.prefill(common, [script.randrange(VOCAB) for _ in range(19)], [common])
    owns = [engine.block() for _ in range(workers)]
    views = views_of(layout, engine, common, owns)
    inputs = [[10 + w, *range(w + 1)] for w in range(workers)]
    tokens, logits = [], []
    for step in range(steps):
        pausing = [step > 0 and script.random() < 0.1 for _ in owns]
        given = [[] if pauses else ids for pauses, ids in zip(pausing, inputs, strict=True)]
        if not any(given):
            continue
        rows = engine.step(views, given, visibility or script.choice(["inclusive", "lagged"]))
        tokens.append([-1 if row is None else int(row.argmax()) for row in rows])
        logits += [row.float() for row in rows if row is not None]
        for w, token in enumerate(tokens[-1]):
            if token < 0:
                continue
            inputs[w] = [token]
            if script.random() < 0.12:
                if layout != "contiguous":
                    engine.move(owns[w], common)
                inputs[w] = [token, 20 + w, 30]
        if script.random() < 0.05:
            w = script.randrange(workers)
            if layout == "contiguous" and tokens[-1][w] >= 0:
                engine.truncate(owns[w], 1)
    return tokens, torch.stack(logits)
