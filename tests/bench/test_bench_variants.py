# SPDX-License-Identifier: Apache-2.0
"""Suite variants: its providers compute the layer, and the adapter alone what the whole does; every method is in it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import run
from suites import variants

from lrkern.reference.variants import VARIANTS

CASES = {(c.method, c.dtype): c for c in variants.Suite([]).cases(False)}
METHODS = sorted({method for method, _ in CASES})
EACH = pytest.mark.parametrize("method", METHODS)


def small(method, dtype=torch.float32):
    return replace(CASES[method, dtype], T=20, I=48, O=48, R=8)


def providers(suite, data):
    return {name: call for name in suite.providers() if (call := getattr(suite, name)(data)) is not None}


def test_every_method_is_timed_in_both_dtypes():
    assert {v.method for v in VARIANTS.values()} | {"factorized"} == {*METHODS}
    assert len(CASES) == 2 * len(METHODS)


@EACH
def test_providers_compute_the_layer(method):
    suite, case = variants.Suite([]), small(method)
    data = suite.data(case, "cpu", 0)
    for name, call in providers(suite, data).items():
        if call.exact:
            assert run.error(suite, case, name, "cpu") < 1e-5, name


@EACH
def test_the_adapter_alone_gives_the_same(method):
    suite, case = variants.Suite([]), small(method)
    data = suite.data(case, "cpu", 0)
    leaves = [t for t in data.inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    if method == "hydra":  # the gradient of x is that of another dy, which the stored one does not know
        leaves = leaves[1:]
    for name, call in providers(suite, data).items():
        if call.alone is None:
            continue
        results = []
        for of in (call, call.alone):
            with of.around():
                y = of.forward()
                results.append((y.detach().clone(), *torch.autograd.grad(y, leaves, data.dy, allow_unused=True)))
        for whole, alone in zip(*results, strict=True):
            assert (whole is None) == (alone is None), name
            if whole is not None:
                torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4, msg=name)
