# SPDX-License-Identifier: Apache-2.0
"""LRKERN_DISABLE=op,op or all: those ops run as composites of ATen's calls, a way out for who meets a bad kernel.

A disabled X takes its gradients with it, X_bwd or those other ops that they are made of. The CPU and CUDA kernels are replaced below
autograd, so it holds however X is called: by its wrapper, by torch.ops, compiled, by a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .dispatch import OPS, Op, _registrations, schema_of, size_of, words_of

_disabled: list[str] = []


def disabled() -> tuple[str, ...]:
    """The ops that run as composites since LRKERN_DISABLE named them, or one whose gradient they are, when lrkern was imported."""
    return tuple(_disabled)


def disable(names: str) -> None:
    """What the variable says, once all ops are known."""
    wanted = [n for n in names.replace(" ", "").split(",") if n]
    wanted = list(OPS) if wanted == ["all"] else wanted
    if unknown := [n for n in wanted if n not in OPS]:
        known = ", ".join(OPS)
        raise ValueError(f"LRKERN_DISABLE must be all or names of ops, got {', '.join(unknown)}; ops are {known}")
    while wanted:
        op = OPS[wanted.pop(0)]
        if op.name in _disabled:
            continue
        _disabled.append(op.name)
        wanted += op.gradient
        replace(op.name, lambda *args, op=op: fresh(op.composed(*args), args))
        if op.fwd:
            replace(op.fwd, lambda *args, op=op: fresh(op.composed_fwd(*args), args))
        if op.bwd:
            replace(op.bwd, lambda *args, op=op: fresh(gradients(op, *args), args))


def replace(name: str, kernel: Any) -> None:
    for key in ("CPU", "CUDA"):
        _registrations.impl(name, kernel, key)


def fresh(out: Any, args: tuple) -> Any:
    """As a kernel gives results: contiguous, in memory of their own."""
    if isinstance(out, tuple):
        return tuple(fresh(t, args) for t in out)
    if out is None:
        return None
    out, given = out.contiguous(), {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    return out.clone() if out.untyped_storage().data_ptr() in given else out


@contextmanager
def above_autograd() -> Iterator[None]:
    """A kernel stands below autograd, which the vector-Jacobian product of a composite is made by; autocast stays away."""
    key = torch._C.DispatchKey
    autocast = torch._C.DispatchKeySet(key.AutocastCPU) | torch._C.DispatchKeySet(key.AutocastCUDA)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, autocast), torch.inference_mode(False), torch.enable_grad():
        yield


def gradients(op: Op, *args: Any) -> Any:
    """X_bwd. What it does not take is zeros: no gradient that is asked for then depends on it."""
    taken = [a.name for a in schema_of(op.bwd).arguments]
    given, dy = dict(zip(taken, args, strict=False)), args[0]
    flags = [given[n] for n in taken if n.startswith("need_")]
    names = [op.names[i] for i in op.gradients]
    need = [n for n, wanted in zip(names, flags or [True], strict=True) if wanted]
    named = {n: given.get(n) for n in op.names}
    base = "x" not in taken or given["x"] is not None or given.get("weight") is not None  # is a base layer there?
    for n, zeros in {"y": True, "weight": base, "x": base, "bias": "bias" in need or not base}.items():
        if n in named and named[n] is None and zeros:
            named[n] = dy.new_zeros(size_of(n, dy, given))
    h = given.get("h") if given.get("x") is None else None
    with words_of(op.bwd), above_autograd():
        named = {n: t.detach() if isinstance(t, Tensor) else t for n, t in named.items()}
        leaves = [named[n].requires_grad_() for n in need]
        y = op.composite.again(**named, h=h) if op.composite.again else op.composed(*named.values())
        if (y.shape, y.dtype) != (dy.shape, dy.dtype):
            must = f"{y.dtype} of shape {list(y.shape)}"
            raise ValueError(f"{taken[0]} must be {must}, got {dy.dtype} of {list(dy.shape)}")
        made = map(torch.zeros_like, leaves)  # where no row has an adapter
        if leaves and y.requires_grad:
            made = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    of = dict(zip(need, made, strict=True))
    return tuple(of.get(n) for n in names) if flags else of[names[0]]
