# SPDX-License-Identifier: Apache-2.0
"""Suite mxfp4: its providers compute the layer."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import contextlib

import run
from suites import mxfp4

CASES = [
    ("linear", "no_grad", torch.float32),
    ("linear", "fwd+bwd", torch.float32),
    ("lora", "no_grad", torch.float32),
    ("linear", "no_grad", torch.bfloat16),
]


@pytest.mark.parametrize(("method", "passes", "dtype"), CASES)
@pytest.mark.parametrize("T", [1, 20])
def test_providers_compute_the_layer(method, passes, dtype, T):
    suite = mxfp4.Suite([])
    case = replace(
        suite.cases(True)[0],
        method=method,
        passes=passes,
        dtype=dtype,
        T=T,
        I=64,
        O=40,
        R=4 if method == "lora" else None,
    )
    dense = "fp32" if dtype == torch.float32 else "bf16"
    for provider in (dense, "eager", "lrkern"):
        assert run.error(suite, case, provider, "cpu") < (1e-5 if dtype == torch.float32 else 5e-3), provider


def test_quantisers_give_the_same_codes():
    suite = mxfp4.Suite([])
    data = suite.data(replace(suite.cases(False)[-1], I=64, O=40), "cpu", 0)
    calls = [suite.eager(data), suite.lrkern(data)]
    with contextlib.suppress(ImportError):
        calls.append(suite.torchao(data))
    first, *others = (call.forward() for call in calls)
    for other in others:
        assert torch.equal(first, other.view(torch.uint8).view(first.shape))
    assert suite.fp32(data) is None and suite.work(data.case, data) is None
