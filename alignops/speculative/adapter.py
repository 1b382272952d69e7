"""What generation needs of a model and of a drafter, and the data that it hands to them.

Any model takes part that maps token ids, positions, an attention mask and a cache to logits; a
drafter is anything that guesses tokens. Both are told about rows: a batch has `rows` of them, a row
holds one sequence at a time, and sequences come and go while others run.

Shape letters: B rows, K drafts, Q query columns of a forward, S slots of the cache that the forward
attends to, V ids, Vd ids of the drafter, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignops.speculative.caches import RaggedCache

LAYOUTS = ("ragged", "defer", "realign", "rollback")


@runtime_checkable
class ModelAdapter(Protocol):
    """A decoder-only language model as generation sees it.

    Attributes:
        vocab_size: V, columns of the logits.
        max_length: most tokens of a sequence; None: any number.
        device: of token ids, masks and logits.
        dtype: of additive masks.
        windows: kinds of layers by what they attend to: 0 all earlier tokens, w > 0 the last w.
        mask_kind: "additive" (B, 1, Q, S), 0 or the lowest value of `dtype`; "bool4d"
            (B, 1, Q, S), True is visible; "mask2d" (B, S) bool, causality and windows are the
            model's own work, and the queries are the last columns. See `build_mask`.
        layouts: of the cache that the model works with, the best one first; a subset of `LAYOUTS`.
    """

    vocab_size: int
    max_length: int | None
    device: torch.device
    dtype: torch.dtype
    windows: tuple[int, ...]
    mask_kind: str
    layouts: tuple[str, ...]

    def new_cache(self, rows: int, capacity: int, fixed: bool = False) -> RaggedCache:
        """An empty cache; `fixed`: it does not grow, and every forward sees all of it."""
        ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Sequence[Tensor],
        cache: RaggedCache,
        last: int,
    ) -> Tensor:
        """Logits of the last columns.

        Args:
            input_ids: (B, Q) int64.
            positions: (B, Q) int64.
            mask: one tensor for each of `windows`, of the kind that `mask_kind` says; one "mask2d"
                for all.
            cache: made by `new_cache`, told by `begin` where to write.
            last: 1 to Q: of how many columns logits are wanted.

        Returns:
            (B, last, V), any float dtype.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by target and drafter alike; temperature 0 is greedy.

    `race`: tokens are race winners (rule "coupled"): a drafter that draws its drafts with the same
    seeds and positions, by `propose(..., race=True)`, is accepted most often. `vocab_size` is the
    target's V: a drafter with more ids draws from the first V.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    race: bool = False
    vocab_size: int | None = None


@dataclass(frozen=True)
class Batch:
    """The rows of a round. Rows that are not active hold nothing; what they draft is ignored.

    A batch may have fewer rows than the session: the first n of them. The token that draft j of row
    b guesses is at position `lengths[b] + j`, which also counts the random words.

    Attributes:
        tokens: (B, capacity) int64: committed tokens from column 0 on, prompt included; what is
            behind `lengths` is undefined.
        lengths: (B,) int64: c_b, at least 1.
        seeds: (B,) int64.
        active: (B,) bool.
        host_lengths: `lengths` on the host, for sizes: never too small, and exact for rows of which
            the host has seen the last round.
    """

    tokens: Tensor
    lengths: Tensor
    seeds: Tensor
    active: Tensor
    host_lengths: Sequence[int]


@dataclass(frozen=True)
class Drafts:
    """What a drafter proposes.

    Attributes:
        ids: (B, K') int64, K' <= the width asked for; -1: no draft from here on. A drafter that
            knows on the host that no row has more than K' drafts returns that many columns, and the
            target computes fewer.
        logits: (B, K', Vd) that the drafts were drawn from under the session's `Sampling`, or None:
            the drafts are certain.
        stats: what `propose` has kept of each draft, for `verify`; None: verify reads `logits`.
        kind: (B,) integers: rows of one kind are about as likely to be accepted, such as those with
            equally long matches; None: nothing is known of that.
    """

    ids: Tensor
    logits: Tensor | None = None
    stats: Any = None
    kind: Tensor | None = None

    def first(self, width: int) -> Drafts:
        """The first columns."""
        logits, stats = self.logits, self.stats
        return replace(
            self,
            ids=self.ids[:, :width],
            logits=None if logits is None else logits[:, :width],
            stats=None if stats is None else stats[:, :width],
        )


class Drafter(Protocol):
    """Guesses the next tokens of each row.

    A session calls `start` once, `add` for each sequence, then for each round `propose` and
    `commit`. An interrupted round is proposed again without a commit in between: `propose` must
    start from what the last `commit`, `add` or `resume` left, and must not rely on an earlier
    `propose`.
    """

    def start(self, rows: int, capacity: int, sampling: Sampling) -> None:
        """Forget everything, and prepare for `rows` rows of up to `capacity` tokens."""
        ...

    def add(self, row: int, tokens: Tensor) -> None:
        """A sequence begins in an empty row: its committed tokens (c,) int64, c >= 1."""
        ...

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        """Drafts of every active row.

        Args:
            batch: the first B rows.
            k: (B,) int32 on the batch's device: most drafts of each row, 0 to `width`.
            width: most drafts of any row, at least 1.
        """
        ...

    def commit(self, batch: Batch, accepted: Tensor) -> None:
        """The round has ended.

        A model that drafted K tokens has keys and values of the last committed token and of all
        drafts but the last. Those of committed tokens stay: the smallest of what it had computed,
        `old length + accepted`, and `lengths - 1`. So the next proposal feeds one token, or two
        where everything was accepted, or more after rounds without drafts.

        Args:
            batch: after the round: new tokens and lengths.
            accepted: (B,) int32: drafts that were committed; 0 where a row was not active.
        """
        ...

    def remove(self, row: int) -> None:
        """The sequence of the row has ended."""
        ...

    def park(self, row: int) -> Any:
        """Take the sequence out of its row, to go on later: what `resume` needs."""
        ...

    def resume(self, row: int, tokens: Tensor, parked: Any) -> None:
        """Put a parked sequence, whose tokens (c,) are the same as then, into an empty row."""
        ...
