# SPDX-License-Identifier: Apache-2.0
"""Suite miss: its providers compute the layer, and the adapter alone what the whole does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import run
from suites import miss


def made(method, monkeypatch):
    monkeypatch.setattr(miss, "COLUMNS", 12)
    suite = miss.Suite([])
    return suite, replace(next(c for c in suite.cases(True) if c.method == method), T=20, I=40, O=24, R=8)


@pytest.mark.parametrize("method", miss.KINDS)
def test_providers_compute_the_layer(method, monkeypatch):
    suite, case = made(method, monkeypatch)
    for provider in ("base", "peft", "lrkern"):
        assert run.error(suite, case, provider, "cpu") < 1e-5, provider


@pytest.mark.parametrize("method", ["miss", "mini"])
def test_the_adapter_alone_gives_the_same(method, monkeypatch):
    suite, case = made(method, monkeypatch)
    data = suite.data(case, "cpu", 0)
    for provider in ("peft", "lrkern"):
        call = getattr(suite, provider)(data)
        results = []
        for of in (call, call.alone):
            y = of.forward()
            results.append((y.detach(), *torch.autograd.grad(y, [data.inputs["x"], data.inputs["block"]], data.dy)))
        for whole, alone in zip(*results, strict=True):
            assert torch.allclose(whole, alone, rtol=1e-4, atol=1e-4)


def test_bat_has_no_adapter_alone(monkeypatch):
    suite, case = made("bone", monkeypatch)
    assert suite.lrkern(suite.data(case, "cpu", 0)).alone is None
