# SPDX-License-Identifier: Apache-2.0
"""MiSS (Kang et al., arXiv 2409.15371, Bone before) as PEFT's ``init_weights`` names its kinds: shards of W that share an update."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import ops
from . import base

__all__ = ["bone_linear", "miss_add", "miss_linear"]


def _check(form: str, block: Tensor, O: int) -> None:
    if block.dim() != 2 or block.shape[0] < 1 or block.shape[1] < 1 or O % block.shape[1]:
        must = f"must have shape [r, m] with m a divisor of {O}"
        raise RuntimeError(f"lrkern::{form}: block {must}, got {list(block.shape)}")


def miss_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """y = x Wᵀ + bias + tile(fold(dropout(x)) block): fold adds up the columns of x that are r apart, x padded with zeros.

    x [..., I]; weight [O, I]; bias [O] or None; block [r, O], or of "mini" [r, m], whose columns are repeated O / m times. block may be
    float32 over a 16-bit base; the adapter then runs in float32, and y is rounded once more.
    """
    _check("miss_linear", block, weight.shape[0])
    y = base.linear(x, weight, bias)
    h = _folded("miss_linear", x, block, dropout_p, training)
    if (
        y.dtype == block.dtype == h.dtype
        and block.shape[1] == y.shape[-1]
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), block).view(y.shape)
    return _added(y, h, block)


def miss_add(y: Tensor, x: Tensor, block: Tensor, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    """y + tile(fold(dropout(x)) block), beside a base layer of any kind that gave y [..., O], in a dtype of its own too."""
    if y.shape[:-1] != x.shape[:-1]:
        must = f"must have shape [..., O] beside x {list(x.shape)}"
        raise RuntimeError(f"lrkern::miss_add: y {must}, got {list(y.shape)}")
    _check("miss_add", block, y.shape[-1])
    return _added(y, _folded("miss_add", x, block, dropout_p, training), block)


def _folded(form: str, x: Tensor, block: Tensor, dropout_p: float, training: bool) -> Tensor:
    """[..., r] in block's dtype."""
    x = x.to(block.dtype)  # before sums are rounded
    if base.probability(form, dropout_p) and training:
        x = torch.dropout(x, dropout_p, True)
    return ops.mora_compress(x, block.shape[0], circular=False)


def _added(y: Tensor, h: Tensor, block: Tensor) -> Tensor:
    z = h @ block.to(h.dtype)
    if z.shape[-1] != y.shape[-1]:
        z = ops.mora_decompress(z, y.shape[-1])
    return (y + z).to(y.dtype)


# ---------------------------------------------------------------------------------------------- "bat"


def _panels(blocks: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of W and their blocks: a quarter of W at most, or one block."""
    n, r = blocks.shape[:2]
    each = max(1, n // 4)
    for i in range(0, n, each):
        yield slice(i * r, min(n, i + each) * r), slice(i, i + each)


def _panel(weight: Tensor, blocks: Tensor) -> Tensor:
    """Rows of W' = W (I + B) + B, [p r, I], of p blocks."""
    p, r, _ = blocks.shape
    w = weight.to(blocks.dtype).reshape(p, -1, r)  # [r n, r] of each block: a row's shards below one another
    new = torch.baddbmm(w, w, blocks)
    new.view(p, r, -1, r).add_(blocks.unsqueeze(2))
    return new.view(p * r, -1)


class _Bone(Function):
    """Saves x, W and the blocks; makes W' again in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, blocks):
        ctx.save_for_backward(x, weight, blocks)
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows, of in _panels(blocks):
            w, to = _panel(weight[rows], blocks[of]).mT, y[:, rows]
            torch.mm(x, w, out=to) if bias is None else torch.addmm(bias[rows], x, w, out=to)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, blocks = ctx.saved_tensors
        need_x, need_w, need_bias, need_blocks = ctx.needs_input_grad
        if need_w:
            raise RuntimeError("lrkern::bone_linear: weight must not require a gradient, it has none here")
        dx = torch.empty_like(x) if need_x else None
        d = torch.empty_like(blocks) if need_blocks else None
        for rows, of in _panels(blocks):
            of_panel, b = dy[:, rows], blocks[of]
            p, r, _ = b.shape
            if need_x:
                w = _panel(weight[rows], b)
                dx.addmm_(of_panel, w) if rows.start else torch.mm(of_panel, w, out=dx)
            if need_blocks:
                g = (of_panel.mT @ x).view(p, -1, r)  # of W', a quarter of it
                w = weight[rows].to(b.dtype).reshape(p, -1, r)
                d[of] = torch.baddbmm(g.view(p, r, -1, r).sum(2), w.mT, g)
        return dx, None, dy.sum(0) if need_bias else None, d


def bone_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """y = x W'ᵀ + bias with W' = W (I + B) + B by shards: rows o r .. o r + r of W, in shards of r columns, are each times I + B_o,
    plus B_o. "bat" of PEFT's MiSS, Bone's block-affine form.

    x [..., I]; weight [O, I], frozen; bias [O] or None; blocks [O / r, r, r], r a divisor of I. W' is made in panels of at most a
    quarter of its rows, or of one block, forward and backward: nothing of W's size is allocated or saved. In blocks' dtype, as PEFT computes it;
    y in x's.
    """
    sizes = weight.shape[0] // max(1, blocks.shape[-1]), blocks.shape[-1], blocks.shape[-1]
    base.of_shape("bone_linear", "blocks", blocks, "[O / r, r, r]", *sizes)
    for name, n in (("I", weight.shape[1]), ("O", weight.shape[0])):
        if not sizes[1] or n % sizes[1]:
            raise RuntimeError(f"lrkern::bone_linear: blocks must have an r that divides {name} = {n}, got {sizes[1]}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError("lrkern::bone_linear: weight must not require a gradient, it has none here")
    to = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else blocks.dtype
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(to)
        y = _Bone.apply(x.flatten(0, -2).to(to), weight, bias, blocks.to(to))
    return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
