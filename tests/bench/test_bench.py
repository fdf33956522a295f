# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its rows, its noise rule, what its figures mean, and its refusals."""

import importlib
import inspect
import itertools
import json
import random
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import report
import run
import timing
from suite import PROVIDERS, Call, Case, Data, Suite
from suites import basis as basis_suite
from suites import lora
from suites import op as op_suite
from suites import rng as rng_suite

import build as emulator_build
from lrkern.reference import OPS

KEYS = {
    *("suite", "case", "dtype", "device", "provider", "p20_ms", "p50_ms", "p80_ms", "extra_over_base", "adapter_ms"),
    *("saved_bytes", "bytes", "flops", "roof_ms", "of_roof", "error", "peak_bytes", "command", "noise_ms", "noisy"),
    *("basis_bytes", "elements", "eager", "rounds", "reads", "of_read", "beside", "paired", "pairs"),
    *("kernels", "of_copy"),
}
ORDER = ("method", "type", "k", "A", "T", "I", "O", "R", "ab", "p", "norm", "pass")
SIZES = (32, 48, 40, 4)  # T, I, O, R
BF16 = torch.bfloat16
TOO_SLOW = run.too_slow  # of this machine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little time per case, no measured ceilings, one or two copies of the data, one thread."""
    monkeypatch.setattr(run, "SECONDS", {True: 0.02, False: 0.02})
    monkeypatch.setattr(run, "ROUNDS", {True: (3, 20), False: (3, 20)})
    monkeypatch.setattr(run, "ceilings", lambda device, dtype, quick: (1e11, 1e10))
    monkeypatch.setattr(run, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(run, "too_slow", lambda case, device: False)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work, what is tiny would wait for its second thread
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.delattr(lora.Suite, "compile")


def measure(suite, case, device="cpu"):
    """By provider, the A/A run left out."""
    rows, missing = run.measure(suite, case, device, 0.02, "command")
    return {r["provider"]: r for r in rows if r["provider"] != "again"}, missing


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_run_writes_rows_a_table_and_a_plot(not_compiled, monkeypatch, tmp_path, capsys):
    cases = [
        lora.case("lora", SIZES, "fwd+bwd", BF16, p=0.1),
        lora.case("lora", SIZES, "fwd"),
        lora.case("dora", SIZES, "bwd"),
        lora.case("dora", (1, 48, 40, 4), "no_grad"),
    ]
    monkeypatch.setattr(lora.Suite, "cases", lambda self, quick: cases)
    rows_file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    assert run.main(["lora", "--quick", "--json", str(rows_file), "--plot", str(plot)]) == 0
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [(r["case"], r["provider"]) for r in rows] == [
        (str(case), provider) for case in cases for provider in ("base", "again", "eager", "peft", "lrkern")
    ]
    for before, r in zip([None, *rows], rows, strict=False):
        assert r.keys() == KEYS
        assert r["command"] == f"python bench/run.py lora --quick --json {rows_file} --plot {plot}"
        assert r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]
        assert 0 < r["of_roof"] == pytest.approx(r["roof_ms"] / r["p50_ms"])
        assert r["rounds"] >= 3
        if r["provider"] == "again":  # the first one's second run: only its times are its own
            assert r["error"] is r["saved_bytes"] is r["peak_bytes"] is r["adapter_ms"] is None
            assert abs(r["p50_ms"] - before["p50_ms"]) == pytest.approx(r["noise_ms"])
            continue
        assert r["error"] < (1e-2 if r["dtype"] == "bfloat16" else 1e-5)
        assert (r["adapter_ms"] is None) == (r["provider"] == "base")
        assert (r["saved_bytes"] is None) == ("no_grad" in r["case"])
        assert r["peak_bytes"] > 0
        if r["provider"] == "base":
            assert r["extra_over_base"] == 0 and not r["saved_bytes"]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[2:])) <= 120  # after the machine and the command
    assert all(str(case) in text for case in cases)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_cases_are_named_in_one_order():
    for cases in (lora.Suite([]).cases(False), op_suite.Suite([]).cases(False), lora.Suite([]).cases(True)):
        texts = [f"{case} {case.dtype}" for case in cases]
        assert len(set(texts)) == len(texts)
        for case in cases:
            keys = [part.split("=")[0] for part in str(case).split(" ")]
            assert keys == [key for key in ORDER if key in keys]
            assert re.search(r" pass=(fwd|bwd|fwd\+bwd|no_grad)$", str(case))
    full = Case(method="m", type="t", k=1, A=2, T=3, I=4, O=5, R=6, passes="fwd", dtype=torch.float32)
    assert str(full) == "method=m type=t k=1 A=2 T=3 I=4 O=5 R=6 pass=fwd"


