# SPDX-License-Identifier: Apache-2.0
"""Stateless compositions of the ops."""

import torch
from torch import Tensor

from . import ops

__all__ = ["lora_linear"]


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
