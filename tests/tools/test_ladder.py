# SPDX-License-Identifier: Apache-2.0
"""The traffic model against kernels whose cost is known: exact counts, and times that others measured (ladder.cu)."""

import ctypes
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest

import build as emulator
from tools import roofline, sources, static_checks
from tools.chips import CHIPS
from tools.families import Plan, one_by_one
from tools.roofline import Counted, Counter, Machine

LADDER = Path("tests/emulator/ladder.cu")
N = 4096

# GFLOP/s on an RTX A6000 at 4096, from S. Boehm, "How to Optimize a CUDA Matmul Kernel for cuBLAS-like Performance".
PUBLISHED = {
    "gemm_naive": 309.0,
    "gemm_coalesced": 1986.5,
    "gemm_shared": 2980.3,
    "gemm_column": 8474.7,
    "gemm_square": 15971.7,
    "gemm_vectors": 18237.3,
    "gemm_warp": 21779.3,
}


@functools.cache
def library() -> Path:
    if why := emulator.why_not():
        pytest.skip(why)
    device = [s.path for s in sources.sources("cuda") if not s.family]
    return emulator.counted("ladder", [LADDER, *device])


@functools.cache
def matrices() -> list[np.ndarray]:
    return [np.empty((N, N), np.float32) for _ in range(3)]  # never touched but for what blocks of a sample write


def climb(step: str, chip: str, resident, n: int = N, count: int = 64) -> Counted:
    counter = Counter(library(), CHIPS[chip], resident)
    run = counter.lib.lrk_ladder
    run.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_int]
    at = [m.ctypes.data for m in matrices()]
    operands = {name: (p, m.nbytes) for name, p, m in zip("abc", at, matrices(), strict=True)}
    (counted,) = counter.count(lambda: run(step.encode(), *at, n, count), operands)
    return counted


def one_block(kernel: str, threads: int, shared: int) -> int:
    return 1


def site(counted: Counted, shared: bool, write: bool) -> roofline.Site:
    (found,) = [s for s in counted.sites if (s.shared, s.write) == (shared, write)]
    return found


def operand(counted: Counted, name: str) -> dict:
    return next(o for o in counted.operands if o["name"] == name)


# ---------------------------------------------------------------------------------------------- counts, which are exact


def test_sectors_of_a_transpose():
    """A warp reads 32 neighbours, one line; written are 32 rows, a sector and a line each, of which 4 bytes are used."""
    naive = climb("transpose_naive", "h100", one_block, 512)
    read, write = site(naive, False, False), site(naive, False, True)
    assert read.requests == write.requests == 512 * 512 / 32
    assert (read.sectors, read.lines, read.used) == (4 * read.requests, read.requests, 128 * read.requests)
    assert (write.sectors, write.lines, write.used) == (32 * write.requests, 32 * write.requests, 128 * write.requests)
    assert naive.run == naive.blocks == naive.busy == 256


@pytest.mark.parametrize(("step", "conflicts"), [("transpose_shared", 32), ("transpose_padded", 1)])
def test_bank_conflicts_of_a_transpose(step, conflicts):
    """A column of a [32, 32] tile lies in one bank; of a [32, 33] tile in 32."""
    counted = climb(step, "h100", one_block, 1024)
    write, read = site(counted, True, True), site(counted, True, False)
    assert write.wavefronts == write.ideal == read.ideal == 1024 * 1024 / 32
    assert read.wavefronts == conflicts * read.ideal
    assert counted.total("sectors") == 2 * 4 * 1024 * 1024 / 32 and counted.bytes_per_sector == 32
    assert counted.l2 == counted.dram == 2 * 4 * 1024 * 1024


def test_a_sample_stands_for_the_whole():
    """Waves of a uniform grid cost alike: the first two and the last give the counts of all."""
    whole = climb("transpose_padded", "h100", one_block, 512)
    sampled = climb("transpose_padded", "a6000", one_block, 1024)
    assert whole.blocks == 256 and sampled.run < sampled.blocks == 1024
    for figure in ("requests", "sectors", "wavefronts"):
        assert sampled.total(figure) == pytest.approx(4 * whole.total(figure), rel=1e-6)
    assert sampled.dram == pytest.approx(4 * whole.dram, rel=1e-6)


def test_blocks_that_return_at_once_count_for_little():
    """Eight waves, of which the last four are idle: single blocks of those that are not run tell."""
    counted = climb("copy_half", "h100", one_block, 1 << 20, 8 * 132)
    assert counted.run == 3 * 132 + 64
    assert counted.busy == pytest.approx(4 * 132, rel=0.05)
    assert counted.dram == counted.l2 == pytest.approx(4 * 132 * 128 * 16 * 2, rel=0.05)


def test_blocks_of_a_wave_share_the_cache():
    """Eight rows of tiles read B again and again: from L2, where they run at the same time; DRAM is read once."""
    counted = climb("gemm_square", "h100", one_block, 1024, 64)
    a, b, c = (operand(counted, name) for name in "abc")
    assert a["unique"] == b["unique"] == 1024 * 64 * 4 and c["unique"] == 1024 * 1024 * 4
    assert a["l2"] == b["l2"] == 8 * 1024 * 64 * 4
    assert (a["dram"], b["dram"], c["dram"]) == (a["unique"], b["unique"], c["unique"])


