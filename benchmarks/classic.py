"""The usual AVX2 lookup kernel (`native/classic_lookup.cpp`) as a contestant, one thread."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from benchmarks import native
from benchmarks.timing import Runner

_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


def pack(idx: torch.Tensor, sign: torch.Tensor) -> np.ndarray:
    """Canonical planes (n, k/8), (n, k/32) -> tiles of 32 rows x 32 columns, which must fit."""
    n, tiles = sign.shape
    codes = idx.numpy().reshape(n // 32, 32, tiles, 4).transpose(0, 2, 3, 1)
    signs = _REVERSED[sign.numpy()].reshape(n // 32, 32, tiles, 1).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.concatenate([codes, signs], axis=2))


class ClassicLookup:
    """y = x W^T for planes with one scale per row; n % 64 == 0, k % 256 == 0."""

    def __init__(self, idx: torch.Tensor, sign: torch.Tensor, scale: torch.Tensor) -> None:
        self._library = native.load("classic_lookup")
        self._packed = pack(idx, sign)
        self._scale = np.ascontiguousarray(scale.float().numpy().ravel())
        self.n, self.k = idx.shape[0], sign.shape[1] * 32
        if self.n % 64 or self.k % 256:
            raise ValueError(
                f"ClassicLookup: shape must be a multiple of (64, 256), got {self.n, self.k}"
            )
        self._workspace = np.empty(10 * self.k, np.uint8)
        self._y = np.empty(self.n, np.float32)

    def __call__(self, x: np.ndarray, row_tiles: int = 2) -> np.ndarray:
        """x (k) float32 -> y (n); the result is overwritten by the next call."""
        self._library.classic_gemv(
            ctypes.c_void_p(self._packed.ctypes.data),
            ctypes.c_void_p(self._scale.ctypes.data),
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_int64(self.n),
            ctypes.c_int64(self.k),
            ctypes.c_int(row_tiles),
            ctypes.c_void_p(self._workspace.ctypes.data),
            ctypes.c_void_p(self._y.ctypes.data),
        )
        return self._y

    def runner(self, row_tiles: int, calls: int = 8) -> Runner:
        x = np.random.default_rng(0).standard_normal(self.k).astype(np.float32)

        def run() -> None:
            for _ in range(calls):
                self(x, row_tiles)

        name = f"classic lookup, {row_tiles} row tile(s)"
        return Runner(name, run, calls, self._packed.nbytes)