def test_providers_have_fixed_ids():
    assert lora.Suite.providers() == ("base", "eager", "compile", "peft", "lrkern")
    assert op_suite.Suite.providers() == ("base", "eager", "lrkern")
    assert len(set(PROVIDERS)) == len(PROVIDERS) == 27


@pytest.mark.slow
def test_compile_is_there():
    got, missing = measure(lora.Suite([]), lora.case("lora", SIZES, "fwd+bwd"))
    assert not missing and got["compile"]["error"] < 1e-5 and got["compile"]["adapter_ms"] > 0


def test_what_cannot_run_is_listed_with_the_reason(monkeypatch, capsys):
    def no_compiler(self, d):
        raise RuntimeError("no C++ compiler\nand much more")

    def not_there(self, d):
        raise ModuleNotFoundError("No module named 'vllm'")

    monkeypatch.setattr(lora.Suite, "compile", no_compiler)
    monkeypatch.setattr(lora.Suite, "vllm", not_there, raising=False)
    monkeypatch.setattr(lora.Suite, "cases", lambda self, quick: [lora.case("lora", SIZES, "no_grad")])
    assert run.main(["lora"]) == 0
    text = capsys.readouterr().out
    assert "missing: compile (no C++ compiler)\nmissing: vllm (not installed)\n" in text and "torchao" not in text
    monkeypatch.setattr(lora.Suite, "peft", no_compiler)
    with pytest.raises(RuntimeError):  # this one is never missing
        run.main(["lora"])


# --------------------------------------------------------------------------------------------------- what figures mean


@pytest.mark.parametrize("p", [None, 0.1])
def test_lrkern_saves_s_and_the_seed(not_compiled, p):
    T, _, _, R = SIZES
    got, _ = measure(lora.Suite([]), lora.case("lora", SIZES, "fwd+bwd", BF16, p))
    assert got["lrkern"]["saved_bytes"] == T * R * 4 + (8 if p else 0)
    assert got["peft"]["saved_bytes"] > got["lrkern"]["saved_bytes"]


@pytest.mark.parametrize("passes", ["fwd+bwd", "no_grad"])
@pytest.mark.parametrize(("method", "dtype", "p"), [
    ("lora", torch.float32, None), ("lora", torch.float32, 0.3), ("lora", BF16, None), ("dora", torch.float32, None),
])  # fmt: skip
@pytest.mark.parametrize("provider", ["eager", "peft", "lrkern"])
def test_the_adapter_alone_gives_what_the_whole_gives(provider, method, dtype, p, passes):
    """What is stored is the true base's result and gradient, so both ways must agree in y and in every gradient."""
    suite, case = lora.Suite([]), lora.case(method, SIZES, passes, dtype, p)
    call = getattr(suite, provider)(data := suite.data(case, "cpu", 0))

    def results(call):
        torch.manual_seed(1)  # one dropout mask
        step = run.step(passes, data, call)
        out = step.run(step.ready())
        return [out.clone()] if passes == "no_grad" else [out[0].detach().clone(), *(g.clone() for g in out[1])]

    whole, alone = results(call), results(call.alone)
    assert len(whole) == (1 if passes == "no_grad" else 4 + (method == "dora"))
    assert not torch.equal(data.y, whole[0])  # the adapter does something
    for mine, true in zip(alone, whole, strict=True):
        tolerance = 2e-2 if dtype == BF16 else 1e-5
        assert (mine - true).norm() <= tolerance * true.norm()


def test_providers_agree_and_an_error_shows(not_compiled, monkeypatch):
    suite, case = lora.Suite([]), lora.case("dora", SIZES, "fwd+bwd")
    for provider in suite.providers():
        assert run.error(suite, case, provider, "cpu") < 1e-6
    monkeypatch.setattr(lora, "dora_gain", lambda weight, a, b, magnitude: magnitude)
    assert run.error(suite, case, "peft", "cpu") > 0.1  # the truth is another formula now