def test_what_does_not_fit_the_cache_is_read_again():
    """A's columns of 16 KB rows: no L1 holds 1024 lines of four blocks' worth for the next k, an L2 does."""
    naive = climb("gemm_naive", "a6000", one_block, 1024, 16)
    a = operand(naive, "a")
    assert a["sectors"] == 1024 * 1024 * 16 / 32 * 32
    assert a["l2"] < a["sectors"] * 32 / 4 and a["dram"] == a["unique"] == 1024 * 16 * 4


def test_asynchronous_copies_under_way():
    """Four stages of 16 bytes a thread, but while they fill and drain."""
    counted = climb("copy_async", "a6000", one_block, 1 << 20, 84)
    assert counted.copies / counted.waits == pytest.approx(4 * 16, rel=0.05)


@pytest.mark.parametrize(
    ("step", "kinds"),
    [("transpose_naive", {"sectors", "L2"}), ("transpose_shared", {"wavefronts"}), ("transpose_padded", set())],
)
def test_gates_fail_on_slow_copies(step, kinds):
    """Of one kernel: as it should be, with bank conflicts, and without a tile."""
    assert set(roofline.departures(climb(step, "h100", one_block, 512), {})) == kinds


# ---------------------------------------------------------------------------------------------- times


@functools.cache
def machine(chip: str) -> Machine:
    made = Machine(CHIPS[chip], [LADDER])
    if made.why:
        pytest.skip(made.why)
    return made


def parts(step: str, chip: str, n: int, count: int) -> dict[str, float]:
    made = machine(chip)
    counted = climb(step, chip, made.resident, n, count)
    return roofline.predict(counted, made.chip, made.code(counted.kernel), 0, 0).parts


@functools.cache
def gflops(step: str) -> float:
    """Of the whole depth, from two short ones: every step of k costs the same."""
    short, longer = (parts(step, "a6000", N, depth) for depth in (32, 64))
    us = max(longer[name] + (N - 64) / 32 * (longer[name] - short[name]) for name in longer)
    return 2 * N**3 / us / 1e3


@pytest.mark.slow
@pytest.mark.parametrize("step", PUBLISHED)
def test_steps_are_within_half_of_what_was_measured(step):
    assert 1 / 1.5 < gflops(step) / PUBLISHED[step] < 1.5


@pytest.mark.slow
def test_steps_come_in_the_published_order():
    predicted = [gflops(step) for step in PUBLISHED]
    assert predicted == sorted(predicted)


def test_transposes_come_in_the_published_order():
    """M. Harris, "An Efficient Matrix Transpose in CUDA C/C++": naive, through shared memory, without its conflicts."""
    steps = ("transpose_naive", "transpose_shared", "transpose_padded")
    counts = [climb(step, "h100", one_block, 2048) for step in steps]
    times = [roofline.predict(c, CHIPS["h100"], None, 0, 0).predicted_us for c in counts]
    assert times[0] > times[1] > times[2]


@pytest.mark.parametrize("loads", [1, 2, 4, 8])
def test_loads_in_flight_of_a_copy(loads):
    """One block of four warps on an SM: 512 bytes a warp and load."""
    made = machine("a6000")
    counted = climb(f"copy_{loads}", "a6000", made.resident, 1 << 20, made.chip.sms)
    predicted = roofline.predict(counted, made.chip, made.code(counted.kernel), 0, 0)
    assert predicted.in_flight_bytes_per_sm == pytest.approx(4 * 512 * loads, rel=0.01)


def test_the_gate_on_loads_in_flight_fails_on_a_copy_that_waits():
    """tools/static_checks.py, on what the compiler made of both."""
    figures = machine("a6000").figures
    plan = Plan(12, flight=8 * one_by_one(12))
    assert not static_checks.faults(figures["copy_kernel<8>"], plan, "86")
    (wrong,) = static_checks.faults(figures["copy_kernel<1>"], plan, "86")
    assert "24576 bytes of loads under way on an SM, planned are 196608" in wrong


def test_copies_are_as_fast_as_their_loads_in_flight():
    """Little's law: twice the bytes under way take half the time, until DRAM gives no more."""
    few = CHIPS["a6000"].sms // 4  # blocks, so that one load each leaves most of DRAM idle
    times = [max(parts(f"copy_{loads}", "a6000", 1 << 20, few).values()) for loads in (1, 2, 4, 8)]
    moved = 2 * (1 << 20) * 16 / CHIPS["a6000"].reached / 1e3
    assert times[0] == pytest.approx(2 * times[1], rel=0.15) and times[1] > 1.4 * times[2]
    assert times[2] == pytest.approx(moved, rel=0.1) and times[3] == pytest.approx(moved, rel=0.1)


def test_machine_code_is_left_out_where_there_is_no_compiler(monkeypatch):
    library()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = Machine(CHIPS["h100"], [LADDER])
    assert made.why == "nvcc is not on PATH" and made.code("copy_kernel<1>") is None
    counted = climb("copy_1", "h100", made.resident, 1 << 16, 132)
    said = roofline.predict(counted, made.chip, None, 1, 0)
    assert said.issue_slots is said.in_flight_bytes_per_sm is None and "waiting" not in said.parts
