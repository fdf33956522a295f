# SPDX-License-Identifier: Apache-2.0
"""The ops: typed wrappers over ``torch.ops.lrkern``, their fakes, autograd and autocast. Nothing else calls _C.so.

Letters: T tokens (any leading dimensions), I in, O out, R rank (0 to 512). Activations and base weights are float32,
float16 or bfloat16; a, b and s are of that dtype or float32. D is dropout by Philox: element (row, column) of x
flattened to [T, I] is kept iff its 16 random bits under ``seed`` are >= round(65536 dropout_p), and kept elements are
divided by the keep probability. The mask is recomputed wherever it is needed and never stored.
Bad arguments raise RuntimeError as ``lrkern::op: argument must ..., got ...``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

LIBRARY = Path(__file__).with_name("_C.so")
if not LIBRARY.exists():
    raise ImportError(f"lrkern: {LIBRARY} is not built; run `pip install .` (or `make build`) in the checkout")
if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"lrkern needs torch >= 2.11, got {torch.__version__}")
torch.ops.load_library(str(LIBRARY))

_ops = torch.ops.lrkern
_lib = torch.library.Library("lrkern", "FRAGMENT")
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

OPS_INFO = {
    "lora_shrink": "S = scale D(x) A^T",
    "linear_expand": "y = x W^T + bias + scale S B^T",
    "lora_linear": "y = x W^T + bias + scale (D(x) A^T) B^T",
    "lora_expand_": "y += scale S B^T, in place",
}

# ---------------------------------------------------------------------------------------------------- wrappers


def lora_shrink(x: Tensor, a: Tensor, scale: float = 1.0, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """S = scale · D(x) Aᵀ, the low-rank activations [..., R] in the dtype of ``a``.

    x [..., I]; a [R, I]; seed int64 [1] on x's device where dropout_p > 0. Differentiable in x and a.
    fp32 accumulation, one rounding. A row's bits do not depend on the other rows.
    """
    return _route(_ops.lora_shrink.default, _shrink, x, a, scale, dropout_p, seed)


def linear_expand(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, s: Tensor, b: Tensor, scale: float = 1.0
) -> Tensor:
    """y = x Wᵀ + bias + scale · S Bᵀ [..., O]. Without x and weight: y = bias + scale · S Bᵀ.

    x [..., I]; weight [O, I]; bias [O]; s [..., R]; b [O, R]. Differentiable in all tensors. The base product is
    ATen's linear; S Bᵀ is added into its result, so y is rounded twice.
    """
    return _route(_ops.linear_expand.default, _expand, x, weight, bias, s, b, scale)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (D(x) Aᵀ) Bᵀ, a linear layer with a LoRA adapter (Hu et al., arXiv 2106.09685).

    x [..., I]; weight [O, I]; bias [O] or None; a [R, I]; b [O, R]; seed int64 [1] where dropout_p > 0.
    Differentiable in all float tensors; saves x, S [T, R] and the seed. Double backward is refused.
    """
    return _route(_ops.lora_linear.default, _linear, x, weight, bias, a, b, scale, dropout_p, seed)


