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


class _Hydra(Function):
    """y0 + scale · (m ⊙ [x A_pᵀ, y0 A_sᵀ]) [B_p, B_s]ᵀ, y0 = x Wᵀ + bias or given."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, ap, bp, a_s, bs, scale, mask):
        y0 = base.linear(x, weight, bias) if y is None else y
        s = _masked(torch.cat([ops.lora_shrink(x, ap), ops.lora_shrink(y0, a_s)], -1), mask)
        out = y0.clone(memory_format=torch.contiguous_format)
        ops.lora_expand_(out, s, torch.cat([bp, bs], 1), scale)
        if ctx is not None:
            keeps_x, keeps_y = ctx.needs_input_grad[3] or ctx.needs_input_grad[5], ctx.needs_input_grad[7]
            ctx.save_for_backward(x if keeps_x else None, y0 if keeps_y else None, weight, ap, bp, a_s, bs, s, mask)
            ctx.form, ctx.scale, ctx.x = form, scale, (x.shape, x.dtype)
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        x, y0, weight, ap, bp, a_s, bs, s, mask = tensors
        need_y, need_x, need_w, need_bias, need_ap, need_bp, need_as, need_bs = ctx.needs_input_grad[1:9]
        dx = dw = dbias = dap = das = None
        need_b = need_bp or need_bs
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            both = torch.cat([bp, bs], 1)
            flags = False, False, False, True, need_b
            *_, ds, db = library().linear_expand_bwd.default(dy, None, None, s, both, ctx.scale, *flags)
            dbp, dbs = db.split([bp.shape[1], bs.shape[1]], 1) if need_b else (None, None)
            dp, dq = (t.contiguous() for t in _masked(ds, mask).split([ap.shape[0], a_s.shape[0]], -1))
            if need_as:
                _, das = library().lora_shrink_bwd.default(dq, y0, a_s, 1.0, 0.0, None, False, True)
            if need_ap:
                _, dap = library().lora_shrink_bwd.default(dp, x, ap, 1.0, 0.0, None, False, True)
            dy0 = None
            if need_y or need_x or need_w or need_bias:
                dy0 = dy.clone(memory_format=torch.contiguous_format)
                ops.lora_expand_(dy0, dq, a_s.mT)
                dx, dw, dbias = base.gradients((need_x, need_w, need_bias), dy0, x, weight)
            if need_x:
                dx = dy.new_zeros(ctx.x[0], dtype=ctx.x[1]) if dx is None else dx.contiguous()
                ops.lora_expand_(dx, dp, ap.mT)
        grads_of_b = dbp if need_bp else None, dbs if need_bs else None
        return None, dy0 if need_y else None, dx, dw, dbias, dap, grads_of_b[0], das, grads_of_b[1], None, None

    @staticmethod
    def composite(y, x, weight, bias, ap, bp, a_s, bs, scale, mask):
        y0 = base.linear(x, weight, bias) if y is None else y
        s = _masked(torch.cat([ops.lora_shrink(x, ap), ops.lora_shrink(y0, a_s)], -1), mask)
        return base.added(y0, ops.linear_expand(None, None, None, s, torch.cat([bp, bs], 1), scale))


def _mask(form: str, x: Tensor, ap: Tensor, a_s: Tensor, dropout_p: float, training: bool) -> Tensor | None:
    """Of the rank activations [..., 2 R]."""
    if not (base.probability(form, dropout_p) and training):
        return None
    return torch.dropout(x.new_ones(*x.shape[:-1], ap.shape[0] + a_s.shape[0]), dropout_p, True)


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
) -> Tensor:
    """y = y0 + scale · (D(x A_pᵀ) B_pᵀ + D(y0 A_sᵀ) B_sᵀ), y0 = x Wᵀ + bias: Hydra (Kim et al.), a branch beside W and one behind it.

    x [..., I]; weight [O, I]; bias [O] or None; ap [R, I]; bp [O, R]; a_s [R, O]; bs [O, R], float32 or of x's dtype; dropout is on
    the rank activations. Saves x, y0 [T, O] and both rank activations [T, 2 R]; dy0 = dy + scale · (dy B_s) A_s goes on to W, bias and x.
    """
    mask = _mask("hydra_linear", x, ap, a_s, dropout_p, training)
    return base.beside("hydra_linear", _Hydra, None, x, weight, bias, 0.0, False, ap, bp, a_s, bs, scale, mask)


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
) -> Tensor:
    """The same as a new tensor, beside a base layer of any kind that gave y0 = y [..., O]."""
    mask = _mask("hydra_add", x, ap, a_s, dropout_p, training)
    if ap.dtype != torch.float32 and not ap.dtype == x.dtype == y.dtype:
        ap, bp, a_s, bs = ap.float(), bp.float(), a_s.float(), bs.float()
    return base.beside("hydra_add", _Hydra, y, x, None, None, 0.0, False, ap, bp, a_s, bs, scale, mask)
