# SPDX-License-Identifier: Apache-2.0
"""What must be equal on every device kind (cpu, cuda, emulated), bit by bit: random bits, and what poisoned memory leaves."""

from contextlib import contextmanager

import pytest
import torch
from test_ops import every_sample, get_sample, gradients, run_op

import lrkern.ops
from lrkern import reference
from lrkern.ops.dispatch import library


@contextmanager
def poisoned():
    """Inside, memory that torch hands out uninitialised is NaN, in integers the largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def results(op, sample):
    fn = getattr(lrkern.ops, op.name)
    out = {"y": run_op(op, fn, sample.args, sample.kwargs)}
    return out | gradients(op, fn, sample) if op.differentiable else out


def test_poison_reaches_the_allocations_of_ops(device):
    x, a = torch.randn(8, 600, device=device), torch.randn(4, 600, device=device)
    with poisoned(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        library().lora_shrink(x, a)
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["aten::fill_"] == count["aten::empty"] >= 1
    with poisoned():
        assert torch.empty(1000, device=device).isnan().all()
        assert torch.empty(1000, device=device, dtype=torch.uint8).min() == 255  # scratch is bytes: NaN again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_sample
def test_no_output_or_scratch_is_left_unwritten(op, sample_name, device, dtype):
    sample = get_sample(op, sample_name, device, dtype)
    clean = results(op, sample)
    with poisoned():
        dirty = results(op, sample)
    for name in clean:
        assert torch.equal(clean[name].nan_to_num(7), dirty[name].nan_to_num(7)), name


@pytest.mark.parametrize(
    ("rows", "cols", "p", "seed"),
    [(1, 8, 0.5, 0), (7, 13, 0.3, 1), (130, 264, 0.1, 2**62 + 12345), (70, 300, 0.9, 2**63 - 1), (512, 65, 2**-16, 77)],
)
def test_dropout_bits(rows, cols, p, seed, device, dtype):
    """Each kernel's mask, read off through identity factors, is the written stream of rng.h."""
    seed = torch.tensor([seed])
    keep = (reference.dropout_multiplier(rows, cols, p, seed) != 0).cpu()
    make = lambda *shape: torch.ones(*shape, dtype=dtype, device=device)
    eye = lambda n: torch.eye(n, dtype=dtype, device=device)
    seed = seed.to(device)

    x = make(rows, cols)
    shrink = lrkern.ops.lora_shrink(x, eye(cols), 1.0, p, seed)
    assert torch.equal(shrink.cpu() != 0, keep)

    a = make(1, cols).requires_grad_()
    (dx,) = torch.autograd.grad(lrkern.ops.lora_shrink(x.requires_grad_(), a, 1.0, p, seed), x, make(rows, 1))
    assert torch.equal(dx.cpu() != 0, keep), "expand"

    a = make(rows, cols).requires_grad_()
    (da,) = torch.autograd.grad(lrkern.ops.lora_shrink(x, a, 1.0, p, seed), a, eye(rows))
    assert torch.equal(da.cpu() != 0, keep), "wgrad"
