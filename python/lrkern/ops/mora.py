# SPDX-License-Identifier: Apache-2.0
"""MoRA (Jiang et al., arXiv 2405.12130): one square matrix M between a fold of x and its unfolding into y.

Which columns of x are added up to one of the r slots, and which columns of y a slot goes to, is the type, as the authors' code
numbers them (there is no 5). cycles: column j belongs to slot j mod r. blocks: slots are neighbouring columns, the first N mod r
of them one longer.

    1 cycles, cycles     2 blocks, blocks     3 blocks, cycles     4 cycles, blocks
    6 x in chunks of r, chunk i turned by R_i: its pairs (p, p + r / 2) by the angles i · 10000^(-2p / r); y likewise, not turned

Cycles pad x to a multiple of r, ``circular``ly as the authors do (its first columns count twice), else with zeros. Types 1 to 4 are
LoRA of rank r. Of type 6 the chunks that y has no room for are dead: their x has no part in y.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from .composites import mora as composites
from .dispatch import Op, below_autograd, library, like_contiguous, s_dtype


class _Compress(Function):
    @staticmethod
    def forward(ctx, x, rank, type, circular, chunks, adjoint):
        with below_autograd():
            h = library().mora_compress.default(x, rank, type, circular, chunks, adjoint)
        ctx.spec, ctx.features, ctx.dtype = (type, circular, not adjoint), x.shape[-1], x.dtype
        return h

    @staticmethod
    def backward(ctx, dh):
        return mora_decompress(dh, ctx.features, *ctx.spec).to(ctx.dtype), None, None, None, None, None


def _compressed(x, rank, type, chunks, **_):
    side = [chunks or -(-x.shape[-1] // max(rank, 1)), rank] if type == 6 else [rank]
    return x.new_empty((*x.shape[:-1], *side), dtype=s_dtype(x.dtype))


_compress = Op(
    "mora_compress",
    composites.mora_compress,
    results=_compressed,
    trains="x",
    function=_Compress,
    gradient="mora_decompress",
    shards={"": {"tokens": "T>T"}},
)


def mora_compress(
    x: Tensor, rank: int, type: int = 1, circular: bool = True, chunks: int = 0, adjoint: bool = False
) -> Tensor:
    """x folded to M's side: [..., r], for type 6 chunks that are turned [..., n, r]; ``chunks`` is how many of the
    ceil(I / r) are kept, 0 for all. In the dtype of x, but float32 for float16, whose range a sum leaves.

    x [..., I]. ``adjoint``: the transpose of ``mora_decompress`` of this type, from O to r (n = ``chunks``), instead. Sums are
    float32 in the order of columns, rounded once. Differentiable in x, by ``mora_decompress``, twice as well.
    """
    return _compress(x, rank, type, circular, chunks, adjoint)


class _Decompress(Function):
    @staticmethod
    def forward(ctx, h, features, type, circular, adjoint):
        with below_autograd():
            y = library().mora_decompress.default(h, features, type, circular, adjoint)
        chunks = h.shape[-2] if type == 6 else 0
        ctx.spec, ctx.dtype, ctx.shape = (h.shape[-1], type, circular, chunks, not adjoint), h.dtype, h.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        if not ctx.shape.numel():  # no chunks would be taken for all of them
            return dy.new_zeros(ctx.shape), None, None, None, None
        return mora_compress(dy, *ctx.spec).to(ctx.dtype), None, None, None, None


def _decompressed(h, out_features, type, **_):
    return h.new_empty((*h.shape[: -2 if type == 6 else -1], out_features))


_decompress = Op(
    "mora_decompress",
    composites.mora_decompress,
    results=_decompressed,
    trains="h",
    function=_Decompress,
    gradient="mora_compress",
    shards={"": {"tokens": "T>T"}},
    leading=lambda h, type=1, **_: h.ndim - (2 if type == 6 else 1),
)


def mora_decompress(
    h: Tensor, out_features: int, type: int = 1, circular: bool = True, adjoint: bool = False
) -> Tensor:
    """h unfolded to y [..., O], each column the slot that it belongs to; of h's dtype.

    h [..., r], for type 6 [..., n, r], whose chunks are repeated where they are too few and cut off where they are too many.
    ``adjoint``: the transpose of ``mora_compress`` of this type and padding, from r to I, instead: sums over the padding, and
    chunks turned back. Differentiable in h, by ``mora_compress``, twice as well.
    """
    return _decompress(h, out_features, type, circular, adjoint)


_decompress_into = Op("mora_decompress_", composites.mora_decompress_, instead="mora_add")


def mora_decompress_(y: Tensor, h: Tensor, type: int = 1, circular: bool = True, adjoint: bool = False) -> None:
    """y += decompress(h) in place, beside anyone's products. y [..., O]; h as in ``mora_decompress``, of y's dtype or float32.

    Not differentiable: raises when gradients are recorded and an argument requires one; use ``mora_add`` then.
    """
    _decompress_into(y, h, type, circular, adjoint)


def _linear_results(x, weight, m, type, **_):
    h = None if type == 6 else m.new_empty((math.prod(x.shape[:-1]), m.shape[0]), dtype=s_dtype(m.dtype))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), h


_linear = Op(
    "mora_linear",
    composites.mora_linear,
    results=_linear_results,
    trains="x weight bias m",
    saved_for={"x": "weight"},
    saved_if={"x": lambda type, **_: type == 6},
    casts="x weight bias m",
    shards={
        "": {"tokens": "TRRR>T"},
        "_fwd": {"batch": "TRRR>TT"},  # h is [T, r]
        "_bwd": {"batch": "TTRRT>TPPP"},
    },
)


def mora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, m: Tensor, type: int = 1, circular: bool = True
) -> Tensor:
    """y = x Wᵀ + bias + decompress(compress(x) Mᵀ), a linear layer with a MoRA adapter (arXiv 2405.12130).

    x [..., I]; weight [O, I]; bias [O] or None; m [r, r], of x's dtype or float32, in which the adapter's part is computed
    (float32 for float16). Differentiable in all tensors. Saves compress(x) [T, r]; x itself for type 6 and where weight trains.
    What is between x and y is never as large as x: type 6 goes some tokens at a time. Double backward is refused.
    """
    return _linear(x, weight, bias, m, type, circular)


def _casts_beside_y(low, y, *_):
    """y stays as the base layer gave it; where it is of another dtype, m is float32."""
    return None, low, low if y.dtype == low else torch.float32, None, None


_add = Op(
    "mora_add",
    composites.mora_add,
    results=lambda y, **_: like_contiguous(y),
    trains="x m",
    passes="y",
    casts=_casts_beside_y,
    shards={"": {"tokens": "TTR>T"}, "_bwd": {"tokens": "TTR>TP"}},
)


def mora_add(y: Tensor, x: Tensor, m: Tensor, type: int = 1, circular: bool = True) -> Tensor:
    """y + decompress(compress(x) Mᵀ) as a new tensor: MoRA beside a base layer of any kind that gave y [..., O].

    x [..., I]; m [r, r]. The dtypes of y and x may differ where m is float32. Differentiable in all tensors; saves x.
    Double backward is refused.
    """
    return _add(y, x, m, type, circular)
