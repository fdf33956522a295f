# SPDX-License-Identifier: Apache-2.0
"""A trained middle between frozen factors: what LoRA-XS, IntTune, SVFit and others compute."""

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from . import base

__all__ = ["middle_add", "middle_linear"]


def _through(s: Tensor, m: Tensor) -> Tensor:
    """s Mᵀ in s's dtype, or s ⊙ m for a gate."""
    m = m.to(s.dtype)
    return s * m if m.dim() == 1 else s @ m.mT


def _back(dp: Tensor, m: Tensor) -> Tensor:
    m = m.to(dp.dtype)
    return dp * m if m.dim() == 1 else dp @ m


class _Middle(Function):
    """y + scale · (M x Aᵀ) Bᵀ, y = x Wᵀ + bias or given. A and B have no gradient: x is not kept for them, only x Aᵀ is."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, m, a, b, scale):
        s = ops.lora_shrink(x, a)
        out = base.output(y, x, weight, bias)
        ops.lora_expand_(out, _through(s, m), b, scale)
        if ctx is not None:
            ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, m, a, b, s)
            ctx.form, ctx.scale, ctx.x = form, scale, (x.shape, x.dtype)
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        x, weight, m, a, b, s = tensors
        need_y, *need, need_m = ctx.needs_input_grad[1:6]
        dm = None
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            dx, dw, dbias = base.gradients(need, dy, x, weight)
            dp = ops.lora_shrink(dy, b.mT, ctx.scale) if need[0] or need_m else None
            if need_m:
                p, u = base.flat(dp).to(m.dtype), base.flat(s).to(m.dtype)
                dm = (p * u).sum(0) if m.dim() == 1 else p.mT @ u
            if need[0]:
                dx = dy.new_zeros(ctx.x[0], dtype=ctx.x[1]) if dx is None else dx.contiguous()
                ops.lora_expand_(dx, _back(dp, m), a.mT)
        return None, dy if need_y else None, dx, dw, dbias, dm, None, None, None

    @staticmethod
    def composite(y, x, weight, bias, m, a, b, scale):
        p = _through(ops.lora_shrink(x, a), m)
        if y is None:
            return ops.linear_expand(x, weight, bias, p, b, scale)
        return base.added(y, ops.linear_expand(None, None, None, p, b, scale))


def _check(form: str, x: Tensor, m: Tensor, a: Tensor, b: Tensor, dropout_p: float) -> None:
    base.probability(form, dropout_p)
    base.of_shape(form, "m", m, "[R]", a.shape[0]) if m.dim() == 1 else base.of_shape(
        form, "m", m, "[Q, R]", b.shape[1], a.shape[0]
    )
    for name, t in (("a", a), ("b", b)):
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"lrkern::{form}: {name} has no gradient here, got one that requires it; use lora_linear"
            )


def middle_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + scale · ((dropout(x) Aᵀ) Mᵀ) Bᵀ with frozen A and B, or of a gate m with scale · (m ⊙ (dropout(x) Aᵀ)) Bᵀ.

    x [..., I]; weight [O, I]; m [Q, R] or [R]; a [R, I] and b [O, Q] (Q = R beside a gate), of m's dtype, float32 or x's. Saves
    x Aᵀ [T, R], and x only where W trains: dM = (scale · dy B)ᵀ (x Aᵀ), dx = dy W + (scale · dy B) M A. a or b that require a
    gradient are refused.
    """
    _check("middle_linear", x, m, a, b, dropout_p)
    return base.beside("middle_linear", _Middle, None, x, weight, bias, dropout_p, training, m, a, b, scale)


def middle_add(
    y: Tensor,
    x: Tensor,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y + scale · ((dropout(x) Aᵀ) Mᵀ) Bᵀ as a new tensor, beside a base layer of any kind that gave y [..., O]."""
    _check("middle_add", x, m, a, b, dropout_p)
    if a.dtype != torch.float32 and not a.dtype == x.dtype == y.dtype:
        a, b = a.float(), b.float()
    return base.beside("middle_add", _Middle, y, x, None, None, dropout_p, training, m, a, b, scale)
