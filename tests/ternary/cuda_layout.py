"""The packed layout of the GPU kernels, written down once more in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cuda_layout(idx: Tensor, sign: Tensor) -> Tensor:
    """Canonical planes (N, B8/2) and (N, B8/8) -> uint8 (tiles * 640,), tiles of 32 x 128.

    Row 32 R + 8 w + g and columns 128 C + 32 t .. + 31 belong to lane 4 g + t of tile (R, C).
    """
    rows, cells = -sign.shape[0] % 32, -sign.shape[1] % 4
    idx = F.pad(idx, (0, 4 * cells, 0, rows)).unflatten(0, (-1, 4, 8)).unflatten(3, (-1, 4, 4))
    sign = F.pad(sign, (0, cells, 0, rows)).unflatten(0, (-1, 4, 8)).unflatten(3, (-1, 4))
    words = idx.permute(0, 3, 2, 4, 1, 5)  # R w g C t i -> R C g t w i
    bits = (sign[..., None] >> torch.arange(8) & 1).unflatten(-1, (4, 2))  # R w g C t i e
    places = 2 * torch.arange(4)[:, None] + torch.arange(2)  # of row w and parity e in byte i
    signs = (bits.permute(0, 3, 2, 4, 5, 1, 6) << places).sum((-1, -2)).to(torch.uint8)
    return torch.cat([words.flatten(2), signs.flatten(2)], 2).flatten()
