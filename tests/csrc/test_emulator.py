# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: it computes what the hardware computes, and catches the mistakes it exists to catch."""

import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wrapper_words

import build as emulator
from tests.conftest import FULL
from tools.sources import closure

VARIANTS = ("plain", "sanitized", "tracked")
CASES = "tests/emulator/cases.cu"
SCHEDULES = range(6)


def needs(variant):
    if why := emulator.why_not(variant):
        pytest.skip(why)


@functools.cache
def program(name, variant, *sources):
    needs(variant)
    return emulator.executable(name, sources, variant)


def line_of(bug):
    """Number of the line of cases.cu that `bug: <name>` marks."""
    lines = (emulator.ROOT / CASES).read_text().splitlines()
    (found,) = [i for i, text in enumerate(lines, 1) if re.search(rf"// bug:.*\b{bug}\b", text)]
    return f"{CASES}:{found}"


def run_case(bug, variant):
    """The process, and per schedule (code, outputs)."""
    done = emulator.execute(program("cases", variant, CASES), bug)
    rows = [line.split() for line in done.stdout.splitlines()]
    return done, [(int(r[1]), r[2:]) for r in rows]


# ---------------------------------------------------------------------------------------------- a healthy kernel


@pytest.mark.parametrize("variant", VARIANTS)
def test_healthy_kernel_passes_under_every_schedule(variant):
    done, rows = run_case("none", variant)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    x = (np.arange(6 * 5 * 64) * 7 % 31 - 15).reshape(6, 5, 64)
    want = (x[:, :, ::-1] * np.arange(1, 65)).sum(axis=(1, 2))
    assert len(rows) == len(SCHEDULES)
    for code, values in rows:
        assert code == 0
        np.testing.assert_array_equal(np.array(values, float), want)


@pytest.mark.parametrize("variant", ["plain", "sanitized"])
def test_blocks_on_several_host_threads(variant):
    done = emulator.execute(program("cases", variant, CASES), "none", LRK_EMU_THREADS=3)
    assert done.stdout == run_case("none", variant)[0].stdout and done.stderr == ""


def test_ucontext_serves_where_there_is_no_assembly():
    needs("plain")
    fallback = emulator.executable("cases-ucontext", [CASES], "plain", runtime=("-DLRK_EMU_UCONTEXT",))
    done = emulator.execute(fallback, "none")
    assert done.stdout == run_case("none", "plain")[0].stdout


# ---------------------------------------------------------------------------------------------- broken kernels

# bug, the build that catches it, what the report says
CAUGHT = [
    ("global_read", "sanitized", "heap-buffer-overflow"),
    ("global_write", "sanitized", "heap-buffer-overflow"),
    ("shared_read", "sanitized", "use-after-poison"),
    ("shared_write", "sanitized", "use-after-poison"),
    ("misaligned", "sanitized", "misaligned address"),
    ("overflow", "sanitized", "signed integer overflow"),
    ("copy_misaligned", "plain", "cp_async: global address"),
    ("divergent_barrier", "plain", "divergent barrier"),
    ("early_return", "plain", "threads 40 have returned"),
    ("barrier_count", "plain", "sync_named"),
    ("short_shuffle", "plain", "a warp-wide call by an incomplete warp"),
    ("short_mma", "plain", "divergent warp"),
    ("divergent_warp", "plain", "divergent warp"),
    ("shared_read", "tracked", "read out of bounds of shared memory"),
    ("missing_sync", "tracked", "shared memory"),
    ("missing_last_sync", "tracked", "shared memory"),
    ("missing_sync_warp", "tracked", "shared memory"),
    ("missing_wait", "tracked", "cp.async has not been waited for"),
    ("short_wait", "tracked", "cp.async has not been waited for"),
    ("early_refill", "tracked", "written before the readers' barrier"),
    ("unwritten_shared", "tracked", "read of shared memory that nothing wrote"),
    ("unwritten_global", "tracked", "read of global memory that nothing wrote"),
    ("block_order", "tracked", "blocks of one launch depend on each other"),
    ("short_reduce", "plain", "divergent warp"),
    ("atomic_misaligned", "plain", "is not 4-byte aligned"),
    ("plain_beside_atomic", "tracked", "race in shared memory"),
    ("unwritten_atomic", "tracked", "read of shared memory that nothing wrote"),
    ("block_order_atomic", "tracked", "blocks of one launch depend on each other"),
]


