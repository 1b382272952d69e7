"""What sessions need of a model: a pool for its keys and values, and forwards of several workers.

Any model takes part that can run the layers of one step over a plan: for models of transformers
`alignops.integrations.attention.concurrent_model` makes one, others call `append_kv` and
`concurrent_attention` in their own attention layers.

Letters: n entries of a forward, T_w new tokens of entry w, V ids, B blocks that an entry may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alignops.attention.pool import KVPool
    from alignops.attention.workspace import Block, Workspace


@dataclass(frozen=True)
class Forward:
    """What a forward returns.

    Attributes:
        logits: (n, V) of the last new token of each entry, in the model's dtype; with `all_logits`
            a list of n tensors (T_w, V). The row of an entry without new tokens is NaN: there is
            nothing to sample from.
        mass: (n, B) float32: the attention probability that fell on each block, the mean over
            layers, heads and the new tokens of the entry; None unless asked for. Rows add up to 1
            where the model has no sinks, and are 0 for an entry without new tokens.
        blocks: what the columns of `mass` are; empty unless asked for.
    """

    logits: Tensor | list[Tensor]
    mass: Tensor | None = None
    blocks: tuple[Block, ...] = ()


@runtime_checkable
class ConcurrentModel(Protocol):
    """A causal language model as concurrent sessions see it.

    Attributes:
        pool: keys and values of all workspaces of this model.
        vocab_size: V, columns of the logits.
        max_length: positions that the model was made for; None: any number.
        device: of the logits.
    """

    pool: KVPool
    vocab_size: int
    max_length: int | None
    device: torch.device

    def workspace(self) -> Workspace:
        """A new workspace over `pool`, with the rotation mode of the model."""
        ...

    def forward(
        self,
        ws: Workspace,
        inputs: Sequence[Sequence[int]],
        *,
        workers: Sequence[int] | None = None,
        views: Sequence[Sequence[Block]] | None = None,
        visibility: str = "inclusive",
        mass: bool = False,
        all_logits: bool = False,
    ) -> Forward:
        """One step: plan, run all layers, commit the new tokens.

        Whatever is raised on the way, lengths are then as before and pages are returned.

        Args:
            ws: made by `workspace`.
            inputs: the new token ids of each entry; some or all may have none.
            workers: who the entries are; None: all active ones in ascending order.
            views: one list of blocks per entry instead of the workers' own views, each ending with
                the block that is written; then the entries need not be workers.
            visibility: "inclusive": entries see each other's tokens of this very step; "lagged":
                they see other blocks as they were before.
            mass: also return how much attention each block got.
            all_logits: return the logits of all new tokens.

        Raises:
            ValueError: `inputs` do not fit the entries, or ids are out of range.
            LayoutError, StalePlan, BlockBusy, PoolExhausted: as `Workspace.plan`.
            PositionError: positions beyond `max_length`, where the model was told to refuse them.
        """
        ...

    def prefill(
        self,
        ws: Workspace,
        block: Block,
        token_ids: Sequence[int],
        view: Sequence[Block] | None = None,
        chunk: int = 2048,
    ) -> None:
        """Append given tokens to a block in the context of a view: prompts, headers, remarks.

        Chunks that were committed before an error stay.

        Args:
            ws: made by `workspace`.
            block: that is written.
            token_ids: any number of them, also none.
            view: blocks that the tokens see, in order, ending with `block`; None: only the block.
            chunk: most tokens per forward, at least 1.

        Raises:
            ValueError: `chunk` or ids are out of range.
            LayoutError: the view does not end with the block.
        """
        ...
