# SPDX-License-Identifier: Apache-2.0
"""How a call of an op reaches the library, and what autograd, autocast, FakeTensor and DTensor know of the op.

An op X of the library may have X_bwd, its gradients, and X_fwd, which returns with the result what X_bwd wants of the forward
pass. X_bwd takes the gradient of the result, then arguments of X and results of X_fwd, each by its name, then a flag need_d...
for each gradient: so the schemas say what is saved. ``Op`` adds what they do not say.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import first_use

LIBRARY = Path(__file__).parents[1] / "_C.so"
if not LIBRARY.exists():
    raise ImportError(f"lrkern: {LIBRARY} is not built; run `pip install .` (or `make build`) in the checkout")
if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"lrkern needs torch >= 2.11, got {torch.__version__}")
torch.ops.load_library(str(LIBRARY))

_registrations = torch.library.Library("lrkern", "FRAGMENT")
_library: Any = torch.ops.lrkern
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, list))  # what is no tensor subclass
below_autograd = torch._C._AutoDispatchBelowAutograd
is_compiling, any_autocast, grad_enabled = (
    torch.compiler.is_compiling,
    torch._C._is_any_autocast_enabled,
    torch.is_grad_enabled,
)
under_transforms = torch._C._are_functorch_transforms_active


def library() -> Any:
    """The library that the wrappers call: torch.ops.lrkern, or another of the same ops (``use_library``)."""
    return _library


@contextmanager
def use_library(stand_in: Any) -> Iterator[None]:
    """The one seam below the wrappers: inside, they and their backward call the ops of ``stand_in`` (the emulated kernels, a
    recorder, ops without their GEMM)."""
    global _library
    before, _library = _library, stand_in
    try:
        yield
    finally:
        _library = before


def build_info() -> str:
    """What _C.so was built for, as JSON."""
    return _library.build_info()


# ---------------------------------------------------------------------------------------------------- ops

OPS: dict[str, "Op"] = {}
Casts = Callable[..., Sequence[torch.dtype | None]]


class Op:
    """An op, called with all of its arguments in order.

    composite: the same in ATen's calls (composites/), which torch.func's transforms take, and LRKERN_DISABLE.
    results: of X's arguments by name, what X_fwd returns, or X where there is none: shapes and dtypes only.
    trains: the arguments that X_bwd gives gradients of, in its order. passes: one whose gradient is that of the result.
    saved_for: what is saved only where another argument takes a gradient, and which. saved_if: where it is saved all the same,
    as a function of X's arguments by name; saved_only: where it is saved at all, likewise. function: in place of X_bwd; gradient: the
    other ops that it calls.
    weigh: an argument, and the gradient that X_bwd takes as a function of the result's and that argument.
    refuses: arguments without a gradient beside others with one; refusal: how that is said. instead: of an op in place, the
    one to use for gradients. casts: what autocast casts to its dtype, or a function of that dtype and the arguments to the
    dtype of each. shards: DTensor's rules of X, X_fwd and X_bwd by suffix, see sharding.py. leading: how many dimensions of its
    first tensor are rows, as a function of X's arguments by name, where it is not all but the last.
    """

    def __init__(
        self,
        name: str,
        composite: Callable[..., Any],
        *,
        results: Callable[..., Any] = lambda **_: None,
        trains: str = "",
        passes: str = "",
        saved_for: dict[str, str] | None = None,
        saved_if: dict[str, Callable[..., bool]] | None = None,
        saved_only: dict[str, Callable[..., bool]] | None = None,
        weigh: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        function: type[Function] | None = None,
        gradient: str = "",
        refuses: str = "",
        refusal: str = "got one that requires it",
        instead: str = "",
        casts: str | Casts = "",
        shards: dict[str, dict[str, str]] | None = None,
        leading: Callable[..., int] | None = None,
    ):
        OPS[name] = self
        arguments = schema_of(name).arguments
        self.name, self.names, self.composite = name, [a.name for a in arguments], composite
        self.defaults = tuple(a.default_value for a in arguments)
        self.saved_for, self.saved_if, self.saved_only = saved_for or {}, saved_if or {}, saved_only or {}
        self.gradient = gradient.split()
        self.weigh, self.shards = weigh, shards or {}
        self.gradients, self.passed = (tuple(map(self.names.index, text.split())) for text in (trains, passes))
        self.trained = self.passed + self.gradients
        self.refused = [(n, self.names.index(n)) for n in refuses.split()]
        self.refusal, self.leading = refusal, leading
        self.fwd, self.bwd = (name + s if hasattr(torch.ops.lrkern, name + s) else "" for s in ("_fwd", "_bwd"))
        self.function = function or (self.make_function() if trains else None)
        if trains or refuses:
            _registrations.impl(name, self.from_dispatcher, "Autograd")
        elif instead:
            refuse(name, f"writes in place and has no gradient, but an argument requires one; use {instead}")
        else:
            refuse(name, "has no gradient, but an argument requires one")
        _registrations.impl(name, self.composed, "FuncTorchBatched")  # vmap
        fake(name, (lambda **given: results(**given)[0]) if self.fwd else results)
        if self.fwd:
            refuse(self.fwd, f"has no gradient, but an argument requires one; use {name}")
            fake(self.fwd, results)
        if self.bwd:
            refuse(self.bwd, "is itself a gradient and has none: double backward is not supported")
            fake(self.bwd, self.fake_gradients)
        for each in filter(None, (name, self.fwd, self.bwd)):
            autocast(each, casts if each == name else "")

    def __call__(self, *args: Any) -> Any:
        """Plain eager tensors take a classic autograd.Function, a third of the host time of the dispatcher's way through
        autograd. Everything else (compile, autocast, tensor subclasses, FakeTensor) goes through the op itself."""
        if not self.trained or is_compiling() or any_autocast():
            return getattr(_library, self.name).default(*args)
        if not PLAIN.issuperset(map(type, args)):
            for arg in args:
                if type(arg) not in PLAIN and isinstance(arg, Tensor):
                    learn_sharding(arg)
                    return getattr(_library, self.name).default(*args)
        if grad_enabled() or forward_ad._current_level >= 0:
            return self.eager(*args)
        with below_autograd():
            return getattr(_library, self.name).default(*args)

    def from_dispatcher(self, *args: Any) -> Any:
        """The Autograd kernel. The dispatcher leaves defaults at the end out."""
        for arg in args:
            if type(arg) not in PLAIN and isinstance(arg, Tensor):
                learn_sharding(arg)
        return self.eager(*args, *self.defaults[len(args) :])

    def eager(self, *args: Any) -> Any:
        refuse_tangents(self.name, args)
        if torch.is_grad_enabled():
            for name, i in self.refused:
                if args[i] is not None and args[i].requires_grad:
                    raise RuntimeError(f"lrkern::{self.name}: {name} has no gradient, {self.refusal}")
            if under_transforms():
                return self.composed(*args)
            for i in self.trained:
                if args[i] is not None and args[i].requires_grad:
                    return self.function.apply(*args)
        with below_autograd():
            return getattr(_library, self.name).default(*args)

    def composed(self, *args: Any) -> Any:
        """The op in ATen's calls, which have derivatives and batching of any order."""
        out = self.composed_fwd(*args)
        return out[0] if self.fwd else out

    def composed_fwd(self, *args: Any) -> Any:
        with words_of(self.name):
            return self.composite(*args, *self.defaults[len(args) :])

    def make_function(self) -> type[Function]:
        """Its tuples of arguments are picked by indices that are found here, once."""
        name, forward, backward, weigh = self.name, self.fwd or self.name, self.bwd, self.weigh
        known = self.names + [r.name for r in schema_of(forward).returns] if self.fwd else self.names
        taken = schema_of(backward).arguments[1:]
        flags = [a.name for a in taken if a.name.startswith("need_")]
        names = [a.name for a in taken if a.name not in flags]
        tensors = [a.name for a in taken if is_tensor(a)]
        others = [n for n in names if n not in tensors]
        tensors_of = pick(known, [*tensors, weigh[0]] if weigh else tensors)
        others_of, in_order = pick(known, others), pick(tensors + others, names)
        needed = itemgetter(*self.gradients) if flags else lambda _: ()
        place = dict.fromkeys(self.passed, 0) | {i: n for n, i in enumerate(self.gradients, 1)}  # in (dy, *grads, None)
        by_argument = itemgetter(*(place.get(i, -1) for i in range(len(self.names))))
        only_where = [
            (tensors.index(n), self.names.index(of), self.saved_if.get(n), self.saved_only.get(n))
            for n, of in self.saved_for.items()
        ]
        named = lambda args: dict(zip(self.names, args, strict=True))

        class Differentiable(Function):
            @staticmethod
            def forward(ctx, *args):
                with below_autograd():
                    out = getattr(_library, forward).default(*args)
                results = out if forward != name else (out,)
                saved = tensors_of((*args, *results))
                if only_where:
                    saved = list(saved)
                    for at, of, needed, only in only_where:
                        wanted = ctx.needs_input_grad[of] or (needed and needed(**named(args)))
                        if not wanted or (only and not only(**named(args))):
                            saved[at] = None
                ctx.save_for_backward(*saved)
                ctx.others = others_of(args)
                return results[0]

            @staticmethod
            def backward(ctx, dy):
                saved, d = ctx.saved_tensors, dy  # unpacked once, as checkpointing asks
                made_of = (dy, *saved)
                with below_autograd():
                    if weigh:
                        *saved, by = saved
                        d = dy if by is None else weigh[1](dy, by)
                    given = in_order((*saved, *ctx.others))
                    grads = getattr(_library, backward).default(d, *given, *needed(ctx.needs_input_grad))
                return by_argument((dy, *once(name, grads if flags else (grads,), made_of), None))

        Differentiable.__name__ = Differentiable.__qualname__ = name
        return Differentiable

    def fake_gradients(self, **given: Any) -> Any:
        """Of X_bwd: a gradient is like its argument. That of a base layer's may not be among what X_bwd takes; x without a
        weight or a number of columns is like the result. Codes of experts have a bias for each."""
        dy, needed = next(iter(given.values())), [v for n, v in given.items() if n.startswith("need_")]
        like = lambda n: dy.new_empty(size_of(n, dy, given)) if given.get(n) is None else like_contiguous(given[n])
        wanted = zip(self.gradients, needed or [True], strict=True)
        grads = tuple(like(self.names[i]) if need else None for i, need in wanted)
        return grads if needed else grads[0]


