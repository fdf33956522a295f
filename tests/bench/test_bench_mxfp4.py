# SPDX-License-Identifier: Apache-2.0
"""Suite mxfp4: its providers compute the layer."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import contextlib

import report
import run
import timing
from suites import mxfp4

CASES = [
    ("linear", "no_grad", torch.float32),
    ("linear", "fwd+bwd", torch.float32),
    ("linear", "bwd", torch.bfloat16),
    ("lora", "no_grad", torch.float32),
    ("linear", "no_grad", torch.bfloat16),
]
# Other people's, where `make peers` put them; and how far from W those of other tables may be.
PEERS = {"torchao": 0.0, "gnf4": 0.0, "bnb": 0.2, "int4pack": 0.15}  # of fp4 and nf4 bnb takes the faster one


def small(**changes):
    suite = mxfp4.Suite([])
    return suite, replace(suite.cases(True)[0], I=128, O=64, **changes)


@pytest.fixture(scope="module", autouse=True)
def pool_ends():
    yield
    if pool := sys.modules.get("cpu_grouped"):
        pool.pool_stop()


@pytest.mark.parametrize(("method", "passes", "dtype"), CASES)
@pytest.mark.parametrize("T", [1, 20])
def test_providers_compute_the_layer(method, passes, dtype, T):
    suite, case = small(method=method, passes=passes, dtype=dtype, T=T, R=4 if method == "lora" else None)
    dense = "fp32" if dtype == torch.float32 else "bf16"
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for provider in (dense, "eager", "lrkern"):
        assert run.error(suite, case, provider, "cpu") < tolerance, provider
    data = suite.data(case, "cpu", 0)
    results = lambda call: run.step(passes, data, call)

    def outputs(call):
        step = results(call)
        out = step.run(step.ready())
        return [out] if passes == "no_grad" else [*out] if passes == "bwd" else [out[0].detach(), *out[1]]

    want = outputs(getattr(suite, dense)(data))
    for provider, off in PEERS.items():
        try:
            call = getattr(suite, provider)(data)
        except ImportError:
            continue
        if call is None:
            assert provider == "int4pack" and "bwd" in passes
            continue
        assert call.exact == (off == 0) and call.reads < 0.7 * 128 * 64
        for got, exact in zip(outputs(call), want, strict=True):
            if got is None:  # where a CPU has the instructions bitsandbytes multiplies without autograd
                assert provider == "bnb" and passes == "fwd+bwd"
            elif exact is not None:
                assert got.dtype == dtype and (got - exact).norm() <= (off + 2 * tolerance) * exact.norm(), provider


def test_quantisers_give_the_same_codes():
    for dtype in (torch.float32, torch.bfloat16):
        suite, case = small(method="quantize", dtype=dtype)
        data = suite.data(case, "cpu", 0)
        calls = [suite.eager(data), suite.lrkern(data)]
        with contextlib.suppress(ImportError):
            calls.append(suite.torchao(data))
        first, *others = (call.forward() for call in calls)
        for other in others:
            assert torch.equal(first, other.view(torch.uint8).view(first.shape))
        assert suite.fp32(data) is None and suite.work(data.case, data) is None


def test_one_token_reads_beyond_512_mib(monkeypatch):
    """Of each provider as many copies as hold that, but of those that decode W whole."""
    assert timing.READ == 512 << 20
    monkeypatch.setattr(timing, "READ", 40_000)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 100)
    suite, case = small()
    copies = run.line_up(suite, case, "cpu", True)
    of = {provider: len(copies.steps[provider, "whole"]) for provider in copies.calls}
    each = sum(t.nbytes for t in run.tensors(copies.copies[0]))
    assert len(copies.copies) == of["lrkern"] == -(-40_000 // each)
    assert (
        of["bf16"] == -(-40_000 // (128 * 64 * 2)) and of["fp32"] == -(-40_000 // (128 * 64 * 4)) and of["eager"] == 2
    )
    assert len({data.inputs["codes"].data_ptr() for data in copies.copies}) == of["lrkern"]
    assert len(run.line_up(suite, replace(case, T=20), "cpu", True).copies) == 1
    crowd = run.line_up(suite, replace(case, T=80), "cpu", True)
    assert crowd.missing == dict.fromkeys(("torchao", "bnb", "gnf4"), "of T=80 not with --quick")
    assert {"bf16", "fp32", "lrkern", "int4pack"} <= crowd.calls.keys()


def test_the_table_says_the_share_of_a_read_and_the_pairs(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 10)
    monkeypatch.setattr(timing, "READ", 4096)
    monkeypatch.setattr(timing, "PAIRS", (3, 3))
    monkeypatch.setattr(run, "ceilings", lambda device, dtype, quick: (1e11, 1e10))
    monkeypatch.setattr(run, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(mxfp4.Suite, "providers", lambda self: ("bf16", "lrkern"))
    suite, case = small(method="lora", R=4)
    rows, _ = run.measure(suite, case, "cpu", 0.01, "command", limit=1.0)
    ours = next(row for row in rows if row["provider"] == "lrkern")
    assert ours["reads"] == 64 * (64 + 4) and ours["of_read"] == pytest.approx(ours["reads"] / ours["p50_ms"] / 1e6)
    assert ours["beside"] == "mx_linear" and ours["pairs"] == 3 and ours["paired"] > 0.1
    text = report.table(rows, suite.against)
    assert "of read" in text and f"lrkern takes {ours['paired']:.3f}x of mx_linear, the median of 3 pairs" in text
    assert max(map(len, text.splitlines()[2:])) <= 120
    rows, _ = run.measure(*small(method="linear", passes="fwd+bwd"), "cpu", 0.01, "command", limit=1.0)
    assert {row["reads"] for row in rows if row["provider"] == "lrkern"} == {2 * ours["reads"]}
    assert all(row["beside"] is row["paired"] is None for row in rows)
