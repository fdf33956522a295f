# SPDX-License-Identifier: Apache-2.0
"""What the benchmark does on CUDA alone, as far as a machine without a GPU can try it."""

import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import report
import run
import timing
from on_cuda import lora as lora_cuda
from suite import Call, by_path
from suites import lora, multi_lora, mxfp4

from lrkern import ops, testing
from lrkern.ops.dispatch import library, use_library

F32, BF16 = torch.float32, torch.bfloat16
PROVIDERS = ("base", "compile", "peft", "concat", "addmm", "lrkern", "fused")


def small(passes, ab=None, p=None, dtype=BF16):
    return replace(lora_cuda.case(32, (48, 40), 4, passes, ab, p), dtype=dtype)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", {True: 0.02, False: 0.02})
    monkeypatch.setattr(run, "ROUNDS", {True: (3, 3), False: (3, 3)})
    monkeypatch.setattr(run, "ceilings", lambda device, dtype, quick: (1e11, 1e10))
    monkeypatch.setattr(run, "read_bandwidth", lambda device: 1e9)


class Asked:
    """The ops, and what LRKERN_FUSED said at each call."""

    def __init__(self):
        self.of, self.said = library(), set()

    def __getattr__(self, name):
        self.said.add(os.environ[testing.FUSED])
        return getattr(self.of, name)


