# SPDX-License-Identifier: Apache-2.0
"""tools/gpu.py and tools/gpu_kernels.py as far as a machine without a GPU can try them."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lrkern import testing
from lrkern.ops.dispatch import library, use_library
from tools import families, gpu, gpu_kernels, gpu_status, sources, tune
from tools.families import Shape
from tools.sources import ROOT


def run(*arguments):
    command = [sys.executable, "tools/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path, ["lora"], part="part", deadline=time.monotonic() + 60)


# ---------------------------------------------------------------------------------------------- the whole script


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_every_part_says_so(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device: nothing was shown" in done.stdout
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert parts.pop("env")["status"] == "passed"
    assert parts and all(p["status"] == "skipped" and p["note"] == "no CUDA device" for p in parts.values())
    assert {f.name for f in tmp_path.iterdir()} == set(gpu_status.FILES)
    evidence = gpu_status.Evidence.read(tmp_path)
    assert evidence.covers("lora") and evidence.verdict("tests") == "not run"


@pytest.mark.slow
def test_rehearsal_on_the_cpu(tmp_path):
    """The same ways through the script, in two slices: what passed is not run again."""
    first = run("--out", tmp_path, "--rehearse", "--only", "lora", "--parts", "ptx,tests:registry,ceilings,kernels")
    assert first.returncode == 0, first.stdout + (tmp_path / "tests.txt").read_text()
    second = run("--out", tmp_path, "--rehearse", "--only", "lora", "--resume", "--parts", "ptx,sanitizer:memcheck")
    assert second.returncode == 0, second.stdout
    assert "ptx                  passed before" in second.stdout
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert parts["ptx_sm90"]["note"] == "80 forms, and a GEMM"
    assert set(parts) == {"env", "ptx", "ptx_sm90", "tests:registry", "ceilings", "kernels", "sanitizer:memcheck"}
    assert all(p["status"] == "passed" for p in parts.values()), parts
    evidence = gpu_status.Evidence.read(tmp_path)
    assert {r["part"] for r in evidence.rows} == {"ceilings", "kernels"}
    text = (tmp_path / "summary.md").read_text()
    assert "| lora_shrink | T=" in text and "40 wrappers" in text


@pytest.mark.slow
def test_rehearsal_of_tuning(tmp_path):
    """Every part but the profiler's goes its way over the emulator; the table that policy reads gets a row of it."""
    import build

    if why := build.why_not():
        pytest.skip(why)
    build.executable("tune", ["tests/emulator/tune.cu", *tune.SOURCES], "plain")
    done = run("--out", tmp_path, "--rehearse", "--tune", "--only", "lora", "--parts", "tune")
    assert done.returncode == 0, done.stdout + (tmp_path / "bench.log").read_text()
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert {n: p["status"] for n, p in parts.items() if n.startswith("tune")} == {
        name: "skipped" if name == "tune:counters" and not gpu.tool("ncu") else "passed" for name, *_ in tune.PARTS
    }
    rows = gpu_status.rows_of(tmp_path / "bench.jsonl")
    sweep = [r for r in rows if r.get("tune") == "sweep"]
    assert len({r["span"] for r in sweep}) > 2 and all(r["equal"] for r in sweep)
    assert {r["level"] for r in rows if r.get("tune") == "latency"} == {"shared", "l1", "l2", "dram"}
    assert all(r["right"] for r in rows if r.get("tune") == "ladder")
    assert {r["kernel"] for r in rows if r["suite"] == "shape"} >= {"lora_shrink", "lora_expand"}
    assert re.search(r"^    \{80, \d+, [\d.]+\},  // a rehearsal", (tmp_path / "tuned.h").read_text(), re.M)


def test_tuning_fits_its_five_minutes():
    session = gpu.Session(Path(), sources.families())
    assert sum(seconds for name, seconds, _ in gpu.tuning(session) if name not in ("build", "env")) <= 440
    correct_first = ["env", "build", "ptx", "tests:registry"]
    assert [name for name, *_ in gpu.tuning(session)] == [*correct_first, *(name for name, *_ in tune.PARTS)]


FAMILIES = pytest.mark.parametrize("family", sources.families())


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in sources.families() if families.load(f).TESTS])
def test_rehearsal_of_a_familys_own_tests(tmp_path, family):
    done = run("--out", tmp_path, "--rehearse", "--only", family, "--parts", "tests:families")
    assert done.returncode == 0, done.stdout + (tmp_path / "tests.txt").read_text()
    assert all((ROOT / file).exists() for file in families.load(family).TESTS)
    assert json.loads((tmp_path / "parts.json").read_text())["tests:families"]["status"] == "passed"


def test_a_limit_leaves_the_rest_for_a_resume(tmp_path):
    done = run("--out", tmp_path, "--limit", 14)
    assert done.returncode == 0
    assert "left for --resume: env, build, ptx, ptx_sm90, tests:registry" in done.stdout


