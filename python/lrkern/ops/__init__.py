# SPDX-License-Identifier: Apache-2.0
"""The ops: typed wrappers over ``torch.ops.lrkern``, their fakes, autograd and autocast. Nothing else calls _C.so.

Letters: T tokens (any leading dimensions), I in, O out, R rank (0 to 512). Activations and base weights are float32,
float16 or bfloat16; a, b and s are of that dtype or float32. D is dropout by Philox: element (row, column) of x
flattened to [T, I] is kept iff its 16 random bits under ``seed`` are >= round(65536 dropout_p), and kept elements are
divided by the keep probability. The mask is recomputed wherever it is needed and never stored.
Bad arguments raise RuntimeError as ``lrkern::op: argument must ..., got ...``.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .dispatch import LIBRARY, library  # noqa: F401

_lib = torch.library.Library("lrkern", "FRAGMENT")
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

# ---------------------------------------------------------------------------------------------------- wrappers


def lora_shrink(x: Tensor, a: Tensor, scale: float = 1.0, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """S = scale · D(x) Aᵀ, the low-rank activations [..., R] in the dtype of ``a``.

    x [..., I]; a [R, I]; seed int64 [1] on x's device where dropout_p > 0. Differentiable in x and a.
    fp32 accumulation, one rounding. A row's bits do not depend on the other rows.
    """
    return _route(library().lora_shrink.default, _shrink, x, a, scale, dropout_p, seed)


def linear_expand(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, s: Tensor, b: Tensor, scale: float = 1.0
) -> Tensor:
    """y = x Wᵀ + bias + scale · S Bᵀ [..., O]. Without x and weight: y = bias + scale · S Bᵀ.

    x [..., I]; weight [O, I]; bias [O]; s [..., R]; b [O, R]. Differentiable in all tensors. The base product is
    ATen's linear; S Bᵀ is added into its result, so y is rounded twice.
    """
    return _route(library().linear_expand.default, _expand, x, weight, bias, s, b, scale)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> Tensor:
    """y = c ⊙ (x Wᵀ) + bias + scale · (D(x) Aᵀ) Bᵀ, a linear layer with a LoRA adapter (Hu et al., arXiv 2106.09685).

    x [..., I]; weight [O, I]; bias [O] or None; a [R, I]; b [O, R]; seed int64 [1] where dropout_p > 0; c is base_scale
    [O] (x's dtype or float32), ones where None: DoRA's g is c with g ⊙ b as b (``functional.dora_linear``).
    Differentiable in all float tensors; saves x, S [T, R], the seed, and x Wᵀ where base_scale requires a gradient.
    Double backward is refused.
    """
    return _route(library().lora_linear.default, _linear, x, weight, bias, a, b, scale, dropout_p, seed, base_scale)


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + scale · (D(x) Aᵀ) Bᵀ as a new tensor: LoRA beside a base layer of any kind (quantised, ...) that gave y.

    y [..., O]; x [..., I]; a [R, I]; b [O, R]. The dtypes of y and x may differ where a and b are float32.
    Differentiable in all float tensors; saves x, S [T, R] and the seed. Double backward is refused.
    """
    return _route(library().lora_add.default, _add, y, x, a, b, scale, dropout_p, seed)


def lora_expand_(y: Tensor, s: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """y += scale · S Bᵀ in place, beside anyone's base GEMM. y [..., O]; s [..., R]; b [O, R].

    Not differentiable: raises when gradients are recorded and an argument requires one; use ``lora_add`` or
    ``linear_expand`` then.
    """
    library().lora_expand_.default(y, s, b, scale)


def build_info() -> str:
    """What _C.so was built for, as JSON."""
    return library().build_info()


_PLAIN = (Tensor, torch.nn.Parameter)


def _route(op: Any, eager: Any, *args: Any) -> Any:
    """Plain eager tensors take a classic autograd.Function, a third of the host time of the dispatcher's way through
    autograd. Everything else (compile, autocast, tensor subclasses, FakeTensor) goes through the op itself."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return op(*args)
    for arg in args:
        if isinstance(arg, Tensor) and type(arg) not in _PLAIN:
            _meet(arg)
            return op(*args)
    return eager(*args)


def _meet(t: Tensor) -> None:
    """DTensor learns our ops when the first one comes: importing it costs a second."""
    if type(t).__name__ == "DTensor":
        importlib.import_module("lrkern.ops.sharding")


# ---------------------------------------------------------------------------------------------------- autograd


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _once(name: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, which raise an error that names the op when they are differentiated again."""
    if not torch.is_grad_enabled():
        return grads
    text = f"lrkern::{name}: double backward is not supported, the gradients of this op have no gradient"
    present = [g.detach().requires_grad_() for g in grads if g is not None]
    tagged = torch._C._functions.DelayedError(text.encode(), len(present))(*present)
    rest = iter((tagged,) if isinstance(tagged, Tensor) else tagged)  # of one tensor it makes one tensor
    return tuple(None if g is None else next(rest) for g in grads)


class _Shrink(Function):
    @staticmethod
    def forward(ctx, x, a, scale, dropout_p, seed):
        with _BelowAutograd():
            s = library().lora_shrink.default(x, a, scale, dropout_p, seed)
        ctx.save_for_backward(x, a, seed)
        ctx.rest = scale, dropout_p
        return s

    @staticmethod
    def backward(ctx, ds):
        x, a, seed = ctx.saved_tensors
        with _BelowAutograd():
            grads = library().lora_shrink_bwd.default(ds, x, a, *ctx.rest, seed, *ctx.needs_input_grad[:2])
        return (*_once("lora_shrink", grads), None, None, None)


class _Expand(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, s, b, scale):
        with _BelowAutograd():
            y = library().linear_expand.default(x, weight, bias, s, b, scale)
        need = ctx.needs_input_grad
        ctx.save_for_backward(x if need[1] else None, weight if need[0] else None, s, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, s, b = ctx.saved_tensors
        with _BelowAutograd():
            grads = library().linear_expand_bwd.default(dy, x, weight, s, b, ctx.scale, *ctx.needs_input_grad[:5])
        return (*_once("linear_expand", grads), None)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, dropout_p, seed, c):
        with _BelowAutograd():
            y, s, base = library().lora_linear_fwd.default(x, weight, bias, a, b, scale, dropout_p, seed, c)
        ctx.save_for_backward(x, weight, a, b, s, seed, c, base if ctx.needs_input_grad[8] else None)
        ctx.rest = scale, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s, seed, c, base = ctx.saved_tensors
        x_, w, bias, a_, b_, _, _, _, c_ = ctx.needs_input_grad
        with _BelowAutograd():
            dx, dw, dbias, da, db, dc = _once("lora_linear", library().lora_linear_bwd.default(
                dy, x, weight, a, b, s, *ctx.rest, seed, c, base, x_, w, bias, a_, b_, c_
            ))  # fmt: skip
        return dx, dw, dbias, da, db, None, None, None, dc


class _Add(Function):
    @staticmethod
    def forward(ctx, y, x, a, b, scale, dropout_p, seed):
        with _BelowAutograd():
            out, s = library().lora_add_fwd.default(y, x, a, b, scale, dropout_p, seed)
        ctx.save_for_backward(x, a, b, s, seed)
        ctx.rest = scale, dropout_p
        return out

    @staticmethod
    def backward(ctx, dy):
        x, a, b, s, seed = ctx.saved_tensors
        with _BelowAutograd():
            grads = library().lora_add_bwd.default(dy, x, a, b, s, *ctx.rest, seed, *ctx.needs_input_grad[1:4])
        return (dy, *_once("lora_add", grads), None, None, None)


def _shrink(x, a, scale=1.0, dropout_p=0.0, seed=None):
    if _needs_grad(x, a):
        return _Shrink.apply(x, a, scale, dropout_p, seed)
    with _BelowAutograd():
        return library().lora_shrink.default(x, a, scale, dropout_p, seed)


def _expand(x, weight, bias, s, b, scale=1.0):
    if _needs_grad(x, weight, bias, s, b):
        return _Expand.apply(x, weight, bias, s, b, scale)
    with _BelowAutograd():
        return library().linear_expand.default(x, weight, bias, s, b, scale)


def _linear(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None, base_scale=None):
    if _needs_grad(x, weight, bias, a, b, base_scale):
        return _Linear.apply(x, weight, bias, a, b, scale, dropout_p, seed, base_scale)
    with _BelowAutograd():
        return library().lora_linear.default(x, weight, bias, a, b, scale, dropout_p, seed, base_scale)


def _add(y, x, a, b, scale=1.0, dropout_p=0.0, seed=None):
    if _needs_grad(y, x, a, b):
        return _Add.apply(y, x, a, b, scale, dropout_p, seed)
    with _BelowAutograd():
        return library().lora_add.default(y, x, a, b, scale, dropout_p, seed)


def _refuse(name: str, why: str, mutates: bool = False) -> None:
    """Gives an op without a gradient an Autograd kernel that raises where a gradient would be lost without a word. One
    that mutates its first argument also counts up that tensor's version, so that autograd sees a saved tensor change."""
    op = getattr(torch.ops.lrkern, name).default

    def kernel(*args, **kwargs):
        if _needs_grad(*(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))):
            raise RuntimeError(f"lrkern::{name}: {why}")
        with _BelowAutograd():
            out = op(*args, **kwargs)
        if mutates:
            torch.autograd.graph.increment_version(args[0])
        return out

    _lib.impl(name, kernel, "Autograd")


_DIFFERENTIABLE = {"lora_shrink": _shrink, "linear_expand": _expand, "lora_linear": _linear, "lora_add": _add}


def _autograd(kernel: Any) -> Any:
    def from_dispatcher(*args, **kwargs):
        for arg in args:
            if isinstance(arg, Tensor) and type(arg) not in _PLAIN:
                _meet(arg)
        return kernel(*args, **kwargs)

    return from_dispatcher


for _name, _kernel in _DIFFERENTIABLE.items():
    _lib.impl(_name, _autograd(_kernel), "Autograd")
    _refuse(f"{_name}_bwd", "is itself a gradient and has none: double backward is not supported")
for _name in ("lora_linear", "lora_add"):
    _refuse(f"{_name}_fwd", f"has no gradient, but an argument requires one; use {_name}")
_refuse("lora_expand_", "writes in place and has no gradient, but an argument requires one; use lora_add", True)

# ---------------------------------------------------------------------------------------------------- autocast


def _autocast(name: str) -> None:
    """As F.linear under autocast: floating-point arguments are cast to the autocast dtype. base_scale stays as it is, and
    so does lora_add's y, which the base layer gave; where that is of another dtype, a and b are float32."""
    op = getattr(torch.ops.lrkern, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, _device=device, _key=getattr(torch._C.DispatchKey, key), **kwargs):
            low = torch.get_autocast_dtype(_device)

            def cast(t, dtype=low):
                ok = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
                return t.to(dtype) if ok else t

            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                if name == "lora_add":
                    y, x, a, b, *rest = args
                    factors = low if y.dtype == low else torch.float32
                    return op(y, cast(x), cast(a, factors), cast(b, factors), *rest, **kwargs)
                args, base_scale = args[:8], args[8:]
                return op(*map(cast, args), *(cast(c, torch.float32) for c in base_scale), **kwargs)

        _lib.impl(name, kernel, key)


for _name in _DIFFERENTIABLE:
    _autocast(_name)

# ---------------------------------------------------------------------------------------------------- fakes
# Shapes and dtypes only; the glue checks the rest when the op runs.


def _fake(name: str):
    def register(fake):
        def checked(*args):
            devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
            if len(devices) > 1:
                raise RuntimeError(f"lrkern::{name}: all tensors must be on one device, got {' and '.join(devices)}")
            return fake(*args)

        torch.library.register_fake(f"lrkern::{name}", checked, lib=_lib)

    return register


def _grad(needed: bool, like: Tensor | None) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else None


@_fake("lora_shrink")
def _(x, a, scale=1.0, dropout_p=0.0, seed=None):
    return a.new_empty((*x.shape[:-1], a.shape[0]))


@_fake("lora_shrink_bwd")
def _(ds, x, a, scale, dropout_p, seed, need_dx, need_da):
    return _grad(need_dx, x), _grad(need_da, a)


@_fake("linear_expand")
def _(x, weight, bias, s, b, scale=1.0):
    like = x if x is not None else bias if bias is not None else s
    return like.new_empty((*s.shape[:-1], b.shape[0]))


@_fake("linear_expand_bwd")
def _(dy, x, weight, s, b, scale, need_dx, need_dw, need_dbias, need_ds, need_db):
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1])) if need_dx else None
    dw = dy.new_empty((dy.shape[-1], x.shape[-1])) if need_dw else None
    dbias = dy.new_empty(dy.shape[-1]) if need_dbias else None
    return dx, dw, dbias, _grad(need_ds, s), _grad(need_db, b)