def test_an_error_of_a_gradient_shows(monkeypatch):
    monkeypatch.setattr(lora.Suite, "eager", lambda self, d: Call(lambda: d.formula(torch.nn.functional.linear,
                        **{**d.inputs, "a": d.inputs["a"].detach() + 0 * d.inputs["a"]})))  # fmt: skip
    suite = lora.Suite([])
    assert run.error(suite, lora.case("lora", SIZES, "fwd"), "eager", "cpu") < 1e-6
    assert run.error(suite, lora.case("lora", SIZES, "bwd"), "eager", "cpu") == pytest.approx(1)  # dA is 0


def test_peak_bytes():
    def work(_):
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(3 << 20, dtype=torch.uint8)
        del b
        return a, torch.empty(1 << 20, dtype=torch.uint8)

    assert timing.peak_bytes(timing.Step(work), "cpu") == 4 << 20
    before = torch.empty(1 << 20)
    assert timing.peak_bytes(timing.Step(lambda t: t.neg_(), lambda: before), "cpu") == 0
    x, a = torch.randn(64, 256), torch.randn(8, 256)
    shrink = timing.Step(lambda _: torch.ops.lrkern.lora_shrink(x, a))
    assert 64 * 8 * 4 <= timing.peak_bytes(shrink, "cpu") < x.nbytes  # allocations of C++ ops are seen


def test_saved_bytes():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    assert timing.saved_bytes(lambda: torch.nn.functional.linear(x, w), [x, w]) == 0
    assert timing.saved_bytes(lambda: (x * 1).sigmoid() @ w.mT, [x, w]) == x.nbytes


def test_ceilings_are_plausible(monkeypatch):
    monkeypatch.setitem(timing.SIZES, "cpu", (1 << 24, 512))
    flop, moved = timing.ceilings("cpu", torch.float32)
    assert 1e9 < flop < 1e14 and 1e8 < moved < 1e13


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_compared_with_the_smallest_figure():
    base = {("base", "whole"): 10.0, ("base", "again"): 10.3}
    wide = {("peft", "whole"): 14.0, ("lrkern", "whole"): 12.0}  # what is added: 4 and 2
    assert run.noise(base | wide) == (pytest.approx(0.3), False)
    assert run.noise(base | wide | {("lrkern", "whole"): 11.4})[1]
    assert run.noise(base | wide | {("peft", "alone"): 4.0, ("lrkern", "alone"): 1.4})[1]  # the adapter alone counts
    assert not run.noise(base | wide | {("peft", "alone"): 4.0, ("lrkern", "whole"): 10.1, ("lrkern", "alone"): 1.6})[1]
    assert run.noise({("eager", "whole"): 2.0, ("eager", "again"): 2.3, ("lrkern", "whole"): 1.4})[1]  # no base


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "clock", lambda: self.now)

    def passes(self, ms):
        self.now += ms * 1e-3


class Fake(Suite):
    """base takes 10 ms, and up to 90 more until it was called `calm` times; lrkern adds 1 ms, and alone takes 0.01."""

    def __init__(self, clock, calm):
        self.clock, self.calm, self.calls, self.draw = clock, calm, 0, random.Random(0)

    def data(self, case, device, seed):
        return Data({"x": torch.zeros(1)})

    def base(self, data):
        def call():
            self.calls += 1
            self.clock.passes(10 + (self.calls < self.calm) * self.draw.uniform(0, 90))

        return Call(call)

    def lrkern(self, data):
        return Call(lambda: self.clock.passes(11), Call(lambda: self.clock.passes(0.01)))


@pytest.mark.parametrize(("calm", "attempts", "noisy"), [(0, 1, False), (1000, 2, False), (10**9, 3, True)])
def test_a_noisy_case_runs_again_with_more_rounds(monkeypatch, calm, attempts, noisy, capsys):
    rounds = []

    def interleaved(steps, count, device, tick=lambda share: None, original=timing.interleaved, **more):
        rounds.append(count)
        return original(steps, count, device, tick, **more)

    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(run, "ROUNDS", {False: (300, 300)})
    case = Case(method="fake", passes="no_grad", dtype=torch.float32)
    got, _ = measure(Fake(Clock(monkeypatch), calm), case)
    assert rounds[1:] == [300, 600, 1200][:attempts]  # the first call is the estimate
    assert all(r["noisy"] is noisy and (r["noise_ms"] > 0.2 * 0.01) is noisy for r in got.values())
    if not noisy:
        assert got["base"]["p50_ms"] == pytest.approx(10) and got["lrkern"]["p50_ms"] == pytest.approx(11)
        assert got["lrkern"]["adapter_ms"] == pytest.approx(0.01)
        assert got["lrkern"]["extra_over_base"] == pytest.approx(0.1)
    assert ("NOISY" in report.table(list(got.values()), "lrkern")) is noisy


