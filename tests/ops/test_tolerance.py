# SPDX-License-Identifier: Apache-2.0
"""The tolerance lets no result through that is 0.5% off: faults planted in what the ops return for the registry's samples."""

import pytest
import torch
from op_checks import as64, gradients, has_fp32_factor, run_op
from test_ops import OP_SAMPLES, get_sample

import lrkern.ops
from lrkern import testing
from lrkern.reference import OPS, Sample

BASE = ("y", "weight", "bias", "base")  # zeros in their place leave the low-rank part
INTEGERS = "multi_lora_plan", "mx_quantize", "nvfp4_quantize"  # what these return
FLOAT_OPS = [op for op in OPS.values() if op.name not in INTEGERS]


def without_base(op, sample):
    args = op.named(sample)
    zeros = {n: torch.zeros_like(args[n]) for n in BASE if args.get(n) is not None}
    return zeros and Sample(sample.name, tuple((args | zeros).values()))


def three(op, sample, grads=False):
    """By name (result, truth, yardstick)."""
    run = lambda fn, s: {"result": run_op(op, fn, s.args, s.kwargs)} | (gradients(op, fn, s) if grads else {})
    ran = [run(getattr(lrkern.ops, op.name), sample), run(op.truth, as64(sample)), run(op.truth, sample)]
    return {name: [r[name] for r in ran] for name in ran[1]}


@pytest.mark.parametrize("op", FLOAT_OPS, ids=lambda op: op.name)
def test_half_a_percent_too_much_is_caught(op, dtype):
    """In the result, in bfloat16 in each gradient, and in the low-rank part where the base is zero."""
    let_through, caught = [], 0
    for name in (name for each, name in OP_SAMPLES if each is op):
        sample = get_sample(op, name, "cpu", dtype)
        found = three(op, sample, grads=bool(op.differentiable) and dtype == torch.bfloat16)  # the coarsest
        if low_rank := without_base(op, sample):
            found |= {"low-rank part": three(op, low_rank)["result"]}
        for part, (got, truth, yardstick) in found.items():
            fp32 = has_fp32_factor(sample.args, dtype) or got.dtype == torch.float32 != dtype
            assert testing.mismatch(got, truth, yardstick, fp32) is None
            if got.numel() < testing.FROBENIUS_FROM or not truth.any():
                continue
            wrong = (got.detach().double() * 1.005).to(got.dtype)
            caught += 1
            if testing.mismatch(wrong, truth, yardstick, fp32) is None:
                let_through.append(f"{part} of {name}")
    assert caught or dtype != torch.bfloat16, "basis_dot has few results"
    assert not let_through


def test_what_the_tolerance_says_is_what_it_does():
    """Of float16 numbers beyond its range the expression's inf decides, and does not widen what else is allowed."""
    truth = torch.linspace(1, 2, 300).double()
    truth[0] = 1e5
    good = truth.half()
    assert good[0].isinf() and testing.mismatch(good, truth, good) is None
    wrong = (truth * 1.005).half()
    assert testing.mismatch(wrong, truth, good).startswith("max error")
    finite = good.clone()
    finite[0] = 65504
    assert testing.mismatch(finite, truth, good) == "isposinf in other places than the expression"
    few = truth[1:200]  # below 256 elements the largest error, and one ulp beside it: of 2**-10 here
    assert testing.mismatch((few + 1.2e-3).half(), few, few.half(), ulps=64) is None
    assert testing.mismatch((few + 2.5e-3).half(), few, few.half(), ulps=64).startswith("max error")
    fp32 = few.float()
    assert testing.mismatch(fp32 + 2**-21, few, fp32, ulps=64) is None
    assert testing.mismatch(fp32 + 2**-21, few, fp32).startswith("max error")
    assert "dtype" in testing.mismatch(good.float(), truth, good) and "shape" in testing.mismatch(good[1:], truth, good)
    assert testing.mismatch(few.int(), few.int(), few.int()) is None
    assert testing.mismatch(few.int() + 1, few.int(), few.int()) == "integers differ"
