# SPDX-License-Identifier: Apache-2.0
"""MoRA (Jiang et al., arXiv 2405.12130): one square matrix in place of two low-rank factors."""

import torch
from torch import Tensor

from .. import ops
from . import base

__all__ = ["mora_add", "mora_delta", "mora_factors", "mora_linear", "mora_rank"]


def mora_rank(in_features: int, out_features: int, r: int, type: int = 1, paper: bool = False) -> int:
    """r̂: M [r̂, r̂] has as many parameters as LoRA of rank r. sqrt((in + out) r) to the nearest number as the authors' code has it,
    for type 6 the even one below; ``paper``: rounded down."""
    rank = int(((in_features + out_features) * r) ** 0.5 + (0.0 if paper else 0.5))
    return rank // 2 * 2 if type == 6 else rank


def mora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: Tensor,
    type: int = 1,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + decompress(compress(dropout(x)) Mᵀ); ``ops.mora_linear``, and with active dropout ``ops.mora_add``.

    x [..., I]; weight [O, I]; bias [O] or None; m [r̂, r̂]; type 1, 2, 3, 4 or 6, as ``ops.mora`` says.
    """
    if base.probability("mora_linear", dropout_p) and training:
        return mora_add(base.linear(x, weight, bias), x, m, type, dropout_p)
    return ops.mora_linear(x, weight, bias, m, type)


def mora_add(y: Tensor, x: Tensor, m: Tensor, type: int = 1, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    """y + decompress(compress(dropout(x)) Mᵀ), beside a base layer of any kind that gave y [..., O], in a dtype of its own too."""
    if base.probability("mora_add", dropout_p) and training:
        x = torch.dropout(x, dropout_p, True)
    if not m.dtype == x.dtype == y.dtype:
        m = m.float()
    return ops.mora_add(y, x, m, type)


def mora_delta(m: Tensor, in_features: int, out_features: int, type: int = 1) -> Tensor:
    """ΔW [out, in] in float32: M's elements where the maps put them; for type 6 blocks M Rᵢ below each other."""
    m, r = m.float(), m.shape[0]
    n = min(-(-in_features // r), -(-out_features // r)) if type == 6 else 1
    if not n:
        return m.new_zeros(out_features, in_features)
    blocks, i = m.new_zeros(n, r, n, r), torch.arange(n)
    blocks[i, :, i] = m
    rows = blocks.flatten(0, 1) if type == 6 else m
    columns = ops.mora_decompress(rows, in_features, type, adjoint=True).mT  # [in, n r]
    columns = columns.unflatten(-1, (n, r)) if type == 6 else columns
    return ops.mora_decompress(columns, out_features, type).mT


def mora_factors(m: Tensor, in_features: int, out_features: int, type: int = 1) -> tuple[Tensor, Tensor]:
    """A [r̂, in] and B [out, r̂] in float32 with ΔW = B A exactly, of types 1 to 4: A has M's columns where x is folded, B a one a
    row where y is unfolded."""
    if type == 6:
        raise ValueError("lrkern::mora_factors: type must be 1, 2, 3 or 4, got 6: its ΔW is of full rank")
    a = ops.mora_decompress(m.float(), in_features, type, adjoint=True)
    b = ops.mora_decompress(torch.eye(m.shape[0], device=m.device), out_features, type)
    return a, b.mT
