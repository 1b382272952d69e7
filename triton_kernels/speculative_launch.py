"""What the launchers of the speculative core share: arguments, outputs, the read of all rows.

Letters: B sequences, K drafts, V ids (Vd of the drafter), T tiles of 4096 ids.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import speculative_rows as rows
from . import speculative_stats as steps
from .speculative_chains import RULES

TILE = 4096
RECORD = rows.RECORD.value
BINS = rows.BINS.value
RESAMPLE, DESCEND, NO_RETRY = range(3)
# Products and sums are rounded by themselves: what decisions rest on.
EXACT = {"enable_fp_fusion": False}
# Programs that hold a tile, and those that hold a few words.
WIDE: dict[str, Any] = {"num_warps": 8, **EXACT}
NARROW: dict[str, Any] = {"num_warps": 1, **EXACT}


def device_of(t: Tensor) -> torch.cuda.device | nullcontext[None]:
    """Kernels are launched on the device of their arguments."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def bits_of(value: float) -> int:
    """A float64 argument: Triton rounds floats to float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@dataclass(frozen=True)
class Warp:
    """How logits become a law: float32 temperatures (B,), 0: greedy; filters (B,) or None."""

    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None

    @property
    def filters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of each sequence."""
        return self.top_k, self.top_p, self.min_p

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time constants of the kernels."""
        names = ("HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P")
        return {name: f is not None for name, f in zip(names, self.filters, strict=True)}


@dataclass(frozen=True)
class Drafts:
    """Draft ids int64 (B, K), how many count (B,) or None, rows of packed logits, active rows.

    Without ids all K rows are real, those of a tree.
    """

    ids: Tensor | None
    shape: tuple[int, int]
    lens: Tensor | None = None
    cu: Tensor | None = None
    active: Tensor | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time constants of the kernels."""
        return {
            "PACKED": self.cu is not None,
            "HAS_LENS": self.lens is not None,
            "HAS_ACTIVE": self.active is not None,
            "K_PAD": triton.next_power_of_2(self.shape[1] + 1) if self.ids is not None else 0,
        }


@dataclass(frozen=True)
class Laws:
    """Logits (or probabilities) of every row, and what one read of them has found.

    `logits` (B, rows, V), or (sum of rows, V) where the drafts say where rows begin.
    """

    logits: Tensor
    is_probs: bool
    records: Tensor

    @property
    def size(self) -> int:
        """V, or Vd."""
        return self.logits.shape[-1]

    @property
    def tiles(self) -> int:
        """T."""
        return -(-self.size // TILE)

    @property
    def strides(self) -> tuple[int, int]:
        """Of sequences and of their rows; of packed ones the number and the stride of rows."""
        s = self.logits.stride()
        return (self.logits.shape[0], s[0]) if self.logits.dim() == 2 else (s[0], s[1])


def read(
    logits: Tensor,
    is_probs: bool,
    drafts: Drafts,
    warp: Warp,
    extra: int,
    *,
    sums: bool = True,
    at: Tensor | None = None,
    block: int = TILE,
) -> Laws:
    """One read of all rows; with filters more of those rows that have them.

    Of a sequence with k drafts the first k + extra rows are real. `at` (B,): only these rows.
    """
    b, k = drafts.shape
    per_sequence = 1 if at is not None else k + extra
    count = b * per_sequence
    records = torch.empty((count, RECORD), dtype=torch.int64, device=logits.device)
    laws = Laws(logits, is_probs, records)
    t = laws.tiles
    if count == 0:
        return laws
    tops, peaks, best = records.new_empty((3, count, t), dtype=torch.int32)
    part = records.new_empty((count, t))
    values = records.new_empty((count, t), dtype=torch.float32)
    common = (
        *(logits, drafts.cu, *laws.strides, drafts.ids, drafts.lens, drafts.active, at),
        warp.temperature,
    )
    flags = {
        **drafts.flags,
        "PACKED": drafts.cu is not None and extra > 0,  # drafter's rows never are
        "HAS_AT": at is not None,
        "IS_PROBS": is_probs,
        "SUMS": sums,
        "BLOCK": block,
    }
    rows.tiles_kernel[(count, t)](
        *common, tops, part, peaks, values, best, per_sequence, extra, k, laws.size, **flags, **WIDE
    )
    filtered = sums and any(f is not None for f in warp.filters)
    rows.rows_kernel[(count,)](
        *common, *warp.filters, tops, part, peaks, values, best,
        records.new_empty((count, BINS)) if filtered else None, records,
        per_sequence, extra, k, laws.size, t, T_PAD=triton.next_power_of_2(t),
        **flags, **warp.flags, **(WIDE if filtered else NARROW),
    )  # fmt: skip
    return laws


def restore(stats: Tensor, draft: Tensor, is_probs: bool) -> Laws:
    """Laws of the drafter by the statistics (B, K, 6) of its steps: nothing is read."""
    count = stats.shape[0] * stats.shape[1]
    laws = Laws(draft, is_probs, stats.new_empty((count, RECORD)))
    if count > 0:
        steps.restore_kernel[(count,)](stats, laws.records, IS_PROBS=is_probs, **NARROW)
    return laws


@dataclass(frozen=True)
class Rule:
    """A rule of `alignops.reference.speculative.rules` and its parameters."""

    name: str
    eps: float = 0.09
    delta: float = 0.3
    below_best: float = -1.0  # `delta` of `relaxed`; below 0: r counts
    m: int = 3
    r: float = 0.5
    t_single: float = 1.0
    t_acc: float = 1.0
    p_th: float = 0.01
    top_n: int = 20
    trials: int = 5
    retry: int = RESAMPLE
    warped: bool = False  # the student's test uses the warped law
    gamma: float = 0.4
    word_start: Tensor | None = None  # (V,)
    eos_lookahead: int = 16
    given: Tensor | None = None  # int32 (B,)

    @classmethod
    def of(
        cls, code: int, numbers: Sequence[float], word_start: Tensor | None, given: Tensor | None
    ) -> Rule:
        """The rule of the operator `speculative_verify`."""
        name = RULES[code]
        rule = cls(name, word_start=word_start, given=given)
        if name == "typical":
            return replace(rule, eps=numbers[0], delta=numbers[1])
        if name == "relaxed":
            return replace(rule, m=int(numbers[0]), r=numbers[1], below_best=numbers[2])
        if name == "threshold":
            return replace(rule, t_single=numbers[0], t_acc=numbers[1])
        if name == "rsd":
            p_th, top_n, trials, retry, warped = numbers
            return replace(
                rule,
                p_th=p_th,
                top_n=int(top_n),
                trials=int(trials),
                retry=int(retry),
                warped=warped != 0,
            )
        if name == "nudge":
            return replace(rule, gamma=numbers[0], eos_lookahead=int(numbers[1]))
        return rule


@dataclass(frozen=True)
class Words:
    """Seeds and positions int64 (B,), or random words uint32 (B, K + 1, 2) instead."""

    seeds: Tensor | None
    positions: Tensor | None
    given: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """What `verify` fills: shapes and types as those of `alignops.speculative.VerifyOut`."""

    accept_len: Tensor
    next_token: Tensor
    num_emitted: Tensor
    tokens: Tensor
    cu_emitted: Tensor
    flat: Tensor
    source: Tensor
    finished: Tensor
    row_error: Tensor
    state: Tensor
    zero_q: Tensor

    @classmethod
    def of_tree(cls, *results: Tensor) -> Outputs:
        """Those of a tree, which has no state."""
        *most, zero_q = results
        return cls(*most, torch.empty_like(most[-1]), zero_q)