def kernels_of(step):
    with use_library(asked := Asked()):
        step.run(step.ready())
    return {{"0": "portable_kernel", "all": "sm90_kernel"}[said] for said in asked.said}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in name: its tensors are on the CPU, graphs are stood in for, a call waits where it says so by torch's own words, and
    LRKERN_FUSED=all launches another kernel."""
    seen = SimpleNamespace(mode="default", captured=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU in name")
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(seen, "mode", mode))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(timing, "captured", lambda step: seen.captured.append(step) or step)
    monkeypatch.setattr(timing, "once_cuda", lambda step, flush: timing.once_cpu(step))
    monkeypatch.setattr(timing, "kernels_of", kernels_of)
    peak, empty = timing.peak_bytes, torch.empty
    monkeypatch.setattr(timing, "peak_bytes", lambda step, device: peak(step, "cpu"))
    monkeypatch.setattr(torch, "empty", lambda *size, **more: empty(*size, **more | {"device": None}))
    for module in (lora_cuda, multi_lora, mxfp4):
        there = staticmethod(lambda case, device, seed, of=module.Data: of(case, "cpu", seed))
        monkeypatch.setattr(module.Suite, "data", there)
    return seen


def measured(suite, case):
    rows, missing = run.measure(suite.on("cuda"), case, "cuda", 0.02, "command")
    return {row["provider"]: row for row in rows}, missing


# ---------------------------------------------------------------------------------------------------- lora


def test_lora_is_asked_of_the_whole_grid():
    suite = lora.Suite([]).on("cuda")
    assert suite.name() == "lora" and suite.providers() == PROVIDERS and suite.device == "cuda"
    assert not isinstance(lora.Suite([]).on("cpu"), lora_cuda.Suite)
    sides = [(4096, 4096), (5120, 5120), (8192, 8192), (4096, 14336), (14336, 4096)]
    grid = itertools.product(sides, (8, 16, 64, 128), (None, F32))
    wanted = set()
    for (I, O), R, ab in grid:
        train = itertools.product((2048, 4096, 8192, 16384), (None, 0.1), ("fwd", "fwd+bwd"))
        wanted |= {(I, O, R, ab, T, p, passes) for T, p, passes in train}
        wanted |= {(I, O, R, ab, T, None, "no_grad") for T in (1, 16, 64, 256)}
    of = lambda case: (case.I, case.O, case.R, case.ab, case.T, case.p, case.passes)
    full, quick = suite.cases(False), suite.cases(True)
    assert {case.dtype for case in full} == {BF16}
    assert sorted(map(str, map(of, full))) == sorted(map(str, wanted))
    assert set(map(of, quick)) < wanted and len(set(quick)) == len(quick)


def test_quick_fits_by_the_roofline():
    """At 60% of an H100's 989 TFLOP/s (67 in float64, for the truth of each provider), each provider run 60 times at most, what is
    around the GEMM as slow as the GEMM, and four seconds a case for all that is no GEMM: under three minutes."""
    cases = lora_cuda.Suite([]).cases(True)
    flop = lambda case: 2 * case.T * case.I * case.O * (2 if "bwd" in case.passes else 1)
    seconds = sum(flop(case) * len(PROVIDERS) * (2 * 60 / (0.6 * 989e12) + 2 / 67e12) + 4 for case in cases)
    assert seconds < 180


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd", "no_grad"])
@pytest.mark.parametrize("ab", [None, F32])
def test_every_provider_computes_the_layer(gpu, passes, ab):
    suite = lora.Suite([]).on("cuda")
    for provider in PROVIDERS:
        assert run.error(suite, small(passes, ab), provider, "cuda") < 5e-3, provider
        if ab is None:  # all that differs is the order of sums
            assert run.error(suite, small(passes, dtype=F32), provider, "cuda") < 1e-6, provider


@pytest.mark.parametrize("provider", ["concat", "addmm"])
def test_dropout_of_those_written_here(provider):
    """By the mask that they draw."""
    suite = lora.Suite([]).on("cuda")
    data = suite.data(small("fwd+bwd", p=0.3, dtype=F32), "cpu", 0)
    step = run.step("fwd+bwd", data, getattr(suite, provider)(data))
    torch.manual_seed(1)
    y, (dx, da, db) = step.run(step.ready())
    torch.manual_seed(1)
    x, weight, bias, a, b = data.inputs.values()
    _, mask = torch.native_dropout(x, 0.3, True)
    want = F.linear(x, weight, bias) + lora.SCALE * (x * mask / 0.7) @ a.mT @ b.mT
    assert 0.2 < 1 - mask.float().mean() < 0.4
    for got, true in zip((y, dx, da, db), (want, *torch.autograd.grad(want, [x, a, b], data.dy)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


def test_what_is_joined_lies_in_one_row():
    x, dy = torch.randn(6, 8), torch.randn(6, 10)
    weight, a, b = torch.randn(10, 8), torch.randn(4, 8), torch.randn(10, 4)
    joined = lora_cuda.Joined(x, dy, weight, torch.zeros(10), a, b)
    before = joined.s.data_ptr()
    lora_cuda.Concat.apply(x, a, b, joined, None)
    assert (
        joined.x.stride(0) == joined.s.stride(0) == 12 and joined.s.data_ptr() == before == joined.xs[:, 8:].data_ptr()
    )
    torch.testing.assert_close(joined.xs, torch.cat([x, lora.SCALE * x @ a.mT], 1))
    assert torch.equal(joined.wb, torch.cat([weight, b], 1)) and torch.equal(joined.wa, torch.cat([weight, a]))


@pytest.mark.slow
def test_pefts_layer_compiles():
    suite = lora.Suite([]).on("cuda")
    assert run.error(suite, small("fwd+bwd"), "compile", "cpu") < 5e-3


def test_a_run_ends_with_the_geometric_mean(gpu, monkeypatch, tmp_path, capsys):
    cases = [small("fwd+bwd", F32, 0.1), small("fwd"), small("no_grad")]
    monkeypatch.setattr(lora_cuda.Suite, "cases", lambda self, quick: cases)
    file = tmp_path / "rows.json"
    assert run.main(["lora", "--device", "cuda", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ordered = [PROVIDERS[0], "again", *PROVIDERS[1:]]
    assert [(r["case"], r["provider"]) for r in rows] == [(str(case), name) for case in cases for name in ordered]
    base = {r["case"]: r["p50_ms"] for r in rows if r["provider"] == "base"}
    for r in rows:
        assert r["suite"] == "lora" and r["device"] == "cuda" and r["eager"] is r["adapter_ms"] is None
        assert r["extra_over_base"] == pytest.approx(r["p50_ms"] / base[r["case"]] - 1)
        of = {"lrkern": ["portable_kernel"], "fused": ["sm90_kernel"]}
        assert r["kernels"] == of.get(r["provider"])
    assert len(gpu.captured) >= 3 * len(PROVIDERS) and gpu.mode == "default" and testing.FUSED not in os.environ
    text = capsys.readouterr().out
    assert len(re.findall(r"^ +extra +ms +p20", text, re.M)) == 3
    assert max(map(len, text.splitlines()[2:])) <= 120
    *_, last = text.partition("\ngeometric mean over base")
    assert "pass" not in last and last.split()[:3] == ["fwd+bwd", "fwd", "no_grad"]
    assert re.findall(r"^  (\w+)  ", last, re.M) == list(PROVIDERS) and last.count(" of 1 cases") == 3 * len(PROVIDERS)


def test_means():
    row = lambda provider, extra, passes="fwd", noisy=False: {
        "provider": provider, "case": f"T=1 pass={passes}", "extra_over_base": extra, "noisy": noisy
    }  # fmt: skip
    rows = [
        *(row("base", 0.0) for _ in range(2)), row("again", 0.5), row("peft", 1.0), row("peft", 0.28), row("fused", -0.1, noisy=True),
        row("peft", 0.1, "no_grad"), row("eager", None),
    ]  # fmt: skip
    head, *lines = report.means(rows).strip().splitlines()
    assert re.split(r" {2,}", head) == ["geometric mean over base", "fwd", "no_grad"]
    assert [re.split(r" {2,}", line.strip()) for line in lines] == [
        ["base", "+0.0% of 2 cases", "-"],
        ["peft", "+60.0% of 2 cases", "+10.0% of 1 cases"],  # 1.6 squared is 2 times 1.28
        ["fused", "-10.0% of 1 cases, noisy", "-"],
    ]


# ---------------------------------------------------------------------------------------------------- the fused path


def test_the_last_word_on_the_path_counts():
    said = lambda: os.environ.get(testing.FUSED)
    call = by_path(by_path(Call(said, Call(said)), False), True)
    for way in (call, call.alone):
        with way.around():
            assert way.forward() == "all"
    assert said() is None


@pytest.mark.parametrize(("found", "reason"), [
    ({"0": {"gemm", "expand"}, "all": {"gemm"}}, "LRKERN_FUSED=all launches no other kernels here"),
    ({"0": set(), "all": set()}, "torch's profiler sees no kernels"),
])  # fmt: skip
def test_fused_is_missing_where_it_is_not(gpu, monkeypatch, found, reason):
    def kernels_of(step):
        with use_library(asked := Asked()):
            step.run(step.ready())
        return found[min(asked.said)]

    monkeypatch.setattr(timing, "kernels_of", kernels_of)
    rows, missing = measured(lora.Suite([]), small("fwd+bwd"))
    assert missing.keys() == {"fused"} and missing["fused"].startswith(reason)
    assert rows.keys() == {*PROVIDERS, "again"} - {"fused"}


def test_what_is_wrong_is_not_timed(gpu, monkeypatch):
    """Other people's is left out; one of our own ends the run."""
    wrong = lambda self, d: Call(lambda: 2 * d.linear(d.inputs["x"]))
    monkeypatch.setattr(lora_cuda.Suite, "compile", wrong)
    rows, missing = measured(lora.Suite([]), small("fwd"))
    assert "compile" not in rows and re.match(r"computes something else: error (1|0\.9\d?)$", missing["compile"])
    monkeypatch.setattr(lora_cuda.Suite, "fused", wrong)
    with pytest.raises(RuntimeError, match="fused computes something else: error .* of method=lora T=32"):
        measured(lora.Suite([]), small("fwd"))


