# SPDX-License-Identifier: Apache-2.0
"""ALLoRA: LoRA whose factors take the gradient of each row of B A by its own rate."""

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..ops.dispatch import library
from . import base

__all__ = ["allora_add", "allora_linear", "allora_rates"]


@torch.no_grad()
def allora_rates(a: Tensor, b: Tensor, eta2: float = 1.0) -> Tensor:
    """c [O] in float32, c_i = 1 / sqrt(‖(B A)_i‖ + 1 / η²), without an O x I product: ‖(B A)_i‖² = b_i (A Aᵀ) b_iᵀ.

    a [R, I]; b [O, R]; eta2: η², so that c = η where B is zero.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.float(), b.float()
        norm = ((b @ (a @ a.mT)) * b).sum(1).clamp_min(0).sqrt()
        return (norm + 1.0 / eta2).rsqrt()


class _Allora(Function):
    """y + (x Aᵀ) Bᵀ, y = x Wᵀ + bias or given. x takes the gradient of that, A and B the one of c ⊙ dy in place of dy."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, a, b, eta2):
        s = ops.lora_shrink(x, a)
        out = base.output(y, x, weight, bias)
        ops.lora_expand_(out, s, b)
        if ctx is not None:
            keeps_x = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
            ctx.save_for_backward(x if keeps_x else None, weight, a, b, s)
            ctx.form, ctx.eta2, ctx.x = form, eta2, (x.shape, x.dtype)
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        x, weight, a, b, s = tensors
        need_y, *need, need_a, need_b = ctx.needs_input_grad[1:7]
        da = db = None
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            dx, dw, dbias = base.gradients(need, dy, x, weight)
            if need_a or need_b:
                c = allora_rates(a, b, ctx.eta2)[:, None]
                # (c ⊙ dy) B and dyᵀ S in one pass over dy; c ⊙ B is not rounded to 16 bits
                of_rows = dy, None, None, s.float(), c * b.float(), 1.0, False, False, False, need_a, need_b
                *_, ds, db = library().linear_expand_bwd.default(*of_rows)
                db = (c * db).to(b.dtype) if need_b else None
                if need_a:
                    _, da = library().lora_shrink_bwd.default(ds.to(s.dtype), x, a, 1.0, 0.0, None, False, True)
            if need[0]:
                dx = dy.new_zeros(ctx.x[0], dtype=ctx.x[1]) if dx is None else dx.contiguous()
                ops.lora_expand_(dx, ops.lora_shrink(dy, b.mT), a.mT)
        return None, dy if need_y else None, dx, dw, dbias, da, db, None

    @staticmethod
    def composite(y, x, weight, bias, a, b, eta2):
        """The gradient rule is that of no formula: once through x alone, and through A and B by c with that taken out of y again."""
        c = allora_rates(a, b, eta2)
        through_x = ops.lora_add(base.linear(x, weight, bias) if y is None else y, x, a.detach(), b.detach())
        s = ops.lora_shrink(x.detach(), a)
        by_rates = ops.linear_expand(None, None, None, s, b).float() * c
        return base.added(through_x, by_rates - by_rates.detach())


def _check(form: str, eta2: float) -> None:
    if not eta2 > 0.0:
        raise RuntimeError(f"lrkern::{form}: eta2 must be positive, got {eta2}")


def allora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, eta2: float = 1.0) -> Tensor:
    """y = x Wᵀ + bias + (x Aᵀ) Bᵀ with ALLoRA's gradients: row i of dL/d(B A) times c_i = 1 / sqrt(‖(B A)_i‖ + 1 / η²) for

        dA = ((c ⊙ dy) B)ᵀ x    dB = c ⊙ (dyᵀ (x Aᵀ))    dx = dy W + (dy B) A, without c

    c is a constant in backward, made there of A and B (``allora_rates``). x [..., I]; weight [O, I]; bias [O] or None; a [R, I] and
    b [O, R], float32 or of x's dtype. Saves x and x Aᵀ.
    """
    _check("allora_linear", eta2)
    return base.beside("allora_linear", _Allora, None, x, weight, bias, 0.0, False, a, b, eta2)


def allora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, eta2: float = 1.0) -> Tensor:
    """y + (x Aᵀ) Bᵀ as a new tensor with ALLoRA's gradients, beside a base layer of any kind that gave y [..., O]."""
    _check("allora_add", eta2)
    if a.dtype != torch.float32 and not a.dtype == x.dtype == y.dtype:
        a, b = a.float(), b.float()
    return base.beside("allora_add", _Allora, y, x, None, None, 0.0, False, a, b, eta2)
