# SPDX-License-Identifier: Apache-2.0
"""LoRA, with dropout from torch's generator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from .base import probability

__all__ = ["lora_add", "lora_into", "lora_linear", "lora_scaling"]


def lora_scaling(alpha: float, r: int, use_rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); 0 for rank 0."""
    return alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0


def dropout_seed(x: Tensor) -> Tensor:
    """A fresh seed from torch's generator of x's device, so that dropout follows manual_seed, checkpointing (which
    replays the generator's state) and CUDA graphs (two replays differ) as nn.Dropout does."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def dropout_of(form: str, x: Tensor, p: float, training: bool) -> tuple:
    """The ops' dropout_p and seed, or nothing where dropout does not act."""
    return (p, dropout_seed(x)) if probability(form, p) and training else ()


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
    if dropout_p == 0.0:
        return ops.lora_linear(x, weight, bias, a, b, scale)
    return ops.lora_linear(x, weight, bias, a, b, scale, *dropout_of("lora_linear", x, dropout_p, training))


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """y + scale · (dropout(x) Aᵀ) Bᵀ, beside a base layer of any kind that gave y [..., O], in a dtype of its own too;
    ``ops.lora_add``."""
    if a.dtype != torch.float32 and not a.dtype == x.dtype == y.dtype:
        a, b = a.float(), b.float()
    return ops.lora_add(y, x, a, b, scale, *dropout_of("lora_add", x, dropout_p, training))


def lora_into(
    base: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """base(x, S, B), S = scale · dropout(x) Aᵀ: for a base layer that gives x Wᵀ + bias + S Bᵀ itself, in one accumulator, such as
    ``nn.MXFP4Linear.with_low_rank``.

    x [..., I]; a [R, I] and b [O, R], of x's dtype or float32.
    """
    return base(x, ops.lora_shrink(x, a, scale, *dropout_of("lora_into", x, dropout_p, training)), b)