def test_multi_lora_has_both_paths(gpu):
    suite = multi_lora.Suite([])
    case = replace(suite.cases(True)[0], T=8, A=2, I=64, O=48)
    assert suite.fused(suite.data(case, "cpu", 0)) is None
    rows, _ = measured(suite, case)
    assert rows["lrkern"]["kernels"] == ["portable_kernel"] and rows["fused"]["kernels"] == ["sm90_kernel"]
    assert rows["fused"]["error"] < 1e-2 and rows["fused"]["adapter_ms"] is None


# ---------------------------------------------------------------------------------------------------- mxfp4


def decoded(codes, scales, dtype):
    return ops.mx_dequantize(codes, scales, 2 * codes.shape[1], dtype)


@pytest.fixture
def peers(monkeypatch):
    """vLLM's functions and humming's layer, as far as they are called, with the names of their arguments."""
    marlin, humming = ModuleType("marlin_utils_fp4"), ModuleType("humming.layer")

    def prepare_fp4_layer_for_marlin(layer, input_dtype=None):
        O, half = layer.weight.shape
        assert (O, 2 * half) == (layer.output_size_per_partition, layer.input_size_per_partition)
        layer.weight = nn.Parameter(decoded(layer.weight, layer.weight_scale, layer.params_dtype), requires_grad=False)
        layer.workspace = "workspace"

    def apply_fp4_marlin_linear(
        input, weight, weight_scale, weight_global_scale, workspace, size_n, size_k, bias=None, input_dtype=None
    ):
        assert weight.shape == (size_n, size_k) and workspace == "workspace" and weight_global_scale is None
        return F.linear(input, weight, bias)

    class HummingLayer(nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, has_bias=False, torch_dtype=None):
            super().__init__()
            assert weight_config == {"quant_method": "mxfp4"} and has_bias
            shapes = {"weight": (shape_n, shape_k // 2), "weight_scale": (shape_n, shape_k // 32)}
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False))
            self.bias = nn.Parameter(torch.empty(shape_n, dtype=torch_dtype))

        def load_from_tensors(self, tensors):
            self.load_state_dict(tensors, strict=True)

        def transform(self):
            self.dense = decoded(self.weight, self.weight_scale, self.bias.dtype)

        def forward(self, inputs):
            return F.linear(inputs, self.dense, self.bias)

    marlin.prepare_fp4_layer_for_marlin, marlin.apply_fp4_marlin_linear = (
        prepare_fp4_layer_for_marlin,
        apply_fp4_marlin_linear,
    )
    humming.HummingLayer = HummingLayer
    path = "vllm.model_executor.layers.quantization.utils"
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    sys.modules[path].marlin_utils_fp4 = marlin
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", humming)
    return marlin


