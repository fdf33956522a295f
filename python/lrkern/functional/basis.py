# SPDX-License-Identifier: Apache-2.0
"""NOLA, VeRA and RandLoRA over random bases that are regenerated from a seed, or stored ones (docs/rng.md)."""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..ops.basis import DISTRIBUTIONS, METHODS


class Basis(NamedTuple):
    """A stack of random matrices scale · U [rows, cols] that is never stored: ``rows`` are those of bases of R rows each."""

    seed: int
    method: str
    rows: int
    cols: int
    R: int
    scale: float = 1.0
    distribution: str = "uniform8"
    tensor: int = 0

    @property
    def stream(self) -> tuple[int, int, int, int]:
        return self.seed, METHODS[self.method], DISTRIBUTIONS[self.distribution], self.tensor

    def fill(self, like: Tensor, q0: int = 0, Q: int | None = None) -> Tensor:
        """Rows q0 .. q0 + Q as a tensor of like's dtype and device."""
        Q = self.rows - q0 if Q is None else Q
        return ops.basis_fill(like, None, None, *self.stream, 0, self.R, q0, 0, Q, self.cols, self.scale)


Projection = Tensor | Basis  # stored, or generated
UNIFORM = math.sqrt(3.0)  # a uniform distribution on (-1, 1) times this has variance 1


def _rows(p: Projection) -> int:
    return p.shape[0] if isinstance(p, Tensor) else p.rows


def _matmul(
    x: Tensor, p: Projection, transposed: bool, in_scale=None, out_scale=None, into: Tensor | None = None, wide=False
) -> Tensor:
    """out_scale ⊙ ((in_scale ⊙ x) P), or Pᵀ, without the scale of a Basis; added into ``into`` where that is given."""
    if isinstance(p, Basis):
        args = (x, in_scale, out_scale, *p.stream, 0, p.R, p.rows, p.cols, transposed)
        if into is None:
            return ops.basis_matmul(*args, wide)
        ops.basis_matmul_(into, *args)
        return into
    x = x.to(p.dtype) if in_scale is None else x.to(p.dtype) * in_scale.to(p.dtype)
    y = x @ (p.mT if transposed else p)
    if out_scale is not None:
        y = y * out_scale.to(y.dtype)
    return y if into is None else into.add_(y)


def project(x: Tensor, p: Projection, transposed: bool = False) -> Tensor:
    """x P, or x Pᵀ: float32 for a Basis, in p's dtype for a stored P. Without gradient."""
    return _matmul(x, p, transposed, wide=True) * p.scale if isinstance(p, Basis) else _matmul(x, p, transposed)


def _scale(p: Projection) -> float:
    return p.scale if isinstance(p, Basis) else 1.0


def _base_gradients(need, dy, x, weight) -> list[Tensor | None]:
    """dx, dW, dbias of x Wᵀ + bias."""
    flat = dy.flatten(0, -2)
    dw = flat.mT @ x.flatten(0, -2) if need[1] else None
    return [dy @ weight if need[0] else None, dw, flat.sum(0) if need[2] else None]


