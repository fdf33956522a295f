# SPDX-License-Identifier: Apache-2.0
"""Every op of the registry on every device kind: forward, gradient, determinism, direct calls, opcheck."""

import pytest
import torch
from op_checks import check_forward, check_gradient, gradients, is_float, run_op
from torch import Tensor

import lrkern.ops
from lrkern import testing
from lrkern.limits import DTYPES
from lrkern.ops.dispatch import library
from lrkern.reference import OPS
from tests.conftest import FULL, enter_device

OP_SAMPLES = [(op, s.name) for op in OPS.values() for s in op.samples("cpu", torch.float32)]
IDS = [f"{op.name}-{name}" for op, name in OP_SAMPLES]
every_sample = pytest.mark.parametrize(("op", "sample_name"), OP_SAMPLES, ids=IDS)
# An op without a gradient must raise where one is asked for: test_direct_call_has_the_gradient.
DIFFERENTIABLE = [(op, name) for op, name in OP_SAMPLES if op.differentiable]
differentiable_sample = pytest.mark.parametrize(
    ("op", "sample_name"), DIFFERENTIABLE, ids=[f"{op.name}-{name}" for op, name in DIFFERENTIABLE]
)


def results_of(out):
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]


def get_sample(op, name, device, dtype):
    return op.sample(name, device, dtype)


@every_sample
def test_forward(op, sample_name, device, dtype):
    check_forward(op, get_sample(op, sample_name, device, dtype), dtype)


@differentiable_sample
def test_gradient(op, sample_name, device, dtype):
    check_gradient(op, get_sample(op, sample_name, device, dtype), dtype)


@every_sample
def test_two_runs_are_bit_equal(op, sample_name, device, dtype):
    s = get_sample(op, sample_name, device, dtype)
    testing.check_equal(op, s, testing.results(op, s), testing.results(op, s))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_direct_call_has_the_gradient(op):
    """torch.ops.lrkern.X itself, not the wrapper: opcheck does not see a gradient that is silently missing."""
    direct = getattr(torch.ops.lrkern, op.name)
    s = get_sample(op, op.family.direct_sample, "cpu", torch.float32)
    if op.differentiable:
        got, wrapped = gradients(op, direct, s), gradients(op, getattr(lrkern.ops, op.name), s)
        assert got.keys() == set(op.differentiable) & wrapped.keys()
        for name in got:
            assert torch.equal(got[name], wrapped[name]), name
    else:
        args = [
            a.clone().requires_grad_() if is_float(a) and (i or not op.mutates) else a for i, a in enumerate(s.args)
        ]
        if not any(is_float(a) for a in args):
            return  # integers alone
        with pytest.raises(RuntimeError, match=f"lrkern::{op.name}: .*requires one"):
            direct(*args, **s.kwargs)


def test_every_op_of_the_library_has_a_gradient_or_refuses():
    """No schema may slip past the registry: each op is in it, is the gradient of one that is, or takes no tensors."""
    schemas = {
        s.name.removeprefix("lrkern::"): s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lrkern::")
    }
    assert OPS.keys() <= schemas.keys()
    for name, schema in schemas.items():
        if name in OPS or name == "build_info":
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lrkern::{name}", "Autograd"), name
        base = name.removesuffix("_bwd").removesuffix("_fwd")
        assert base in OPS, f"{name}: neither in the registry nor a part of an op that is ({schema})"


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable and not op.twice_differentiable], ids=lambda op: op.name
)
def test_double_backward_is_refused(op):  # of random bases: test_rng.py
    s = get_sample(op, "odd", "cpu", torch.float32)
    names, args = op.parameters, op.leaves(s)
    y = getattr(lrkern.ops, op.name)(*args, **s.kwargs)
    leaf = args[names.index(op.differentiable[-1] if "x" not in op.differentiable else "x")]
    (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"lrkern::{op.name}: double backward is not supported"):
        g.sum().backward()


OPCHECKED = [(d, t) for d in ("cpu", "emulated", "cuda") for t in DTYPES] if FULL else [("cpu", torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), OPCHECKED, ids=lambda v: str(v).removeprefix("torch."))
@every_sample
def test_opcheck(op, sample_name, kind, dtype, stack):
    """An op without a gradient has an Autograd kernel that knows one library alone."""
    s = op.sample(sample_name, enter_device(kind, stack), dtype)
    namespace = torch.ops.lrkern if op.differentiable or kind == "cuda" else library()
    torch.library.opcheck(getattr(namespace, op.name).default, copied(op.leaves(s)), s.kwargs)


def copied(args):
    return tuple(a.detach().clone().requires_grad_(a.requires_grad) if is_float(a) else a for a in args)


@differentiable_sample
def test_each_gradient_alone(op, sample_name):
    """Where only one argument requires a gradient, it gets what it gets among all, and no other argument gets one."""
    fn, s = getattr(lrkern.ops, op.name), get_sample(op, sample_name, "cpu", torch.float32)
    names, together = op.parameters, gradients(op, fn, s)
    for name, expected in together.items():
        args = op.leaves(s, name)
        y = fn(*args, **s.kwargs)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        grads = {n: a.grad for n, a in zip(names, args, strict=False) if isinstance(a, Tensor) and a.grad is not None}
        assert grads.keys() == {name}
        testing.check(grads[name], expected.double(), expected, name)  # dS and dB may take separate passes


@every_sample
def test_autocast_casts_what_the_registry_says(op, sample_name):
    s, fn, low = op.sample(sample_name, "cpu", torch.float32), getattr(lrkern.ops, op.name), torch.float16
    cast = [a.to(low) if n in op.casts and is_float(a) else a for n, a in zip(op.parameters, s.args, strict=False)]
    expected = run_op(op, fn, cast, s.kwargs)
    with torch.autocast("cpu", low):
        got = run_op(op, fn, s.args, s.kwargs)
    for g, e in zip(results_of(got), results_of(expected), strict=True):
        assert g.dtype == e.dtype and torch.equal(g.nan_to_num(7), e.nan_to_num(7))


@differentiable_sample
def test_backward_inside_autocast_is_that_of_the_forward(op, sample_name):
    """ATen's GEMM inside a gradient must not be cast: in bf16 it would come back half as large as it is taken for."""
    s = op.sample(sample_name, "cpu", torch.float32)
    args = op.leaves(s)
    y, wanted = getattr(lrkern.ops, op.name)(*args, **s.kwargs), [a for a in args if is_float(a) and a.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, wanted, dy)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and torch.equal(g.nan_to_num(7), e.nan_to_num(7))
