# SPDX-License-Identifier: Apache-2.0
"""Suite s2ft: its providers compute the layers, and the adapter alone what the whole does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import run
from suites import s2ft


def made(method):
    suite = s2ft.Suite([])
    return suite, replace(suite.cases(True)[0], method=method, T=20, I=24, O=40, R=5)


@pytest.mark.parametrize("method", ["s2ft", "ffn"])
def test_providers_compute_the_layers(method):
    suite, case = made(method)
    for provider in ("base", "published", "full", "lrkern"):
        assert run.error(suite, case, provider, "cpu") < 1e-5, provider


def test_the_adapter_alone_is_that_of_the_whole():
    suite, case = made("s2ft")
    data = suite.data(case, "cpu", 0)
    call, wanted = suite.lrkern(data), [data.inputs[name] for name in ("x", "slice0")]
    results = []
    for each in (call, call.alone):
        with each.around():
            y = each.forward()
            results.append((y.detach(), *torch.autograd.grad(y, wanted, data.dy)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["s2ft", "ffn"])
def test_others_train_their_own_parameters(method):
    suite, case = made(method)
    data = suite.data(case, "cpu", 0)
    for provider in ("peft", "published"):
        (dx,) = torch.autograd.grad(getattr(suite, provider)(data).forward(), data.inputs["x"], data.dy)
        assert dx.shape == data.inputs["x"].shape, provider
    count = lambda ps: sum(p.numel() for p in ps if p.requires_grad)
    assert count(p for layer in data.layers for p in layer.parameters()) == (5 * 24 * 2 if method == "ffn" else 5 * 40)
