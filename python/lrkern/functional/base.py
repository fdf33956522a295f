# SPDX-License-Identifier: Apache-2.0
"""The frozen linear layer that an adapter stands beside: its product, its gradients, and what autocast does to it."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

linear = F.linear  # bench/ puts its own here and in place of ``gradients`` to time an adapter alone


def gradients(need, dy: Tensor, x: Tensor | None, weight: Tensor) -> list[Tensor | None]:
    """dx, dW, dbias of x Wᵀ + bias, those that ``need`` asks for."""
    flat = dy.flatten(0, -2)
    dw = flat.mT @ x.flatten(0, -2) if need[1] else None
    return [dy @ weight if need[0] else None, dw, flat.sum(0) if need[2] else None]


def output(y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, or a copy of the y that a base layer gave: contiguous, for an adapter to add to in place."""
    if y is None:
        return linear(x, weight, bias).contiguous()
    return y.clone(memory_format=torch.contiguous_format)


def cast(x: Tensor, *base: Tensor | None) -> tuple[Any, ...]:
    """As F.linear under autocast: activations and base are cast, the adapter's own parameters stay."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *base
    low = torch.get_autocast_dtype(x.device.type)
    return x.to(low), *(None if t is None else t.to(low) for t in base)


def no_autocast(backward):
    """As forward ran: ``loss.backward()`` may be called where autocast is on."""

    @functools.wraps(backward)
    def run(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return run
