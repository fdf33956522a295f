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

from .composites import basis as composites
from .dispatch import Op, below_autograd, library

METHODS = {"nola": 2, "vera": 3, "randlora": 4}
DISTRIBUTIONS = {"uniform8": 2, "uniform16": 3, "uniform32": 4, "sign": 5, "ternary6": 6, "ternary4": 7}
STREAM_VERSION = 0
REFUSAL = "but it requires one"  # of a scale

# The gradients of these ops are these same ops, so they have gradients themselves.


def _sized(name: str, **sizes: int) -> None:
    for argument, n in sizes.items():
        if n < 0:
            raise RuntimeError(f"lrkern::{name}: {argument} must not be negative, got {n}")


def _filled(like, Q, C, **_):
    _sized("basis_fill", Q=Q, C=C)
    return like.new_empty((Q, C))


_fill = Op("basis_fill", composites.basis_fill, results=_filled, refuses="row_scale col_scale", refusal=REFUSAL)


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
    return _fill(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale)


class _Combine(Function):
    @staticmethod
    def forward(ctx, coef, base, *spec):
        ctx.spec = spec
        with below_autograd():
            return library().basis_combine.default(coef, base, *spec)

    @staticmethod
    def backward(ctx, g):
        dcoef = dbase = None
        if ctx.needs_input_grad[0]:
            dcoef = basis_dot(g, *ctx.spec[:4], *ctx.spec[5:])
        if ctx.needs_input_grad[1]:
            dbase = g.flatten(0, -3).sum(0) if g.dim() > 2 else g
        return dcoef, dbase, *[None] * len(ctx.spec)


def _combined(coef, R, widths, **_):
    _sized("basis_combine", R=R, widths=sum(widths))
    return coef.new_empty((*coef.shape[:-1], R, sum(widths)))


_combine = Op(
    "basis_combine",
    composites.basis_combine,
    results=_combined,
    trains="coef base",
    function=_Combine,
    gradient="basis_dot",
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
    return _combine(coef, base, seed, method, distribution, tensor, R, widths, counts, scales)


class _Dot(Function):
    @staticmethod
    def forward(ctx, g, *spec):
        with below_autograd():
            out = library().basis_dot.default(g, *spec)  # refuses a g that has no rows
        ctx.spec, ctx.rows = spec, g.shape[-2]
        return out

    @staticmethod
    def backward(ctx, d):
        dg = basis_combine(d, None, *ctx.spec[:4], ctx.rows, *ctx.spec[4:])
        return dg, *[None] * len(ctx.spec)


def _dotted(g, counts, **_):
    _sized("basis_dot", counts=sum(counts))
    return g.new_empty((*g.shape[:-2], sum(counts)))


_dot = Op("basis_dot", composites.basis_dot, results=_dotted, trains="g", function=_Dot, gradient="basis_combine")


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
    return _dot(g, seed, method, distribution, tensor, widths, counts, scales)


class _Matmul(Function):
    @staticmethod
    def forward(ctx, x, in_scale, out_scale, *spec):
        ctx.save_for_backward(in_scale, out_scale)
        ctx.spec, ctx.dtype = spec, x.dtype
        with below_autograd():
            return library().basis_matmul.default(x, in_scale, out_scale, *spec)

    @staticmethod
    def backward(ctx, dy):
        in_scale, out_scale = ctx.saved_tensors
        *where, transposed, _ = ctx.spec
        dx = basis_matmul(dy, out_scale, in_scale, *where, not transposed).to(ctx.dtype)
        return dx, *[None] * (2 + len(ctx.spec))


def _product(x, Q, C, transposed, fp32, **_):
    _sized("basis_matmul", Q=Q, C=C)
    return x.new_empty((*x.shape[:-1], Q if transposed else C), dtype=torch.float32 if fp32 else x.dtype)


_matmul = Op(
    "basis_matmul",
    composites.basis_matmul,
    results=_product,
    trains="x",
    function=_Matmul,
    refuses="in_scale out_scale",
    refusal=REFUSAL,
)


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
    U stays in registers; for more it is generated once, rows or columns that fit a cache at a time, for ATen's GEMM
    (lrkern._host.explain("basis_matmul", ...)), or on CUDA, where x and the result differ in dtype, inside a product of two-term
    bfloat16 operands (2^-17). Differentiable in x, twice as well; the scales have no gradient here.
    """
    return _matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32)


_matmul_into = Op("basis_matmul_", composites.basis_matmul_, instead="basis_matmul")


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
    _matmul_into(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed)
