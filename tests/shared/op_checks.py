# SPDX-License-Identifier: Apache-2.0
"""A sample of the registry beside its reference: forward and gradients."""

import torch
from torch import Tensor

import lrkern.ops
from lrkern import testing


def is_float(a):
    return isinstance(a, Tensor) and a.is_floating_point()


def want_gradients(op, kwargs):
    """Of every argument that has any, so that a call goes through autograd."""
    for name in op.differentiable:
        if is_float(kwargs.get(name)):
            kwargs[name].requires_grad_()


def has_fp32_factor(args, dtype):
    return dtype != torch.float32 and any(is_float(a) and a.dtype == torch.float32 for a in args)


def run_op(op, fn, args, kwargs):
    """The result, or for a mutating op what it wrote."""
    if op.mutates is None:
        return fn(*args, **kwargs)
    target = args[0].clone() if args[0].is_contiguous() else copy_rows(args[0])
    assert fn(target, *args[1:], **kwargs) is None
    return target


def copy_rows(t):
    """A copy with the strides of t; what lies between the rows stays NaN."""
    storage = torch.full(
        (t.untyped_storage().nbytes() // t.element_size(),), float("nan"), dtype=t.dtype, device=t.device
    )
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
    return view.copy_(t)


def check_forward(op, s, dtype, ulps=1.0):
    """Against the reference. dtype: of the sample's activations."""
    got = run_op(op, getattr(lrkern.ops, op.name), s.args, s.kwargs)
    truth = run_op(op, op.truth, [testing.to64(a) for a in s.args], s.kwargs)
    yardstick = run_op(op, op.truth, s.args, s.kwargs)
    widened = isinstance(got, Tensor) and got.dtype == torch.float32 != dtype  # S of float16 factors
    fp32 = has_fp32_factor(s.args, dtype) or widened
    testing.check(got, truth, yardstick, f"{op.name}[{s.name}]", fp32, ulps)


def gradients(op, fn, sample, cotangent=None):
    """Gradients of every differentiable argument present, by name."""
    names, args = op.parameters, op.leaves(sample)
    y = fn(*args, **sample.kwargs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if cotangent is None else cotangent
    wanted = {n: a for n, a in zip(names, args, strict=False) if n in op.differentiable and a is not None}
    truth = fn is op.truth  # may leave out what has no part in the sample; the op may not
    if truth and not y.requires_grad:
        return {n: torch.zeros_like(a) for n, a in wanted.items()}
    grads = torch.autograd.grad(y, list(wanted.values()), g.to(y.device, y.dtype), materialize_grads=truth)
    return dict(zip(wanted, grads, strict=True))


def as64(sample):
    return type(sample)(sample.name, tuple(testing.to64(a) for a in sample.args), sample.kwargs)


def check_gradient(op, s, dtype, ulps=1.0):
    got = gradients(op, getattr(lrkern.ops, op.name), s)
    truth = gradients(op, op.truth, as64(s))
    yardstick = gradients(op, op.truth, s)
    for name in truth:
        what = f"d {op.name}[{s.name}] / d {name}"
        testing.check(got[name], truth[name], yardstick[name], what, has_fp32_factor(s.args, dtype), ulps)
