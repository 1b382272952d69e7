"""Attention of several workers over shared blocks by definition: one softmax over a worker's view.

Keys lie in blocks as if each block began at position 0; a query is turned once for each segment of
the view instead. Everything here is differentiable, of any dtype and on any device.

Shape letters: R rows, new tokens of all workers in order; T rows of one worker; Hq query heads,
Hkv key heads, g = Hq / Hkv; D size of queries and keys, Dv of values; n keys of a segment, N of a
view; B blocks.

Source: arXiv 2504.06261.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignops.reference.attention.rope import rotate, rotations


@dataclass(frozen=True)
class Rotary:
    """Frequencies (F,), and which dimensions of a head they turn."""

    inv_freq: Tensor
    offset: int = 0
    interleaved: bool = False


@dataclass(frozen=True)
class Segment:
    """Keys in a row: key i stands at position s0 + i of its block and is stored as R(r0 + i) k.

    Attributes:
        k, v: (Hkv, n, D) and (Hkv, n, Dv).
    """

    k: Tensor
    v: Tensor
    s0: int
    r0: int


@dataclass(frozen=True)
class Seen:
    """A block as a worker sees it: positions [start, end) of it, end - start positions of the view.

    Attributes:
        bias, gain: score = gain scale q.k + bias; bias -inf hides the block and keeps its place.
    """

    block: int
    end: int
    start: int = 0
    bias: float = 0.0
    gain: float = 1.0


@dataclass(frozen=True)
class Worker:
    """New tokens of a worker, and its view, which ends with the block that they are written to.

    The new tokens stand in that block at positions end, end + 1, ... of the last entry.
    """

    rows: int
    view: Sequence[Seen]


def origins(view: Sequence[Seen]) -> list[int]:
    """Position of each block's position 0 in the view."""
    out, before = [], 0
    for seen in view:
        out.append(before - seen.start)
        before += seen.end - seen.start
    return out


def concurrent_attention(
    q: Tensor,
    blocks: Sequence[Sequence[Segment]],
    workers: Sequence[Worker],
    *,
    rope: Rotary | None = None,
    local: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every worker's new tokens over its view.

    Args:
        q: (R, Hq, D), not rotated; with `local` rotated by each token's position in its block.
        blocks: segments of each block, in order; new tokens are among them.
        workers: their rows are those of q, in order.
        rope: None: nothing is rotated.
        local: see q.
        scale: of scores; None: D^-1/2.
        softcap: c: scores become c tanh(score / c), before the bias.
        window: only keys less than so many positions before the query are seen.
        sinks: (Hq,): score of one more key with value 0.

    Returns:
        out (R, Hq, Dv) in the dtype of q, lse (R, Hq), natural, and mass (R, Hq, B), the share of
        the probability on each block, in the dtype that is computed in, float32 or wider. A row
        that sees nothing has out 0, lse -inf (that of the sink), mass 0.

    Example:
        >>> k = torch.eye(2).reshape(1, 2, 2)
        >>> blocks = [[Segment(k[:, :1], k[:, :1], 0, 0)], [Segment(k[:, 1:], k[:, 1:], 0, 0)]]
        >>> worker = Worker(1, [Seen(0, 1), Seen(1, 0)])
        >>> out, lse, mass = concurrent_attention(torch.zeros(1, 1, 2), blocks, [worker])
        >>> out.tolist(), mass.tolist()
        ([[[0.5, 0.5]]], [[[0.5, 0.5]]])
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = [segment.v.shape[-1] for block in blocks for segment in block]
    out = [q.new_zeros(0, q.shape[1], sizes[0] if sizes else q.shape[2], dtype=dtype)]
    lse, mass = (
        [q.new_zeros(0, q.shape[1], dtype=dtype)],
        [out[0].new_zeros(0, q.shape[1], len(blocks))],
    )
    first = 0
    for worker in workers:
        rows = q[first : first + worker.rows].to(dtype)
        first += worker.rows
        if worker.rows > 0:
            keys = _keys(rows, blocks, worker, rope, local, scale, softcap, window)
            for t in range(worker.rows):
                for part, x in zip(
                    (out, lse, mass), _softmax(keys, t, len(blocks), sinks), strict=True
                ):
                    part.append(x[None])
    return torch.cat(out).to(q.dtype), torch.cat(lse), torch.cat(mass)


@dataclass(frozen=True)
class _Keys:
    """Keys of a view: scores (T, Hq, N), visible (T, N), values (N, Hq, Dv), blocks (N,)."""

    scores: Tensor
    visible: Tensor
    values: Tensor
    block: Tensor


def _keys(
    q: Tensor,
    blocks: Sequence[Sequence[Segment]],
    worker: Worker,
    rope: Rotary | None,
    local: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> _Keys:
    own, origin = worker.view[-1], origins(worker.view)
    index = own.end + torch.arange(worker.rows, device=q.device)  # of new tokens in their block
    position = origin[-1] + index  # in the view
    parts = []
    for o, seen in zip(origin, worker.view, strict=True):
        for segment in blocks[seen.block]:
            groups = q.shape[1] // segment.k.shape[0]
            k, v = (x.to(q.dtype).repeat_interleave(groups, 0) for x in (segment.k, segment.v))
            # A key at position o + s0 + i is stored rotated by r0 + i.
            delta = position - o - segment.s0 + segment.r0
            if local:
                delta = delta - index
            turned = q
            if rope is not None:
                angles = rotations(rope.inv_freq, delta, q.dtype).unsqueeze(1)
                turned = rotate(q, angles, offset=rope.offset, interleaved=rope.interleaved)
            s = seen.gain * scale * torch.einsum("thd,hnd->thn", turned, k)
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            s = s + seen.bias
            place = segment.s0 + torch.arange(k.shape[1], device=q.device)  # in the block
            last = index if seen is own else torch.full_like(index, seen.end - 1)
            visible = (place >= seen.start) & (place <= last[:, None]) & (seen.bias > -math.inf)
            if window is not None:
                visible = visible & (position[:, None] - (o + place) < window)
            parts.append((s, visible, v.transpose(0, 1), torch.full_like(place, seen.block)))
    scores, seen_by, values, block = (list(part) for part in zip(*parts, strict=True))
    return _Keys(torch.cat(scores, -1), torch.cat(seen_by, -1), torch.cat(values), torch.cat(block))


def _softmax(
    keys: _Keys, t: int, blocks: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (Hq, Dv), lse (Hq,) and share of each block (Hq, B) of row t.

    Keys that are not seen are left out, not multiplied by 0: they may hold anything.
    """
    seen = keys.visible[t]
    scores, values, block = keys.scores[t][:, seen], keys.values[seen], keys.block[seen]
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(scores)[:, None]], -1)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(scores - lse[:, None])
    mass = torch.stack([p[:, block == b].sum(-1) for b in range(blocks)], -1)
    return torch.einsum("hn,nhd->hd", p, values), lse, mass