# ---------------------------------------------------------------------------------------------- commands


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_hangs_is_ended_with_its_children(session):
    session.deadline = time.monotonic() + 1
    start = time.monotonic()
    code, text = session.run("sh", "-c", "sleep 60 & echo $!; sleep 61", log="tests.txt")
    assert code is None and time.monotonic() - start < 20
    assert gpu.plain(code, text) == ("failed", "ran out of time")
    time.sleep(0.2)
    assert not alive(int(text))


PARTS = [name for name, *_ in gpu.parts_of(gpu.Session(Path(), sources.families()))]


@pytest.mark.parametrize("name", [name for name in PARTS if name != "env"])
def test_each_part_holds_its_time_limit(name, session, tmp_path, monkeypatch):
    """Whatever it runs hangs: it has failed soon after its time, and nothing it started is left."""
    hangs = tmp_path / "hangs"
    hangs.write_text('#!/bin/sh\necho $$ >> "$0.pids"\nsleep 61 &\necho $! >> "$0.pids"\nwait\n')
    hangs.chmod(0o755)
    monkeypatch.setattr(gpu, "PYTHON", str(hangs))
    monkeypatch.setattr(gpu, "tool", lambda name: str(hangs))
    monkeypatch.setattr(gpu, "PROBES", tmp_path / "probes")
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    session.families, session.device, start = sources.families(), "cuda", time.monotonic()
    ((seconds, part),) = [(seconds, part) for each, seconds, part in gpu.parts_of(session) if each == name]
    assert 10 <= seconds <= 600
    session.deadline = start + 0.3
    status, note = part(session, {"gpus": [["a GPU", "90", 1, 1]]})
    assert status != "passed" and time.monotonic() - start < 10, (status, note)
    pids = list(map(int, (tmp_path / "hangs.pids").read_text().split()))
    assert len(pids) >= 2
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.fixture
def own_kernels(monkeypatch):
    """A second kernel for LoRA, on sm_90 alone."""
    shrink = next(k for k in gpu_status.kernels() if k.name == "lora_shrink")
    expand = next(k for k in gpu_status.kernels() if k.name == "lora_expand")
    own = replace(expand, source=replace(expand.source, arch="90"))
    monkeypatch.setattr(gpu_status, "kernels", lambda: [shrink, own])


@pytest.mark.parametrize("only", [False, True])
def test_fused_paths_run_again(own_kernels, session, only):
    session.families, session.only = ["lora", "mora"], only
    assert not any(name.startswith("fused") for name, *_ in gpu.parts_of(session)), "not on this GPU"
    session.capability = "90"
    names = [name for name, *_ in gpu.parts_of(session)]
    again = ["tests:registry", "tests:families", "tests:layers", *(f"sanitizer:{check}" for check in gpu.TOOLS)]
    assert [name for name in names if name.startswith("fused")] == [f"fused:{name}" for name in again]
    assert names.index("tests:library") < names.index("fused:tests:registry") < names.index("sanitizer:memcheck")
    assert names.index("fused:sanitizer:memcheck") < names.index("ceilings")


def test_a_part_knows_which_path_it_runs(own_kernels, session, tmp_path, monkeypatch):
    """The portable one whatever the variable says outside, over all families; then the other, over those that have it."""
    says = tmp_path / "says"
    says.write_text('#!/bin/sh\necho "path $LRKERN_FUSED: $@"\n')
    says.chmod(0o755)
    monkeypatch.setattr(gpu, "PYTHON", str(says))
    monkeypatch.setenv("LRKERN_FUSED", "1")
    session.families, session.device, session.capability = ["lora", "mora"], "cuda", "90"
    parts = {name: run for name, _, run in gpu.parts_of(session)}
    for name in ("tests:registry", "fused:tests:registry", "tests:families", "fused:tests:families"):
        parts[name](session, {"gpus": [["a GPU", "90", 0, 0]]})
    said = [line for line in (tmp_path / "tests.txt").read_text().splitlines() if line.startswith("path ")]
    assert [line.split(":")[0] + ":" for line in said] == ["path 0:", "path all:"] * 2
    assert said[0].endswith("-k cuda") and "lora_linear" in said[1] and "mora" not in said[1]
    assert "test_mora.py" in said[2] and "test_lora.py" in said[3] and "test_mora.py" not in said[3]