@pytest.fixture
def slow_suite(monkeypatch):
    """A suite of six cases in place of op, by a clock of its own: data takes a second, a call as many as are asked for."""
    clock, begun = Clock(monkeypatch), {}

    def make(seconds):
        class Slow(Suite):
            cold = False

            def __init__(self, names):
                pass

            def cases(self, quick):
                return [Case(method="slow", k=k, passes="no_grad", dtype=torch.float32) for k in range(6)]

            def data(self, case, device, seed):
                begun.setdefault(case.k, clock.now)
                clock.passes(1e3)
                return Data({"x": torch.zeros(1)})

            def base(self, data):
                return Call(lambda: clock.passes(seconds * 1e3))

            def compile(self, data):
                raise AssertionError("asked for with --quick")

        monkeypatch.setattr(op_suite, "Suite", Slow)
        monkeypatch.setattr(run, "SECONDS", {True: 3.0})
        return clock, begun

    return make


def test_a_quick_case_keeps_to_its_share(slow_suite, monkeypatch, tmp_path, capsys):
    """A sixth of the time each, its data counted, though all three attempts are noisy; the last one what the others left."""
    monkeypatch.setattr(run, "noise", lambda p50: (1.0, True))
    clock, begun = slow_suite(seconds=0.1)
    rows_file = tmp_path / "rows.json"
    assert run.main(["op", "--quick", "--json", str(rows_file)]) == 0
    starts = [*begun.values(), clock.now]
    assert all(0.5 < (end - begin) / (run.QUICK / 6) <= 1.3 for begin, end in itertools.pairwise(starts))
    assert clock.now < run.QUICK
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert len(rows) == 12 and all(r["noisy"] and r["rounds"] >= 3 for r in rows)
    text = capsys.readouterr().out
    assert "missing: compile (not with --quick)" in text and "left out" not in text


def test_quick_begins_no_case_after_its_time(slow_suite, monkeypatch, capsys):
    """Where the least there is to measure takes longer than a share, the last cases are left out, and it says which."""
    monkeypatch.setattr(run, "noise", lambda p50: (1.0, True))
    clock, begun = slow_suite(seconds=2.0)
    assert run.main(["op", "--quick"]) == 0
    assert max(begun.values()) < run.QUICK < clock.now and len(begun) < 6
    text = capsys.readouterr().out
    assert text.count("A/A 1 ms, 3 rounds, NOISY") == len(begun)  # once only: a second attempt would not have fitted
    for k in range(6):
        said = f"left out: method=slow k={k} pass=no_grad fp32 (the time was up, and --quick)"
        assert (said in text) == (k not in begun)


