# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: a full-rank sum of random bases, each between two trained diagonals."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import base
from .projection import Basis, Projection, cols_of, matmul, rows_of, save, saved, scale_of

__all__ = ["randlora_add", "randlora_delta", "randlora_linear", "randlora_way"]

_PANEL = 1 << 19  # elements of a panel of U: less makes GEMMs too thin


def randlora_way(T: int, in_features: int, out_features: int) -> str:
    """How ``randlora_linear`` computes for T tokens of float32:

    "vector": T <= 16. Λ A Γ is applied to the tokens factor by factor, no row of it is formed, and B stays in registers.
    "factors": two GEMMs over panels of U = Λ A Γ and B, 2 T Q (I + O) flop with Q = min(I, O) rows.
    "merged": T > I O / (I + O). W + ΔW is formed once, 2 Q I O flop, and takes the place of the base GEMM.
    """
    if T <= 16:
        return "vector"
    return "merged" if T * (in_features + out_features) > in_features * out_features else "factors"


class _Update(NamedTuple):
    """scale · ΔW = scale · Outᵀ In, of U = Λ A Γ and the stack of the Bⱼ, both [Q, .]: In [Q, I] and Out [Q, O] are U and B, or
    B and U where in > out. Neither is ever whole: a panel has the rows of some k (reference) or of some j (paper), with all
    of the other."""

    lam: Tensor  # [r, n] float32
    gam: Tensor  # [n, min] float32
    a: Tensor  # [r, min] float32
    B: Projection  # [n r, max], row j r + k is column k of the paper's Bⱼ
    scale: float
    paper: bool
    narrow_in: bool

    @classmethod
    def of(cls, lam: Tensor, gam: Tensor, A: Projection, B: Projection, scale: float, paper: bool, narrow_in: bool):
        lam = lam.float()
        a = A.fill(lam) if isinstance(A, Basis) else A.float()
        return cls(lam, gam.float(), a, B, scale, paper, narrow_in)

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Those k or j, and the rows of B that meet theirs of U."""
        inner, outer = self.lam.shape if self.paper else self.lam.mT.shape
        step, B = max(1, _PANEL // max(1, inner * self.a.shape[1])), self.B
        for i in range(0, outer, step):
            q, n = i * inner, min(step, outer - i) * inner
            yield slice(i, i + step), B.fill(self.lam, q, n) if isinstance(B, Basis) else B[q : q + n].float()

    def u(self, span: slice) -> Tensor:
        """Rows of U: row k n + j is lam[k, j] a[k] gam[j] as the reference flattens it, row j r + k as the paper's Eq. 4."""
        if self.paper:
            u = (self.gam[span, None] * self.a).mul_(self.lam.mT[span, :, None])
        else:
            u = (self.a[span, None] * self.gam).mul_(self.lam[span, :, None])
        return u.flatten(0, 1)

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Panels of In and Out."""
        for span, b in self.panels():
            yield (self.u(span), b) if self.narrow_in else (b, self.u(span))

    def delta(self) -> Tensor:
        """scale · ΔW [O, I] float32."""
        sizes = cols_of(self.B), self.a.shape[1]
        delta = self.lam.new_zeros(sizes if self.narrow_in else sizes[::-1])
        for inner, outer in self.factors():
            delta.addmm_(outer.mT, inner, alpha=self.scale)
        return delta

    def gradients(self, du: Tensor, span: slice, dlam: Tensor, dgam: Tensor) -> None:
        """Adds what du, the gradient of a panel of U over scale, gives to dlam and dgam; in place, du is overwritten."""
        du.mul_(self.scale)
        if self.paper:
            e = du.view(-1, *self.a.shape).mul_(self.a)  # [j, k, min]
            dgam[span] = (self.lam.mT[span, None] @ e)[:, 0]
            dlam[:, span] = e.mul_(self.gam[span, None]).sum(-1).mT
        else:
            e = du.view(-1, *self.gam.shape).mul_(self.a[span, None])  # [k, j, min]
            for e_k, lam_k in zip(e, self.lam[span], strict=True):
                dgam.addcmul_(e_k, lam_k[:, None])
            dlam[span] = e.mul_(self.gam).sum(-1)


class _Factors:
    """Two GEMMs a panel, for the tokens."""

    @classmethod
    def forward(cls, update: _Update, y, x, weight, bias, kept: list[Tensor] | None) -> Tensor:
        out = base.output(y, x, weight, bias)
        cls.add(update, out.view(-1, out.shape[-1]), base.flat(x).float(), kept)
        return out

    @staticmethod
    def add(update: _Update, y: Tensor, x: Tensor, kept: list[Tensor] | None) -> None:
        """y [T, O] += scale · x ΔWᵀ, in place; x [T, I] float32. ``kept`` gets each panel's x Inᵀ [T, panel]."""
        sums = y.float()
        for inner, outer in update.factors():
            h = x @ inner.mT
            sums.addmm_(h, outer, alpha=update.scale)
            if kept is not None:
                kept.append(h)
        y.copy_(sums)

    @staticmethod
    def backward(update: _Update, need, need_coef: bool, dy, x, weight, dlam, dgam, kept) -> list[Tensor | None]:
        """dx, dW and dbias, those that are needed; with ``need_coef`` dlam and dgam, which are zeros, are filled. ``kept``:
        the forward's, or empty."""
        grads = base.gradients(need, dy, x, weight)
        rows, g = base.flat(x).float(), base.flat(dy).float()
        if need[0]:
            dx = torch.zeros_like(rows) if grads[0] is None else grads[0].reshape(rows.shape).float()
        at_b, at_u = (g, rows) if update.narrow_in else (rows, g)
        for i, (span, b) in enumerate(update.panels() if need[0] or need_coef else ()):
            h = kept[i] if kept else at_b @ b.mT if update.narrow_in or need_coef else None  # [T, panel]
            b = None if update.narrow_in else b  # its memory is free for U
            u = update.u(span)
            if need[0]:
                dx.addmm_(*((h, u) if update.narrow_in else (g @ u.mT, b)), alpha=update.scale)
            if need_coef:  # dU takes the place of U
                update.gradients(torch.mm(h.mT, at_u, out=u), span, dlam, dgam)
        return [dx.to(x.dtype).view(x.shape) if need[0] else None, *grads[1:]]