first_use.watch(Op, "__call__", "eager")  # eager: what the dispatcher calls comes through it


def size_of(name: str, dy: Tensor, given: dict[str, Any]) -> tuple[int, ...]:
    """Of an argument that X_bwd does not take, or not this time."""
    if name == "weight":
        return dy.shape[-1], given["x"].shape[-1]
    if name == "bias":
        return *(given["codes"].shape[:-2] if "codes" in given else ()), dy.shape[-1]
    columns = given["weight"].shape[1] if given.get("weight") is not None else given.get("columns", dy.shape[-1])
    return *dy.shape[:-1], columns


def schema_of(name: str) -> Any:
    return getattr(torch.ops.lrkern, name).default._schema


def is_tensor(argument: Any) -> bool:
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def pick(names: Sequence[str], wanted: Sequence[str]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function of values in the order of names that gives the wanted ones, in their order."""
    at = [names.index(name) for name in wanted]
    return itemgetter(*at) if len(at) > 1 else lambda values: [values[i] for i in at]


def s_dtype(factor: torch.dtype) -> torch.dtype:
    """Of S and its gradient beside factors of a dtype: theirs, but float32 beside float16, whose range scale · S leaves."""
    return torch.float32 if factor == torch.float16 else factor


def spoken(name: str) -> str:
    """X, or of X_bwd that it is X's backward: how errors call what the user called X."""
    return f"{name.removesuffix('_bwd')} (backward)" if name.endswith("_bwd") else name.removesuffix("_fwd")


@contextmanager
def words_of(name: str) -> Iterator[None]:
    """Errors of a composite, and of ATen inside it, name the op."""
    try:
        yield
    except (ValueError, IndexError, RuntimeError) as error:
        said = f"lrkern::{spoken(name)}: "
        raise RuntimeError(said + str(error).removeprefix(said)) from error


def like_contiguous(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def learn_sharding(t: Tensor) -> None:
    """DTensor learns our ops when the first one comes: importing it costs a second."""
    if type(t).__name__ == "DTensor":
        importlib.import_module("lrkern.ops.sharding")


class _Once(Function):
    """The first n tensors as they are, made of all of them; their gradient is an error."""

    @staticmethod
    def forward(ctx, name, n, *tensors):
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"lrkern::{ctx.name}: double backward is not supported, the gradients of this op have no gradient"
        )


def once(
    name: str, grads: tuple[Tensor | None, ...], made_of: Sequence[Tensor | None] = ()
) -> tuple[Tensor | None, ...]:
    """The gradients, which raise an error that names the op when they are differentiated again, with respect to what they were made
    of or anything else."""
    if not torch.is_grad_enabled():
        return grads
    present = [g.detach() for g in grads if g is not None]
    others = [t for t in made_of if t is not None]
    rest = iter(
        _Once.apply(name, len(present), *present, *others, torch.empty(0, requires_grad=True)) if present else ()
    )
    return tuple(None if g is None else next(rest) for g in grads)


# ---------------------------------------------------------------------------------------------------- kernels by dispatch key


def refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Forward-mode differentiation, which would lose them without a word below autograd."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(f"lrkern::{name}: forward-mode differentiation is not supported, got a dual tensor")


def refuse(name: str, why: str) -> None:
    """Gives an op without a gradient an Autograd kernel that raises where a gradient would be lost without a word. One
    that mutates its first argument also counts up that tensor's version, so that autograd sees a saved tensor change."""
    op, mutates = getattr(torch.ops.lrkern, name).default, schema_of(name).arguments[0].alias_info is not None

    def kernel(*args):
        refuse_tangents(name, args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            raise RuntimeError(f"lrkern::{name}: {why}")
        if mutates and torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"lrkern::{name}: writes in place, which torch.onnx's tracing exporter leaves out of the model without a word; merge "
                "the adapter first"
            )
        with below_autograd():
            out = op(*args)
        if mutates:
            torch.autograd.graph.increment_version(args[0])
        return out

    _registrations.impl(name, kernel, "Autograd")


def autocast_cast(t: Any, dtype: torch.dtype | None) -> Any:
    """As F.linear under autocast: floating-point tensors are cast, but not float64."""
    if dtype is None or not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(dtype)


def autocast(name: str, casts: str | Casts) -> None:
    """Every op has such a kernel, also where nothing is cast: ATen's GEMM inside the op, which is told what dtypes it gets
    and gives, must not cast either, as where ``backward`` is called inside autocast."""
    op, names = getattr(torch.ops.lrkern, name).default, [a.name for a in schema_of(name).arguments]
    if isinstance(casts, str):
        cast = [n in casts.split() for n in names]
        casts = lambda low, *_: [low if c else None for c in cast]
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, device=device, keys=torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            dtypes = casts(torch.get_autocast_dtype(device), *args)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*map(autocast_cast, args, dtypes))

        _registrations.impl(name, kernel, key)


FAKES: dict[str, Callable[..., Any]] = {}  # by the name of X, X_fwd or X_bwd


def fake(name: str, results: Callable[..., Any]) -> None:
    """Shapes and dtypes only; the glue checks the rest when the op runs."""
    arguments = schema_of(name).arguments

    def kernel(*args):
        devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
        if len(devices) > 1:
            where = " and ".join(devices)
            raise RuntimeError(f"lrkern::{spoken(name)}: all tensors must be on one device, got {where}")
        first_use.look(args)
        defaults = (a.default_value for a in arguments[len(args) :])
        return results(**dict(zip((a.name for a in arguments), (*args, *defaults), strict=True)))

    kernel.__name__ = kernel.__qualname__ = f"fake_{name}"
    FAKES[name] = kernel
    torch.library.register_fake(f"lrkern::{name}", kernel, lib=_registrations)