def _no_autocast(backward):
    """As forward ran: ``loss.backward()`` may be called where autocast is on."""

    @functools.wraps(backward)
    def run(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return run


def _cast(x: Tensor, *base: Tensor | None) -> tuple[Any, ...]:
    """As F.linear under autocast: activations and base are cast, the adapter's own parameters stay."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *base
    low = torch.get_autocast_dtype(x.device.type)
    return x.to(low), *(None if t is None else t.to(low) for t in base)


# ---------------------------------------------------------------------------------------------------- NOLA


def nola_factors(
    alpha: Tensor,
    beta: Tensor,
    seed: int,
    r: int,
    in_features: int,
    out_features: int,
    normalize: bool = True,
    frozen_a: bool = True,
    distribution: str = "uniform8",
    tensor: int = 0,
) -> tuple[Tensor, Tensor]:
    """A = A₀ + c Σᵢ alphaᵢ Uᵢ [..., r, in] and B = c' Σⱼ betaⱼ Vⱼ [..., out, r], float32: NOLA (arXiv 2310.02556).

    alpha [..., k] and beta [..., l] float32, with the layers that share the seed as leading dimensions. U_i [r, in] is basis i of
    ``tensor``, V_jᵀ [r, out] of tensor + 1; their elements lie in (-1, 1). c = 1/sqrt(k), c' = 1/sqrt(l) where ``normalize``
    (as NOLA's GPT-2 code; its README leaves them out), else 1. With ``frozen_a`` A₀ is basis k times 1/sqrt(in), which
    is kaiming_uniform(a=sqrt(5)) as NOLA's code draws it, and takes no memory either; without it A₀ = 0.
    """
    k, l = alpha.shape[-1], beta.shape[-1]
    c = [1 / math.sqrt(max(n, 1)) if normalize else 1.0 for n in (k, l)]
    frozen = [alpha.new_full((*alpha.shape[:-1], 1), in_features**-0.5 / c[0])] if frozen_a else []
    stream = (seed, METHODS["nola"], DISTRIBUTIONS[distribution], tensor)
    coef = torch.cat([alpha.float(), *frozen, beta.float()], -1)
    ab = ops.basis_combine(coef, None, *stream, r, [in_features, out_features], [k + len(frozen), l], c)
    a, b = ab.split([in_features, out_features], -1)
    return a, b.mT


def nola_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    seed: int,
    r: int,
    scale: float = 1.0,
    normalize: bool = True,
    frozen_a: bool = True,
    distribution: str = "uniform8",
    tensor: int = 0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ with A and B of ``nola_factors``; x [..., I], weight [O, I].

    Backward saves x, S [T, r], A and B of this layer, and regenerates the bases.
    """
    from . import lora_linear

    x, weight, bias = _cast(x, weight, bias)
    O, I = weight.shape
    a, b = nola_factors(alpha, beta, seed, r, I, O, normalize, frozen_a, distribution, tensor)
    with torch.autocast(x.device.type, enabled=False):
        return lora_linear(x, weight, bias, a, b, scale, dropout_p, training)


# ---------------------------------------------------------------------------------------------------- VeRA


class _Vera(Function):
    """y + b ⊙ ((c d ⊙ (x Aᵀ)) B), y = x Wᵀ + bias or given; c the scales of A and B, B stored as [r, out]."""

    @staticmethod
    def forward(ctx, y, x, weight, bias, d, b, A, B, save_output):
        d32, b32, c = d.float().contiguous(), b.float().contiguous(), _scale(A) * _scale(B)
        wide = d.dtype == torch.float32
        u = _matmul(x, A, True, wide=wide)
        out = F.linear(x, weight, bias).contiguous() if y is None else y.clone(memory_format=torch.contiguous_format)
        w = None
        if save_output:
            w = _matmul(u, B, False, in_scale=c * d32, wide=wide)
            out.addcmul_(w, b.to(w.dtype))
        else:
            _matmul(u, B, False, c * d32, b32, into=out)
        stored = [p for p in (A, B) if isinstance(p, Tensor)]
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, d, b, u, w, *stored)
        ctx.x = x.shape, x.dtype
        ctx.projections = [None if isinstance(p, Tensor) else p for p in (A, B)]
        ctx.c = c
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_no_autocast
    def backward(ctx, dy):
        x, weight, d, b, u, w, *stored = ctx.saved_tensors
        stored = iter(stored)
        A, B = (next(stored) if p is None else p for p in ctx.projections)
        y_, x_, w_, bias_, d_, b_ = ctx.needs_input_grad[:6]
        d32, b32, wide, c = d.float(), b.float(), d.dtype == torch.float32, ctx.c
        dx = dw = dbias = dd = db = None
        if weight is not None:
            dx, dw, dbias = _base_gradients((x_, w_, bias_), dy, x, weight)
        if x_ or d_:
            dv = _matmul(dy, B, True, in_scale=b32, wide=wide)  # [..., r]
            if d_:
                dd = (c * (dv.float() * u.float()).flatten(0, -2).sum(0)).to(d.dtype)
            if x_:
                shape, dtype = ctx.x
                dx = dy.new_zeros(shape, dtype=dtype) if dx is None else dx.contiguous()
                _matmul(dv, A, False, in_scale=c * d32, into=dx)
        if b_:
            db = _vera_db(dy, u, c * d32, B, w).to(b.dtype)
        return dy if y_ else None, dx, dw, dbias, dd, db, None, None, None


def _vera_db(dy: Tensor, u: Tensor, d: Tensor, B: Projection, w: Tensor | None) -> Tensor:
    """Σ_t dy[t] ⊙ w[t], w = (d ⊙ u) B, or without a [T, O] temporary Σ_k B[k] ⊙ (vᵀ dy)[k], v = d ⊙ u."""
    dy, u = dy.flatten(0, -2), u.flatten(0, -2)
    if w is None and len(dy) < _rows(B):
        w = _matmul(u, B, False, in_scale=d, wide=True)
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
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        if training and dropout_p > 0.0:
            return vera_add(F.linear(x, weight, bias), x, d, b, A, B, dropout_p, training, save_output)
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
    (x,) = _cast(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Vera.apply(y, torch.dropout(x, dropout_p, training), None, None, d, b, A, B, save_output)


# ---------------------------------------------------------------------------------------------------- RandLoRA

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
        return _matmul(x, p, transposed, wide=True)
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
            c = y.new_full((_cols(B),), scale * _scale(B), dtype=torch.float32)
            _matmul(order(h).contiguous(), B, False, out_scale=c, into=y)
        else:
            y += _in_pieces(order(h), B, False).mul_(scale)
    else:
        h = _in_pieces(x, B, True)  # [T, Q]
        h = h.view(-1, n, len(a)) if pieces.paper else h.view(-1, len(a), n).mT
        y += (((h * lam.mT) @ a) * gam).sum(1).mul_(scale * _scale(B))


def _cols(p: Projection) -> int:
    return p.shape[1] if isinstance(p, Tensor) else p.cols


def _randlora_delta(lam, gam, pieces: _Pieces, scale: float, narrow_in: bool) -> Tensor:
    """ΔW [O, I] float32."""
    I, O = (pieces.a.shape[1], _cols(pieces.B)) if narrow_in else (_cols(pieces.B), pieces.a.shape[1])
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
            out = F.linear(x, _randlora_delta(lam32, gam32, pieces, scale, narrow_in).add_(weight), bias)
        else:
            out = (
                F.linear(x, weight, bias).contiguous() if y is None else y.clone(memory_format=torch.contiguous_format)
            )
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
    @_no_autocast
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
            dx, dw, dbias = _base_gradients((x_, w_, bias_), dy, x, w)
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
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        if training and dropout_p > 0.0:
            y = F.linear(x, weight, bias)
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
    (x,) = _cast(x)
    with torch.autocast(x.device.type, enabled=False):
        x = torch.dropout(x, dropout_p, training)
        return _RandLora.apply(y, x, None, None, lam, gam, A, B, scale, paper_pairing)