class _Vector(_Factors):
    """Λ A Γ applied to few tokens factor by factor."""

    @staticmethod
    def add(update: _Update, y: Tensor, x: Tensor, kept: list[Tensor] | None) -> None:
        lam, gam, a, B, scale, paper, narrow_in = update
        if narrow_in:  # x's columns meet A
            h = ((x[:, None] * gam) @ a.mT) * lam.mT  # [T, n, r]
            h = (h if paper else h.mT).flatten(1)  # [T, Q]
            if isinstance(B, Basis):
                c = y.new_full((B.cols,), scale * B.scale, dtype=torch.float32)
                matmul(h.contiguous(), B, False, out_scale=c, into=y)
            else:
                y += _stored(h, B, False).mul_(scale)
        else:
            h = _stored(x, B, True)  # [T, Q]
            h = h.view(-1, *lam.mT.shape) if paper else h.view(-1, *lam.shape).mT
            y += (((h * lam.mT) @ a) * gam).sum(1).mul_(scale * scale_of(B))


def _stored(x: Tensor, p: Projection, transposed: bool) -> Tensor:
    """x P or x Pᵀ in float32; of a stored P in 16 bit a panel at a time is float32."""
    if isinstance(p, Basis) or p.dtype == torch.float32:
        return matmul(x, p, transposed, wide=True)
    panels = p.split(max(1, _PANEL // p.shape[1]))
    if transposed:
        return torch.cat([x @ panel.float().mT for panel in panels], -1)
    parts = x.split([len(panel) for panel in panels], -1)
    return sum(part @ panel.float() for part, panel in zip(parts, panels, strict=True))


class _Merged:
    """W + ΔW formed once, in place of W."""

    @staticmethod
    def forward(update: _Update, y, x, weight, bias, kept: list[Tensor] | None) -> Tensor:
        return base.linear(x, update.delta().add_(weight), bias)

    @staticmethod
    def backward(update: _Update, need, need_coef: bool, dy, x, weight, dlam, dgam, kept) -> list[Tensor | None]:
        grads = base.gradients(need, dy, x, update.delta().add_(weight) if need[0] else weight)
        if need_coef:
            delta = base.flat(dy).mT @ base.flat(x)  # dL/dΔW [O, I]
            for span, b in update.panels():
                update.gradients(b @ (delta if update.narrow_in else delta.mT), span, dlam, dgam)
        return grads


_WAYS = {"vector": _Vector, "factors": _Factors, "merged": _Merged}


class _RandLora(Function):
    """y + scale · x ΔWᵀ, y = x Wᵀ + bias or given."""

    @staticmethod
    def forward(ctx, form, y, x, weight, bias, lam, gam, A, B, scale, paper, save_output):
        I, O = x.shape[-1], y.shape[-1] if weight is None else weight.shape[0]
        way, may_merge = randlora_way(x.shape[:-1].numel(), I, O), weight is not None and x.dtype == torch.float32
        way = way if may_merge or way != "merged" else "factors"
        rest, kept = (scale, paper, I <= O), None
        if save_output and I > O and ctx is not None and any(ctx.needs_input_grad[5:7]):  # else dU needs none
            kept = []
        out = _WAYS[way].forward(_Update.of(lam, gam, A, B, *rest), y, x, weight, bias, kept)
        if ctx is not None:
            ctx.form, ctx.way, ctx.rest = form, way, rest
            save(ctx, A, B, x, weight, lam, gam, *(kept or ()))
        return out

    @base.once_differentiable
    def backward(ctx, dy, tensors):
        A, B, x, weight, lam, gam, *kept = saved(ctx, tensors)
        need_y, *need, need_lam, need_gam = ctx.needs_input_grad[1:7]
        with torch.autocast(dy.device.type, enabled=False):  # as forward ran, wherever backward() is called
            update = _Update.of(lam, gam, A, B, *ctx.rest)
            dlam, dgam = torch.zeros_like(update.lam), torch.zeros_like(update.gam)
            grads = _WAYS[ctx.way].backward(update, need, need_lam or need_gam, dy, x, weight, dlam, dgam, kept)
        dlam, dgam = dlam.to(lam.dtype) if need_lam else None, dgam.to(gam.dtype) if need_gam else None
        return None, dy if need_y else None, *grads, dlam, dgam, None, None, None, None, None

    @staticmethod
    def composite(y, x, weight, bias, lam, gam, A, B, scale, paper, save_output):
        y = base.linear(x, weight, bias) if y is None else y
        update, delta = _Update.of(lam, gam, A, B, scale, paper, x.shape[-1] <= y.shape[-1]), 0.0
        lam, gam, a = update.lam, update.gam, update.a
        for span, b in update.panels():
            u = gam[span, None] * a * lam.mT[span, :, None] if paper else a[span, None] * gam * lam[span, :, None]
            inner, outer = (u.flatten(0, 1), b) if update.narrow_in else (b, u.flatten(0, 1))
            delta = delta + x.float() @ inner.mT @ outer
        return base.added(y, scale * delta)


@torch.no_grad()
def randlora_delta(
    lam: Tensor,
    gam: Tensor,
    A: Projection,
    B: Projection,
    in_features: int,
    out_features: int,
    scale: float = 1.0,
    paper_pairing: bool = False,
) -> Tensor:
    """scale · ΔW [out, in] of ``randlora_linear`` in float32. Not differentiable."""
    return _Update.of(lam, gam, A, B, scale, paper_pairing, in_features <= out_features).delta()


def _check(form: str, lam: Tensor, gam: Tensor, A: Projection, B: Projection, dropout_p: float) -> None:
    base.probability(form, dropout_p)
    r, n = rows_of(A), rows_of(B) // max(1, rows_of(A))
    base.of_shape(form, "lam", lam, "[r, n]", r, n)
    base.of_shape(form, "gam", gam, "[n, min(I, O)]", n, cols_of(A))


def randlora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: Tensor,
    gam: Tensor,
    A: Projection,
    B: Projection,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    paper_pairing: bool = False,
    save_output: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + scale · dropout(x) ΔWᵀ, ΔW = Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ), transposed where in > out: RandLoRA
    (Albert et al., arXiv 2502.00987), full rank from n = ceil(min(I, O) / r) products.

    x [..., I]; weight [O, I]; lam [r, n] and gam [n, min(I, O)] train; A [r, min(I, O)] and B [n r, max(I, O)], whose row j r + k
    is column k of Bⱼ, are a ``Basis`` or frozen tensors. The reference's code (and PEFT's) flattens λ A γ the other way round, so
    that column j' of B's stack meets another λ A γ than Eq. 4 says; it is the default, ``paper_pairing`` is Eq. 4.
    U = Λ A Γ is not saved, and for in <= out nothing else that is not x's. For in > out the output of B's stack, x Bᵀ
    [T, min(I, O)] float32, is, as PEFT does; ``save_output=False`` does not keep it, and dU costs a GEMM more. How it is
    computed: ``randlora_way``.
    """
    _check("randlora_linear", lam, gam, A, B, dropout_p)
    return base.beside(
        "randlora_linear",
        _RandLora,
        None,
        x,
        weight,
        bias,
        dropout_p,
        training,
        lam,
        gam,
        A,
        B,
        scale,
        paper_pairing,
        save_output,
    )


def randlora_add(
    y: Tensor,
    x: Tensor,
    lam: Tensor,
    gam: Tensor,
    A: Projection,
    B: Projection,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    paper_pairing: bool = False,
    save_output: bool = True,
) -> Tensor:
    """y + scale · dropout(x) ΔWᵀ as a new tensor, beside a base layer of any kind that gave y."""
    _check("randlora_add", lam, gam, A, B, dropout_p)
    return base.beside(
        "randlora_add",
        _RandLora,
        y,
        x,
        None,
        None,
        dropout_p,
        training,
        lam,
        gam,
        A,
        B,
        scale,
        paper_pairing,
        save_output,
    )
