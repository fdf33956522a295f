# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10, dropout and the elements of random bases (docs/rng.md)."""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def mul32(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of the 64-bit product of uint32 values held in int64."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


def philox4x32(counter: list[Tensor], key: int, rounds: int = 10) -> list[Tensor]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words are int64 tensors below 2^32."""
    c, k0, k1 = counter, key & MASK32, key >> 32
    for _ in range(rounds):
        (h0, l0), (h1, l1) = mul32(c[0], 0xD2511F53), mul32(c[2], 0xCD9E8D57)
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def dropout_multiplier(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """[rows, cols] float64: 0, or 1 / (keep probability). 16 bits an element, 8 columns a block (csrc/rng.h)."""
    blocks = (cols + 7) // 8
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tag = torch.full_like(row, 1 << 16 | 1 << 22)  # method dropout, distribution 16 bits
    words = torch.stack(philox4x32([block, row, torch.zeros_like(row), tag], int(seed)), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).reshape(rows, blocks * 8)[:, :cols]
    threshold = int(p * 65536 + 0.5)
    return (bits >= threshold).double() * (65536 / max(65536 - threshold, 1))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if int(p * 65536 + 0.5) == 0:
        return x
    m = dropout_multiplier(x.shape[:-1].numel(), x.shape[-1], p, seed.cpu()).to(x.device)
    m = m.to(x.dtype).reshape(x.shape)
    return torch.where(m != 0, x * m, 0.0)  # a dropped nan is dropped


BITS = {2: 8, 3: 16, 4: 32, 5: 1, 6: 16, 7: 2}  # of an element, by distribution


def basis_value(h: Tensor, distribution: int) -> Tensor:
    if distribution == 5:
        return 1.0 - 2.0 * h
    if distribution == 6:
        return (h >= 54613).double() - (h < 10923).double()
    if distribution == 7:
        return (h & 1).double() - (h >> 1).double()
    h, b = (h >> 8, 24) if distribution == 4 else (h, BITS[distribution])
    return (2 * h + 1).double() / 2**b - 1


def basis_elements(seed, method, distribution, tensor, first, R, q0, c0, Q, C) -> Tensor:
    """U[q0 : q0 + Q, c0 : c0 + C] of the stack, float64 [Q, C]."""
    b = BITS[distribution]
    E, lead = 128 // b, c0 % (128 // b)
    q, block = torch.meshgrid(q0 + torch.arange(Q), c0 // E + torch.arange((lead + C + E - 1) // E), indexing="ij")
    tag = first + q // R | method << 16 | distribution << 22
    words = torch.stack(philox4x32([block, q % R, torch.full_like(q, tensor), tag], seed), -1)
    bits = words.unsqueeze(-1) >> torch.arange(0, 32, b) & (1 << b) - 1  # [Q, blocks, 4, 32 / b]
    return basis_value(bits.reshape(Q, bits.shape[1] * E)[:, lead : lead + C], distribution)
