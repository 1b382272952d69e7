"""Random caches: tensors of any element, heads, head size and strides, inside larger buffers.

What lies in a buffer around the slots of a tensor are canaries: no move may touch them.
"""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
)


@dataclasses.dataclass
class View:
    """`tensor` (B, H, S, D) is a view of `buffer`."""

    buffer: Tensor
    tensor: Tensor

    def in_layout(self, layout: str) -> Tensor:
        return self.tensor if layout in ("bhsd", "hnd") else self.tensor.transpose(1, 2)

    def after(self, expected: Tensor) -> Tensor:
        """What the buffer must hold if the tensor is to hold `expected`, and nothing else moves."""
        whole = self.buffer.clone()
        torch.as_strided(
            whole, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        ).copy_(expected)
        return whole


def fill(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """`count` elements of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8).view(
        dtype
    )


def guarded(dtype: torch.dtype, *shape: int) -> View:
    """Contiguous, between canaries."""
    buffer = torch.full((torch.Size(shape).numel() + 7,), 7, dtype=dtype)
    return View(buffer, buffer[3 : buffer.numel() - 4].view(shape))


def as_integers(t: Tensor) -> Tensor:
    """The same bits as integers, so that NaN equals itself."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(same_size[t.element_size()])


@st.composite
def views(draw: st.DrawFn, rows: int, slots: int) -> View:
    """A view (rows, H, slots, D): dimensions in any order in memory, with gaps between them."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    shape = (rows, heads, slots, width)
    order = [*draw(st.permutations((0, 1, 2))), 3]  # from the outermost to the innermost
    gaps = draw(st.tuples(*(st.integers(0, 2) for _ in range(4))))
    strides, inner = [0] * 4, 1
    for axis, gap in zip(reversed(order), gaps, strict=True):
        strides[axis] = inner
        inner *= max(shape[axis], 1) + gap
    offset = draw(st.integers(0, 3))
    buffer = as_integers(fill(dtype, offset + inner + 5, draw(st.integers(0, 2**16))))
    return View(buffer, buffer.as_strided(shape, strides, offset))


def tables(rows: int, slots: int) -> st.SearchStrategy[list[View]]:
    return st.lists(views(rows, slots), min_size=1, max_size=4)


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(("bhsd", "bshd"))


@st.composite
def ranges(draw: st.DrawFn, slots: int) -> tuple[int, int, int]:
    """src, dst and length."""
    length = draw(st.integers(0, slots))
    limit = slots - length
    return draw(st.integers(0, limit)), draw(st.integers(0, limit)), length


@st.composite
def paths(draw: st.DrawFn, slots: int, nodes: int) -> tuple[int, list[int], int]:
    """base, path (nodes) and length."""
    base = draw(st.integers(0, slots))
    chosen = (
        sorted(draw(st.sets(st.integers(0, slots - base - 1), max_size=nodes)))
        if base < slots
        else []
    )
    return base, chosen + [-1] * (nodes - len(chosen)), len(chosen)


def columns(plans: list[tuple[object, ...]], dtype: torch.dtype = torch.int32) -> list[Tensor]:
    """Row by row plans as one tensor for each of their members."""
    return [torch.tensor(column, dtype=dtype) for column in zip(*plans, strict=True)]
