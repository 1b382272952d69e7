"""Ternary weights: canonical planes for files, packed tiles for the kernels.

Shape letters: E experts, N rows (outputs), K columns (inputs), B8 = ceil(K/4) blocks rounded up
to 8, ng scale groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignops import _native
from alignops.ternary import checks, ops

FORMAT_VERSION = 1

# What the kernels take: packed planes, scale (ng, padded N), n, k, group, stride, layout.
Pack = tuple[Tensor, Tensor, int, int, int, int, int]

_lock = threading.RLock()  # one thread packs, the others wait for it


class TernaryWeight(nn.Module):
    """A weight of 3:4 sparse ternary blocks: 1.25 bits per element, and float scales.

    The state dict holds the canonical planes, the same on every device: `idx` uint8 (N, B8/2),
    `sign` uint8 (N, B8/8), `scale` (N, ng), and `format` int64 (version, N, K, group, stride).
    `.half()` and its kin leave all of them as they are. The kernels read a packed copy. It is made
    at once on the CPU and at first use elsewhere, and made anew when the planes are loaded, moved
    or copied and when the instruction set changes; after writing into a plane call `prepack()`.

    Use `quantize` to make one. Calls from several threads are safe.

    Args:
        idx, sign: canonical planes; for a stack of experts of E * N rows.
        scale: (N, ng) float32, bfloat16 or float16.
        shape: (N, K), or (E, N, K).
        group: columns that share a scale; None: one scale per row.
        stride: distance of the four columns of a block, 1 or 16.

    Raises:
        ValueError: a plane has the wrong shape or dtype, or group or stride is not supported.
    """

    idx: Tensor
    sign: Tensor
    scale: Tensor
    format: Tensor
    _pack: Pack | None = None
    _fusion: _Fusion | None = None

    def __init__(
        self,
        idx: Tensor,
        sign: Tensor,
        scale: Tensor,
        shape: Sequence[int],
        group: int | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        n, k = self.shape[:-1].numel(), self.shape[-1]
        self.group = k if group is None else group
        self.stride = stride
        checks.check_group(k, self.group, stride, "TernaryWeight")
        idx_bytes, sign_bytes = checks.plane_bytes(k)
        groups = checks.ceil_div(k, self.group)
        for name, plane, columns in (("idx", idx, idx_bytes), ("sign", sign, sign_bytes)):
            _check_plane(name, plane, (n, columns), (torch.uint8,))
        _check_plane("scale", scale, (n, groups), checks.FLOAT_DTYPES)
        self.register_buffer("idx", idx.contiguous())
        self.register_buffer("sign", sign.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("format", torch.tensor(self._format(), device=idx.device))
        self._changed()

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        group: int | None = None,
        stride: int = 1,
        scale_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> TernaryWeight:
        """A weight with all scales 0, to be filled by `load_state_dict`."""
        n, k = torch.Size(shape)[:-1].numel(), shape[-1]
        idx, sign = (
            torch.zeros(n, b, dtype=torch.uint8, device=device) for b in checks.plane_bytes(k)
        )
        groups = checks.ceil_div(k, group or k)
        scale = torch.zeros(n, groups, dtype=scale_dtype, device=device)
        return cls(idx, sign, scale, shape, group, stride)

    @classmethod
    def cat(cls, weights: Sequence[TernaryWeight]) -> TernaryWeight:
        """The rows of several weights of equal K, group and stride, one after the other.

        Raises:
            ValueError: the weights differ in K, group or stride, or are stacks.
        """
        kinds = {(w.shape[-1], w.group, w.stride, len(w.shape)) for w in weights}
        if len(kinds) != 1 or len(weights[0].shape) != 2:
            raise ValueError(
                "TernaryWeight.cat: weights must have equal K, group and stride, and two "
                f"dimensions, got {weights}"
            )
        planes = [w._planes() for w in weights]
        return cls(
            torch.cat([idx for idx, _ in planes]),
            torch.cat([sign for _, sign in planes]),
            torch.cat([w.scale for w in weights]),
            (sum(w.shape[0] for w in weights), weights[0].shape[1]),
            weights[0].group,
            weights[0].stride,
        )

    def unbind(self) -> list[TernaryWeight]:
        """The E matrices of a stack (E, N, K); they share the memory of its planes."""
        if len(self.shape) != 3:
            raise ValueError(f"unbind: shape must be (E, N, K), got {tuple(self.shape)}")
        _, n, k = self.shape
        idx, sign = self._planes()
        return [
            TernaryWeight(*planes, (n, k), self.group, self.stride)
            for planes in zip(idx.split(n), sign.split(n), self.scale.split(n), strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of planes and scales; the packed copy has the size of the planes up to padding."""
        n, k = self.shape[:-1].numel(), self.shape[-1]
        return n * sum(checks.plane_bytes(k)) + self.scale.numel() * self.scale.element_size()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scale * T as a dense tensor of `shape` in float32, bfloat16 or float16.

        Example:
            >>> import torch
            >>> quantize(torch.tensor([[1.0, -2.0, 3.0, -4.0]])).dequantize()
            tensor([[ 0., -3.,  3., -3.]])
        """
        idx, sign = self._planes()
        scale = self.scale.float()
        k = self.shape[-1]
        return ops.ternary_dequantize(idx, sign, scale, k, self.group, self.stride, dtype).view(
            self.shape
        )

    def prepack(self, release: bool = False) -> None:
        """Make the packed copy for this device and instruction set.

        Args:
            release: drop the planes afterwards; `state_dict` and `dequantize` then recover them
                from the packed copy.
        """
        with _lock:
            if self._fusion is None or not self._fusion.build():
                self._pack = self._make_pack()
            if release:
                self._drop_planes()

    def ready(self) -> Pack:
        """What the kernels take, packed now if need be."""
        pack = self._current_pack()
        if pack is None and torch.compiler.is_dynamo_compiling():  # which knows no locks
            pack = self._pack = self._make_pack()
        elif pack is None:
            with _lock:
                if self._current_pack() is None:  # no other thread was faster
                    self.prepack()
                pack = cast(Pack, self._pack)
        return pack

    def fused_with(self, weights: tuple[TernaryWeight, ...]) -> TernaryWeight | None:
        """The rows of `weights`, of which this is the first, as one weight.

        None where they cannot be one: K, group, stride or device differ.
        """
        fusion = self._fusion
        if fusion is None or fusion.members != weights:
            if torch.compiler.is_dynamo_compiling():
                return None
            with _lock:
                fusion = _Fusion(weights)
                fusion.build()
                for w in weights:
                    w._fusion = fusion
        return fusion.weight

    def extra_repr(self) -> str:
        """Shape, and group and stride where they are not the usual ones."""
        group = "" if self.group == self.shape[-1] else f", group={self.group}"
        stride = "" if self.stride == 1 else f", stride={self.stride}"
        return f"{tuple(self.shape)}{group}{stride}"

    # Planes and packed copy

    def _format(self) -> list[int]:
        n, k = self.shape[:-1].numel(), self.shape[-1]
        return [FORMAT_VERSION, n, k, self.group, self.stride]

    def _current_pack(self) -> Pack | None:
        pack = self._pack
        return pack if pack is not None and pack[6] == _kernel_layout(pack[0]) else None

    def _planes(self) -> tuple[Tensor, Tensor]:
        idx, sign = self._buffers["idx"], self._buffers["sign"]
        if idx is not None and sign is not None:
            return idx, sign
        packed, _, n, k, _, _, layout = cast(Pack, self._pack)
        return ops.ternary_unpack(packed, n, k, layout)

    def _drop_planes(self) -> None:
        self._buffers["idx"] = self._buffers["sign"] = None

    def _restore_planes(self) -> bool:
        """Whether the planes had been dropped."""
        released = self._buffers["idx"] is None
        self._buffers["idx"], self._buffers["sign"] = self._planes()
        return released

    def _make_pack(self) -> Pack:
        if len(self.shape) != 2:
            raise ValueError(
                f"ternary_linear: weight must have shape (N, K), got {tuple(self.shape)}; "
                "unbind() gives the matrices of a stack"
            )
        n, k = self.shape
        idx, sign = self._planes()
        layout = _kernel_layout(idx)
        packed = ops.ternary_prepack(idx, sign, k, layout)
        scale = self.scale.float().t()
        scale = nn.functional.pad(scale, (0, -n % checks.ROW_PAD)).contiguous()
        return packed, scale, n, k, self.group, self.stride, layout

    def _forget_pack(self) -> None:
        self._pack = None
        if self._fusion is not None:
            self._fusion.weight = None

    def _changed(self, release: bool = False) -> None:
        """The planes are new: pack them now on the CPU, later elsewhere."""
        self._forget_pack()
        compiling = torch.compiler.is_dynamo_compiling()  # which knows no locks, see `ready`
        if len(self.shape) == 2 and self.scale.device.type == "cpu" and not compiling:
            self.prepack(release)

    # Life as a module

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("idx", "sign", "scale"):
            self._forget_pack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_pack", None)
        state.pop("_fusion", None)
        state["_release"] = self._buffers["idx"] is None
        idx, sign = self._planes()
        state["_buffers"] = {**self._buffers, "idx": idx, "sign": sign}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        release = state.pop("_release")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._changed(release)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryWeight:
        released = self._restore_planes()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if any(self._buffers[name] is not old for name, old in before.items()):
            self._changed(released)
        elif released:
            self._drop_planes()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        released = self._restore_planes()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if released:
            self._drop_planes()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = state_dict.get(prefix + "format")
        if found is not None and not found.is_meta and found.tolist() != self._format():
            error_msgs.append(
                f"{prefix}format must be (version, N, K, group, stride) = {self._format()}, got "
                f"{found.tolist()}"
            )
            return
        released = self._restore_planes()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._changed(released)


class _Fusion:
    """Weights that read the same input, and their rows as one weight.

    Where every member fills whole tiles, their packed copies are parts of the fused one.
    """

    def __init__(self, members: tuple[TernaryWeight, ...]) -> None:
        self.members = members
        self.weight: TernaryWeight | None = None

    def build(self) -> bool:
        """Pack all members; False if they cannot be fused and nothing was done."""
        self.weight = None
        kinds = {(w.shape[-1], w.group, w.stride, w.scale.device) for w in self.members}
        if len(kinds) != 1:
            return False
        fused = TernaryWeight.cat(self.members)
        packed, scale, total, k, group, stride, layout = fused.ready()
        fused._drop_planes()
        whole_tiles = all(w.shape[0] % checks.ROW_PAD == 0 for w in self.members)
        row = 0
        for w in self.members:
            n = w.shape[0]
            if whole_tiles:
                part = packed.narrow(0, packed.numel() * row // total, packed.numel() * n // total)
                part_scale = scale[:, row : row + n].contiguous()
                w._pack = (part, part_scale, n, k, group, stride, layout)
            else:
                w._pack = w._make_pack()
            row += n
        self.weight = fused
        return True


def quantize(
    w: Tensor,
    group: int | None = None,
    stride: int = 1,
    scale_dtype: torch.dtype = torch.float32,
) -> TernaryWeight:
    """Quantize a weight to 3:4 sparse ternary blocks ("Sparse-AbsMean").

    In each block of four columns the smallest magnitude becomes 0 (tie: the first) and the others
    their sign; the scale is the mean of the kept magnitudes. This is optimal in the squared error.

    Args:
        w: (N, K) or (E, N, K) float32, bfloat16, float16 or float64 (which is rounded to float32).
        group: columns that share a scale, a multiple of 32 (64 for stride 16); None: one scale per
            row.
        stride: 1: a block is four neighbouring columns; 16: columns 64c + j + 16p, as in STQ1_0
            files (K must be a multiple of 64).
        scale_dtype: of the stored scales: float32, bfloat16 or float16.

    Raises:
        TypeError: w is not a floating point tensor, or group or stride is not an int.
        ValueError: w is empty, has NaN or Inf or the wrong number of dimensions, group or stride
            does not fit, or a scale is out of range of scale_dtype.

    Source: arXiv 2601.07892, section 3.1, eq. 4-5.

    Example:
        >>> import torch
        >>> quantize(torch.randn(8, 64))
        TernaryWeight((8, 64))
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = checks.dtype_name(w.dtype) if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"quantize: w must be a floating point Tensor, got {got}")
    for name, value in (("group", group), ("stride", stride)):
        if not isinstance(value, int | None) or isinstance(value, bool):
            raise TypeError(f"quantize: {name} must be an int, got {type(value).__name__}")
    if w.dim() not in (2, 3) or w.numel() == 0:
        raise ValueError(
            "quantize: w must have shape (N, K) or (E, N, K) and not be empty, got "
            f"{tuple(w.shape)}"
        )
    if scale_dtype not in checks.FLOAT_DTYPES:
        raise ValueError(
            "quantize: scale_dtype must be float32, bfloat16 or float16, got "
            f"{checks.dtype_name(scale_dtype)}"
        )
    rows = w.detach().flatten(0, -2)
    if rows.dtype == torch.float64:
        rows = rows.float()
    k = w.shape[-1]
    idx, sign, exact = ops.ternary_quantize(rows, k if group is None else group, stride)
    scale = exact.to(scale_dtype)
    if scale_dtype != torch.float32 and not w.is_meta:
        lost = ~scale.isfinite() | ((scale == 0) & (exact != 0))
        if lost.any():
            row, g = lost.nonzero()[0].tolist()
            raise ValueError(
                f"quantize: scale_dtype {checks.dtype_name(scale_dtype)} must hold every scale, "
                f"got {exact[row, g].item():g} at (row, group) = ({row}, {g})"
            )
    return TernaryWeight(idx, sign, scale, w.shape, group, stride)


def _kernel_layout(t: Tensor) -> int:
    return ops.CUDA_LAYOUT if t.is_cuda else _native.cpu_layout


def _check_plane(
    name: str, plane: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(plane.shape) != shape or plane.dtype not in dtypes:
        expected = " or ".join(checks.dtype_name(d) for d in dtypes)
        raise ValueError(
            f"TernaryWeight: {name} must be {expected} of shape {shape}, got "
            f"{checks.dtype_name(plane.dtype)} of shape {tuple(plane.shape)}"
        )
