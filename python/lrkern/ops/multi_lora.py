# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA: every row of a batch has adapters of its own (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

Letters: T rows (x flattened), K slots a row, A adapters, L slices of one x (q, k, v), M pages of 16 ranks, R = 16 M, P rows
of a pool. Factors lie rank-major in pools: a_pool [P, I] holds rows of A, b_pool [P, O] rows of Bᵀ, of the activations'
dtype or float32. pages int32 [A, L, M]: page m of an adapter and slice is the pool's rows 16 pages[a, l, m] and the 15 after
it; ranks int32 [A, L] says how many of its rows count. A page belongs to one adapter. plan is what multi_lora_plan made of
index int32 [T, K] (or [T]), an adapter per row and slot, negative for none: made once, it serves all layers of a batch.
scales float32 [T, K] (or [T]); dropout_p float32 [A], one probability an adapter; seed int64 [1].

All of this stays on the device: nothing is read back, so a captured CUDA graph replays with other adapters, ranks, scales
and rows. A row or page that does not exist is refused on the CPU; on CUDA, where nobody looks, that row is NaN and no other.
The adapter part is batch-invariant: a row alone and the row in any batch give the same bits.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import _autograd, _BelowAutograd, _fake, _grad, _lib, _needs_grad, _once, _refuse, _route
from .dispatch import library


def multi_lora_plan(index: Tensor, adapters: int) -> Tensor:
    """The rows of a batch sorted by adapter, int32 [K, plan length]; its layout is csrc/multi_lora.h's.

    index int32 [T, K] or [T]: an adapter below ``adapters``, or negative for none.
    """
    return library().multi_lora_plan.default(index, adapters)


