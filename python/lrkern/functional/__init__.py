# SPDX-License-Identifier: Apache-2.0
"""Stateless compositions of the ops: adapters as users name them. Letters as in ops."""

import math

import torch
from torch import Tensor

from .. import ops
from .basis import (
    Basis,
    nola_factors,
    nola_linear,
    randlora_add,
    randlora_delta,
    randlora_linear,
    randlora_way,
    vera_add,
    vera_linear,
)

__all__ = [
    "Basis",
    "dora_linear",
    "dora_norm",
    "lora_add",
    "lora_linear",
    "lora_scaling",
    "nola_factors",
    "nola_linear",
    "randlora_add",
    "randlora_delta",
    "randlora_linear",
    "randlora_way",
    "vera_add",
    "vera_linear",
]


def lora_scaling(alpha: float, r: int, use_rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); 0 for rank 0."""
    return alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0


def dropout_seed(x: Tensor) -> Tensor:
    """A fresh seed from torch's generator of x's device, so that dropout follows manual_seed, checkpointing (which
    replays the generator's state) and CUDA graphs (two replays differ) as nn.Dropout does."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ; ``ops.lora_linear`` with a seed drawn from torch's generator.

    x [..., I]; weight [O, I]; bias [O] or None; a [R, I]; b [O, R]. Dropout acts where training and dropout_p > 0.
    """
    if training and dropout_p > 0.0:
        return ops.lora_linear(x, weight, bias, a, b, scale, dropout_p, dropout_seed(x))
    return ops.lora_linear(x, weight, bias, a, b, scale)


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """y + scale · (dropout(x) Aᵀ) Bᵀ, beside a base layer of any kind that gave y [..., O]; ``ops.lora_add``."""
    if training and dropout_p > 0.0:
        return ops.lora_add(y, x, a, b, scale, dropout_p, dropout_seed(x))
    return ops.lora_add(y, x, a, b, scale)


@torch.no_grad()
def row_norm(weight: Tensor) -> Tensor:
    """‖W‖ of every row [O] in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, weight_norm: Tensor | None = None) -> Tensor:
    """‖W + scale · B A‖ of every row [O] in float32, without gradient and without an O x I product:

        ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ    for a row w of W and b of B

    weight [O, I]; a [R, I]; b [O, R]; weight_norm: ``row_norm(weight)`` where it is known. Where W and scale · B A nearly
    cancel, the relative error grows as (‖w‖ / norm)².
    """
    with torch.autocast(weight.device.type, enabled=False):
        wa = ops.lora_shrink(weight, a if a.dtype == weight.dtype else a.float()).float()  # W Aᵀ [O, R]
        a, b = a.float(), b.float()
        low = 2 * scale * wa + scale**2 * (b @ (a @ a.mT))
        weight_norm = row_norm(weight) if weight_norm is None else weight_norm
        return (weight_norm.square() + (b * low).sum(1)).clamp_min(0).sqrt()


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias, g = magnitude / ‖W + scale · B A‖ per row: DoRA (Liu et al., arXiv
    2402.09353) as PEFT defines it: the norm has no gradient, and with active dropout

        y = x Wᵀ + bias + (g - 1) ⊙ (D(x) Wᵀ) + g ⊙ scale · (D(x) Aᵀ) Bᵀ

    x [..., I]; weight [O, I]; bias [O] or None; a [R, I]; b [O, R]; magnitude [O], float32 or of x's dtype;
    norm: ``dora_norm(weight, a, b, scale)`` where it is known.
    """
    g = magnitude / (dora_norm(weight, a, b, scale) if norm is None else norm)
    gb = (g[:, None] * b).to(b.dtype)
    if training and dropout_p > 0.0:
        dropped = torch.dropout(x, dropout_p, True)
        base = torch.nn.functional.linear(x, weight, bias)
        return base + ops.lora_linear(dropped, weight, None, a, gb, scale, base_scale=g - 1)
    return ops.lora_linear(x, weight, bias, a, gb, scale, base_scale=g)
