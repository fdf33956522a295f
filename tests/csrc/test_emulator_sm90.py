# SPDX-License-Identifier: Apache-2.0
"""The emulator's sm_90: mbarriers, copies of boxes, wgmma. It computes what the hardware computes, and catches the mistakes."""

import functools
import re
import shutil
import subprocess

import pytest

import build as emulator
from tests.csrc.test_emulator import VARIANTS, needs
from tools import sass

CASES, WRAPPERS = "tests/emulator/cases_sm90.cu", "tests/emulator/wrappers_sm90.cu"
HEALTHY_KERNELS = ("none", "pair")  # blocks alone, and in clusters of two
HEALTHY = [[str(schedule), "0", "0", "0"] for schedule in range(8)]


@functools.cache
def program(source, variant):
    needs(variant)
    return emulator.executable(source.split("/")[-1].removesuffix(".cu"), [source], variant)


def run_case(bug, variant, schedules=8, **env):
    done = emulator.execute(program(CASES, variant), bug, schedules, **env)
    return done, [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", HEALTHY_KERNELS)
def test_healthy_kernel_passes_under_every_schedule(kernel, variant):
    done, rows = run_case(kernel, variant)
    assert rows == HEALTHY and done.returncode == 0, done.stderr


# bug, the build that catches it, what the report says
CAUGHT = [
    ("bare", "tracked", "a bulk copy has not been waited for"),
    ("short_expect", "plain", "a phase of an mbarrier that is never over"),
    ("long_expect", "plain", "in phase 0 1 of 1 have arrived, 16 bytes are to come"),
    ("early_release", "tracked", "written before the readers' barrier"),
    ("double_arrive", "tracked", ""),  # more than may, or those of the next phase: it depends on who comes first
    ("wrong_parity", "plain", "a phase of an mbarrier that is never over"),
    ("registers_over", "plain", "set_registers"),
    ("box_offset", "plain", "the box begins 128 bytes into the swizzle's pattern of 1024"),
    ("unmade", "plain", "nobody has made this mbarrier"),
    ("beyond", "plain", "lies outside of shared memory"),
    ("nobody_waits", "plain", "a bulk load is under way when the block ends"),
    ("elected_wait", "tracked", "race in shared memory: no barrier between two accesses"),
    ("no_first_sync", "plain", "of the cluster has not made this mbarrier"),
    ("no_last_sync", "plain", "of the cluster has ended"),
    ("own_release", "tracked", "race in shared memory: no barrier between two accesses"),
    ("same_half", "tracked", "a bulk copy has not been waited for"),
    ("third_block", "plain", "no block 2 in a cluster of 2"),
]


@pytest.mark.parametrize(("bug", "variant", "message"), CAUGHT, ids=lambda v: v if " " not in v else "")
def test_caught_with_kernel_block_and_thread(bug, variant, message):
    done, rows = run_case(bug, variant, 2)
    assert message in done.stderr
    assert re.search(r"kernel gemm, block \(\d, \d, 0\), thread \(\d+, 0, 0\)", done.stderr)
    assert "719" in {row[1] for row in rows}


@pytest.mark.parametrize("bug", ["no_first_sync", "no_last_sync", "own_release"])
def test_tracked_whatever_the_schedule(bug):
    done, rows = run_case(bug, "tracked")
    assert [row[1] for row in rows] == ["719"] * 8
    assert bug != "no_last_sync" or "a block ends and knows not whether all that was sent to it has come" in done.stderr


@pytest.mark.parametrize("bug", ["early_release", "read_early", "register_touched", "own_release"])
def test_schedules_alone_disagree(bug):
    """The hardware acts as early or as late as it may: results are right under some schedule at most."""
    _, rows = run_case(bug, "plain")
    assert any(row[2] != "0" for row in rows)
    assert bug == "read_early" or any(row[2] == "0" for row in rows)


def healthy_lines():
    """Numbers and texts of the lines of the kernel, without the bugs' own."""
    hidden = 0
    for number, text in enumerate((emulator.ROOT / CASES).read_text().splitlines(), 1):
        if hidden or re.match(r" *if constexpr \(kBug ==", text):
            hidden += text.count("{") - text.count("}")
            if text.strip() == "} else {":
                hidden = 0
            continue
        yield number, text.split("//")[0]


# What only the other of the two kernels does.
NOT_IN = {
    "none": re.compile(r"sync_cluster|mbarrier_arrive_at|bulk_load_multicast"),
    "pair": re.compile(r"sync_threads|bulk_load\(bs|mbarrier_arrive\(empty"),
}


def waits():
    call = re.compile(r"\b(mbarrier_\w+|fence_\w+|sync_\w+|wgmma_\w+(<\d>)?|bulk_\w+(<\d>)?|fewer_registers<\d+>)\(")
    return [
        pytest.param(kernel, f"{CASES}:{number}", id=f"{call.search(text)[1]}-{number}-{kernel}")
        for number, text in healthy_lines()
        for kernel in HEALTHY_KERNELS
        if call.search(text) and not NOT_IN[kernel].search(text)
    ]


def test_the_kernel_has_every_kind_of_wait():
    kinds = {re.sub(r"(<\d+>)?-.*", "", p.id) for p in waits()}
    assert kinds == {
        "mbarrier_init", "fence_mbarrier_init", "mbarrier_arrive", "mbarrier_arrive_expect", "mbarrier_wait", "bulk_load",
        "sync_threads", "sync_warp", "sync_named", "wgmma_fence", "wgmma_commit", "wgmma_wait", "fence_async", "bulk_store",
        "bulk_commit", "bulk_wait_read", "fewer_registers", "sync_cluster", "mbarrier_arrive_at", "bulk_load_multicast",
    }  # fmt: skip


@pytest.mark.parametrize(("kernel", "place"), waits())
def test_every_wait_arrive_and_fence_is_missed(kernel, place):
    done, rows = run_case(kernel, "tracked", 1, LRK_EMU_SKIP=place)
    assert done.returncode == 1
    (row,) = rows
    assert "emulator: " in done.stderr or row[2] != "0"  # of a copy: what it would have moved is not there


# ---------------------------------------------------------------------------------------------- launches that overlap

OVERLAP = "tests/emulator/overlap_sm90.cu"
EARLY = "the launch before may not be over: no wait_predecessor"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["all_wait", "one_waits", "one_loads"])
def test_what_the_launch_before_wrote_is_there_after_the_wait(name, variant):
    done = emulator.execute(program(OVERLAP, variant), name)
    assert done.stdout.split() == ["0", "0"] * 8 and done.returncode == 0, done.stderr