@pytest.mark.parametrize(("bug", "variant", "message"), CAUGHT, ids=lambda v: v if " " not in v else "")
def test_caught_with_kernel_block_thread_and_line(bug, variant, message):
    done, rows = run_case(bug, variant)
    report = done.stderr
    assert message in report
    assert line_of(bug) in report
    assert re.search(r"kernel pipeline, block \(\d, 0, 0\), thread \(\d+, 0, 0\)", report)
    if done.returncode == 0:  # no sanitizer ended the process: the launch says it
        assert {code for code, _ in rows} == {719}


@pytest.mark.parametrize(
    "bug", ["missing_last_sync", "missing_wait", "short_wait", "early_refill", "block_order", "float_atomic"]
)
def test_schedules_alone_disagree(bug):
    _, rows = run_case(bug, "plain")
    assert len({tuple(values) for _, values in rows}) > 1


@pytest.mark.parametrize("bug", ["missing_sync", "missing_sync_warp", "unwritten_shared", "unwritten_global"])
def test_fresh_memory_is_nan(bug):
    _, rows = run_case(bug, "plain")
    assert all("nan" in value for _, values in rows for value in values)


def test_redzones_are_checked_without_a_sanitizer():
    done, rows = run_case("shared_write", "plain")
    assert {code for code, _ in rows} == {719}
    assert "out of bounds write to shared memory, at byte offset 12 of piece 1 (12 bytes)" in done.stderr


@pytest.mark.parametrize(
    ("bug", "code", "message"),
    [
        ("threads", 9, "block (64, 17, 1)"),
        ("grid_y", 9, "grid (1, 65536, 1)"),
        ("empty_grid", 9, "grid (0, 1, 1)"),
        ("shared_limit", 1, "233472 bytes"),
        ("shared_overtake", 719, "1024 bytes taken, the launch has 896"),
    ],
)
def test_launch_over_the_limits(bug, code, message):
    done, rows = run_case(bug, "plain")
    assert {c for c, _ in rows} == {code}
    assert message in done.stderr and "pipeline" in done.stderr


# ---------------------------------------------------------------------------------------------- instructions


def test_fragment_maps_are_those_of_cute():
    needs("plain")
    includes, why = emulator.cute_includes()
    if why:
        pytest.skip(why)
    emulator.OUT.mkdir(parents=True, exist_ok=True)
    oracle = emulator.OUT / "cute_maps"
    emulator.run([emulator.CXX, emulator.standard(), "-O1", "-w", *includes, f"-I{emulator.HERE}", emulator.HERE / "cute_maps.cpp",
                  "-o", oracle])  # fmt: skip
    done = emulator.execute(oracle)
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"(\d+) elements, 0 (?:bits )?differ", done.stdout)
    assert [int(n) for n in counts] == [256, 128, 128] * 2 + [256, 128] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_wrapper(variant):
    found = wrapper_words.run(str(program("wrappers", variant, "tests/emulator/wrappers.cu")))
    assert not any(found.values()), found


def test_every_word_of_the_wrappers_is_checked():
    rng = random.Random(1)
    tile = wrapper_words.tile_of(rng)
    good = [0] * (64 * wrapper_words.WORDS + wrapper_words.GLOBALS)
    words = set()
    for _, word, values in wrapper_words.expected(tile):
        words.add(word)
        for t, v in enumerate(values):
            good[t * wrapper_words.WORDS + word] = v
    assert words == set(range(106)) - set(range(12, 20)), "12 to 19 are mma"
    for name in ("mma_16816 bf16", "mma_16816 f16", "atomicAdd global", "atomicAdd float global"):
        assert wrapper_words.faults(tile, good)[name]
    for word in words:
        at = rng.randrange(64) * wrapper_words.WORDS + word
        good[at] ^= 1
        assert any(str(word) in fault for fault in wrapper_words.faults(tile, good).values())
        good[at] ^= 1


# ---------------------------------------------------------------------------------------------- the real kernels

FAMILIES = emulator.families()


@functools.cache
def params_program(family, variant):
    needs(variant)
    return emulator.params_program(family, variant)