def lora_expand_(y: Tensor, s: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """y += scale · S Bᵀ in place, beside anyone's base GEMM. y [..., O]; s [..., R]; b [O, R].

    Not differentiable: raises when gradients are recorded and an argument requires one; use ``linear_expand`` then.
    """
    _ops.lora_expand_.default(y, s, b, scale)


def build_info() -> str:
    """What _C.so was built for, as JSON."""
    return _ops.build_info()


_PLAIN = (Tensor, torch.nn.Parameter)


def _route(op: Any, eager: Any, *args: Any) -> Any:
    """Plain eager tensors take a classic autograd.Function, a third of the host time of the dispatcher's way through
    autograd. Everything else (compile, autocast, tensor subclasses, FakeTensor) goes through the op itself."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return op(*args)
    for arg in args:
        if isinstance(arg, Tensor) and type(arg) not in _PLAIN:
            return op(*args)
    return eager(*args)


# ---------------------------------------------------------------------------------------------------- autograd


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _once(name: str, needed: tuple[bool, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients as autograd wants them: None where not needed, and an error that names the op on a second backward."""
    if torch.is_grad_enabled():  # backward(create_graph=True)
        text = f"lrkern::{name}: double backward is not supported, the gradients of this op have no gradient"
        tagged = [g.detach().requires_grad_() for g in grads]
        grads = torch._C._functions.DelayedError(text.encode(), len(tagged))(*tagged)
    return tuple(g if n else None for n, g in zip(needed, grads, strict=True))


class _Shrink(Function):
    @staticmethod
    def forward(ctx, x, a, scale, dropout_p, seed):
        with _BelowAutograd():
            s = _ops.lora_shrink.default(x, a, scale, dropout_p, seed)
        ctx.save_for_backward(x, a, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return s

    @staticmethod
    def backward(ctx, ds):
        x, a, seed = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        with _BelowAutograd():
            grads = _ops.lora_shrink_bwd.default(ds, x, a, ctx.scale, ctx.dropout_p, seed, *need)
        return (*_once("lora_shrink", need, grads), None, None, None)


class _Expand(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, s, b, scale):
        with _BelowAutograd():
            y = _ops.linear_expand.default(x, weight, bias, s, b, scale)
        need = ctx.needs_input_grad
        ctx.save_for_backward(x if need[1] else None, weight if need[0] else None, s, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, s, b = ctx.saved_tensors
        need = ctx.needs_input_grad[:5]
        with _BelowAutograd():
            grads = _ops.linear_expand_bwd.default(dy, x, weight, s, b, ctx.scale, *need)
        return (*_once("linear_expand", need, grads), None)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, dropout_p, seed):
        with _BelowAutograd():
            y, s = _ops.lora_linear_fwd.default(x, weight, bias, a, b, scale, dropout_p, seed)
        ctx.save_for_backward(x, weight, a, b, s, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s, seed = ctx.saved_tensors
        need = ctx.needs_input_grad[:5]
        with _BelowAutograd():
            grads = _ops.lora_linear_bwd.default(dy, x, weight, a, b, s, ctx.scale, ctx.dropout_p, seed, *need)
        return (*_once("lora_linear", need, grads), None, None, None)


def _shrink(x, a, scale=1.0, dropout_p=0.0, seed=None):
    if _needs_grad(x, a):
        return _Shrink.apply(x, a, scale, dropout_p, seed)
    with _BelowAutograd():
        return _ops.lora_shrink.default(x, a, scale, dropout_p, seed)


def _expand(x, weight, bias, s, b, scale=1.0):
    if _needs_grad(x, weight, bias, s, b):
        return _Expand.apply(x, weight, bias, s, b, scale)
    with _BelowAutograd():
        return _ops.linear_expand.default(x, weight, bias, s, b, scale)


def _linear(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None):
    if _needs_grad(x, weight, bias, a, b):
        return _Linear.apply(x, weight, bias, a, b, scale, dropout_p, seed)
    with _BelowAutograd():
        return _ops.lora_linear.default(x, weight, bias, a, b, scale, dropout_p, seed)


def _refuse(name: str, why: str, mutates: bool = False) -> None:
    """Gives an op without a gradient an Autograd kernel that raises where a gradient would be lost without a word. One
    that mutates its first argument also counts up that tensor's version, so that autograd sees a saved tensor change."""
    op = getattr(_ops, name).default

    def kernel(*args, **kwargs):
        if _needs_grad(*(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))):
            raise RuntimeError(f"lrkern::{name}: {why}")
        with _BelowAutograd():
            out = op(*args, **kwargs)
        if mutates:
            torch.autograd.graph.increment_version(args[0])
        return out

    _lib.impl(name, kernel, "Autograd")


for _name, _kernel in {"lora_shrink": _shrink, "linear_expand": _expand, "lora_linear": _linear}.items():
    _lib.impl(_name, _kernel, "Autograd")
_refuse("lora_expand_", "writes in place and has no gradient, but an argument requires one; use linear_expand", True)
_refuse("lora_linear_fwd", "has no gradient, but an argument requires one; use lora_linear")
for _name in ("lora_shrink", "linear_expand", "lora_linear"):
    _refuse(f"{_name}_bwd", "is itself a gradient and has none: double backward is not supported")

# ---------------------------------------------------------------------------------------------------- autocast


def _autocast(name: str) -> None:
    """As F.linear under autocast: floating-point arguments are cast to the autocast dtype."""
    op = getattr(_ops, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, _device=device, _key=getattr(torch._C.DispatchKey, key), **kwargs):
            dtype = torch.get_autocast_dtype(_device)

            def cast(t):
                ok = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
                return t.to(dtype) if ok else t

            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

        _lib.impl(name, kernel, key)


for _name in ("lora_shrink", "linear_expand", "lora_linear"):
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


def _grad(needed: bool, like: Tensor | None) -> Tensor:
    """A gradient nobody asked for is an empty tensor."""
    return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else like.new_empty(0)


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
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1])) if need_dx else dy.new_empty(0)
    dw = dy.new_empty((dy.shape[-1], x.shape[-1])) if need_dw else dy.new_empty(0)
    dbias = dy.new_empty(dy.shape[-1] if need_dbias else 0)
    return dx, dw, dbias, _grad(need_ds, s), _grad(need_db, b)


@_fake("lora_expand_")
def _(y, s, b, scale=1.0):
    return None


@_fake("lora_linear")
def _(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("lora_linear_fwd")
def _(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), a.new_empty((*x.shape[:-1], a.shape[0]))


@_fake("lora_linear_bwd")
def _(dy, x, weight, a, b, s, scale, dropout_p, seed, need_dx, need_dw, need_dbias, need_da, need_db):
    dbias = dy.new_empty(weight.shape[0] if need_dbias else 0)
    return _grad(need_dx, x), _grad(need_dw, weight), dbias, _grad(need_da, a), _grad(need_db, b)
