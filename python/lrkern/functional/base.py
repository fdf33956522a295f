# SPDX-License-Identifier: Apache-2.0
"""The frozen linear layer that an adapter stands beside: its product, its gradients, and what autocast does to it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..ops.dispatch import is_compiling, once, refuse_tangents, under_transforms

linear = F.linear  # bench/ puts its own here and in place of ``gradients`` to time an adapter alone


def flat(x: Tensor) -> Tensor:
    """[T, N], of a vector too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def gradients(need: Sequence[bool], dy: Tensor, x: Tensor | None, weight: Tensor | None) -> list[Tensor | None]:
    """dx, dW, dbias of x Wᵀ + bias, those that ``need`` asks for; none where the base layer gave y."""
    if weight is None:
        return [None, None, None]
    dw = flat(dy).mT @ flat(x) if need[1] else None
    return [dy @ weight if need[0] else None, dw, flat(dy).sum(0) if need[2] else None]


def output(y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, or a copy of the y that a base layer gave: contiguous, for an adapter to add to in place."""
    if y is not None:
        return y.clone(memory_format=torch.contiguous_format)
    out = linear(x, weight, bias).contiguous()
    if x.dim() <= 2:
        return out
    # Here F.linear gives a view of [T, O]. Autograd lets no activation work in place on a view that a Function returns; this is none.
    return torch.unsafe_chunk(out, 1, -1)[0]


def added(y: Tensor, delta: Tensor) -> Tensor:
    """y + delta, rounded once to y's dtype."""
    return (y.float() + delta.float()).to(y.dtype)


def dtype_of(x: Tensor) -> torch.dtype:
    """In which x is multiplied: its own, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor, *base: Tensor | None) -> tuple[Any, ...]:
    """As F.linear under autocast: activations and base are cast, the adapter's own parameters stay."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *base
    low = dtype_of(x)
    return x.to(low), *(None if t is None else t.to(low) for t in base)


def probability(form: str, p: float) -> float:
    """A dropout_p that acts or not is a probability all the same."""
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"lrkern::{form}: dropout_p must lie in [0, 1], got {p}")
    return p


def of_shape(form: str, name: str, t: Tensor, letters: str, *sizes: int) -> None:
    """Refuses what torch would broadcast without a word."""
    if t.shape != sizes:
        raise RuntimeError(f"lrkern::{form}: {name} must have shape {letters} = {list(sizes)}, got {list(t.shape)}")


def once_differentiable(backward: Callable) -> Callable:
    """As torch's of that name, of backward(ctx, dy, saved_tensors), but the error names ctx.form. A compiled graph refuses a second
    backward by itself."""

    @functools.wraps(backward)
    def first_only(ctx, dy):
        if is_compiling():
            return backward(ctx, dy, ctx.saved_tensors)
        kept = ctx.saved_tensors  # unpacked once, as checkpointing asks
        with torch.no_grad():
            grads = backward(ctx, dy, kept)
        return once(ctx.form, tuple(grads), (dy, *kept))

    return staticmethod(first_only)


def beside(
    form: str, function: type[Function], y, x: Tensor, weight, bias, dropout_p: float, training: bool, *args: Any
) -> Tensor:
    """function(form, y, x, weight, bias, *args), form the name that errors say, its ctx None where no backward follows, out of autocast:
    an adapter beside x Wᵀ + bias, or beside a base layer of any kind that gave y, with dropout on the adapter's x alone. Under torch.func's
    transforms function.composite(y, x, weight, bias, *args), whose calls have all derivatives."""
    if torch.is_autocast_enabled(x.device.type):  # entering a context costs as much as the products of few tokens
        x, weight, bias = cast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return beside(form, function, y, x, weight, bias, dropout_p, training, *args)
    if training and dropout_p > 0.0:
        if weight is not None:
            y, weight, bias = linear(x, weight, bias), None, None
        x = torch.dropout(x, dropout_p, True)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0 and not under_transforms():
        return function.forward(
            None, form, y, x, weight, bias, *args
        )  # applying it costs as much as the products of few tokens
    refuse_tangents(form, (y, x, weight, bias, *args))
    if under_transforms():
        return function.composite(y, x, weight, bias, *args)
    return function.apply(form, y, x, weight, bias, *args)