def test_every_source_is_read():
    """By CMake and the emulator: what csrc/sources.cmake does not find nobody compiles, nor a program of no family."""
    files = {p.relative_to(emulator.ROOT) for s in ("*.cpp", "*.cu") for p in (emulator.ROOT / "csrc").rglob(s)}
    assert files == {s.path for s in emulator.sources()} | {Path("csrc/host/host.cpp")}
    programs = (emulator.ROOT / emulator.HERE).glob("*_params.cpp")
    assert sorted(p.name.removesuffix("_params.cpp") for p in programs) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "cases", "schedules"),
    [
        ("plain", 400 if FULL else 80, (0,)),
        pytest.param("plain", 400 if FULL else 80, (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("sanitized", 80, (1,), marks=pytest.mark.slow),
        pytest.param("tracked", 80, (0,), marks=pytest.mark.slow),
    ],
)
def test_launchers(family, variant, cases, schedules):
    done = emulator.execute(params_program(family, variant), cases, 1, *schedules)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 failed" in done.stdout


@pytest.mark.skipif(not FULL, reason="test-full")
@pytest.mark.parametrize("family", FAMILIES)
def test_launchers_under_contraction(family):
    """As nvcc contracts a * b + c: results hold, and schedules still agree in every bit."""
    test_launchers(family, "contracted", 200, (0, 1))


@pytest.mark.skipif(not FULL, reason="test-full")
def test_two_ways_have_equal_bits_under_contraction():
    """What tests/ops says of the bits of rows, batches, runs and threads, over kernels that fuse multiply and add."""
    needs("contracted")
    files = [f"tests/ops/test_{name}.py" for name in ("lora", "multi_lora", "mora", "rng")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *files]
    said = "emulated and (bits or batch or order)"
    env = {**os.environ, "LRK_EMULATOR": "contracted", "LRK_TEST_FULL": ""}
    done = subprocess.run([*command, "-k", said], cwd=emulator.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]  # 5 where none is selected


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["plain", "sanitized"])
def test_more_than_2_31_elements(family, variant):
    done = emulator.execute(params_program(family, variant), "huge")
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def barriers():
    """Of each family those of its sources and of the headers that it shares."""
    call = re.compile(r"(?!__device__).*\b(sync_threads|sync_warp|sync_named|cp_async_wait(<\d+>)?)\(")
    for family in FAMILIES:
        for path in closure(emulator.sources_of(family)):
            if not path.is_relative_to("csrc") or "sm90" in path.name or path.stem == "gemm":  # test_gemm_sm90.py's
                continue
            lines = (emulator.ROOT / path).read_text().splitlines()
            for number, text in enumerate(lines, 1):
                if call.match(text.split("//")[0]):
                    yield pytest.param(family, f"{path}:{number}", id=f"{family}-{path.name}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), list(barriers()))
def test_every_barrier_of_the_kernels_is_missed(family, place):
    """Without any one of them the tracked build reports a race: the barrier is needed, and the cases reach it."""
    done = emulator.execute(params_program(family, "tracked"), 300, 3, 0, LRK_EMU_SKIP=place)
    assert done.returncode == 1
    assert re.search(r"emulator: ((race in|read of) (shared|global) memory|cp.async has not been waited)", done.stderr)


# ---------------------------------------------------------------------------------------------- the device kind


def test_the_glue_runs_over_emulated_kernels():
    needs("plain")
    torch = pytest.importorskip("torch")
    ops = emulator.ops()
    torch.manual_seed(0)
    x, a = torch.randn(70, 300).bfloat16(), torch.randn(8, 300).bfloat16()
    results = []
    for schedule in (0, 1, 2):
        with emulator.setting("schedule", schedule):
            results.append(ops.lora_shrink(x, a, 0.5))
    torch.testing.assert_close(results[0], ((x.double() @ a.double().T) * 0.5).bfloat16())
    assert all(torch.equal(results[0], r) for r in results)
    with (
        emulator.setting("max_shared", 1024),
        pytest.raises(RuntimeError, match="lrkern::lora_shrink: kernel launch failed"),
    ):
        ops.lora_shrink(x, a)


def test_switches_are_counted():
    needs("plain")
    lib = emulator.library()
    before = lib.lrk_emulator_get(b"switches")
    emulator.ops().lora_shrink(*(pytest.importorskip("torch").ones(16, 64) for _ in range(2)))
    assert lib.lrk_emulator_get(b"switches") > before
