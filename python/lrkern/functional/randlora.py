# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: a full-rank sum of random bases, each between two trained diagonals."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import base
from .projection import Basis, Projection, cols_of, matmul, scale_of

__all__ = ["randlora_add", "randlora_delta", "randlora_linear", "randlora_way"]


_CHUNK = 1 << 19  # elements of one factor at a time: less makes GEMMs too thin


def randlora_way(T: int, in_features: int, out_features: int) -> str:
    """How ``randlora_linear`` computes for T tokens of float32:

    "vector": T <= 16. Λ A Γ is applied to the tokens factor by factor, no row of it is formed, and B stays in registers.
    "factors": two GEMMs over pieces of U = Λ A Γ and B, 2 T Q (I + O) flop with Q = min(I, O) rows.
    "merged": T > I O / (I + O). W + ΔW is formed once, 2 Q I O flop, and takes the place of the base GEMM.
    """
    if T <= 16:
        return "vector"
    return "merged" if T * (in_features + out_features) > in_features * out_features else "factors"


class _Pieces(NamedTuple):
    """The rows q of U = Λ A Γ and of B's stack in pieces: whole k (reference) or whole j (paper), each with all of the other."""

    a: Tensor  # [r, min] float32
    B: Projection  # [n r, max], row j r + k is column k of the paper's B_j
    n: int
    paper: bool

    def spans(self):
        inner, outer = (len(self.a), self.n) if self.paper else (self.n, len(self.a))
        step = max(1, _CHUNK // max(1, inner * self.a.shape[1]))
        for i in range(0, outer, step):
            yield i, min(i + step, outer), i * inner, min(i + step, outer) * inner

    def u(self, lam: Tensor, gam: Tensor, i: int, end: int) -> Tensor:
        """Rows of U: row k n + j is lam[k, j] a[k] gam[j] as the reference flattens it, row j r + k as the paper's Eq. 4."""
        if self.paper:
            u = (gam[i:end, None] * self.a).mul_(lam.mT[i:end, :, None])
        else:
            u = (self.a[i:end, None] * gam).mul_(lam[i:end, :, None])
        return u.flatten(0, 1)

    def gradients(self, du: Tensor, lam: Tensor, gam: Tensor, dlam: Tensor, dgam: Tensor, i: int, end: int) -> None:
        """Adds what du, the gradient of rows of U, gives to dlam and dgam; in place, du is overwritten."""
        if self.paper:
            e = du.view(end - i, len(self.a), -1).mul_(self.a)  # [j, k, min]
            dgam[i:end] = (lam.mT[i:end, None] @ e)[:, 0]
            dlam[:, i:end] = e.mul_(gam[i:end, None]).sum(-1).mT
        else:
            e = du.view(end - i, self.n, -1).mul_(self.a[i:end, None])  # [k, j, min]
            for k in range(end - i):
                dgam.addcmul_(e[k], lam[i + k, :, None])
            dlam[i:end] = e.mul_(gam).sum(-1)

    def b(self, like: Tensor, q: int, end: int) -> Tensor:
        return self.B.fill(like, q, end - q) if isinstance(self.B, Basis) else self.B[q:end].to(like.dtype)


def _in_pieces(x: Tensor, p: Projection, transposed: bool) -> Tensor:
    """x P or x Pᵀ in float32; of a stored P in 16 bit a piece at a time is float32."""
    if isinstance(p, Basis) or p.dtype == torch.float32:
        return matmul(x, p, transposed, wide=True)
    step = max(1, _CHUNK // p.shape[1])
    if transposed:
        return torch.cat([x @ rows.float().mT for rows in p.split(step)], -1)
    y = x.new_zeros(*x.shape[:-1], p.shape[1])
    for part, rows in zip(x.split(step, -1), p.split(step), strict=True):
        y += part @ rows.float()
    return y


def _randlora_vector(y, x, lam, gam, pieces: _Pieces, scale: float, narrow_in: bool) -> None:
    """y += the adapter's part, in place; few tokens. x float32."""
    a, n, B = pieces.a, pieces.n, pieces.B
    order = (lambda h: h.flatten(1)) if pieces.paper else (lambda h: h.mT.flatten(1))  # [T, n, r] -> [T, Q]
    if narrow_in:  # x's columns meet A
        h = ((x[:, None] * gam) @ a.mT) * lam.mT
        if isinstance(B, Basis):
            c = y.new_full((cols_of(B),), scale * scale_of(B), dtype=torch.float32)
            matmul(order(h).contiguous(), B, False, out_scale=c, into=y)
        else:
            y += _in_pieces(order(h), B, False).mul_(scale)
    else:
        h = _in_pieces(x, B, True)  # [T, Q]
        h = h.view(-1, n, len(a)) if pieces.paper else h.view(-1, len(a), n).mT
        y += (((h * lam.mT) @ a) * gam).sum(1).mul_(scale * scale_of(B))


def _randlora_delta(lam, gam, pieces: _Pieces, scale: float, narrow_in: bool) -> Tensor:
    """ΔW [O, I] float32."""
    I, O = (pieces.a.shape[1], cols_of(pieces.B)) if narrow_in else (cols_of(pieces.B), pieces.a.shape[1])
    delta = lam.new_zeros(O, I)
    for i, end, q, q_end in pieces.spans():
        u, b = pieces.u(lam, gam, i, end), pieces.b(lam, q, q_end)
        delta.addmm_(*((b.mT, u) if narrow_in else (u.mT, b)), alpha=scale)
    return delta


class _RandLora(Function):
    """y + scale · (x Inᵀ) Out, y = x Wᵀ + bias or given; In [Q, I] and Out [Q, O] are U and B, or B and U where in > out."""

    @staticmethod
    def forward(ctx, y, x, weight, bias, lam, gam, A, B, scale, paper):
        lam32, gam32 = lam.float(), gam.float()
        I = x.shape[-1]
        O = y.shape[-1] if weight is None else weight.shape[0]
        narrow_in, T = I <= O, x.shape[:-1].numel()
        a = A.fill(lam32) if isinstance(A, Basis) else A.float()
        pieces = _Pieces(a, B, len(gam), paper)
        way = randlora_way(T, I, O)
        if way == "merged" and (weight is None or x.dtype != torch.float32):
            way = "factors"
        if way == "merged":
            out = base.linear(x, _randlora_delta(lam32, gam32, pieces, scale, narrow_in).add_(weight), bias)
        else:
            out = base.output(y, x, weight, bias)
            flat, rows = out.view(-1, O), x.reshape(-1, I).float()
            if way == "vector":
                _randlora_vector(flat, rows, lam32, gam32, pieces, scale, narrow_in)
            else:
                sums = flat if out.dtype == torch.float32 else flat.float()
                for i, end, q, q_end in pieces.spans():
                    u, b = pieces.u(lam32, gam32, i, end), pieces.b(lam32, q, q_end)
                    inner, outer = (u, b) if narrow_in else (b, u)
                    sums.addmm_(rows @ inner.mT, outer, alpha=scale)
                if sums is not flat:
                    flat.copy_(sums)
        ctx.save_for_backward(
            x, weight, lam, gam, A if isinstance(A, Tensor) else None, B if isinstance(B, Tensor) else None
        )
        ctx.rest = A if isinstance(A, Basis) else None, B if isinstance(B, Basis) else None, scale, paper, narrow_in
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @base.no_autocast
    def backward(ctx, dy):
        x, weight, lam, gam, A, B = ctx.saved_tensors
        a_basis, b_basis, scale, paper, narrow_in = ctx.rest
        A, B = A if a_basis is None else a_basis, B if b_basis is None else b_basis
        y_, x_, w_, bias_, lam_, gam_ = ctx.needs_input_grad[:6]
        lam32, gam32 = lam.float(), gam.float()
        pieces = _Pieces(A.fill(lam32) if isinstance(A, Basis) else A.float(), B, len(gam), paper)
        I, O = x.shape[-1], dy.shape[-1]
        rows, g = x.reshape(-1, I).float(), dy.reshape(-1, O).float()
        merged = weight is not None and x.dtype == torch.float32 and randlora_way(len(g), I, O) == "merged"
        dx = dw = dbias = None
        if weight is not None:
            w = _randlora_delta(lam32, gam32, pieces, scale, narrow_in).add_(weight) if merged and x_ else weight
            dx, dw, dbias = base.gradients((x_, w_, bias_), dy, x, w)
        want = lam_ or gam_
        dlam, dgam = torch.zeros_like(lam32), torch.zeros_like(gam32)
        delta = g.mT @ rows if merged and want else None  # dL/dΔW [O, I]
        if merged:
            for i, end, q, q_end in pieces.spans() if want else ():
                b = pieces.b(lam32, q, q_end)
                du = (b @ (delta if narrow_in else delta.mT)).mul_(scale)
                pieces.gradients(du, lam32, gam32, dlam, dgam, i, end)
        elif want or x_:
            dx32 = None
            if x_:
                dx32 = torch.zeros_like(rows) if dx is None else dx.reshape(-1, I).float()
            for i, end, q, q_end in pieces.spans():
                b = pieces.b(lam32, q, q_end)
                if narrow_in:
                    dh, b = g @ b.mT, None  # [T, piece], over scale
                    u = inner = pieces.u(lam32, gam32, i, end)
                else:
                    u, inner = pieces.u(lam32, gam32, i, end), b
                    dh = g @ u.mT if x_ else None
                if x_:
                    dx32.addmm_(dh, inner, alpha=scale)
                if want:  # dU takes the place of U
                    du = torch.mm(dh.mT, rows, out=u) if narrow_in else torch.mm((rows @ b.mT).mT, g, out=u)
                    pieces.gradients(du.mul_(scale), lam32, gam32, dlam, dgam, i, end)
            if x_:
                dx = dx32.to(x.dtype).view(x.shape)
        dlam, dgam = dlam.to(lam.dtype) if lam_ else None, dgam.to(gam.dtype) if gam_ else None
        return dy if y_ else None, dx, dw, dbias, dlam, dgam, None, None, None, None


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
    with torch.no_grad():
        lam, gam = lam.float(), gam.float()
        pieces = _Pieces(A.fill(lam) if isinstance(A, Basis) else A.float(), B, len(gam), paper_pairing)
        return _randlora_delta(lam, gam, pieces, scale, in_features <= out_features)


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
) -> Tensor:
    """y = x Wᵀ + bias + scale · dropout(x) ΔWᵀ, ΔW = Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ), transposed where in > out: RandLoRA
    (Albert et al., arXiv 2502.00987), full rank from n = ceil(min(I, O) / r) products.

    x [..., I]; weight [O, I]; lam [r, n] and gam [n, min(I, O)] train; A [r, min(I, O)] and B [n r, max(I, O)], whose row j r + k
    is column k of Bⱼ, are a ``Basis`` or frozen tensors. The reference's code (and PEFT's) flattens λ A γ the other way round, so
    that column j' of B's stack meets another λ A γ than Eq. 4 says; it is the default, ``paper_pairing`` is Eq. 4.
    Neither U = Λ A Γ nor x Uᵀ is saved; for in > out dU costs a GEMM more for it. How it is computed: ``randlora_way``.
    """
    x, weight, bias = base.cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        if training and dropout_p > 0.0:
            y = base.linear(x, weight, bias)
            return randlora_add(y, x, lam, gam, A, B, scale, dropout_p, training, paper_pairing)
        return _RandLora.apply(None, x, weight, bias, lam, gam, A, B, scale, paper_pairing)


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
) -> Tensor:
    """y + scale · dropout(x) ΔWᵀ as a new tensor, beside a base layer of any kind that gave y."""
    (x,) = base.cast(x)
    with torch.autocast(x.device.type, enabled=False):
        x = torch.dropout(x, dropout_p, training)
        return _RandLora.apply(y, x, None, None, lam, gam, A, B, scale, paper_pairing)
