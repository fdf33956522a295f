# SPDX-License-Identifier: Apache-2.0
"""Random bases that exist only as a seed: regenerated inside the kernels, the same bits on every device (docs/rng.md).

A stream is named by four integers: seed in [0, 2^63), a method (``METHODS``), a distribution (``DISTRIBUTIONS``) and a tensor
number below 2^32. Its matrices U_k [R, C], k below 2^16, form a stack U [K R, C] whose row q is row q % R of U_(first + q // R).
Element (k, row, column) depends on nothing else, so any slice, tiling or device sees the same number, exact in float32.

Letters: K bases, R rows of a basis, Q rows of the stack, C columns (the long feature axis), T tokens, L layers that share
a stream, W = Σ widths. An index past a counter's limit is refused. Sums are float32, in an order that follows from the shape.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import _autograd, _BelowAutograd, _fake, _lib, _needs_grad, _refuse, _route
from .dispatch import library

METHODS = {"nola": 2, "vera": 3, "randlora": 4}
DISTRIBUTIONS = {"uniform8": 2, "uniform16": 3, "uniform32": 4, "sign": 5, "ternary6": 6, "ternary4": 7}
STREAM_VERSION = 0


def basis_fill(
    like: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    seed: int,
    method: int,
    distribution: int,
    tensor: int,
    first: int,
    R: int,
    q0: int,
    c0: int,
    Q: int,
    C: int,
    scale: float = 1.0,
) -> Tensor:
    """scale · row_scale ⊙ U[q0 : q0 + Q, c0 : c0 + C] ⊙ col_scale, [Q, C] of like's dtype and device.

    row_scale float32 [Q], col_scale float32 [C]. Not differentiable.
    """
    return library().basis_fill.default(
        like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale
    )


def basis_combine(
    coef: Tensor,
    base: Tensor | None,
    seed: int,
    method: int,
    distribution: int,
    tensor: int,
    R: int,
    widths: list[int],
    counts: list[int],
    scales: list[float],
) -> Tensor:
    """base + scale Σₖ coef[..., k] U_k: matrices from coefficients, [..., R, W] float32 (NOLA, arXiv 2310.02556).

    coef float32 [..., ΣK]; base float32 [R, W]. Segment s has widths[s] columns, counts[s] coefficients, scales[s] and the
    stream's tensor + s: the A and the Bᵀ of a layer come from one call. Each element is generated once for all leading
    dimensions of coef. No basis is stored. Differentiable in coef (by basis_dot) and base, twice as well.
    """
    op = library().basis_combine.default
    return _route(op, _combine, coef, base, seed, method, distribution, tensor, R, widths, counts, scales)


def basis_dot(
    g: Tensor,
    seed: int,
    method: int,
    distribution: int,
    tensor: int,
    widths: list[int],
    counts: list[int],
    scales: list[float],
) -> Tensor:
    """scale ⟨g, U_k⟩ for every k of every segment, [..., ΣK] float32: the adjoint of basis_combine.

    g float32 [..., R, W]. Differentiable in g (by basis_combine), twice as well.
    """
    return _route(library().basis_dot.default, _dot, g, seed, method, distribution, tensor, widths, counts, scales)


def basis_matmul(
    x: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    seed: int,
    method: int,
    distribution: int,
    tensor: int,
    first: int,
    R: int,
    Q: int,
    C: int,
    transposed: bool,
    fp32: bool = False,
) -> Tensor:
    """out_scale ⊙ ((in_scale ⊙ x) U), or Uᵀ where ``transposed``; in x's dtype or, with ``fp32``, float32.

    x [..., Q] -> [..., C]; transposed x [..., C] -> [..., Q]. in_scale and out_scale are float32 vectors. Up to 16 tokens
    U stays in registers; for more it is generated once, in pieces that fit a cache, for ATen's GEMM
    (lrkern._host.explain("basis_matmul", ...)). Differentiable in x, twice as well; the scales have no gradient here.
    """
    args = x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32
    return _route(library().basis_matmul.default, _matmul, *args)


def basis_matmul_(
    y: Tensor,
    x: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    seed: int,
    method: int,
    distribution: int,
    tensor: int,
    first: int,
    R: int,
    Q: int,
    C: int,
    transposed: bool,
) -> None:
    """y += the same, in place. Not differentiable: raises where gradients are recorded and an argument requires one."""
    library().basis_matmul_.default(
        y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed
    )


# ---------------------------------------------------------------------------------------------------- autograd
# The gradients are these same ops, so they have gradients themselves.


class _Combine(Function):
    @staticmethod
    def forward(ctx, coef, base, *spec):
        ctx.spec = spec
        with _BelowAutograd():
            return library().basis_combine.default(coef, base, *spec)

    @staticmethod
    def backward(ctx, g):
        dcoef = dbase = None
        if ctx.needs_input_grad[0]:
            dcoef = basis_dot(g, *ctx.spec[:4], *ctx.spec[5:])
        if ctx.needs_input_grad[1]:
            dbase = g.flatten(0, -3).sum(0) if g.dim() > 2 else g
        return dcoef, dbase, *[None] * len(ctx.spec)


class _Dot(Function):
    @staticmethod
    def forward(ctx, g, *spec):
        ctx.spec, ctx.rows = spec, g.shape[-2]
        with _BelowAutograd():
            return library().basis_dot.default(g, *spec)

    @staticmethod
    def backward(ctx, d):
        dg = basis_combine(d, None, *ctx.spec[:4], ctx.rows, *ctx.spec[4:])
        return dg, *[None] * len(ctx.spec)


class _Matmul(Function):
    @staticmethod
    def forward(ctx, x, in_scale, out_scale, *spec):
        ctx.save_for_backward(in_scale, out_scale)
        ctx.spec, ctx.dtype = spec, x.dtype
        with _BelowAutograd():
            return library().basis_matmul.default(x, in_scale, out_scale, *spec)

    @staticmethod
    def backward(ctx, dy):
        in_scale, out_scale = ctx.saved_tensors
        *where, transposed, _ = ctx.spec
        dx = basis_matmul(dy, out_scale, in_scale, *where, not transposed).to(ctx.dtype)
        return dx, *[None] * (2 + len(ctx.spec))


def _combine(coef, base, *spec):
    if _needs_grad(coef, base):
        return _Combine.apply(coef, base, *spec)
    with _BelowAutograd():
        return library().basis_combine.default(coef, base, *spec)


def _dot(g, *spec):
    if _needs_grad(g):
        return _Dot.apply(g, *spec)
    with _BelowAutograd():
        return library().basis_dot.default(g, *spec)


def _matmul(x, in_scale, out_scale, *spec):
    for name, t in (("in_scale", in_scale), ("out_scale", out_scale)):
        if _needs_grad(t):
            raise RuntimeError(f"lrkern::basis_matmul: {name} has no gradient, but it requires one")
    spec = spec if len(spec) == 10 else (*spec, False)
    if _needs_grad(x):
        return _Matmul.apply(x, in_scale, out_scale, *spec)
    with _BelowAutograd():
        return library().basis_matmul.default(x, in_scale, out_scale, *spec)


def _fill(like, row_scale, col_scale, *spec):
    for name, t in (("row_scale", row_scale), ("col_scale", col_scale)):
        if _needs_grad(t):
            raise RuntimeError(f"lrkern::basis_fill: {name} has no gradient, but it requires one")
    with _BelowAutograd():
        return library().basis_fill.default(like, row_scale, col_scale, *spec)


_KERNELS = {"basis_fill": _fill, "basis_combine": _combine, "basis_dot": _dot, "basis_matmul": _matmul}
for _name, _kernel in _KERNELS.items():
    _lib.impl(_name, _autograd(_kernel), "Autograd")
_refuse("basis_matmul_", "writes in place and has no gradient, but an argument requires one; use basis_matmul", True)

# ---------------------------------------------------------------------------------------------------- fakes


def _sized(name: str, **sizes: int) -> None:
    for argument, n in sizes.items():
        if n < 0:
            raise RuntimeError(f"lrkern::{name}: {argument} must not be negative, got {n}")


@_fake("basis_fill")
def _(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale=1.0):
    _sized("basis_fill", Q=Q, C=C)
    return like.new_empty((Q, C))


@_fake("basis_combine")
def _(coef, base, seed, method, distribution, tensor, R, widths, counts, scales):
    _sized("basis_combine", R=R, widths=sum(widths))
    return coef.new_empty((*coef.shape[:-1], R, sum(widths)))


@_fake("basis_dot")
def _(g, seed, method, distribution, tensor, widths, counts, scales):
    _sized("basis_dot", counts=sum(counts))
    return g.new_empty((*g.shape[:-2], sum(counts)))


@_fake("basis_matmul")
def _(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32=False):
    _sized("basis_matmul", Q=Q, C=C)
    return x.new_empty((*x.shape[:-1], Q if transposed else C), dtype=torch.float32 if fp32 else x.dtype)


@_fake("basis_matmul_")
def _(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    return None