@_fake("lora_expand_")
def _(y, s, b, scale=1.0):
    return None


@_fake("lora_linear")
def _(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None, base_scale=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("lora_linear_fwd")
def _(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None, base_scale=None):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, a.new_empty((*x.shape[:-1], a.shape[0])), _grad(base_scale is not None, y)


@_fake("lora_linear_bwd")
def _(dy, x, weight, a, b, s, scale, dropout_p, seed, c, base, need_dx, need_dw, need_dbias, need_da, need_db, need_dc):
    dbias = dy.new_empty(weight.shape[0]) if need_dbias else None
    needed = ((need_dx, x), (need_dw, weight), (need_da, a), (need_db, b), (need_dc, c))
    dx, dw, da, db, dc = (_grad(*pair) for pair in needed)
    return dx, dw, dbias, da, db, dc


@_fake("lora_add")
def _(y, x, a, b, scale=1.0, dropout_p=0.0, seed=None):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_fake("lora_add_fwd")
def _(y, x, a, b, scale=1.0, dropout_p=0.0, seed=None):
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, a.new_empty((*x.shape[:-1], a.shape[0]))


@_fake("lora_add_bwd")
def _(dy, x, a, b, s, scale, dropout_p, seed, need_dx, need_da, need_db):
    return _grad(need_dx, x), _grad(need_da, a), _grad(need_db, b)


from .basis import (  # noqa: E402, F401  at the end: they need what stands above
    basis_combine,
    basis_dot,
    basis_fill,
    basis_matmul,
    basis_matmul_,
)
from .multi_lora import (  # noqa: E402, F401
    multi_lora_embedding,
    multi_lora_expand,
    multi_lora_expand_,
    multi_lora_linear,
    multi_lora_plan,
    multi_lora_shrink,
)
