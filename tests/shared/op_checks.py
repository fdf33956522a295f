# SPDX-License-Identifier: Apache-2.0
"""A sample of the registry beside its reference, as lrkern.testing has it for tests and for users' selftest."""

from lrkern.testing import as64, check_forward, check_gradient, gradients, has_fp32_factor, is_float, run_op  # noqa: F401


def want_gradients(op, kwargs):
    """Of every argument that has any, so that a call goes through autograd."""
    for name in op.differentiable:
        if is_float(kwargs.get(name)):
            kwargs[name].requires_grad_()
