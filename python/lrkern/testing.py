# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy and its reports, used by tests/ and bench/.

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

from typing import Any

import torch
from torch import Tensor

MAX_ERROR_FACTOR = 2.0
FROBENIUS_FACTOR = {torch.float32: 1.5, torch.bfloat16: 1.25, torch.float16: 1.25}
FROBENIUS_FROM = 256
FP32_FACTOR_ERROR = 1e-5


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