def test_quick_leaves_out_16_bits_where_one_step_takes_tens_of_seconds(monkeypatch, capsys):
    monkeypatch.setattr(run, "too_slow", TOO_SLOW)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    case = partial(Case, method="m", T=512, passes="fwd+bwd", dtype=BF16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert run.too_slow(case(), "cpu") and not run.too_slow(case(), "cuda")
    assert not any(run.too_slow(c, "cpu") for c in (case(dtype=torch.float32), case(passes="no_grad"), case(T=None)))
    for quick in (["--quick"], []):
        assert run.main(["lora", "--list", *quick]) == 0
        assert ("pass=fwd+bwd bf16" in capsys.readouterr().out) == (not quick)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not run.too_slow(case(), "cpu")


@pytest.mark.parametrize("name", run.SUITES)
def test_quick_keeps_its_spread(name, monkeypatch):
    """No more cases than two minutes hold at four seconds each."""
    module = importlib.import_module(f"suites.{name}")
    if name == "emulator":
        monkeypatch.setattr(emulator_build, "why_not", lambda: "")
    suite = module.Suite([])
    quick, full = suite.cases(True), suite.cases(False)
    assert 0 < len(quick) <= min(30, len(full))
    if name in ("lora", "multi_lora"):
        assert {case.dtype for case in quick} == {torch.float32, BF16}
        assert {case.passes for case in quick} >= {"fwd+bwd", "no_grad"}


def test_turns_interleave_and_copies_rotate():
    seen = []
    step = lambda name, copy: timing.Step(lambda _: seen.append((name, copy)))
    names, copies = ("a", "b", "c"), 4
    times = timing.interleaved({name: [step(name, copy) for copy in range(copies)] for name in names}, 20, "cpu")
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys(names, 20)
    turns = seen[len(names) * copies :]  # after every step was run once; two calls a turn
    assert [copy for _, copy in turns] == [i % copies for i in range(2 * 60)]
    assert [name for name, _ in turns[::2]] == [name for name, _ in turns[1::2]]
    rounds = [tuple(name for name, _ in turns[i : i + 6 : 2]) for i in range(0, 120, 6)]
    assert all(sorted(r) == list(names) for r in rounds)
    assert len(set(rounds)) > 3  # orders differ


def test_a_pair_is_two_calls_in_succession(monkeypatch):
    """What drifts between pairs leaves their ratios alone, and each goes first as often as the other."""
    clock, seen, slow = Clock(monkeypatch), [], itertools.count(1)

    def step(name, copy, ms):
        return timing.Step(lambda _: (seen.append((name, copy)), clock.passes(ms * (1 + next(slow) // 40))))

    one, other = [step("one", i, 3) for i in range(3)], [step("other", i, 2) for i in range(2)]
    ratios = timing.paired(one, other, 0.5, "cpu")
    assert 5 <= len(ratios) < 60 and ratios == sorted(ratios) and ratios[len(ratios) // 2] == pytest.approx(1.5)
    firsts = [name for name, _ in seen[::4]]
    assert firsts == ["other", "one"] * (len(firsts) // 2) + ["other"] * (len(firsts) % 2)
    assert {copy for name, copy in seen if name == "one"} == {0, 1, 2}


def test_the_timed_call_of_a_turn_is_the_second(monkeypatch):
    clock = Clock(monkeypatch)
    costs = itertools.chain([9, 9], itertools.cycle([5, 1]))  # every step is run once before the first turn
    steps = [timing.Step(lambda _: clock.passes(next(costs)))] * 2
    assert timing.interleaved({"a": steps}, 4, "cpu")["a"] == pytest.approx([1] * 4)


def test_backward_alone_leaves_the_forward_untimed(monkeypatch):
    clock = Clock(monkeypatch)
    step = timing.Step(lambda _: clock.passes(2), lambda: clock.passes(50))
    assert timing.interleaved({"a": [step]}, 3, "cpu")["a"] == pytest.approx([2, 2, 2])


# ---------------------------------------------------------------------------------------------------------- the op suite


def test_the_large_case_has_every_argument():
    for op in OPS.values():
        parameters = inspect.signature(op.truth).parameters.values()
        sample = op.named(op.large(6, 24, 20, 4, False, device="cpu", dtype=torch.float32))
        assert {p.name for p in parameters if p.default is p.empty} <= sample.keys() <= set(op.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_ops_are_timed_beside_their_truth(name):
    suite = op_suite.Suite([name])
    cases = [replace(case, T=6, I=24, O=20, R=4) for case in suite.cases(False)]
    got, _ = measure(suite, cases[0])
    assert got.keys() == {"eager", "lrkern"} | ({"base"} if "weight" in OPS[name].parameters else set())
    assert bool(got["lrkern"]["flops"]) == bool(OPS[name].products) and got["lrkern"]["bytes"] > 0
    for case in cases:
        for provider in got if OPS[name].products else ():  # a plan is integers
            assert run.error(suite, case, provider, "cpu") < (1e-2 if case.dtype == BF16 else 1e-6)
    passes = {case.passes for case in cases}
    assert passes == ({"no_grad", "fwd+bwd"} if OPS[name].differentiable else {"no_grad"})


def test_work_of_an_op():
    case = Case(method="lora_linear", T=6, I=24, O=20, R=4, passes="no_grad", dtype=torch.float32)
    case = op_suite.Case(**case.__dict__)
    suite = op_suite.Suite(["lora_linear"])
    work = lambda case: suite.work(case, suite.data(case, "cpu", 0))
    products = 2 * 6 * (24 * 20 + 24 * 4 + 20 * 4)
    tensors = 4 * (6 * 24 + 20 * 24 + 20 + 4 * 24 + 20 * 4)
    assert work(case) == (products, tensors + 4 * 6 * 20)
    flop, _ = work(replace(case, passes="fwd+bwd"))
    assert flop == 2 * products + 2 * 6 * (24 * 4 + 20 * 4)  # W takes no gradient


# ------------------------------------------------------------------------------------------------- the basis suites


@pytest.mark.parametrize("method", ["nola", "vera_seed", "vera_small", "randlora_seed"])
@pytest.mark.parametrize(("I", "O"), [(24, 40), (40, 24)])
def test_random_bases_are_timed_beside_stored_ones(method, I, O):
    suite = basis_suite.Suite([])
    case = next(case for case in suite.cases(False) if case.method == method and "bwd" in case.passes)
    case = replace(case, T=20, I=I, O=O, R=4, k=7 if method == "nola" else None)
    got, missing = measure(suite, case)
    assert not missing
    assert got.keys() == {"base", "stored", "lrkern", "published" if method == "nola" else "peft"}
    assert got["lrkern"]["basis_bytes"] == 0 < got["stored"]["basis_bytes"]
    for provider in got.keys() - {"published"}:  # which draws another basis
        assert run.error(suite, case, provider, "cpu") < 1e-5
    assert all(row["adapter_ms"] for name, row in got.items() if name != "base")
    assert max(map(len, report.table(list(got.values()), suite.against).splitlines()[2:])) <= 120


def test_random_elements_are_counted():
    suite = rng_suite.Suite([])
    case = replace(suite.cases(True)[0], k=128, R=8, I=256)
    got, _ = measure(suite, case)
    assert got["lrkern"]["elements"] == got["eager"]["elements"] == 128 * 8 * 256
    assert "Gelem/s" in report.table(list(got.values()), suite.against)


# -------------------------------------------------------------------------------------------------------- the emulator


@pytest.mark.slow
@pytest.mark.skipif(bool(emulator_build.why_not()), reason=str(emulator_build.why_not()))
def test_the_emulator_is_timed(tmp_path, capsys):
    rows_file = tmp_path / "rows.json"
    assert run.main(["emulator", "--quick", "--case", "method=lora_shrink", "--json", str(rows_file)]) == 0
    text = capsys.readouterr().out
    for name in ("barrier", "shuffle", "ldmatrix", "mma"):
        assert re.search(rf"^{name} +[\d.]+ M thread switches/s", text, re.M)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [r["case"] for r in rows] == [
        *["method=lora_shrink pass=no_grad"] * 2,
        *["method=lora_shrink pass=fwd+bwd"] * 2,
    ]
    assert all(r.keys() == KEYS and r["p50_ms"] > 0 for r in rows)
    assert [r["provider"] for r in rows] == ["lrkern", "again"] * 2
    assert rows[0]["p50_ms"] < rows[2]["p50_ms"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("argv", "says"), [
    (["op", "lora_shrink", "lora_shrinc"], f"lora_shrinc must be in the registry, which has {', '.join(OPS)}"),
    (["lora", "lora_shrink"], "suite lora takes no names, got lora_shrink"),
    (["lora", "--case", "T=13"], "--case 'T=13' is in no case:\nmethod=lora T=512"),
    (["nothing"], "invalid choice: 'nothing'"),
])  # fmt: skip
def test_refusals(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2
    assert says in re.sub(r" +", " ", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        run.main(["lora", "--device", "cuda"])
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("passes", ["fwd", "bwd", "fwd+bwd", "no_grad"])
def test_cuda_graphs(passes):
    got, missing = measure(lora.Suite([]), lora.case("lora", SIZES, passes, BF16), "cuda")
    assert not missing and all(r["p50_ms"] > 0 for r in got.values())


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run.main(["lora", "--plot", "p.png"])
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_rows_survive_an_interrupt(monkeypatch, tmp_path, capsys):
    sizes = {"T": 6, "I": 24, "O": 20, "R": 4}
    cases = [replace(case, **sizes) for case in op_suite.Suite([]).cases(True)]
    fates = iter([run.measure])

    def measure_once(*args):
        if fate := next(fates, None):
            return fate(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", measure_once)
    monkeypatch.setattr(op_suite.Suite, "cases", lambda self, quick: cases)
    rows_file = tmp_path / "rows.json"
    assert run.main(["op", "--json", str(rows_file)]) == 130
    assert {json.loads(line)["case"] for line in rows_file.read_text().splitlines()} == {str(cases[0])}
    assert "stopped" in capsys.readouterr().out
