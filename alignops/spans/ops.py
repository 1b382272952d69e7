"""Span operators over `torch.ops.alignops.spans_*`, with fake kernels and gradients.

Shape letters: N suffixes, V size of the vocabulary, R rows, K candidates per row, T tokens of a
response. The searches take one shard of an index as tensors, on the CPU or on a GPU, and rows of
token ids as one tensor with offsets, int64 (R + 1). They are not differentiable.

The fake kernels make the checks of the native code: the same type, the same argument. Values are
checked on the CPU only. On a GPU, where nothing waits for a result, an id that does not exist
occurs nowhere, and numbers that point outside a tensor are clamped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignops._checks import FLOAT_DTYPES, check, check_layout, dtype_name

if TYPE_CHECKING:
    from alignops.spans.index import SpanIndex

_op = torch.ops.alignops

#: Bits of a token by dtype of the text.
_TOKEN_BITS = {torch.uint8: 8, torch.uint16: 16, torch.uint32: 32}
#: A `max_count` that nothing exceeds.
NO_LIMIT = 2**63 - 1
#: Code of each carrier of the penalty.
CARRIERS = {"unlikelihood": 0, "logp": 1}
_LARGEST_LOGP, _LEAST_LOGP = -1e-6, -20.0


class IndexTensors(NamedTuple):
    """One shard of an index as tensors.

    Attributes:
        text: uint8, uint16 or uint32: all documents, each followed by the largest number of the
            dtype.
        suf: uint32 (N,), or uint8 (N, 5) little-endian: sorted positions of the suffixes.
        first: int64 (V + 1,): suffixes that start with token t have the ranks [first[t],
            first[t + 1]).
    """

    text: Tensor
    suf: Tensor
    first: Tensor

    @classmethod
    def load(cls, index: SpanIndex, shard: int = 0, device: Any = None) -> IndexTensors:
        """Read a shard into memory, verified, and move it to a device.

        Raises:
            IndexCorruptError: a file is damaged.
            ValueError: documents were removed from the index, which tensors would count.
        """
        if len(index.removed):
            raise ValueError(
                f"IndexTensors.load: index must be without removed documents, got "
                f"{len(index.removed)}: build it anew"
            )
        index.verify("full")
        text, suf = index._store.arrays(shard)
        counts = np.bincount(text, minlength=index.vocab_size)[: index.vocab_size]
        first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        return cls(*(torch.from_numpy(a).to(device) for a in (text, suf, first)))


def find(index: IndexTensors, tokens: Tensor, offsets: Tensor) -> Tensor:
    """Ranks [lo, hi) of the suffixes that start with each row: hi - lo counts its occurrences.

    Args:
        index: on the device of the other tensors.
        tokens: int64, the ids of all rows.
        offsets: int64 (R + 1,) from 0 to the number of tokens; row r is tokens[offsets[r]:
            offsets[r + 1]].

    Returns:
        int64 (R, 2); of the empty row, [0, N). Without an occurrence both are the rank where it
        would stand.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the offsets fall.
        IndexError: an id is outside the vocabulary.
    """
    result: Tensor = _op.spans_find(*index, tokens, offsets)
    return result


def next_counts(index: IndexTensors, tokens: Tensor, offsets: Tensor, cand: Tensor) -> Tensor:
    """How often each row followed by each of its candidates occurs.

    Args:
        index: on the device of the other tensors.
        tokens: int64, the ids of all rows.
        offsets: int64 (R + 1,).
        cand: int64 (R, K), candidates.

    Returns:
        int64 (R, K).

    Raises:
        ValueError, IndexError: as `find`.
    """
    result: Tensor = _op.spans_next_counts(*index, tokens, offsets, cand)
    return result


class PeekTensors(NamedTuple):
    """What candidates lead to, (R, K) each: bool flag, int64 length and count, float64 bci."""

    flag: Tensor
    length: Tensor
    count: Tensor  # type: ignore[assignment]
    bci: Tensor


def peek(
    index: IndexTensors,
    tokens: Tensor,
    offsets: Tensor,
    cand: Tensor,
    surprisal: Tensor,
    tau: float = 20.0,
    min_len: int = 8,
    max_count: int | None = None,
) -> PeekTensors:
    """The longest suffix that occurs of each row followed by each of its candidates.

    What `SpanMatcher.peek` says of rows with these tokens, without a state: on a GPU, the step of
    a decoder captured as a graph.

    Args:
        index: on the device of the other tensors.
        tokens: int64, the ids of all rows.
        offsets: int64 (R + 1,).
        cand: int64 (R, K), candidates.
        surprisal: float64 (V,), -ln P of each token.
        tau: a suffix is flagged if the sum of its surprisals is larger,
        min_len: it has at least so many tokens,
        max_count: and occurs at most so often; None: however often.

    Returns:
        Flags, lengths, occurrences and sums.

    Raises:
        ValueError, IndexError: as `find`.
    """
    limit = NO_LIMIT if max_count is None else max_count
    return PeekTensors(
        *_op.spans_peek(*index, tokens, offsets, cand, surprisal, tau, min_len, limit)
    )


# Fake kernels


def _check_index(text: Tensor, suf: Tensor, first: Tensor, op: str) -> int:
    check(
        text.dtype in _TOKEN_BITS,
        f"{op}: text must be uint8, uint16 or uint32, got {dtype_name(text.dtype)}",
    )
    check(text.dim() == 1, f"{op}: text must have one dimension, got shape {tuple(text.shape)}")
    check_layout(text, text.dtype, tuple(text.shape), op, "text")
    packed = suf.dtype == torch.uint8
    check(
        suf.dim() == (2 if packed else 1),
        f"{op}: suf must be uint32 (n,) or uint8 (n, 5), got {dtype_name(suf.dtype)} of shape "
        f"{tuple(suf.shape)}",
    )
    shape = (suf.shape[0], 5) if packed else (suf.shape[0],)
    check_layout(suf, torch.uint8 if packed else torch.uint32, shape, op, "suf")
    check(
        suf.shape[0] <= text.shape[0],
        f"{op}: suf must be no longer than text, {text.shape[0]}, got {suf.shape[0]}",
    )
    check(
        first.dim() == 1 and first.shape[0] >= 1,
        f"{op}: first must have shape (vocab_size + 1,), got {tuple(first.shape)}",
    )
    check_layout(first, torch.int64, tuple(first.shape), op, "first")
    vocab = first.shape[0] - 1
    most = 2 ** _TOKEN_BITS[text.dtype] - 1
    check(
        vocab <= most,
        f"{op}: first must have at most {most + 1} elements for this text, got {vocab + 1}",
    )
    return vocab


def _check_ragged(tokens: Tensor, offsets: Tensor, op: str) -> int:
    check(
        tokens.dim() == 1, f"{op}: tokens must have one dimension, got shape {tuple(tokens.shape)}"
    )
    check_layout(tokens, torch.int64, tuple(tokens.shape), op, "tokens")
    check(
        offsets.dim() == 1 and offsets.shape[0] >= 1,
        f"{op}: offsets must have shape (rows + 1,), got {tuple(offsets.shape)}",
    )
    check_layout(offsets, torch.int64, tuple(offsets.shape), op, "offsets")
    return offsets.shape[0] - 1


def _check_candidates(cand: Tensor, rows: int, op: str) -> None:
    check(
        cand.dim() == 2 and cand.shape[0] == rows,
        f"{op}: cand must have shape ({rows}, width), got {tuple(cand.shape)}",
    )
    check_layout(cand, torch.int64, tuple(cand.shape), op, "cand")


@torch.library.register_fake("alignops::spans_find")
def _(text: Tensor, suf: Tensor, first: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    op = "spans_find"
    _check_index(text, suf, first, op)
    return tokens.new_empty((_check_ragged(tokens, offsets, op), 2))


@torch.library.register_fake("alignops::spans_next_counts")
def _(
    text: Tensor, suf: Tensor, first: Tensor, tokens: Tensor, offsets: Tensor, cand: Tensor
) -> Tensor:
    op = "spans_next_counts"
    _check_index(text, suf, first, op)
    _check_candidates(cand, _check_ragged(tokens, offsets, op), op)
    return torch.empty_like(cand)


@torch.library.register_fake("alignops::spans_peek")
def _(
    text: Tensor,
    suf: Tensor,
    first: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    cand: Tensor,
    surprisal: Tensor,
    tau: float,
    min_len: int,
    max_count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "spans_peek"
    vocab = _check_index(text, suf, first, op)
    _check_candidates(cand, _check_ragged(tokens, offsets, op), op)
    check_layout(surprisal, torch.float64, (vocab,), op, "surprisal")
    check(math.isfinite(tau), f"{op}: tau must be finite, got {tau}")
    check(min_len >= 1, f"{op}: min_len must be positive, got {min_len}")
    check(max_count >= 1, f"{op}: max_count must be positive, got {max_count}")
    return (
        torch.empty_like(cand, dtype=torch.bool),
        torch.empty_like(cand),
        torch.empty_like(cand),
        torch.empty_like(cand, dtype=torch.float64),
    )


# Penalty


def cbd_penalty(
    logps: Tensor, mask: Tensor, weights: Tensor, carrier: str = "unlikelihood"
) -> Tensor:
    """Sum over tokens of a_t u_t, which grows with the probability of weighted tokens.

    u_t = -ln(1 - p_t) from l = min(ln p_t, -1e-6), with the gradient p / (1 - p) at that l, so that
    it does not vanish there: on the logits of the model it is at most 1. Tokens of weight 0 get a
    gradient of exactly 0.

    Args:
        logps: (..., T) ln p_t under the model, float32, bfloat16, float16 or float64.
        mask: bool (..., T), which tokens are part of the response; others may hold anything.
        weights: (..., T) a_t, finite and not negative; no gradient flows into them.
        carrier: "unlikelihood"; or "logp": u_t = max(ln p_t, -20), for comparison.

    Returns:
        (...,) float32, or float64 if logps are.

    Raises:
        ValueError: shapes differ, the carrier is unknown, weights need a gradient, or on the CPU
            logps hold NaN or more than 1e-4, or weights a bad value: the message names the row.

    Source: a differentiable carrier of ours for the loss of arXiv 2508.02063 (CBD).

    Example:
        >>> import torch
        >>> logps = torch.tensor([[0.5, 0.75]]).log()
        >>> cbd_penalty(logps, torch.tensor([[True, True]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.6931])
    """
    op = "cbd_penalty"
    if carrier not in CARRIERS:
        raise ValueError(f"{op}: carrier must be one of {', '.join(CARRIERS)}, got {carrier!r}")
    if weights.requires_grad:
        raise ValueError(f"{op}: weights must not require a gradient: they come from data")
    result: Tensor = _op.spans_cbd_penalty(
        logps, mask.bool().contiguous(), weights.float().contiguous(), CARRIERS[carrier]
    )
    return result


@torch.library.register_fake("alignops::spans_cbd_penalty")
def penalty_output(logps: Tensor, mask: Tensor, weights: Tensor, carrier: int) -> Tensor:
    """Checks the arguments of the operator and allocates its result."""
    op = "spans_cbd_penalty"
    check(
        logps.dtype in (*FLOAT_DTYPES, torch.float64),
        f"{op}: logps must be float32, float64, bfloat16 or float16, got {dtype_name(logps.dtype)}",
    )
    check(logps.dim() >= 1, f"{op}: logps must have at least one dimension, got a scalar")
    check_layout(mask, torch.bool, tuple(logps.shape), op, "mask")
    check_layout(weights, torch.float32, tuple(logps.shape), op, "weights")
    check(
        carrier in CARRIERS.values(),
        f"{op}: carrier must be 0 (unlikelihood) or 1 (logp), got {carrier}",
    )
    wide = logps.dtype == torch.float64
    return logps.new_empty(logps.shape[:-1], dtype=torch.float64 if wide else torch.float32)


def penalty_on_gpu(logps: Tensor, mask: Tensor, weights: Tensor, carrier: int) -> Tensor:
    """The operator for CUDA tensors, in torch's own: a few launches in a whole step of training."""
    for name, t in (("mask", mask), ("weights", weights)):
        check(
            t.device == logps.device,
            f"spans_cbd_penalty: {name} must be on {logps.device}, got {t.device}",
        )
    out = penalty_output(logps, mask, weights, carrier)
    used, values = mask & (weights != 0), logps.to(out.dtype)
    if carrier == CARRIERS["logp"]:
        u = values.clamp(min=_LEAST_LOGP)
    else:
        logp = values.clamp(max=_LARGEST_LOGP)
        u = torch.where(logp > -math.log(2), -(-logp.expm1()).log(), -(-logp.exp()).log1p())
    return torch.where(used, weights * u, 0.0).sum(-1, dtype=out.dtype)


torch.library.impl("alignops::spans_cbd_penalty", "CUDA", penalty_on_gpu)


def _penalty_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logps, mask, weights, ctx.carrier = inputs
    ctx.save_for_backward(logps, mask, weights)


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    logps, mask, weights = ctx.saved_tensors
    values = logps.to(grad.dtype)
    if ctx.carrier == CARRIERS["logp"]:
        slope = (values >= _LEAST_LOGP).to(grad.dtype)
    else:
        logp = values.clamp(max=_LARGEST_LOGP)
        slope = logp.exp() / -logp.expm1()
    used = mask & (weights != 0)
    return (
        torch.where(used, grad[..., None] * weights * slope, 0.0).to(logps.dtype),
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "alignops::spans_cbd_penalty", _penalty_backward, setup_context=_penalty_context
)
