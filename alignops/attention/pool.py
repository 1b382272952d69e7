"""Pages of keys and values, shared by workspaces.

Shape letters: L layers, Hkv KV heads, D and Dv columns of keys and values, P slots per page, N
runs.

Source: arXiv 2504.06261; pages and their sharing as in arXiv 2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignops import _native
from alignops._checks import check, check_float_dtype
from alignops.attention.ops import rewrite_kv
from alignops.attention.rope import RopeSpec

PAGE_SIZES = (16, 32, 64, 128)


class KVPool:
    """Room for keys and values of all layers, in pages; page i is page i of every layer.

    The memory is taken at once and not initialised; slots that hold no token are never read.
    Several workspaces, also in several threads, may use one pool, and forks of them share pages.

    Args:
        num_layers: L.
        num_kv_heads: Hkv, or that of each layer.
        head_dim: D, or that of each layer.
        v_head_dim: Dv, or that of each layer; None: as `head_dim`.
        dtype: float32, bfloat16 or float16.
        device: where the pages are.
        page_size: P: 16, 32, 64 or 128.
        num_pages: how many pages.
        bytes: or, instead, how much memory for all of them together.
        rope: rotary positions of all layers; None: they have none; or a pair of specs and, for
            each layer, the number of its spec or None.

    Attributes:
        k, v: of each layer (num_pages, Hkv, P, D) and (num_pages, Hkv, P, Dv).
        specs: rope types.
        layer_spec: of each layer the number of its type, None without rotary positions.
        num_layers, num_pages, page_size, dtype, device: as given.

    Raises:
        ValueError: an argument is out of range, or two do not fit.

    Example:
        >>> pool = KVPool(2, 1, 8, dtype=torch.float32, num_pages=4, rope=RopeSpec.default(8))
        >>> pool.k[0].shape, pool.layer_spec
        (torch.Size([4, 1, 32, 8]), (0, 0))
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        v_head_dim: int | Sequence[int] | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = 32,
        num_pages: int | None = None,
        bytes: int | None = None,
        rope: RopeSpec | tuple[Sequence[RopeSpec], Sequence[int | None]] | None = None,
    ) -> None:
        op = "KVPool"
        check(num_layers >= 1, f"{op}: num_layers must be at least 1, got {num_layers}")
        check_float_dtype(dtype, op, "dtype")
        check(
            page_size in PAGE_SIZES,
            f"{op}: page_size must be one of {PAGE_SIZES}, got {page_size}",
        )
        heads = _per_layer(num_kv_heads, num_layers, "num_kv_heads")
        k_dims = _per_layer(head_dim, num_layers, "head_dim")
        v_dims = k_dims if v_head_dim is None else _per_layer(v_head_dim, num_layers, "v_head_dim")
        self.num_layers, self.page_size, self.dtype = num_layers, page_size, dtype
        self.num_kv_heads, self.head_dims, self.v_head_dims = heads, k_dims, v_dims
        self.specs, self.layer_spec = _rope(rope, num_layers)
        for layer, spec in enumerate(self.layer_spec):
            if spec is not None:
                self.specs[spec].check_head(k_dims[layer], f"{op}: layer {layer}")

        #: Bytes of one token in all layers.
        self.token_bytes = dtype.itemsize * sum(
            h * (d + dv) for h, d, dv in zip(heads, k_dims, v_dims, strict=True)
        )
        check(
            (num_pages is None) != (bytes is None),
            f"{op}: either num_pages or bytes must be given, got {num_pages} and {bytes}",
        )
        if num_pages is None:
            assert bytes is not None
            num_pages = bytes // (page_size * self.token_bytes)
            check(
                num_pages >= 1,
                f"{op}: bytes must hold a page of {page_size * self.token_bytes}, got {bytes}",
            )
        self.num_pages = num_pages
        #: The pages' references and the tokens in them: alignops._C.AttentionPool.
        self.native = _native.library.AttentionPool(num_pages, page_size)
        self.k = tuple(
            torch.empty(num_pages, h, page_size, d, dtype=dtype, device=device)
            for h, d in zip(heads, k_dims, strict=True)
        )
        self.v = tuple(
            torch.empty(num_pages, h, page_size, d, dtype=dtype, device=device)
            for h, d in zip(heads, v_dims, strict=True)
        )
        self.device = self.k[0].device
        self._last_use: dict[int, Any] = {}  # of each CUDA stream, when it last used pages

    @property
    def free_pages(self) -> int:
        """Pages that can be taken now."""
        return self.native.free_pages

    def rewrite(self, copies: Tensor) -> None:
        """Copy runs of slots in all layers, keys rotated on the way.

        Args:
            copies: (N, 4) int64 on the CPU: source slot, target slot, tokens, positions that keys
                turn by. No run crosses a page, and no page is both source and target.
        """
        shifts, rows = torch.unique(copies[:, 3], return_inverse=True)
        rows = rows.masked_fill(copies[:, 3] == 0, -1)
        runs = torch.cat([copies[:, :3], rows.unsqueeze(1)], dim=1)
        rotations = [spec.rotations(shifts).to(self.device) for spec in self.specs]
        rewrite_kv(self, runs.to(self.device), rotations)

    def wait(self) -> None:
        """Let the current stream wait for what others have done with pages of the pool."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        for stream, event in list(self._last_use.items()):
            if stream != current.stream_id:
                current.wait_event(event)

    def used(self) -> None:
        """Take note that the current stream has used pages, for others to wait for."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        event = self._last_use.get(stream.stream_id)
        if event is None:
            event = self._last_use[stream.stream_id] = torch.cuda.Event()
        event.record(stream)


def _per_layer(value: int | Sequence[int], layers: int, name: str) -> tuple[int, ...]:
    values = (value,) * layers if isinstance(value, int) else tuple(value)
    check(
        len(values) == layers and all(v >= 1 for v in values),
        f"KVPool: {name} must be at least 1, for all or each of {layers} layers, got {value}",
    )
    return values


def _rope(
    rope: RopeSpec | tuple[Sequence[RopeSpec], Sequence[int | None]] | None, layers: int
) -> tuple[tuple[RopeSpec, ...], tuple[int | None, ...]]:
    if rope is None:
        return (), (None,) * layers
    if isinstance(rope, RopeSpec):
        return (rope,), (0,) * layers
    specs, layer_spec = tuple(rope[0]), tuple(rope[1])
    check(
        len(layer_spec) == layers and all(i is None or 0 <= i < len(specs) for i in layer_spec),
        f"KVPool: rope must name one of {len(specs)} specs or None for each of {layers} layers, "
        f"got {layer_spec}",
    )
    check(len(specs) <= 8, f"KVPool: rope must have at most 8 specs, got {len(specs)}")
    return specs, layer_spec
