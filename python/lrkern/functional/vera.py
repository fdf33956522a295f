# SPDX-License-Identifier: Apache-2.0
"""VeRA: two trained vectors over a frozen pair of projections."""

import torch
from torch import Tensor
from torch.autograd import Function

from . import base
from .projection import Basis, Projection, add_, cols_of, matmul, rows_of, save, saved, scale_of

__all__ = ["vera_add", "vera_linear"]


def _wide(d: Tensor) -> bool:
    """Whether x Aᵀ and its gradient are float32 over a generated A, whose scale they lack: they may leave float16's range."""
    return d.dtype != torch.bfloat16


class _Vera(Function):
    """y + b ⊙ ((c d ⊙ (x Aᵀ)) B), y = x Wᵀ + bias or given; c the scales of A and B, B stored as [r, out]."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, d, b, A, B, save_output):
        d32, b32, c = d.float().contiguous(), b.float().contiguous(), scale_of(A) * scale_of(B)
        d32, wide = d32 if c == 1.0 else c * d32, _wide(d)
        u = matmul(x, A, True, wide=wide)
        out, w = base.output(y, x, weight, bias), None
        if save_output:
            w = matmul(u, B, False, in_scale=d32, wide=wide)
            add_(out, w, b32, w.dtype)  # the roundings of the other way
        else:
            matmul(u, B, False, d32, b32, into=out)
        if ctx is not None:
            save(ctx, A, B, x if ctx.needs_input_grad[3] else None, weight, d, b, u, w)
            ctx.form, ctx.x, ctx.c = form, (x.shape, x.dtype), c
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        A, B, x, weight, d, b, u, w = saved(ctx, tensors)
        need_y, *need, need_d, need_b = ctx.needs_input_grad[1:7]
        wide, v, dd, db = _wide(d), ctx.c * d.float(), None, None
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            dx, dw, dbias = base.gradients(need, dy, x, weight)
            if need[0] or need_d:
                dv = matmul(dy, B, True, in_scale=b.float(), wide=wide)  # [..., r]
            if need_d:
                dd = (ctx.c * base.flat(dv.float() * u.float()).sum(0)).to(d.dtype)
            if need[0]:
                dx = dy.new_zeros(ctx.x[0], dtype=ctx.x[1]) if dx is None else dx.contiguous()
                matmul(dv, A, False, in_scale=v, into=dx)
            if need_b:
                db = _db(dy, u, v, B, w).to(b.dtype)
        return None, dy if need_y else None, dx, dw, dbias, dd, db, None, None, None

    @staticmethod
    def composite(y, x, weight, bias, d, b, A, B, save_output):
        wide, c = _wide(d), scale_of(A) * scale_of(B)
        v = c * d.float() * matmul(x, A, True, wide=wide).float()
        w = b.float() * matmul(v, B, False, wide=True)
        return base.added(base.linear(x, weight, bias) if y is None else y, w)


def _db(dy: Tensor, u: Tensor, v: Tensor, B: Projection, w: Tensor | None) -> Tensor:
    """Σ_t dy[t] ⊙ w[t], w = (v ⊙ u) B, or without a [T, O] temporary Σ_k B[k] ⊙ ((v ⊙ u)ᵀ dy)[k]."""
    dy, u = base.flat(dy), base.flat(u)
    if w is None and len(dy) < len(v):
        w = matmul(u, B, False, in_scale=v, wide=True)
    if w is not None:
        return (dy.float() * base.flat(w).float()).sum(0)
    p = (u.float() * v).mT @ dy.float()  # [r, O]
    return p.mul_(B._replace(scale=1.0).fill(p) if isinstance(B, Basis) else B).sum(0)


def _check(form: str, d: Tensor, b: Tensor, A: Projection, B: Projection, dropout_p: float) -> None:
    if dropout_p:
        base.probability(form, dropout_p)
    base.of_shape(form, "d", d, "[r]", rows_of(A))
    base.of_shape(form, "b", b, "[O]", cols_of(B))


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
    save_output: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + b ⊙ ((d ⊙ (dropout(x) Aᵀ)) B): VeRA (Kopiczko et al., arXiv 2310.11454).

    x [..., I]; weight [O, I]; d [r] and b [O] train, float32 or x's dtype; A [r, I] and B [r, O], the transpose of the paper's, are a
    ``Basis`` or frozen tensors. Saves x Aᵀ [T, r], x where weight trains, and where b trains (d ⊙ (x Aᵀ)) B [T, O] as PEFT
    does; ``save_output=False`` does not keep that one, and db costs a GEMM more.
    """
    _check("vera_linear", d, b, A, B, dropout_p)
    keep = save_output and b.requires_grad and torch.is_grad_enabled()
    return base.beside("vera_linear", _Vera, None, x, weight, bias, dropout_p, training, d, b, A, B, keep)


def vera_add(
    y: Tensor,
    x: Tensor,
    d: Tensor,
    b: Tensor,
    A: Projection,
    B: Projection,
    dropout_p: float = 0.0,
    training: bool = True,
    save_output: bool = True,
) -> Tensor:
    """y + b ⊙ ((d ⊙ (dropout(x) Aᵀ)) B) as a new tensor, beside a base layer of any kind that gave y."""
    _check("vera_add", d, b, A, B, dropout_p)
    keep = save_output and b.requires_grad and torch.is_grad_enabled()
    return base.beside("vera_add", _Vera, y, x, None, None, dropout_p, training, d, b, A, B, keep)
