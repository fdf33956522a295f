# SPDX-License-Identifier: Apache-2.0
"""S2FT (Yang et al., arXiv 2412.06289): of W a slice trains, some of its columns (input features) or rows (output features).

index int32 [s]: columns in ascending order, without doubles. Where rows of a batch have adapters of their own, index is [A, s],
each adapter's columns and -1 behind their end, and ids int32 [T] or [T, K] says whose columns a row has, K at once, negative for none;
scales float32 like ids. All of this stays on the device. What does not ascend or exist is refused on the CPU; on CUDA, where values are
not validated, that row is NaN and no other.
"""

import math

from torch import Tensor
from torch.autograd import Function

from .composites import s2ft as composites
from .dispatch import Op, below_autograd, library, like_contiguous


def _sliced(x, index, ids=None, **_):
    slots = ids.shape[1:] if ids is not None else ()
    return x.new_empty((*x.shape[:-1], *slots, index.shape[-1]))


class _Gather(Function):
    @staticmethod
    def forward(ctx, x, index, ids, scales):
        with below_autograd():
            h = library().slice_gather.default(x, index, ids, scales)
        ctx.save_for_backward(index, ids, scales)
        ctx.shape = x.shape
        return h

    @staticmethod
    def backward(ctx, dh):
        return scatter_add(dh.new_zeros(ctx.shape), dh, *ctx.saved_tensors), None, None, None


_gather = Op(
    "slice_gather",
    composites.slice_gather,
    results=_sliced,
    trains="x",
    refuses="scales",
    function=_Gather,
    gradient="scatter_add",
)


def slice_gather(x: Tensor, index: Tensor, ids: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """h[t, k] = scales[t, k] · x[t, index[ids[t, k]]]: [..., s], or [..., K, s] where ids is [T, K]; zeros where there is no column.

    x [..., N]. Differentiable in x, by ``scatter_add``, twice as well.
    """
    return _gather(x, index, ids, scales)


class _Scatter(Function):
    @staticmethod
    def forward(ctx, y, h, index, ids, scales):
        with below_autograd():
            out = library().scatter_add.default(y, h, index, ids, scales)
        ctx.save_for_backward(index, ids, scales)
        ctx.dtype = h.dtype
        return out

    @staticmethod
    def backward(ctx, dy):
        dh = slice_gather(dy.to(ctx.dtype), *ctx.saved_tensors) if ctx.needs_input_grad[1] else None
        return dy, dh, None, None, None


_scatter = Op(
    "scatter_add",
    composites.scatter_add,
    results=lambda y, **_: like_contiguous(y),
    trains="h",
    passes="y",
    refuses="scales",
    function=_Scatter,
    gradient="slice_gather",
)


def scatter_add(y: Tensor, h: Tensor, index: Tensor, ids: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """y, and added to its columns y[t, index[ids[t, k]]] what scales[t, k] · h[t, k] has for them, as a new tensor.

    y [..., N]; h [..., s], or [..., K, s] where ids is [T, K], of y's dtype or float32. Slots are summed in order in float32 and rounded once.
    Differentiable in y and h, twice as well.
    """
    return _scatter(y, h, index, ids, scales)


_scatter_into = Op("scatter_add_", composites.scatter_add_, instead="scatter_add")


def scatter_add_(y: Tensor, h: Tensor, index: Tensor, ids: Tensor | None = None, scales: Tensor | None = None) -> None:
    """The same in place. Not differentiable: raises where gradients are recorded and an argument requires one."""
    _scatter_into(y, h, index, ids, scales)


_matmul = Op(
    "gather_matmul",
    composites.gather_matmul,
    results=lambda y, **_: like_contiguous(y),
    trains="x d",
    passes="y",
    refuses="scales",
    casts="y x d",
)


def gather_matmul(
    y: Tensor, x: Tensor, d: Tensor, index: Tensor, ids: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """y + x[:, index] d as a new tensor: a slice of columns, as an adapter beside a base layer that gave y. With ids
    y[t] + Σₖ scales[t, k] · x[t, index[ids[t, k]]] d[ids[t, k]]: rows of a batch may use different adapters.

    x [..., I]; y [..., O] of x's dtype; d [s, O], or [A, s, O] beside ids (s at most 512 then), of x's dtype or float32. Sums
    are float32, rounded once for 512 columns. Differentiable in y, x and d; saves x.
    """
    return _matmul(y, x, d, index, ids, scales)


_matmul_into = Op("gather_matmul_", composites.gather_matmul_, instead="gather_matmul")


def gather_matmul_(
    y: Tensor, x: Tensor, d: Tensor, index: Tensor, ids: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """The same in place. Not differentiable: raises where gradients are recorded and an argument requires one."""
    _matmul_into(y, x, d, index, ids, scales)


def _linear_results(x, weight, index, dim, **_):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((math.prod(x.shape[:-1]), index.shape[0])) if dim == 1 else None


_linear = Op(
    "slice_linear",
    composites.slice_linear,
    results=_linear_results,
    trains="x bias slice",
    refuses="weight",
    refusal="slice has that of the part that trains",
    saved_for={"x": "slice"},
    saved_only={"x": lambda dim, **_: dim == 0},
    casts="x weight bias",
)


def slice_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slice: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """y = x Wᵀ + bias, where W is weight with ``slice`` in its columns ``index`` (dim 1) or its rows (dim 0), and only they train.

    x [..., I]; weight [O, I]; slice [O, s], or of rows [s, I], of x's dtype or float32. slice is first written into weight, in
    place and rounded to its dtype: one W holds what was trained, no second copy is made. Differentiable in x, bias and slice:
    dx = dy W; dslice = dyᵀ x[:, index], for which x[:, index] [T, s] is saved, or of rows dy[:, index]ᵀ x, for which x is.
    It is computed in x's dtype. Double backward is refused. Under torch.func's transforms weight is not written: each sample may have a
    slice of its own. S2FT's partial backpropagation.
    """
    return _linear(x, weight, bias, slice, index, dim)
