# SPDX-License-Identifier: Apache-2.0
"""MiSS (Kang et al., arXiv 2409.15371, Bone before) as PEFT's ``init_weights`` names its kinds: shards of W that share an update."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..ops.dispatch import refuse_tangents, under_transforms
from . import base

__all__ = ["bone_add", "bone_delta", "bone_linear", "miss_add", "miss_delta", "miss_factors", "miss_linear"]


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
        return torch.addmm(base.flat(y), base.flat(h), block).view(y.shape)
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


def miss_factors(block: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float32 with ΔW = B A exactly: A has a one in each column where x is folded, B is block, for "mini"
    repeated, the other way round."""
    _check("miss_factors", block, out_features)
    one = torch.eye(block.shape[0], device=block.device)
    a = ops.mora_decompress(one, in_features, circular=False, adjoint=True)
    return a, ops.mora_decompress(block.float(), out_features).mT


def miss_delta(block: Tensor, in_features: int, out_features: int) -> Tensor:
    """ΔW [out, in] in float32: ΔW[o, j] = block[j mod r, o mod m]."""
    _check("miss_delta", block, out_features)
    rows = ops.mora_decompress(block.float(), out_features).mT
    return ops.mora_decompress(rows, in_features, circular=False, adjoint=True)


# ---------------------------------------------------------------------------------------------- "bat"


PANEL = 1 << 20  # elements of W' at a time: products of fewer cost more than the memory is worth


