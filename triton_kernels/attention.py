"""Launchers of the attention core on GPUs: attend, append, rewrite.

What a launch depends on are shapes: of q, of the outputs, of the pool, and the size of the scratch
buffer, which limits the number of parts. Lengths, segments, pages, rotations and rows come from the
plan in device memory; nothing is read by the host, nothing is allocated. So a captured call may be
replayed after another plan has been copied into the same buffer, with any number of tokens,
segments, blocks and workers, as long as it has no more rows and blocks than q and mass: rows behind
its own give 0, -inf and 0, and nothing is appended of them. Capture with scratch for long plans.

In Triton because one source serves the tensor-core tiles of all dtypes. Arguments are not checked
here, except for shapes that no kernel serves. Letters: R rows, Hq query and Hkv KV heads, D and Dv
columns of keys and values, P slots per page, B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .attention_attend import attend_kernel, reduce_kernel
from .attention_plan import UNSPLIT
from .attention_write import append_kernel, rewrite_kernel

WIDEST = 576
LAYERS_PER_LAUNCH, PROGRAMS_PER_RUN = 16, 4
PROGRAMS_PER_PROCESSOR = 2
# Products and sums may be fused: what Triton did by default before 3.10.
CHUNK = 1024  # queries are rotated in pieces of so many numbers, for 4 warps
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, warps of a program, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def _pieces(width: int) -> tuple[int, int]:
    """A power of two and what a second one must hold of the rest, both at least 16 or 0."""
    first = 1 << (width.bit_length() - 1)
    if first < 16:
        return 16, 0
    rest = width - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


@dataclass(frozen=True)
class Shape:
    """Of a call of `attend`: R, Hq, Hkv, D, Dv, bytes of a number of q, B (0: no mass)."""

    rows: int
    q_heads: int
    kv_heads: int
    d: int
    dv: int
    q_bytes: int
    blocks: int = 0

    @property
    def lines(self) -> int:
        """Rows of the products: R g."""
        return self.rows * (self.q_heads // self.kv_heads)

    @property
    def tiles(self) -> Tiles:
        """Tiles that fit the shared memory of every supported GPU."""
        height = min(64, max(16, triton.next_power_of_2(self.lines)))
        width = max(self.d, self.dv)
        if self.q_bytes == 4:  # products of float32 go without tensor cores, from registers
            return Tiles(16, 32 if width <= 128 else 16, 4, 1)
        if width > 256:
            return Tiles(min(height, 32), 16, 8, 3)
        keys = 64 if width <= 128 else 32
        return Tiles(height, keys, 8 if height * width > 32 * 128 else 4, 3)

    def columns_of_tiles(self, tiles: Tiles) -> int:
        """Tiles that hold all rows of a KV head."""
        return triton.cdiv(self.lines, tiles.rows)

    def turned_bytes(self, tiles: Tiles) -> int:
        """Scratch of one part for rotated queries: a tile of each program."""
        lines = self.columns_of_tiles(tiles) * tiles.rows
        return self.kv_heads * lines * sum(_pieces(self.d)) * self.q_bytes

    def state_bytes(self) -> int:
        """Scratch of one part for A, m, l and a sum per block."""
        return 4 * self.rows * self.q_heads * (self.dv + 2 + self.blocks)

    def most_parts(self, processors: int) -> int:
        """Parts that give every multiprocessor its programs."""
        programs = self.kv_heads * self.columns_of_tiles(self.tiles)
        return max(1, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs))

    def scratch_bytes(self, parts: int, tiles: Tiles | None = None) -> int:
        """Scratch for so many parts. A single one writes the result without a state."""
        turned = parts * self.turned_bytes(tiles or self.tiles)
        return turned + (parts * self.state_bytes() if parts > 1 else 0)

    def wanted_bytes(self, tokens: int, processors: int) -> int:
        """Scratch for a plan with so many keys: more than this is not used."""
        return self.scratch_bytes(self.most_parts(processors) if tokens >= UNSPLIT.value else 1)


def _device(t: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":  # interpreted
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def _product_dtype(q: Tensor, k: Tensor) -> tl.dtype:
    if q.dtype == torch.float32:
        return tl.float32
    if k.dtype == torch.float16:
        return tl.float16
    # The interpreter cannot multiply bfloat16; operands are rounded to it all the same.
    return tl.float32 if knobs.runtime.interpret else tl.bfloat16


def _check_shape(op: str, t: Tensor, heads: tuple[int, int], d: int, dv: int, page: int) -> None:
    if d > WIDEST or dv > WIDEST or d == 0 or dv == 0 or page & (page - 1):
        raise NotImplementedError(
            f"{op}: no kernel for device {t.device.type}, dtype {t.dtype}, heads {heads}, head_dim "
            f"{d}, v_head_dim {dv}, page_size {page}: dims must be 1..{WIDEST}, pages a power of 2"
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sinks: Tensor | None,
    rope: int,
    offset: int,
    interleaved: bool,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
    lse: Tensor | None,
    mass: Tensor | None,
    scratch: Tensor,
    *,
    tiles: Tiles | None = None,
    parts: int | None = None,
) -> None:
    """Fills out (R, Hq, Dv), lse (R, Hq) and mass (R, Hq, B) as `attention_concurrent_`.

    `tiles` and `parts` are for tests; otherwise they follow from the shape and the GPU.

    Raises:
        NotImplementedError: no kernel for head dims or page size.
        ValueError: `scratch` is too small for one part.
    """
    op = "attention_concurrent_"
    rows, q_heads, d = q.shape
    pages, kv_heads, page, _ = k.shape
    dv = v.shape[-1]
    _check_shape(op, q, (q_heads, kv_heads), d, dv, page)
    if rows == 0 or q_heads == 0:
        return
    blocks = 0 if mass is None else mass.shape[-1]
    shape = Shape(rows, q_heads, kv_heads, d, dv, q.element_size(), blocks)
    tiles = tiles or shape.tiles
    parts = parts or shape.most_parts(processors_of(q.device))
    size = scratch.numel()
    if size < shape.scratch_bytes(1, tiles):
        raise ValueError(
            f"{op}: scratch must have at least {shape.scratch_bytes(1, tiles)} bytes, got {size}"
        )
    parts = max(1, min(parts, size // (shape.scratch_bytes(2, tiles) // 2)))
    turned_bytes = parts * shape.turned_bytes(tiles)
    partial = scratch[turned_bytes : size // 4 * 4].view(torch.float32)
    turned = scratch[:turned_bytes].view(torch.float32 if q.dtype == torch.float32 else k.dtype)
    reals = plan.view(torch.float32)
    (d0, d1), (dv0, dv1) = _pieces(d), _pieces(dv)
    flags = {"SINKS": sinks is not None, "LSE": lse is not None, "MASS": mass is not None}
    grid = (kv_heads, parts, shape.columns_of_tiles(tiles))
    with _device(q):
        attend_kernel[grid](
            q, k, v, plan, reals, sinks, out, lse, mass, partial, turned, *q.stride()[:2],
            *k.stride()[:3], *v.stride()[:3], *out.stride()[:2], rows, blocks, parts, pages, rope,
            offset, window, scale, softcap, G=q_heads // kv_heads, D=d, D0=d0, D1=d1, DV=dv,
            DV0=dv0, DV1=dv1, ROTARY=rope >= 0, INTERLEAVED=interleaved, WINDOW=window > 0,
            SOFTCAP=softcap > 0, **flags, BM=tiles.rows, BN=tiles.keys, P=page,
            CHUNK=CHUNK // tiles.rows * (tiles.warps // 4), DOT=_product_dtype(q, k),
            num_warps=tiles.warps, num_stages=tiles.stages, **FUSED,
        )  # fmt: skip
        if parts > 1:
            reduce_kernel[(rows, q_heads)](
                plan, sinks, out, lse, mass, partial, *out.stride()[:2], rows, blocks, parts,
                DV=dv, DV_PAD=max(16, triton.next_power_of_2(dv)), **flags, BN=tiles.keys, BP=8,
                BB=32, num_warps=4 if dv > 128 else 1, **FUSED,
            )  # fmt: skip


def append(
    k_new: Tensor,
    v_new: Tensor,
    plan: Tensor,
    rope: int,
    offset: int,
    interleaved: bool,
    k: Tensor,
    v: Tensor,
) -> None:
    """Stores rows k_new (R, Hkv, D) and v_new (R, Hkv, Dv) in the pool as `attention_append_`.

    Raises:
        NotImplementedError: no kernel for head dims or page size.
    """
    rows, heads, d = k_new.shape
    pages, _, page, _ = k.shape
    dv = v_new.shape[-1]
    _check_shape("attention_append_", k_new, (heads, heads), d, dv, page)
    if rows == 0 or heads == 0 or pages == 0:
        return
    with _device(k):
        append_kernel[(rows,)](
            k_new, v_new, plan, plan.view(torch.float32), k, v, *k_new.stride()[:2],
            *v_new.stride()[:2], *k.stride()[:3], *v.stride()[:3], pages, rope, offset,
            H=heads, D=d, DV=dv, ROTARY=rope >= 0, INTERLEAVED=interleaved, P=page,
            H_PAD=triton.next_power_of_2(heads), D_PAD=triton.next_power_of_2(d),
            DV_PAD=triton.next_power_of_2(dv), num_warps=4, **FUSED,
        )  # fmt: skip


def rewrite(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    runs: Tensor,
    rotations: Sequence[Tensor],
    rope: Sequence[int],
    offset: Sequence[int],
    interleaved: Sequence[bool],
) -> None:
    """Moves runs of slots in all layers as `attention_rewrite_`; one launch for 16 like layers.

    Raises:
        NotImplementedError: no kernel for head dims or page size.
    """
    alike: dict[Any, list[int]] = {}
    for i, (keys, values) in enumerate(zip(k, v, strict=True)):
        _, heads, page, d = keys.shape
        dv = values.shape[-1]
        _check_shape("attention_rewrite_", keys, (heads, heads), d, dv, page)
        turn = (rope[i], offset[i], interleaved[i])
        kind = (keys.shape, dv, keys.dtype, keys.stride(), values.stride(), turn)
        if heads > 0 and len(runs) > 0:
            alike.setdefault(kind, []).append(i)
    for ((pages, heads, page, d), dv, _, k_strides, v_strides, turn), layers in alike.items():
        table = rotations[turn[0]] if turn[0] >= 0 else None
        rows, pairs = (0, 0) if table is None else table.shape[:2]
        for first in range(0, len(layers), LAYERS_PER_LAUNCH):
            some = layers[first : first + LAYERS_PER_LAUNCH]
            with _device(runs):
                rewrite_kernel[(len(runs), PROGRAMS_PER_RUN, len(some))](
                    tuple(k[i] for i in some), tuple(v[i] for i in some), runs, table,
                    *k_strides[:3], *v_strides[:3], runs.stride(0), rows, pages, pairs, turn[1],
                    H=heads, D=d, DV=dv, ROTARY=table is not None, INTERLEAVED=turn[2], P=page,
                    LAYERS=len(some), D_PAD=triton.next_power_of_2(d),
                    DV_PAD=triton.next_power_of_2(dv), LINES=16, num_warps=4, **FUSED,
                )  # fmt: skip
