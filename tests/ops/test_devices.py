# SPDX-License-Identifier: Apache-2.0
"""What poisoned memory leaves on every device kind (cpu, cuda, emulated), and what sees that a device was used."""

from dataclasses import replace

import pytest
import torch
from op_checks import gradients
from recorder import Recorder
from test_ops import every_sample, get_sample

import lrkern.ops
from lrkern import testing
from lrkern.ops.dispatch import library, use_library
from lrkern.reference import OPS
from tests.conftest import pytest_pyfunc_call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_sample
def test_no_output_or_scratch_is_left_unwritten(op, sample_name, device, dtype):
    sample = get_sample(op, sample_name, device, dtype)
    clean = testing.results(op, sample)
    with testing.poisoned():
        testing.check_equal(op, sample, clean, testing.results(op, sample))


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
