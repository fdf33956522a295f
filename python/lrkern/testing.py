# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy and its reports, and how a sample of the registry is run beside its reference: for tests/, bench/ and selftest.

A result is compared with the truth (the reference in float64) by the yardstick: the larger of the error of the same-dtype
PyTorch expression and of the truth rounded once to the result's dtype.

                       16-bit results                       fp32 results
    max error          <= 2 x, below 256 elements + 1 ulp   <= 2 x + 1 ulp, at max |truth|
    Frobenius error    <= 1.25 x                            <= 1.5 x + half an ulp per element      from 256 elements on
    inf and nan        in the same places as in the expression

A 16-bit result is its roundings, the same in op and expression: seen are 1.04 x over the registry, and beyond 2 x nothing but
0.17 ulp of 16 elements in 700 random layers. So a result 0.5% off shows (tests/ops/test_tolerance.py). An fp32 result is the
order of its sums, and the expression can be exact by luck: seen are 3.2 x where one row is all there is, 0.9 ulp beyond 2 x and
0.13 ulp per element beyond 1.5 x. ``ulps`` widens what fp32 results may have beside it. (torch.testing.assert_close's defaults
fail for torch's own fp32 linear at I >= 512.)

fp32 results beside 16-bit operands (S, and gradients of fp32 factors), which tensor cores sum: also relative Frobenius
error <= FP32_FACTOR_ERROR, where two bf16 terms of an fp32 operand give 3.5e-6. Integers, indices, codes and random bits
are equal.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import Op, Sample

MAX_ERROR_FACTOR = 2.0
FROBENIUS_FACTOR = {torch.float32: 1.5, torch.bfloat16: 1.25, torch.float16: 1.25}
FROBENIUS_FROM = 256
FP32_FACTOR_ERROR = 1e-5
FUSED = "LRKERN_FUSED"  # 1: ops take kernels of one architecture where it has some, which are not the default yet


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of dtype at magnitude `scale`."""
    if scale == 0:
        return torch.finfo(dtype).smallest_normal
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(scale).log2().floor().item()


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max |got - truth|, Frobenius norm of got - truth), over the finite elements of truth."""
    if got.numel() == 0:
        return 0.0, 0.0
    finite = truth.isfinite()
    d = torch.where(finite, got.double() - truth, 0.0)
    return d.abs().max().item(), d.norm().item()


def mismatch(got: Tensor, truth: Tensor, yardstick: Tensor, fp32_factor: bool = False, ulps: float = 1.0) -> str | None:
    """What is wrong with `got`, or None. truth is float64, yardstick the same-dtype expression's result."""
    if got.shape != truth.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if got.dtype != yardstick.dtype:
        return f"dtype {got.dtype}, expected {yardstick.dtype}"
    if got.is_floating_point() is False:
        return None if torch.equal(got, yardstick) else "integers differ"
    got, truth, yardstick = got.detach(), truth.detach(), yardstick.detach()
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(test(got), test(yardstick)):
            return f"{test.__name__} in other places than the expression"
    if got.numel() == 0:
        return None
    truth = truth.masked_fill(~yardstick.isfinite(), torch.inf)
    once = truth.to(got.dtype)
    once = torch.where(once.isfinite(), once, yardstick)
    (max_got, fro_got), expression, rounded = errors(got, truth), errors(yardstick, truth), errors(once, truth)
    max_ref, fro_ref = map(max, expression, rounded)
    finite = truth[truth.isfinite()]
    if fp32_factor and fro_got <= FP32_FACTOR_ERROR * finite.norm().item():
        return None
    fp32, few = got.dtype == torch.float32, got.numel() < FROBENIUS_FROM
    step = (ulps if fp32 else float(few)) * ulp(finite.abs().max().item() if finite.numel() else 0.0, got.dtype)
    if max_got > MAX_ERROR_FACTOR * max_ref + step:
        return f"max error {max_got:.3e}, the yardstick is {max_ref:.3e}, allowed beside it {step:.3e}"
    step *= 0.5 * got.numel() ** 0.5
    if not few and fro_got > FROBENIUS_FACTOR[got.dtype] * fro_ref + step:
        return f"Frobenius error {fro_got:.3e}, the yardstick is {fro_ref:.3e}, allowed beside it {step:.3e}"
    return None


def check(got: Any, truth: Any, yardstick: Any, what: str, fp32_factor: bool = False, ulps: float = 1.0) -> None:
    """Raises AssertionError naming `what` where a tensor (or one of a tuple) is off."""
    if isinstance(got, (tuple, list)):
        for i, parts in enumerate(zip(got, truth, yardstick, strict=True)):
            check(*parts, f"{what}[{i}]", fp32_factor, ulps)
        return
    if got is None or truth is None:  # a result that was not asked for
        assert got is truth, f"{what}: {got}, expected {truth}"
        return
    if wrong := mismatch(got, truth.to(got.device), yardstick.to(got.device), fp32_factor, ulps):
        raise AssertionError(f"{what}: {wrong}")


def to64(t: Any) -> Any:
    """An argument of a reference that computes in float64; a dtype is that of its result."""
    if isinstance(t, torch.dtype) and t.is_floating_point:
        return torch.float64
    return t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t


# ---------------------------------------------------------------------------------------------------- samples of the registry


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def has_fp32_factor(args: Any, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and any(is_float(a) and a.dtype == torch.float32 for a in args)


def as64(sample: Sample) -> Sample:
    return Sample(sample.name, tuple(map(to64, sample.args)), sample.kwargs)


def run_op(op: Op, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The result, or for a mutating op what it wrote."""
    if op.mutates is None:
        return fn(*args, **kwargs)
    target = args[0].clone() if args[0].is_contiguous() else copy_rows(args[0])
    assert fn(target, *args[1:], **kwargs) is None
    return target


def copy_rows(t: Tensor) -> Tensor:
    """A copy with the strides of t; what lies between the rows stays NaN."""
    n = t.untyped_storage().nbytes() // t.element_size()
    storage = torch.full((n,), float("nan"), dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def gradients(op: Op, fn: Callable[..., Any], sample: Sample, cotangent: Tensor | None = None) -> dict[str, Tensor]:
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


def results(op: Op, sample: Sample) -> dict[str, Tensor]:
    """By name, what the op returns or writes, and its gradients."""
    fn = getattr(ops, op.name)
    y = run_op(op, fn, sample.args, sample.kwargs)
    out = {f"[{i}]": t for i, t in enumerate(y) if t is not None} if isinstance(y, tuple) else {"": y}
    return out | ({f" / d {n}": g for n, g in gradients(op, fn, sample).items()} if op.differentiable else {})


def check_forward(op: Op, s: Sample, dtype: torch.dtype, ulps: float = 1.0) -> None:
    """Against the reference. dtype: of the sample's activations."""
    got = run_op(op, getattr(ops, op.name), s.args, s.kwargs)
    truth, yardstick = (run_op(op, op.truth, each.args, s.kwargs) for each in (as64(s), s))
    widened = isinstance(got, Tensor) and got.dtype == torch.float32 != dtype  # S of float16 factors
    check(got, truth, yardstick, f"{op.name}[{s.name}]", has_fp32_factor(s.args, dtype) or widened, ulps)


def check_gradient(op: Op, s: Sample, dtype: torch.dtype, ulps: float = 1.0) -> None:
    got = gradients(op, getattr(ops, op.name), s)
    truth, yardstick = (gradients(op, op.truth, each) for each in (as64(s), s))
    for name in truth:
        what = f"d {op.name}[{s.name}] / d {name}"
        check(got[name], truth[name], yardstick[name], what, has_fp32_factor(s.args, dtype), max(ulps, s.ulps))


def check_equal(op: Op, s: Sample, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Of two runs' ``results``: every bit, where NaN is NaN."""
    for name in one:
        same = torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7))
        assert same, f"{op.name}[{s.name}]{name}: two runs differ"


@contextmanager
def fused(wanted: bool) -> Iterator[None]:
    """Inside, what LRKERN_FUSED says, which ops read at every call."""
    before = os.environ.get(FUSED)
    os.environ[FUSED] = "all" if wanted else "0"
    try:
        yield
    finally:
        os.environ.pop(FUSED)
        os.environ |= {} if before is None else {FUSED: before}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch hands out uninitialised is NaN, in integers the largest value: results and scratch memory that ops ask
    torch for. It is not what a kernel keeps in registers and shared memory, nor what cuBLAS takes for itself."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
