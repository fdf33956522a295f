# SPDX-License-Identifier: Apache-2.0
"""Hydra: a low-rank branch beside the layer and one behind it."""

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..ops.dispatch import library
from . import base

__all__ = ["hydra_add", "hydra_linear"]


def _masked(s: Tensor, mask: Tensor | None) -> Tensor:
    return s if mask is None else s * mask.to(s.dtype)


def _rank(
    x: Tensor, y0: Tensor, ap: Tensor, a_s: Tensor, inner: Tensor | None, mask: Tensor | None, ones: bool
) -> Tensor:
    s = torch.cat([ops.lora_shrink(x, ap), ops.lora_shrink(y0, a_s)], -1)
    s = _masked(s if inner is None else s + inner.to(s.dtype), mask)
    return torch.cat([s, s.new_ones(*s.shape[:-1], 1)], -1) if ones else s


def _beyond(bp: Tensor, bs: Tensor, outer: Tensor | None) -> Tensor:
    return torch.cat([bp, bs] if outer is None else [bp, bs, outer[:, None]], 1)


class _Hydra(Function):
    """y0 + scale · S [B_p, B_s, outer]ᵀ, S = [m ⊙ ([x A_pᵀ, y0 A_sᵀ] + inner), 1], y0 = x Wᵀ + bias or given: a bias behind the branches is
    one rank more, in forward and in backward."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, ap, bp, a_s, bs, inner, outer, scale, mask):
        y0 = base.linear(x, weight, bias) if y is None else y
        s = _rank(x, y0, ap, a_s, inner, mask, outer is not None)
        alone = y is None and ctx is None  # nobody else has y0
        out = y0.contiguous() if alone else y0.clone(memory_format=torch.contiguous_format)
        ops.lora_expand_(out, s, _beyond(bp, bs, outer), scale)
        if ctx is not None:
            keeps_x, keeps_y = ctx.needs_input_grad[3] or ctx.needs_input_grad[5], ctx.needs_input_grad[7]
            rank = ap, bp, a_s, bs, outer, s, mask
            ctx.save_for_backward(x if keeps_x else None, y0 if keeps_y else None, weight, *rank)
            ctx.form, ctx.scale, ctx.x = form, scale, (x.shape, x.dtype)
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        x, y0, weight, ap, bp, a_s, bs, outer, s, mask = tensors
        need_y, *need, need_ap, need_bp, need_as, need_bs, need_inner, need_outer = ctx.needs_input_grad[1:11]
        dx = dw = dbias = dap = dbp = das = dbs = dinner = douter = dy0 = None
        sizes = [ap.shape[0], a_s.shape[0]] + [1] * (outer is not None)
        need_b = need_bp or need_bs or need_outer
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            flags = False, False, False, True, need_b
            *_, ds, db = library().linear_expand_bwd.default(
                dy, None, None, s, _beyond(bp, bs, outer), ctx.scale, *flags
            )
            if need_b:
                dbp, dbs, *rest = db.split(sizes, 1)
                douter = rest[0].flatten() if rest else None
            ds = _masked(ds[..., : sizes[0] + sizes[1]], mask)
            dp, dq = (t.contiguous() for t in ds.split(sizes[:2], -1))
            if need_inner:
                dinner = base.flat(ds).sum(0).to(outer.dtype)
            if need_as:
                _, das = library().lora_shrink_bwd.default(dq, y0, a_s, 1.0, 0.0, None, False, True)
            if need_ap:
                _, dap = library().lora_shrink_bwd.default(dp, x, ap, 1.0, 0.0, None, False, True)
            if need_y or any(need):
                dy0 = dy.clone(memory_format=torch.contiguous_format)
                ops.lora_expand_(dy0, dq, a_s.mT)
                dx, dw, dbias = base.gradients(need, dy0, x, weight)
            if need[0]:
                dx = dy.new_zeros(ctx.x[0], dtype=ctx.x[1]) if dx is None else dx.contiguous()
                ops.lora_expand_(dx, dp, ap.mT)
        grads = dy0 if need_y else None, dx, dw, dbias, dap, dbp if need_bp else None, das, dbs if need_bs else None
        return None, *grads, dinner, douter if need_outer else None, None, None

    @staticmethod
    def composite(y, x, weight, bias, ap, bp, a_s, bs, inner, outer, scale, mask):
        y0 = base.linear(x, weight, bias) if y is None else y
        s = _rank(x, y0, ap, a_s, inner, mask, outer is not None)
        return base.added(y0, ops.linear_expand(None, None, None, s, _beyond(bp, bs, outer), scale))


def _mask(form: str, x: Tensor, ap: Tensor, a_s: Tensor, dropout_p: float, training: bool) -> Tensor | None:
    """Of the rank activations [..., 2 R]."""
    if not (base.probability(form, dropout_p) and training):
        return None
    return torch.dropout(x.new_ones(*x.shape[:-1], ap.shape[0] + a_s.shape[0]), dropout_p, True)


def _check(form: str, a_s: Tensor, ap: Tensor, inner: Tensor | None, outer: Tensor | None) -> None:
    if (inner is None) != (outer is None):
        raise RuntimeError(
            f"lrkern::{form}: inner and outer must come together, got {'outer' if inner is None else 'inner'}"
        )
    if inner is not None:
        base.of_shape(form, "inner", inner, "[2 R]", ap.shape[0] + a_s.shape[0])
        base.of_shape(form, "outer", outer, "[O]", a_s.shape[1])


def hydra_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ap: Tensor,
    bp: Tensor,
    a_s: Tensor,
    bs: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
) -> Tensor:
    """y = y0 + scale · (D(x A_pᵀ) B_pᵀ + D(y0 A_sᵀ) B_sᵀ), y0 = x Wᵀ + bias: Hydra (Kim et al., arXiv 2309.06922), a branch beside W
    and one behind it.

    x [..., I]; weight [O, I]; bias [O] or None; ap [R, I]; bp [O, R]; a_s [R, O]; bs [O, R], float32 or of x's dtype; dropout is on
    the rank activations. inner [2 R] and outer [O], of the factors' dtype: biases of the authors' code, added to both rank activations
    before dropout, and to what both branches give before scale. Saves x, y0 [T, O] and both rank activations [T, 2 R];
    dy0 = dy + scale · (dy B_s) A_s goes on to W, bias and x.
    """
    _check("hydra_linear", a_s, ap, inner, outer)
    mask = _mask("hydra_linear", x, ap, a_s, dropout_p, training)
    rank = ap, bp, a_s, bs, inner, outer
    return base.beside("hydra_linear", _Hydra, None, x, weight, bias, 0.0, False, *rank, scale, mask)


def hydra_add(
    y: Tensor,
    x: Tensor,
    ap: Tensor,
    bp: Tensor,
    a_s: Tensor,
    bs: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
) -> Tensor:
    """y + scale · (D(x A_pᵀ) B_pᵀ + D(y A_sᵀ) B_sᵀ) as a new tensor: Hydra beside a base layer of any kind that gave y [..., O]."""
    _check("hydra_add", a_s, ap, inner, outer)
    mask = _mask("hydra_add", x, ap, a_s, dropout_p, training)
    rank = ap, bp, a_s, bs, inner, outer
    if ap.dtype != torch.float32 and not ap.dtype == x.dtype == y.dtype:
        rank = tuple(t if t is None else t.float() for t in rank)
    return base.beside("hydra_add", _Hydra, y, x, None, None, 0.0, False, *rank, scale, mask)
