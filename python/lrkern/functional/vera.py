# SPDX-License-Identifier: Apache-2.0
"""VeRA: two trained vectors over a frozen pair of projections."""

import torch
from torch import Tensor
from torch.autograd import Function

from . import base
from .projection import Basis, Projection, matmul, rows_of, scale_of

__all__ = ["vera_add", "vera_linear"]


class _Vera(Function):
    """y + b ⊙ ((c d ⊙ (x Aᵀ)) B), y = x Wᵀ + bias or given; c the scales of A and B, B stored as [r, out]."""

    @staticmethod
    def forward(ctx, y, x, weight, bias, d, b, A, B, save_output):
        d32, b32, c = d.float().contiguous(), b.float().contiguous(), scale_of(A) * scale_of(B)
        wide = d.dtype == torch.float32
        u = matmul(x, A, True, wide=wide)
        out = base.output(y, x, weight, bias)
        w = None
        if save_output:
            w = matmul(u, B, False, in_scale=c * d32, wide=wide)
            out.addcmul_(w, b.to(w.dtype))
        else:
            matmul(u, B, False, c * d32, b32, into=out)
        stored = [p for p in (A, B) if isinstance(p, Tensor)]
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, d, b, u, w, *stored)
        ctx.x = x.shape, x.dtype
        ctx.projections = [None if isinstance(p, Tensor) else p for p in (A, B)]
        ctx.c = c
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @base.no_autocast
    def backward(ctx, dy):
        x, weight, d, b, u, w, *stored = ctx.saved_tensors
        stored = iter(stored)
        A, B = (next(stored) if p is None else p for p in ctx.projections)
        y_, x_, w_, bias_, d_, b_ = ctx.needs_input_grad[:6]
        d32, b32, wide, c = d.float(), b.float(), d.dtype == torch.float32, ctx.c
        dx = dw = dbias = dd = db = None
        if weight is not None:
            dx, dw, dbias = base.gradients((x_, w_, bias_), dy, x, weight)
        if x_ or d_:
            dv = matmul(dy, B, True, in_scale=b32, wide=wide)  # [..., r]
            if d_:
                dd = (c * (dv.float() * u.float()).flatten(0, -2).sum(0)).to(d.dtype)
            if x_:
                shape, dtype = ctx.x
                dx = dy.new_zeros(shape, dtype=dtype) if dx is None else dx.contiguous()
                matmul(dv, A, False, in_scale=c * d32, into=dx)
        if b_:
            db = _vera_db(dy, u, c * d32, B, w).to(b.dtype)
        return dy if y_ else None, dx, dw, dbias, dd, db, None, None, None


def _vera_db(dy: Tensor, u: Tensor, d: Tensor, B: Projection, w: Tensor | None) -> Tensor:
    """Σ_t dy[t] ⊙ w[t], w = (d ⊙ u) B, or without a [T, O] temporary Σ_k B[k] ⊙ (vᵀ dy)[k], v = d ⊙ u."""
    dy, u = dy.flatten(0, -2), u.flatten(0, -2)
    if w is None and len(dy) < rows_of(B):
        w = matmul(u, B, False, in_scale=d, wide=True)
    if w is not None:
        return (dy.float() * w.flatten(0, -2).float()).sum(0)
    p = (u.float() * d).mT @ dy.float()  # [r, O]
    return p.mul_(B._replace(scale=1.0).fill(p) if isinstance(B, Basis) else B).sum(0)


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    b: Tensor,
    A: Projection,
    B: Projection,
    dropout_p: float = 0.0,
    training: bool = True,
    save_output: bool = False,
) -> Tensor:
    """y = x Wᵀ + bias + b ⊙ ((d ⊙ (dropout(x) Aᵀ)) B): VeRA (Kopiczko et al., arXiv 2310.11454).

    x [..., I]; weight [O, I]; d [r] and b [O] train, float32 or x's dtype; A [r, I] and B [r, O], the transpose of the
    paper's, are a ``Basis`` or frozen tensors. Saves x Aᵀ [T, r], and x where
    weight trains; db costs a GEMM that ``save_output`` saves by keeping [T, O].
    """
    x, weight, bias = base.cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        if training and dropout_p > 0.0:
            return vera_add(base.linear(x, weight, bias), x, d, b, A, B, dropout_p, training, save_output)
        return _Vera.apply(None, x, weight, bias, d, b, A, B, save_output)


def vera_add(
    y: Tensor,
    x: Tensor,
    d: Tensor,
    b: Tensor,
    A: Projection,
    B: Projection,
    dropout_p: float = 0.0,
    training: bool = True,
    save_output: bool = False,
) -> Tensor:
    """y + b ⊙ ((d ⊙ (dropout(x) Aᵀ)) B) as a new tensor, beside a base layer of any kind that gave y."""
    (x,) = base.cast(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Vera.apply(y, torch.dropout(x, dropout_p, training), None, None, d, b, A, B, save_output)
