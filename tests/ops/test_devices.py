# SPDX-License-Identifier: Apache-2.0
"""What poisoned memory leaves on every device kind (cpu, cuda, emulated), and what sees that a device was used."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from op_checks import gradients, run_op
from recorder import Recorder
from test_ops import every_sample, get_sample

import lrkern.ops
from lrkern.ops.dispatch import library, use_library
from lrkern.reference import OPS
from tests.conftest import pytest_pyfunc_call


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
    y = run_op(op, fn, sample.args, sample.kwargs)
    out = {str(i): t for i, t in enumerate(y) if t is not None} if isinstance(y, tuple) else {"y": y}
    return out | gradients(op, fn, sample) if op.differentiable else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_sample
def test_no_output_or_scratch_is_left_unwritten(op, sample_name, device, dtype):
    sample = get_sample(op, sample_name, device, dtype)
    clean = results(op, sample)
    with poisoned():
        dirty = results(op, sample)
    for name in clean:
        assert torch.equal(clean[name].nan_to_num(7), dirty[name].nan_to_num(7)), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_recorder_sees_on_which_device_an_op_was_called(op, device):
    """meta stands for a device that a test pretends to use, as CUDA's cases do where their tensors are on the CPU."""
    sample = op.sample(op.family.direct_sample, "cpu", torch.float32)
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in sample.args]
    sample = replace(sample, args=tuple(args))
    with use_library(Recorder(library(), "meta")):
        getattr(lrkern.ops, op.name)(*sample.args, **sample.kwargs)
        if op.differentiable:
            gradients(op, getattr(lrkern.ops, op.name), sample)
        case = pytest_pyfunc_call(None)
        next(case)
        with pytest.raises(StopIteration if device == "meta" else pytest.fail.Exception):
            case.send(True)