def few(**changes):
    case = mxfp4.Suite([]).on("cuda").cases(True)[0]
    return replace(case, T=5, I=128, O=64, **changes)


@pytest.fixture
def alone(monkeypatch):
    """Without what `make peers` brings, which has tests of its own."""
    names = ("bf16", "copy", "marlin", "humming", "lrkern", "fused")
    monkeypatch.setattr(mxfp4.Suite, "providers", lambda self: names)
    return names


def test_mxfp4_is_asked_at_the_sizes_of_large_layers():
    suite = mxfp4.Suite([]).on("cuda")
    full, quick = suite.cases(False), suite.cases(True)
    decode = {(case.I, case.O, case.T) for case in full if case.passes == "no_grad" and case.method == "linear"}
    sides = ((4096, 14336), (14336, 4096), (4096, 4096))
    assert decode == {(*side, T) for side in sides for T in (1, 2, 4, 8, 16, 512, 2048, 8192)}
    assert {str(case) for case in quick} < {str(case) for case in full} and len(quick) == 8
    assert {"copy", "marlin", "humming", "bf16", "lrkern", "fused"} < set(suite.providers())


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_mxfp4_beside_its_peers(gpu, peers, alone, method):
    case = few(method=method, R=4 if method == "lora" else None)
    rows, missing = measured(mxfp4.Suite([]), case)
    assert not missing and rows.keys() == {*alone, "again"}
    assert all(rows[name]["error"] < 1e-2 for name in {*alone} - {"copy"}) and rows["copy"]["error"] is None
    packed = 64 * (64 + 4)
    for name, row in rows.items():
        reads = 64 * 128 * 2 if name in ("bf16", "again") else packed
        assert row["reads"] == reads and row["of_read"] is None
        assert row["of_copy"] == pytest.approx(reads / packed * rows["copy"]["p50_ms"] / row["p50_ms"])
    assert "of copy" in report.table(list(rows.values()), "bf16") and rows["fused"]["kernels"] == ["sm90_kernel"]


