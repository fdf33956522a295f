# SPDX-License-Identifier: Apache-2.0
"""Suite mora: its providers compute the layer, and the adapter alone what the whole does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import run
from suites import mora

CASES = [(24, 24, 6), (24, 40, 6), (40, 24, 6), (24, 40, 1), (41, 23, 1)]


def made(I, O, kind):
    suite = mora.Suite([])
    return suite, replace(suite.cases(True)[0], type=str(kind), T=20, I=I, O=O, R=4)


@pytest.mark.parametrize(("I", "O", "kind"), CASES)
def test_providers_compute_the_layer(I, O, kind):
    suite, case = made(I, O, kind)
    for provider in ("base", "published", "full", "lrkern"):
        assert run.error(suite, case, provider, "cpu") < 1e-5, provider


@pytest.mark.parametrize(("I", "O", "kind"), CASES)
def test_the_adapter_alone_is_that_of_the_whole(I, O, kind):
    suite, case = made(I, O, kind)
    for provider in ("published", "lrkern"):
        data = suite.data(case, "cpu", 0)
        call, wanted = getattr(suite, provider)(data), [data.inputs[name] for name in ("x", "m")]
        y = call.forward()
        whole = y.detach(), *torch.autograd.grad(y, wanted, data.dy)
        with call.alone.around():
            y = call.alone.forward()
            alone = y.detach(), *torch.autograd.grad(y, wanted, data.dy)
        for got, want in zip(alone, whole, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_stock_lora_trains_its_own_parameters():
    suite, case = made(24, 40, 1)
    data = suite.data(case, "cpu", 0)
    call = suite.peft(data)
    assert not call.exact
    (dx,) = torch.autograd.grad(call.forward(), data.inputs["x"], data.dy)
    assert dx.shape == data.inputs["x"].shape