def _panels(blocks: Tensor, I: int) -> Iterator[tuple[slice, slice]]:
    """Rows of W [O, I] and their blocks: a quarter of W at most, or PANEL, or one block."""
    n, r = blocks.shape[:2]
    each = max(1, n // 4, min(n, PANEL // max(1, r * I)))
    for i in range(0, n, each):
        yield slice(i * r, min(n, i + each) * r), slice(i, i + each)


def _panel(weight: Tensor, blocks: Tensor, whole: bool = True) -> Tensor:
    """Rows of W' = W (I + B) + B, or of ΔW = W B + B alone, [p r, I], of p blocks."""
    p, r, _ = blocks.shape
    w = weight.to(blocks.dtype).reshape(p, -1, r)  # [r n, r] of each block: a row's shards below one another
    new = torch.baddbmm(w, w, blocks) if whole else torch.bmm(w, blocks)
    new.view(p, r, -1, r).add_(blocks.unsqueeze(2))
    return new.view(p * r, -1)


class _Bone(Function):
    """start + x W'ᵀ for a bias [O] as start, start + x ΔWᵀ for a y [T, O]. Saves x, W and the blocks, or in place of W who gives it;
    makes the panels again in backward."""

    @staticmethod
    def forward(ctx, form, x, weight, start, blocks):
        ctx.form = form
        ctx.dense, ctx.whole = weight if callable(weight) else None, start is None or start.dim() == 1
        ctx.save_for_backward(x, None if ctx.dense else weight, blocks)
        weight = _dense(ctx.dense, x, blocks) if ctx.dense else weight
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows, of in _panels(blocks, x.shape[-1]):
            w, to = _panel(weight[rows], blocks[of], ctx.whole).mT, y[:, rows]
            into = {} if torch.compiler.is_compiling() else {"out": to}  # dynamo takes none with gaps between its rows
            part = torch.mm(x, w, **into) if start is None else torch.addmm(start[..., rows], x, w, **into)
            if not into:
                to.copy_(part)
        return y

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        x, weight, blocks = tensors
        weight = _dense(ctx.dense, x, blocks) if ctx.dense else weight
        _, need_x, need_w, need_start, need_blocks = ctx.needs_input_grad
        if need_w:
            raise RuntimeError(f"lrkern::{ctx.form}: weight must not require a gradient, it has none here")
        dx = torch.empty_like(x) if need_x else None
        d = torch.empty_like(blocks) if need_blocks else None
        for rows, of in _panels(blocks, x.shape[-1]):
            of_panel, b = dy[:, rows], blocks[of]
            p, r, _ = b.shape
            if need_x:
                w = _panel(weight[rows], b, ctx.whole)
                dx.addmm_(of_panel, w) if rows.start else torch.mm(of_panel, w, out=dx)
            if need_blocks:
                g = (of_panel.mT @ x).view(p, -1, r)  # of W', a quarter of it
                w = weight[rows].to(b.dtype).reshape(p, -1, r)
                d[of] = torch.baddbmm(g.view(p, r, -1, r).sum(2), w.mT, g)
        dstart = (dy.sum(0) if ctx.whole else dy) if need_start else None
        return None, dx, None, dstart, d

    @staticmethod
    def composite(x, weight, start, blocks):
        """For torch.func's transforms, by all of whose derivatives."""
        weight = _dense(weight, x, blocks) if callable(weight) else weight
        whole = start is None or start.dim() == 1
        y = torch.cat([x @ _panel(weight[rows], blocks[of], whole).mT for rows, of in _panels(blocks, x.shape[-1])], -1)
        return y if start is None else start + y


def _dense(weight: Callable[[], Tensor], x: Tensor, blocks: Tensor) -> Tensor:
    with torch.no_grad():
        w = weight()
    base.of_shape("bone_linear", "weight()", w, "[O, I]", blocks.shape[0] * blocks.shape[-1], x.shape[-1])
    return w


def _check_blocks(form: str, I: int, O: int, blocks: Tensor) -> None:
    sizes = O // max(1, blocks.shape[-1]), blocks.shape[-1], blocks.shape[-1]
    base.of_shape(form, "blocks", blocks, "[O / r, r, r]", *sizes)
    for name, n in (("I", I), ("O", O)):
        if not sizes[1] or n % sizes[1]:
            raise RuntimeError(f"lrkern::{form}: blocks must have an r that divides {name} = {n}, got {sizes[1]}")


Weight = Tensor | Callable[[], Tensor]


def _bone(form: str, x: Tensor, weight: Weight, start: Tensor | None, blocks: Tensor) -> Tensor:
    """[..., O] in blocks' dtype, or autocast's."""
    O = blocks.shape[0] * blocks.shape[-1] if callable(weight) else weight.shape[0]
    _check_blocks(form, x.shape[-1] if callable(weight) else weight.shape[1], O, blocks)
    if not callable(weight) and torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError(f"lrkern::{form}: weight must not require a gradient, it has none here")
    to = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else blocks.dtype
    with torch.autocast(x.device.type, enabled=False):
        start = None if start is None else start.to(to)
        args = base.flat(x).to(to), weight, start, blocks.to(to)
        refuse_tangents(form, args)
        y = _Bone.composite(*args) if under_transforms() else _Bone.apply(form, *args)
    return y.view(*x.shape[:-1], O)


def bone_linear(x: Tensor, weight: Weight, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """y = x W'ᵀ + bias with W' = W (I + B) + B by shards: rows o r .. o r + r of W, in shards of r columns, are each times I + B_o,
    plus B_o. "bat" of PEFT's MiSS, Bone's block-affine form.

    x [..., I]; weight [O, I], frozen; bias [O] or None; blocks [O / r, r, r], r a divisor of I. W' is made in panels of at most a
    quarter of its rows, or of one block, forward and backward: nothing of W's size is allocated or saved. In blocks' dtype, as
    PEFT computes it; y in x's.

    weight may be a function that gives it, of a base layer that keeps it in another form (quantised): it is called in forward and
    again in backward, and what it gives is not kept.
    """
    return _bone("bone_linear", x, weight, bias, blocks).to(x.dtype)


def bone_add(y: Tensor, x: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
    """y + x ΔWᵀ with ΔW = W B + B by shards as in ``bone_linear``, beside a base layer of any kind that gave y [..., O]: weight is the W
    that the change is of. Differentiable in y, x and blocks; y's dtype stays."""
    if y.shape != (*x.shape[:-1], weight.shape[0]):
        must = f"must have shape {[*x.shape[:-1], weight.shape[0]]} beside x {list(x.shape)}"
        raise RuntimeError(f"lrkern::bone_add: y {must}, got {list(y.shape)}")
    return _bone("bone_add", x, weight, base.flat(y), blocks).to(y.dtype)


def bone_delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """ΔW = W B + B by shards, [O, I] in float32."""
    _check_blocks("bone_delta", weight.shape[1], weight.shape[0], blocks)
    return _panel(weight, blocks.float(), whole=False)
