# SPDX-License-Identifier: Apache-2.0
"""DoRA: LoRA whose rows are scaled to a trained magnitude."""

import torch
from torch import Tensor

from .. import ops
from . import base
from .lora import lora_add

__all__ = ["dora_add", "dora_linear", "dora_norm"]


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """‖W + scale · B A‖ of every row [O] in float32, without gradient and without an O x I product:

        ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ    for a row w of W and b of B

    weight [O, I]; a [R, I]; b [O, R]. Where W and scale · B A nearly cancel, the relative error grows as (‖w‖ / norm)².
    """
    with torch.autocast(weight.device.type, enabled=False):
        wa = ops.lora_shrink(weight, a if a.dtype == weight.dtype else a.float()).float()  # W Aᵀ [O, R]
        a, b = a.float(), b.float()
        low = 2 * scale * wa + scale**2 * (b @ (a @ a.mT))
        weight_norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
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
    base.of_shape("dora_linear", "magnitude", magnitude, "[O]", len(weight))
    g = magnitude / (dora_norm(weight, a, b, scale) if norm is None else norm)
    p = base.probability("dora_linear", dropout_p) * training
    dtype = base.dtype_of(x)
    if dtype == torch.float16:
        return _in_float16(x, weight, bias, a, b, g.float(), scale, p)
    if dtype == g.dtype == torch.float32 and p == 0.0 and _fewer_rows_than_ranks(x, a):
        y = ops.lora_linear(x, weight, None, a, b, scale)
        return g * y if bias is None else torch.addcmul(bias, g, y)
    gb = (g[:, None] * b).to(b.dtype)
    if p > 0.0:
        dropped = torch.dropout(x, p, True)
        y = torch.nn.functional.linear(x, weight, bias)
        return y + ops.lora_linear(dropped, weight, None, a, gb, scale, base_scale=g - 1)
    return ops.lora_linear(x, weight, bias, a, gb, scale, base_scale=g)


def _fewer_rows_than_ranks(x: Tensor, a: Tensor) -> bool:
    """So that g ⊙ y is less work than g ⊙ b. Not where a gradient follows, which needs g ⊙ b in any case, and not while
    compiling, when the number of rows may be any."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.numel() < a.numel()


def dora_add(y: Tensor, x: Tensor, product: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """y + (g - 1) ⊙ product + g ⊙ scale · (x Aᵀ) Bᵀ, DoRA beside a base layer of any kind that gave y = x' Wᵀ + bias.

    x [..., I], dropped out where dropout acts; product = x Wᵀ [..., O]; g = magnitude / ``dora_norm`` [O].
    """
    if torch.float16 in (y.dtype, b.dtype):  # as in _in_float16
        wide = y.float() + (g - 1).float() * product.float()
        return ops.lora_add(wide, x, a.float(), g[:, None].float() * b.float(), scale).to(y.dtype)
    y = (y + (g - 1) * product).to(y.dtype)
    return lora_add(y, x, a, (g[:, None] * b).to(b.dtype), scale)


def _in_float16(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, p: float
) -> Tensor:
    """Over a float16 base the adapter is float32: g ⊙ b, and (g - 1) ⊙ (x Wᵀ) with what is added to it, may leave float16's
    range where PEFT's products, in another order, stay inside."""
    dropped = torch.dropout(x, p, True) if p > 0.0 else x
    x, dropped, weight, bias = base.cast(x, dropped, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        a, gb = a.float(), g[:, None] * b.float()
        if p == 0.0:
            return ops.lora_linear(x, weight, bias, a, gb, scale, base_scale=g)
        y = torch.nn.functional.linear(x, weight, bias) + (g - 1) * torch.nn.functional.linear(dropped, weight)
        return ops.lora_add(y, dropped, a, gb, scale).to(x.dtype)
