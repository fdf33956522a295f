# SPDX-License-Identifier: Apache-2.0
"""Quartet: a linear layer's three products, of forward and of backward, in FP4."""

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..limits import DTYPES
from ..ops.dispatch import once, under_transforms
from ..ops.mx import BLOCK
from .base import cast, of_shape

__all__ = ["quartet_linear"]

RULES = ("quest", "quest_nearest")


def drawn(device: torch.device) -> tuple[Tensor, Tensor]:
    """What one backward pass draws from torch's generator: signs int32 [2], of dX and of dW, and seeds int64 [4], of the operands of
    each. Two operands under one seed would round alike where they have the same rows and columns, and their product would be biased."""
    signs = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)
    return signs, torch.randint(2**63 - 1, (4,), dtype=torch.int64, device=device)


def _hadamard(like: Tensor) -> Tensor:
    """Sylvester's matrix [32, 32] of ±1: the parity of the bits that row and column share."""
    i = torch.arange(BLOCK, device=like.device)
    shared = (i[:, None] & i)[..., None] >> torch.arange(5, device=like.device)
    return (1 - 2 * ((shared & 1).sum(-1) & 1)).to(like.dtype)


def _gradient(e: Tensor, codes: Tensor, scales: Tensor, mask: Tensor, signs: Tensor, seeds: Tensor) -> Tensor:
    """(mask ⊙ (Q(e H) Q(Z H)ᵀ)) Hᵀ [M, 32 G] of e [M, N] and the packed Zᵀ [N, 32 G]; mask int32 [M, G]."""
    z = ops.mx_dequantize(codes, scales, BLOCK * scales.shape[-1], torch.bfloat16).mT
    pair = zip((e, z), seeds.split(1), strict=True)
    a, b = (ops.mx_quantize(t, "floor", True, signs, seed, 0.75)[:2] for t, seed in pair)
    # H of ±1 is exact in 16 bits; its 32^-1/2 is in alpha.
    g = ops.mx_matmul(*a, *b, BLOCK * a[1].shape[-1], e.dtype, 16 / 9 * BLOCK**-0.5).unflatten(-1, (-1, BLOCK))
    bits = torch.ones((), dtype=torch.int32, device=e.device) << torch.arange(BLOCK, device=e.device).int()
    g = g.masked_fill((mask[..., None] & bits) == 0, 0)
    return (g @ _hadamard(g)).flatten(-2)


class _Quartet(Function):
    @staticmethod
    def forward(ctx, x, weight, rule):
        need_x, need_w, _ = ctx.needs_input_grad
        x_codes, x_scales, x_mask = ops.mx_quantize(x, rule, True, mask=need_x)
        w_codes, w_scales, w_mask = ops.mx_quantize(weight, rule, True, mask=need_w)
        of_x = (w_codes, w_scales, x_mask) if need_x else (None,) * 3
        of_w = (x_codes, x_scales, w_mask) if need_w else (None,) * 3
        ctx.save_for_backward(*of_x, *of_w)
        ctx.columns, ctx.dtype = weight.shape[1], weight.dtype
        return ops.mx_matmul(x_codes, x_scales, w_codes, w_scales, BLOCK * w_scales.shape[1], x.dtype)

    @staticmethod
    def backward(ctx, dy):
        need_x, need_w, _ = ctx.needs_input_grad
        saved, (signs, seeds) = ctx.saved_tensors, drawn(dy.device)
        dx = dw = None
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            if need_x:
                dx = _gradient(dy, *saved[:3], signs[:1], seeds[:2])[:, : ctx.columns]
            if need_w:
                dw = _gradient(dy.mT, *saved[3:], signs[1:], seeds[2:])[:, : ctx.columns].to(ctx.dtype)
        return *once("quartet_linear", (dx, dw), (dy,)), None


def quartet_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rule: str = "quest") -> Tensor:
    """y = x Wᵀ + bias by FP4 x FP4, and so its gradients: Quartet (Castro et al., arXiv 2505.14669).

        X̂, Ŵ = Q(x H), Q(W H)   y = X̂ Ŵᵀ + bias               H of each 32 along I, Q to the nearest, scales by ``rule``
        dx = (Mx ⊙ (R(dy H₁) R(Ŵᵀ H₁)ᵀ)) Hᵀ                   along O
        dW = (Mw ⊙ (R(dyᵀ H₂) R(X̂ᵀ H₂)ᵀ)) Hᵀ                  along the rows of x

    H is the orthonormal Hadamard matrix of 32; H₁ and H₂ are H with signs of their own. R multiplies by 3/4 under the scale "floor", where
    nothing clips, and rounds stochastically, products by 16/9: so the gradients' means are those of y = X̂ Ŵᵀ. M is 0 where forward
    clipped. The last block of each direction is filled with zeros. Signs and seeds are drawn anew in each backward pass, from torch's
    generator of dy's device: forward draws nothing, so that checkpointing, which repeats it, and evaluation change no random number.

    x [..., I] is float32, bfloat16 or float16, y and dx have its dtype, under autocast that of F.linear. weight [O, I], of any of the three,
    is quantised as it is; dW has its dtype, through dy's. bias [O] is cast and its gradient a plain sum. Kept for backward are codes,
    scales and masks alone, 21 bytes for each block of x and of W (17 and 4 where only one of the two takes a gradient). Double backward is
    refused. Where there are no FP4 units the products are emulated, exactly (``ops.mx_matmul``): slower than F.linear there.

    rule: "quest" as published, or "quest_nearest", of less error (``ops.mx_quantize``).
    """
    who, sizes = "lrkern::quartet_linear", f"{list(x.shape)} and {list(weight.shape)}"
    if under_transforms():
        raise RuntimeError(
            f"{who}: torch.func's transforms (grad, vmap, jacrev, ...) are not supported, its gradients are drawn at random"
        )
    if rule not in RULES:
        raise RuntimeError(f"{who}: rule must be one of {list(RULES)}, got {rule!r}")
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        must = "x and weight must be float32, float16 or bfloat16"
        raise RuntimeError(f"{who}: {must}, got {x.dtype} and {weight.dtype}")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise RuntimeError(f"{who}: x and weight must have shapes [..., I] and [O, I], got {sizes}")
    if bias is not None:
        of_shape("quartet_linear", "bias", bias, "[O]", weight.shape[0])
    (x,) = cast(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _Quartet.apply(rows, weight, rule).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)