def test_kernels_of_one_architecture_are_timed_on_it_by_their_path(own_kernels, monkeypatch):
    of = lambda name: families.Timed(name, lambda: os.environ["LRKERN_FUSED"], {}, 0)
    there = SimpleNamespace(timed=lambda *_: [of("lora_expand"), of("lora_shrink")])
    monkeypatch.setattr(gpu_kernels, "load", lambda family: there)
    found = lambda device: [(t.kernel, t.call()) for t in gpu_kernels.calls("lora", gpu_kernels.SMALL, device)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert found("cuda") == [("lora_expand", "all"), ("lora_shrink", "0")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert found("cuda") == found("cpu") == [("lora_shrink", "0")]


def test_the_summary_says_what_is_beyond_the_base(session, tmp_path):
    (tmp_path / "env.txt").write_text("gpu: one\n")
    row = {
        "suite": "lora",
        "case": "T=1",
        "dtype": "bfloat16",
        "provider": "fused",
        "p50_ms": 0.5,
        "extra_over_base": 0.041,
    }
    session.rows([row])
    head, row = gpu.summary(session, {}).strip().splitlines()[-3::2]
    cells = dict(zip(*([c.strip() for c in line.strip("|").split("|")] for line in (head, row)), strict=True))
    assert cells["over base"] == "+4.1%" and cells["ms"] == "0.5" and cells["provider"] == "fused"


def test_the_layers_tests_are_there():
    assert all((ROOT / file).exists() for file in gpu.LAYERS)


@pytest.mark.skipif(not gpu.tool("nvcc"), reason="no nvcc")
def test_the_programs_for_the_device_build(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PROBES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--prepare"])
    assert gpu.main() == 0
    assert all((tmp_path / name).exists() for name in ("wrappers", "planted", *gpu.SM90))
    assert (tmp_path / sources.KEPT.name).read_text() == sources.printed()


def test_a_part_that_fails_or_breaks_does_not_cost_the_rest(tmp_path, monkeypatch, capsys):
    def broken(session, known):
        raise KeyError("oops")

    def fails(session, known):
        return gpu.plain(*session.run("sh", "-c", "echo no; exit 3", log="tests.txt"))

    def works(session, known):
        return "passed", "fine"

    parts = [("env", 10, gpu.env), ("ptx", 10, broken), ("tests:a", 10, fails), ("tests:b", 10, works)]
    monkeypatch.setattr(gpu, "parts_of", lambda session: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--rehearse"])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    assert "KeyError: 'oops'" in out and "exit status 3: no" in out and "passed: env, tests:b" in out
    assert "failed: ptx, tests:a" in out
    parts[1] = ("ptx", 10, works)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    assert gpu.main() == 1, "tests:a still fails"
    out = capsys.readouterr().out
    assert "tests:b              passed before" in out and "failed: tests:a" in out


def test_logs_stay_small(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before\n" + b"a" * 1000 + b"b" * 1000)
    text = gpu.trim(path, 7, limit=100)
    assert text == "a" * 50 + "\n[... 1900 bytes left out ...]\n" + "b" * 50
    assert path.read_text() == "before\n" + text


@pytest.mark.parametrize(
    ("archs", "capability", "yes"),
    [
        ("80-real 90-real 90-virtual", "90", True), ("80-real 90-real 90-virtual", "86", True),
        ("80-real 90-real 90-virtual", "100", True), ("80-real", "90", False), ("90-real", "80", False),
        ("90", "90", True), ("90", "120", True), ("", "90", False),
    ],
)  # fmt: skip
def test_which_devices_a_build_serves(archs, capability, yes):
    assert gpu.covers(archs, capability) == yes


@pytest.mark.parametrize(
    ("code", "text", "status", "note"),
    [
        (0, "....\n32 passed, 5 deselected in 7.12s\n", "passed", "32 passed, 5 deselected"),
        (0, "===== 32 passed in 61.12s (0:01:01) =====\n", "passed", "32 passed"),
        (1, "F.\nFAILED tests/a.py::b - c\n1 failed, 31 passed in 7.12s\n", "failed", "1 failed, 31 passed"),
        (0, "s.\nSKIPPED [3] tests/test_cuda.py: no CUDA device\n32 passed, 3 skipped in 1.0s\n", "failed", "no CUDA"),
        (0, "ss\n2 skipped in 1.0s\n", "failed", "nothing ran: 2 skipped"),
        (5, "7 deselected in 1.0s\n", "failed", "7 deselected"),
        (None, "...", "failed", "ran out of time"),
        (3, "INTERNALERROR> KeyError\n", "failed", "exit status 3: INTERNALERROR> KeyError"),
    ],
)
def test_what_a_pytest_run_amounts_to(code, text, status, note):
    got = gpu.pytest_verdict(code, text)
    assert got[0] == status and note in got[1], got


# ---------------------------------------------------------------------------------------------- compute-sanitizer

BANNER = "========= COMPUTE-SANITIZER\n"
CASES = "lora_shrink[odd] torch.bfloat16\ncases: 195 of 195 in 40.1 s\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
WRITE = """========= Invalid __global__ write of size 4 bytes
=========     at {}+0x150 in planted.cu:14
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f2f48000100 is out of bounds
"""
BARRIER = """========= Barrier error detected. Divergent thread(s) in warp.
=========     at lrk::planted(int, int *, int)+0xa0 in planted.cu:19
=========     by thread (19,0,0) in block (0,0,0)
"""
RACE = """========= Error: Race reported between Write access at void lrk::<unnamed>::wgrad_kernel<lrk::bf16, (int)16>()+0xf0
=========     and Read access at void lrk::<unnamed>::wgrad_kernel<lrk::bf16, (int)16>()+0xd0 [32 hazards]
"""
UNREAD = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cutlass::Kernel2<x>(T1::Params)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: lrk::lora_shrink_cuda [0x1754] in _C.so
"""
NO_DEVICE = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Error: couldn't find exit code.
"""  # 2025.3.1 on a machine without a GPU


@pytest.mark.parametrize(
    ("code", "text", "status", "note"),
    [
        (0, BANNER + CASES + CLEAN, "passed", "195 of 195 cases, 0 errors"),
        (0, BANNER + CASES + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed", "0 hazards"),
        (66, BANNER + WRITE.format("lrk::planted(int)") + CLEAN, "failed", "1 errors in our kernels, first: Invalid __global__"),
        (66, BANNER + BARRIER * 3 + CASES + CLEAN, "failed", "3 errors in our kernels, first: Barrier error"),
        (66, BANNER + RACE + CASES + CLEAN, "failed", "1 errors in our kernels, first: Error: Race reported"),
        (66, BANNER + UNREAD + CASES + "========= ERROR SUMMARY: 1 error\n", "passed", "(1 in kernels that are not ours)"),
        (0, BANNER + CLEAN, "failed", "the cases did not end"),
        (1, BANNER + CASES + CLEAN, "failed", "exit status 1"),
        (None, BANNER + "lora_shrink[odd]\n", "failed", "ran out of time"),
        (255, NO_DEVICE, "refused", "Error: couldn't find exit code."),
        (255, "unrecognised option '--nonsense'\n", "refused", "unrecognised option"),
        (1, "========= Device not supported. Please refer to the documentation.\n", "refused", "Device not supported"),
    ],
)  # fmt: skip
def test_what_a_sanitizer_run_amounts_to(code, text, status, note):
    got = gpu.verdict(code, text)
    assert got[0] == status and note in got[1], got


def test_a_planted_error_is_recognised():
    assert gpu.device_errors(BANNER + WRITE.format("lrk::planted(int, int *, int)"))[:2] == (1, 0)
    assert gpu.device_errors(BANNER + WRITE.format("_ZN3lrk7plantedEiPii"))[:2] == (1, 0)
    assert gpu.device_errors(NO_DEVICE) == (0, 0, "")


# ---------------------------------------------------------------------------------------------- kernels


def test_every_kernel_is_timed():
    """But for those that are timed with another."""
    names = {
        timed.kernel
        for family in sources.families()
        for dtype in (torch.float32, torch.bfloat16)
        for timed in families.load(family).timed(library(), "cpu", dtype, Shape(T=20, I=64, O=64, R=4))
    }
    assert names == {name for name, kernel in families.kernels().items() if not kernel.part}


@pytest.fixture
def emulator(stack):
    import build

    if why := build.why_not():
        pytest.skip(why)
    stack.enter_context(use_library(build.ops()))
    return build


@FAMILIES
def test_the_sanitizers_cases_reach_every_kernel(family, emulator):
    archs = {k.source.arch for k in gpu_status.kernels() if k.source.family == family} & {"", "90"}  # what the emulator has
    wanted = {k.name for k in gpu_status.kernels() if k.source.family == family and k.source.arch in archs}
    emulator.launched()
    for arch in sorted(archs):
        with testing.fused(bool(arch)), emulator.setting("arch", int(arch or 80)):
            for _, call in gpu_kernels.samples([family], "cpu", gpu_kernels.DTYPES[:2]):
                call()
    assert {name for name, _, _ in emulator.launched()} >= {n for n in wanted if families.kernels()[n].by_ops}


@FAMILIES
def test_each_timed_call_launches_its_kernel(family, emulator):
    parts = {name for name, kernel in families.kernels().items() if kernel.part}
    archs = {k.name: k.source.arch for k in gpu_status.kernels()}
    for timed in families.load(family).timed(library(), "cpu", torch.bfloat16, Shape(T=70, I=600, O=600, R=16)):
        emulator.launched()
        if archs[timed.kernel] not in ("", "90"):
            continue
        arch = archs[timed.kernel]
        with testing.fused(bool(arch)), emulator.setting("arch", int(arch or 80)):
            timed.call()
        seen = {name for name, _, _ in emulator.launched()}
        known = {timed.kernel, *timed.also} | parts
        assert seen >= {timed.kernel, *timed.also} and seen <= known, (timed.kernel, seen)