# bug, what the launch before did there
TOO_EARLY = [
    ("late_wait", "wrote"),
    ("no_barrier", "wrote"),
    ("early_load", "wrote"),
    ("two_before", "wrote"),
    ("early_write", "reads"),
    ("early_overwrite", "wrote"),
]


@pytest.mark.parametrize(("bug", "did"), TOO_EARLY)
def test_access_before_the_wait_is_named(bug, did):
    done = emulator.execute(program(OVERLAP, "tracked"), bug)
    text = (emulator.ROOT / OVERLAP).read_text().splitlines()
    (line,) = [i for i, code in enumerate(text, 1) if re.search(rf"// bug:.*\b{bug}\b", code)]
    assert done.returncode == 1 and done.stdout.split()[::2] == ["719"] * 8
    assert done.stderr.count(f"{EARLY}\n  access at {OVERLAP}:{line}\n  the launch before {did} it at {OVERLAP}:") == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_launch_that_never_waits(variant):
    done = emulator.execute(program(OVERLAP, variant), "no_wait")
    assert ("calls no wait_predecessor" if variant != "tracked" else EARLY) in done.stderr
    assert done.stdout.split()[::2] == ["719"] * 8


# ---------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form(variant):
    done = emulator.execute(program(WRAPPERS, variant))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and all(line.endswith(" ok") for line in lines), done.stdout
    forms = [line for line in lines if line.startswith("wgmma")]
    assert len(forms) == 56 and len(lines) == 80
    assert {int(re.search(r" N (\d+)", line)[1]) for line in forms} == {8, 16, 32, 64, 128, 256}
    assert set(re.findall(r"swizzle (\d+)", done.stdout)) == {"16", "32", "64", "128"}


def test_layouts_are_those_of_cute():
    needs("plain")
    includes, why = emulator.cute_includes()
    if why:
        pytest.skip(why)
    emulator.OUT.mkdir(parents=True, exist_ok=True)
    oracle = emulator.OUT / "cute_maps_sm90"
    emulator.run([emulator.CXX, emulator.standard(), "-O1", "-w", *includes, f"-I{emulator.HERE}",
                  emulator.HERE / "cute_maps_sm90.cpp", "-o", oracle])  # fmt: skip
    done = emulator.execute(oracle)
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"(\d+) elements, 0 differ", done.stdout)
    assert [int(n) for n in counts] == [512, 16384, 1024] + [8192] * 8


@pytest.mark.parametrize("source", [CASES, WRAPPERS])
def test_nvcc_takes_them_for_sm_90a(source, tmp_path):
    """Nothing is spilled, wgmma is not serialised, and each wrapper is the instruction it stands for."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on PATH")
    cubin = tmp_path / "a.cubin"
    flags = [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-O2",
        "--expt-relaxed-constexpr",
        "-Icsrc",
        "-Icsrc/cuda",
        "-Xptxas=-v",
    ]
    done = subprocess.run(
        [nvcc, emulator.standard(), *flags, "-cubin", source, "-o", cubin],
        cwd=emulator.ROOT,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "serialized" not in said and "C75" not in said
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}
    text = sass.disassemble(cubin)
    alone = ("ACQBULK", "PREEXIT") if source == WRAPPERS else ()  # griddepcontrol's
    for word in ("HGMMA", "UTMALDG", "UTMALDG.2D.MULTICAST", "UTMASTG", "SYNCS", "UCGABAR_WAIT", *alone):
        assert word in text