def test_mxfp4_without_its_peers(gpu, alone, monkeypatch):
    for name in ("vllm", "humming"):
        monkeypatch.setitem(sys.modules, name, None)
    rows, missing = measured(mxfp4.Suite([]), few())
    assert missing == dict.fromkeys(("marlin", "humming"), "not installed")
    assert rows.keys() == {*alone, "again"} - missing.keys()


def test_a_peer_whose_bytes_lie_otherwise_is_not_timed(gpu, peers, alone, monkeypatch):
    apply = peers.apply_fp4_marlin_linear
    peers.apply_fp4_marlin_linear = lambda x, weight, *more: apply(x, weight.roll(1, 0), *more)
    rows, missing = measured(mxfp4.Suite([]), few())
    assert "marlin" not in rows and "computes something else: error 1" in missing["marlin"]


def test_peers_have_no_part_in_training(gpu, peers, alone):
    rows, missing = measured(mxfp4.Suite([]), few(passes="fwd+bwd"))
    assert not missing and rows.keys() == {"bf16", "again", "lrkern", "fused"}


# ---------------------------------------------------------------------------------------------------- timing


def test_what_cannot_be_captured_is_timed_without_a_graph_and_said(gpu, monkeypatch):
    def waits(self, d):
        def forward():
            if gpu.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nand where")
            return lora_cuda.Suite.addmm(self, d).forward()

        return Call(forward)

    monkeypatch.setattr(lora_cuda.Suite, "peft", waits)
    rows, missing = measured(lora.Suite([]), small("no_grad"))
    assert not missing and gpu.mode == "default" and gpu.captured
    why = "called a synchronizing CUDA operation"
    assert {name: row["eager"] for name, row in rows.items() if row["eager"]} == {"peft": why}
    assert f"peft without a graph, host time included: {why}" in report.table(list(rows.values()), "peft")

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timing.as_graphs([timing.Step(lambda _: broken())])
    assert gpu.mode == "default"


def test_the_cache_is_read_full_before_the_time(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: seen.append("event")
            self.synchronize = lambda: seen.append("wait")

        def elapsed_time(self, other):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    step = timing.Step(lambda _: seen.append("run"), lambda: seen.append("prepare"))
    flush = SimpleNamespace(sum=lambda: seen.append("read"))
    assert timing.once_cuda(step, flush) == 1.5
    assert seen == ["prepare", "read", "event", "run", "event", "wait"]


def test_names_of_kernels_are_the_profilers(monkeypatch):
    kinds = torch.autograd.DeviceType
    event = lambda name, kind: SimpleNamespace(name=name, device_type=kind)
    events = [
        event("void lrk::gemm_kernel<64>", kinds.CUDA), event("void lrk::gemm_kernel<64>", kinds.CUDA),
        event("Memcpy DtoD", kinds.CUDA), event("cudaLaunchKernel", kinds.CPU),
    ]  # fmt: skip
    ran = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert ran == ["ready"]

        events = staticmethod(lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.kernels_of(timing.Step(ran.append, lambda: "ready")) == {"void lrk::gemm_kernel<64>"}
