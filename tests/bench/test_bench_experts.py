# SPDX-License-Identifier: Apache-2.0
"""Suite experts: its providers compute the layer, of tokens that crowd."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import report
import run
from suites import experts


@pytest.mark.parametrize("passes", ["no_grad", "fwd+bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_providers_compute_the_layer(passes, dtype):
    suite = experts.Suite([])
    case = replace(suite.cases(False)[1], T=40, I=64, O=96, E=8, passes=passes, dtype=dtype)
    data = suite.data(case, "cpu", 0)
    counts = data.sorted(data.inputs["indices"])[1]
    assert sum(counts.values()) == 40 * 4 and max(counts.values()) > 3 * min(counts.values())
    assert not torch.equal(data.inputs["indices"], suite.data(case, "cpu", 1).inputs["indices"])
    providers = ["fp32" if dtype == torch.float32 else "bf16", "lrkern"]
    try:
        assert suite.gnf4(data).reads == suite.lrkern(data).reads == len(counts) * 3 * 64 * 96 * 17 // 32
        providers.append("gnf4")
    except ImportError:
        pass
    for provider in providers:
        assert run.error(suite, case, provider, "cpu") < (1e-5 if dtype == torch.float32 else 2e-2), provider
    assert suite.work(case, data)[1] == suite.lrkern(data).reads * (2 if passes == "fwd+bwd" else 1)
    if pool := sys.modules.get("cpu_grouped"):
        pool.pool_stop()


def test_a_row_and_a_table(monkeypatch):
    monkeypatch.setattr(run, "ceilings", lambda device, dtype, quick: (1e11, 1e10))
    monkeypatch.setattr(run, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(experts.Suite, "gnf4", lambda self, d: None)
    suite = experts.Suite([])
    case = replace(suite.cases(True)[0], I=64, O=96, E=4)
    assert str(case) == "k=4 T=1 I=64 O=96 E=4 pass=no_grad"
    rows, missing = run.measure(suite, case, "cpu", 0.01, "command", limit=1.0)
    assert not missing and [r["provider"] for r in rows] == ["bf16", "again", "fp32", "lrkern"]
    assert "of read" in report.table(rows, suite.against)