def multi_lora_shrink(
    x: Tensor,
    a_pool: Tensor,
    pages: Tensor,
    ranks: Tensor,
    plan: Tensor,
    scales: Tensor | None = None,
    dropout_p: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """S [..., K, L, R] = scales[t, k] · D(x[t]) A[index[t, k], l]ᵀ; zeros where a slot or an adapter has no rank.

    x [..., I]. Differentiable in x and a_pool. All slices in one pass over x.
    """
    op = library().multi_lora_shrink.default
    return _route(op, _shrink, x, a_pool, pages, ranks, plan, scales, dropout_p, seed)


def multi_lora_expand(
    y: Tensor, s: Tensor, b_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, slice: int = 0
) -> Tensor:
    """y[t] + Σₖ S[t, k, slice] B[index[t, k], slice]ᵀ as a new tensor, beside a base layer of any kind that gave y [..., O].

    Slots are summed in order in fp32 and rounded once. Differentiable in y, s and b_pool.
    """
    return _route(library().multi_lora_expand.default, _expand, y, s, b_pool, pages, ranks, plan, slice)


def multi_lora_expand_(
    y: Tensor, s: Tensor, b_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, slice: int = 0
) -> None:
    """The same in place. Not differentiable: raises where gradients are recorded and an argument requires one."""
    library().multi_lora_expand_.default(y, s, b_pool, pages, ranks, plan, slice)


def multi_lora_embedding(
    ids: Tensor, a_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, scales: Tensor | None = None
) -> Tensor:
    """S [..., K, L, R] = scales[t, k] · A[index[t, k], l][:, ids[t]]: multi_lora_shrink of one-hot rows, for an embedding.

    ids int64 [...], below V; a_pool [P, V]. Then multi_lora_expand into the rows that the base table gave. Differentiable in
    a_pool, with a dense gradient [P, V].
    """
    return _route(library().multi_lora_embedding.default, _embedding, ids, a_pool, pages, ranks, plan, scales)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_pool: Tensor,
    b_pool: Tensor,
    pages: Tensor,
    ranks: Tensor,
    plan: Tensor,
    scales: Tensor | None = None,
    dropout_p: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y[t] = x[t] Wᵀ + bias + Σₖ scales[t, k] (D(x[t]) A[index[t, k]]ᵀ) B[index[t, k]]ᵀ, one slice.

    x [..., I]; weight [O, I]; bias [O] or None. Differentiable in x, weight, bias, a_pool and b_pool: several adapters train
    in one batch, gradients of pool rows without an adapter in it are zeros. Saves x, S and the metadata. The base product
    is ATen's linear, so y is rounded twice.
    """
    op = library().multi_lora_linear.default
    return _route(op, _linear, x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales, dropout_p, seed)


# ---------------------------------------------------------------------------------------------------- autograd


class _Shrink(Function):
    @staticmethod
    def forward(ctx, x, a_pool, pages, ranks, plan, scales, dropout_p, seed):
        with _BelowAutograd():
            s = library().multi_lora_shrink.default(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)
        ctx.save_for_backward(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)
        return s

    @staticmethod
    def backward(ctx, ds):
        x, a_pool, pages, ranks, plan, scales, dropout_p, seed = ctx.saved_tensors
        with _BelowAutograd():
            if scales is not None:
                ds = (ds * scales.reshape(*ds.shape[:-2], 1, 1)).to(ds.dtype)
            grads = library().multi_lora_shrink_bwd.default(
                ds, x, a_pool, pages, ranks, plan, dropout_p, seed, *ctx.needs_input_grad[:2]
            )
        return (*_once("multi_lora_shrink", grads), *[None] * 6)


class _Expand(Function):
    @staticmethod
    def forward(ctx, y, s, b_pool, pages, ranks, plan, slice):
        with _BelowAutograd():
            out = library().multi_lora_expand.default(y, s, b_pool, pages, ranks, plan, slice)
        ctx.save_for_backward(s, b_pool, pages, ranks, plan)
        ctx.slice = slice
        return out

    @staticmethod
    def backward(ctx, dy):
        s, b_pool, pages, ranks, plan = ctx.saved_tensors
        with _BelowAutograd():
            grads = library().multi_lora_expand_bwd.default(
                dy, s, b_pool, pages, ranks, plan, ctx.slice, *ctx.needs_input_grad[1:3]
            )
        return (dy, *_once("multi_lora_expand", grads), *[None] * 4)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, ids, a_pool, pages, ranks, plan, scales):
        with _BelowAutograd():
            s = library().multi_lora_embedding.default(ids, a_pool, pages, ranks, plan, scales)
        ctx.save_for_backward(ids, a_pool, pages, ranks, plan, scales)
        return s

    @staticmethod
    def backward(ctx, ds):
        *saved, scales = ctx.saved_tensors
        with _BelowAutograd():
            if scales is not None:
                ds = (ds * scales.reshape(*ds.shape[:-2], 1, 1)).to(ds.dtype)
            da = library().multi_lora_embedding_bwd.default(ds, *saved)
        return (None, *_once("multi_lora_embedding", (da,)), *[None] * 4)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a_pool, b_pool, *rest):
        with _BelowAutograd():
            y, s = library().multi_lora_linear_fwd.default(x, weight, bias, a_pool, b_pool, *rest)
        ctx.save_for_backward(x, weight, a_pool, b_pool, s, *rest)
        return y

    @staticmethod
    def backward(ctx, dy):
        with _BelowAutograd():
            grads = library().multi_lora_linear_bwd.default(dy, *ctx.saved_tensors, *ctx.needs_input_grad[:5])
        return (*_once("multi_lora_linear", grads), *[None] * 6)


def _no_gradient_of(name: str, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if _needs_grad(t):
            raise RuntimeError(f"lrkern::{name}: {argument} has no gradient, got one that requires it")


def _shrink(x, a_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    args = x, a_pool, pages, ranks, plan, scales, dropout_p, seed
    _no_gradient_of("multi_lora_shrink", scales=scales, dropout_p=dropout_p)
    if _needs_grad(x, a_pool):
        return _Shrink.apply(*args)
    with _BelowAutograd():
        return library().multi_lora_shrink.default(*args)


def _expand(y, s, b_pool, pages, ranks, plan, slice=0):
    if _needs_grad(y, s, b_pool):
        return _Expand.apply(y, s, b_pool, pages, ranks, plan, slice)
    with _BelowAutograd():
        return library().multi_lora_expand.default(y, s, b_pool, pages, ranks, plan, slice)


def _embedding(ids, a_pool, pages, ranks, plan, scales=None):
    _no_gradient_of("multi_lora_embedding", scales=scales)
    if _needs_grad(a_pool):
        return _Embedding.apply(ids, a_pool, pages, ranks, plan, scales)
    with _BelowAutograd():
        return library().multi_lora_embedding.default(ids, a_pool, pages, ranks, plan, scales)


def _linear(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    args = x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales, dropout_p, seed
    _no_gradient_of("multi_lora_linear", scales=scales, dropout_p=dropout_p)
    if _needs_grad(x, weight, bias, a_pool, b_pool):
        return _Linear.apply(*args)
    with _BelowAutograd():
        return library().multi_lora_linear.default(*args)


_DIFFERENTIABLE = {
    "multi_lora_shrink": _shrink,
    "multi_lora_expand": _expand,
    "multi_lora_embedding": _embedding,
    "multi_lora_linear": _linear,
}
for _name, _kernel in _DIFFERENTIABLE.items():
    _lib.impl(_name, _autograd(_kernel), "Autograd")
    _refuse(f"{_name}_bwd", "is itself a gradient and has none: double backward is not supported")
_refuse("multi_lora_linear_fwd", "has no gradient, but an argument requires one; use multi_lora_linear")
_why = "writes in place and has no gradient, but an argument requires one; use multi_lora_expand"
_refuse("multi_lora_expand_", _why, True)
_refuse("multi_lora_plan", "has no gradient")

# ---------------------------------------------------------------------------------------------------- autocast


def _autocast(name: str, count: int) -> None:
    """The first `count` arguments, activations and base, are cast. Pools stay as they are: to cast thousands of adapters
    at every call would cost more than it saves. A float32 pool serves any activations."""
    op = getattr(torch.ops.lrkern, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, _device=device, _key=getattr(torch._C.DispatchKey, key), **kwargs):
            low = torch.get_autocast_dtype(_device)
            ok = lambda t: isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                cast = (t.to(low) if ok(t) else t for t in args[:count])
                return op(*cast, *args[count:], **kwargs)

        _lib.impl(name, kernel, key)


_autocast("multi_lora_shrink", 1)
_autocast("multi_lora_linear", 3)

# ---------------------------------------------------------------------------------------------------- fakes


def _s(x: Tensor, pool: Tensor, pages: Tensor, plan: Tensor) -> Tensor:
    return pool.new_empty((*x.shape[:-1], plan.shape[0], pages.shape[1], 16 * pages.shape[2]))


@_fake("multi_lora_plan")
def _(index, adapters):
    if not 0 <= adapters <= 2**30:
        raise RuntimeError(f"lrkern::multi_lora_plan: adapters must lie in [0, 2^30], got {adapters}")
    T = index.shape[0]
    tiles = (T + 63) // 64 + torch.sym_min(adapters + 2, T)
    return index.new_empty((index.shape[1] if index.dim() == 2 else 1, T + adapters + 3 + 2 * tiles))


@_fake("multi_lora_shrink")
def _(x, a_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    return _s(x, a_pool, pages, plan)


@_fake("multi_lora_shrink_bwd")
def _(ds, x, a_pool, pages, ranks, plan, dropout_p, seed, need_dx, need_da):
    return _grad(need_dx, x), _grad(need_da, a_pool)


@_fake("multi_lora_expand")
def _(y, s, b_pool, pages, ranks, plan, slice=0):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_fake("multi_lora_expand_bwd")
def _(dy, s, b_pool, pages, ranks, plan, slice, need_ds, need_db):
    return _grad(need_ds, s), _grad(need_db, b_pool)


@_fake("multi_lora_expand_")
def _(y, s, b_pool, pages, ranks, plan, slice=0):
    return None


@_fake("multi_lora_embedding")
def _(ids, a_pool, pages, ranks, plan, scales=None):
    return a_pool.new_empty((*ids.shape, plan.shape[0], pages.shape[1], 16 * pages.shape[2]))


@_fake("multi_lora_embedding_bwd")
def _(ds, ids, a_pool, pages, ranks, plan):
    return torch.empty_like(a_pool)


@_fake("multi_lora_linear")
def _(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("multi_lora_linear_fwd")
def _(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _s(x, a_pool, pages, plan)


@_fake("multi_lora_linear_bwd")
def _(dy, x, weight, a_pool, b_pool, s, pages, ranks, plan, scales, dropout_p, seed, *need):
    dbias = dy.new_empty(weight.shape[0]) if need[2] else None
    grads = (_grad(*pair) for pair in zip((*need[:2], *need[3:]), (x, weight, a_pool, b_pool), strict=True))
    dx, dw, da, db = grads
    return dx, dw, dbias, da, db
