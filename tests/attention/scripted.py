"""A model that writes what a script says, over a real workspace: for the logic around the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from alignops.attention.adapter import Forward
from alignops.attention.pool import KVPool
from alignops.attention.workspace import Workspace
from alignops.testing import ByteTokenizer

TOKENIZER = ByteTokenizer(["\n\n", ".\n\n", "**"])
THINKING = ByteTokenizer(["\n\n", ".\n\n", "<think>", "</think>"])


class ScriptedModel:
    """Each worker's sampled tokens are those of its script, then of "zzz...".

    Args:
        scripts: worker's name to text; tokens of the tokenizer.
        pages: of the pool.
        tokenizer: of the scripts.

    Attributes:
        forwards: (names or "aside", inputs, visibility) of each forward.
        prefills: (block's name, ids, names of the view's blocks).
        fail: raise this in the next forward, once.
    """

    max_length = None
    device = torch.device("cpu")

    def __init__(
        self,
        scripts: Mapping[str, str] | None = None,
        pages: int = 400,
        tokenizer: Any = TOKENIZER,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.scripts = {name: tokenizer.encode(text) for name, text in (scripts or {}).items()}
        self.pool = KVPool(1, 1, 2, dtype=torch.float32, page_size=16, num_pages=pages)
        self.forwards: list[Any] = []
        self.prefills: list[Any] = []
        self.fail: BaseException | None = None

    def workspace(self) -> Any:
        return Workspace(self.pool)

    def forward(
        self,
        ws: Any,
        inputs: Sequence[Sequence[int]],
        *,
        workers: Sequence[int] | None = None,
        views: Any = None,
        visibility: str = "inclusive",
        mass: bool = False,
        all_logits: bool = False,
    ) -> Forward:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        plan = ws.plan(
            [len(ids) for ids in inputs], visibility=visibility, workers=workers, views=views
        )
        ws.commit(plan, inputs)
        shown = views if views is not None else [ws.view(w) for w in workers or ws.workers]
        names = [view[-1].name for view in shown]
        self.forwards.append((names, [list(ids) for ids in inputs], visibility))
        logits = torch.zeros(len(inputs), self.vocab_size)
        for row, name in enumerate(names):
            script = self.scripts.get(name, [])
            logits[row, script.pop(0) if script else ord("z")] = 9.0
        blocks = tuple({block.id: block for view in shown for block in view}.values())
        shares = torch.tensor(
            [[(b.id in [c.id for c in view]) / len(view) for b in blocks] for view in shown]
        )
        return Forward(logits, shares if mass else None, blocks if mass else ())

    def prefill(
        self, ws: Any, block: Any, token_ids: Sequence[int], view: Any = None, chunk: int = 2048
    ) -> None:
        shown = [block] if view is None else list(view)
        self.prefills.append((block.name, list(token_ids), [b.name for b in shown]))
        ws.commit(ws.plan([len(token_ids)], views=[shown]), [token_ids])
