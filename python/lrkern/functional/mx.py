# SPDX-License-Identifier: Apache-2.0
"""The layout in which Blackwell's block-scaled products read scales (tcgen05, cuBLAS, CUTLASS Sm1xx): tiles of 128 rows by 4 blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["swizzle_scales", "unswizzle_scales"]


def _size(rows: int, blocks: int) -> int:
    return -(-rows // 128) * -(-blocks // 4) * 512


def swizzle_scales(scales: Tensor) -> Tensor:
    """Bytes [512 ⌈R / 128⌉ ⌈G / 4⌉] of scales [R, G] in any dtype of one byte: (r, g) at csrc/mx.h's ``swizzled_scale``, zeros beside them.

    Tiles of [128, 4] lie row by row; in one, row r % 128 and block g % 4 are at 16 (r % 32) + 4 (r % 128 div 32) + g % 4.
    """
    if scales.dim() != 2 or scales.element_size() != 1:
        got = f"{list(scales.shape)} of {str(scales.dtype).removeprefix('torch.')}"
        raise RuntimeError(f"lrkern::swizzle_scales: scales must have shape [R, G] and a dtype of one byte, got {got}")
    rows, blocks = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -blocks % 4, 0, -rows % 128))
    tiles = padded.view(-(-rows // 128), 4, 32, -(-blocks // 4), 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(_size(rows, blocks)).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales [rows, blocks] of what ``swizzle_scales`` gives; its padding is left out."""
    if rows < 0 or blocks < 0 or swizzled.element_size() != 1 or swizzled.numel() != _size(rows, blocks):
        must = f"must have {_size(rows, blocks)} elements of one byte, as those of [{rows}, {blocks}] fill"
        got = f"{swizzled.numel()} of {str(swizzled.dtype).removeprefix('torch.')}"
        raise RuntimeError(f"lrkern::unswizzle_scales: swizzled {must}, got {got}")
    tiles = swizzled.reshape(-1).view(torch.uint8).view(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -(-blocks // 4) * 4)
    return whole[:rows, :blocks].contiguous().view(swizzled.dtype)
