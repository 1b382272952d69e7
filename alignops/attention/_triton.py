"""Registers the Triton kernels as operators on CUDA tensors; the first call imports triton.

Attention on a GPU is Triton's: there is no second implementation. Checks and shapes are those of
the fake kernels. What lies in device memory is not read to be checked: kernels take the tables of a
plan as they are and clamp pages to those of the pool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignops._checks import check_devices
from alignops.attention import ops

_library = torch.library.Library("alignops", "FRAGMENT")


def _kernels() -> Any:
    from alignops.triton_kernels import attention

    return attention


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sinks: Tensor | None,
    rope: int,
    rotary_offset: int,
    interleaved: bool,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
    lse: Tensor | None,
    mass: Tensor | None,
    scratch: Tensor,
) -> None:
    check_devices(
        "attention_concurrent_",
        q,
        **{"k": k, "v": v, "plan": plan, "sinks": sinks, "out": out, "lse": lse, "mass": mass},
        scratch=scratch,
    )
    rotary = (rope, rotary_offset, interleaved)
    scores = (scale, softcap, window)
    ops.check_attend(q, k, v, plan, sinks, *rotary, *scores, out, lse, mass, scratch)
    _kernels().attend(q, k, v, plan, sinks, *rotary, *scores, out, lse, mass, scratch)


def _append(
    k_new: Tensor,
    v_new: Tensor,
    plan: Tensor,
    rope: int,
    rotary_offset: int,
    interleaved: bool,
    k: Tensor,
    v: Tensor,
) -> None:
    check_devices("attention_append_", k, k_new=k_new, v_new=v_new, plan=plan, v=v)
    ops.check_append(k_new, v_new, plan, rope, rotary_offset, interleaved, k, v)
    _kernels().append(k_new, v_new, plan, rope, rotary_offset, interleaved, k, v)


def _rewrite(
    k: list[Tensor],
    v: list[Tensor],
    runs: Tensor,
    rotations: list[Tensor],
    rope: list[int],
    rotary_offset: list[int],
    interleaved: list[bool],
) -> None:
    for name, tensors in {"k": k, "v": v, "rotations": rotations}.items():
        for t in tensors:
            check_devices("attention_rewrite_", runs, **{name: t})
    ops.check_rewrite(k, v, runs, rotations, rope, rotary_offset, interleaved)
    _kernels().rewrite(k, v, runs, rotations, rope, rotary_offset, interleaved)


def scratch_bytes(
    host: Tensor,
    device: torch.device,
    head_dim: int,
    q_heads: int,
    kv_heads: int,
    v_head_dim: int,
    mass: bool,
) -> int:
    """Bytes that `attention_concurrent_` needs on a GPU: enough parts for all of it.

    Args:
        host: the plan, in the memory of the host; of a short one nothing is split.
        device: the GPU.
        head_dim: D.
        q_heads: Hq.
        kv_heads: Hkv.
        v_head_dim: Dv.
        mass: whether the mass is asked for.
    """
    kernels = _kernels()
    rows, blocks, tokens = (int(host[i]) for i in (3, 5, 9))
    heads = (q_heads, kv_heads, head_dim, v_head_dim)
    # The dtype of q decides about tiles, and a plan does not know it.
    shapes = [kernels.Shape(rows, *heads, size, blocks if mass else 0) for size in (2, 4)]
    processors = kernels.processors_of(device)
    size: int = max(shape.wanted_bytes(tokens, processors) for shape in shapes)
    return size


_library.impl("attention_concurrent_", _attend, "CUDA")
_library.impl("attention_append_", _append, "CUDA")
_library.impl("attention_rewrite_", _rewrite, "CUDA")
