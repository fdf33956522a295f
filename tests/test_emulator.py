# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: it computes what the hardware computes, and catches the mistakes it exists to catch."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import build as emulator

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


@pytest.mark.parametrize("bug", ["missing_last_sync", "missing_wait", "short_wait", "early_refill", "block_order"])
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
        ("shared_overtake", 719, "896 bytes taken, the launch has 768"),
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
    emulator.run([emulator.CXX, "-std=c++17", "-O1", "-w", *includes, f"-I{emulator.HERE}", emulator.HERE / "cute_maps.cpp",
                  "-o", oracle])  # fmt: skip
    done = emulator.execute(oracle)
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"(\d+) elements, 0 (?:bits )?differ", done.stdout)
    assert [int(n) for n in counts] == [256, 128, 128] * 2 + [256, 128] * 2


def float_bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def bf16_bits(x):
    u = float_bits(x).astype(np.uint64)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint32)


def f16_bits(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_wrapper(variant):
    rng = np.random.default_rng(0)
    # Small halves: the same bits stand for other numbers in bf16 and in f16, and products are exact in both.
    tile = rng.integers(-8, 9, (64, 64)).astype(np.float16).view(np.uint16)
    done = subprocess.run(
        [program("wrappers", variant, "tests/emulator/wrappers.cu")], input=tile.tobytes(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    out = np.frombuffer(done.stdout, np.uint32).reshape(64, -1)
    t = np.arange(64)
    g, q = t % 32 // 4, t % 4 * 2

    def pairs(rows, cols, rows2, cols2):
        return tile[rows, cols].astype(np.uint32) | tile[rows2, cols2].astype(np.uint32) << 16

    for i in range(4):  # ldmatrix: matrix i lies at rows 8 (i % 2), columns 8 (i / 2) of the tile
        r, c = i % 2 * 8, i // 2 * 8
        np.testing.assert_array_equal(out[:, i], pairs(r + g, c + q, r + g, c + q + 1))
        np.testing.assert_array_equal(out[:, 4 + i], pairs(r + q, c + g, r + q + 1, c + g))
    for i in range(2):
        np.testing.assert_array_equal(out[:, 8 + i], pairs(g, i * 8 + q, g, i * 8 + q + 1))
        np.testing.assert_array_equal(out[:, 10 + i], pairs(i * 8 + q, g, i * 8 + q + 1, g))

    as_bf16 = (tile.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    as_f16 = tile.view(np.float16).astype(np.float64)
    for first, values in ((12, as_bf16), (16, as_f16)):
        product = values[:16, :16] @ values[:8, :16].T
        terms = (abs(values[:16, :16]) @ abs(values[:8, :16]).T).max()
        for i in range(4):
            want = product[g + i // 2 * 8, q + i % 2] + (i + 1)
            np.testing.assert_allclose(out[:, first + i].view(np.float32), want, rtol=0, atol=1e-6 * terms)

    lane, warp = t % 32, t // 32 * 32
    third = sum(1 << n for n in range(0, 32, 3))
    words = {
        20: warp + 5, 21: t ^ 9, 22: np.where(lane + 3 < 32, t + 3, t), 23: np.where(lane >= 3, t - 3, t),
        24: np.full(64, third), 25: t >= 32, 26: t < 32, 27: 1000 + (t ^ 1), 28: 1000 + 63 - t,
        29: np.where(t < 32, 2000 + 31 - t, 0),
    }  # fmt: skip
    for i, want in words.items():
        np.testing.assert_array_equal(out[:, i], want, err_msg=f"word {i}")
    source = tile.reshape(-1)[: 64 * 8].reshape(64, 8)
    for k, count in enumerate((0, 3, 8)):
        want = np.where(np.arange(8) < count, source, 0).astype(np.uint16).view(np.uint32)
        np.testing.assert_array_equal(out[:, 30 + 4 * k : 34 + 4 * k], want)

    values = np.array([1.00390625, -3.1415927, 65504, 70000, 6.1e-5, 3e-8, -0.0, 1e-45, 1e30], np.float32)
    for k, v in enumerate(values):
        scaled = (v * (1 + t % 7).astype(np.float32)).astype(np.float32)
        plain = np.full(64, v, np.float32)
        columns = out[:, 42 + 4 * k : 46 + 4 * k].T
        for bits, single, packed in ((bf16_bits, columns[0], columns[2]), (f16_bits, columns[1], columns[3])):
            np.testing.assert_array_equal(single, bits(scaled))
            np.testing.assert_array_equal(packed, bits(scaled) | bits(plain) << 16)
    first_row = tile.reshape(-1)[:64]
    np.testing.assert_array_equal(out[:, 78], float_bits(first_row.view(np.float16)))
    np.testing.assert_array_equal(out[:, 79], first_row.astype(np.uint32) << 16)
    np.testing.assert_array_equal(out[:, 80], float_bits((t * 9).astype(np.uint16).view(np.float16)))


# ---------------------------------------------------------------------------------------------- the real kernels

FAMILIES = sorted(p.stem for p in emulator.portable_kernels())


def params_program(family, variant):
    """tests/emulator/<family>_params.cpp: every launcher of the family's contract, on random and on odd params."""
    return program(
        f"{family}_params", variant, f"tests/emulator/{family}_params.cpp", "csrc/policy.cpp", f"csrc/cuda/{family}.cu"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "cases", "schedules"), [("plain", 200, (0, 1, 2, 3)), ("sanitized", 80, (1,)), ("tracked", 80, (0,))]
)
def test_launchers(family, variant, cases, schedules):
    done = emulator.execute(params_program(family, variant), cases, 1, *schedules)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 failed" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["plain", "sanitized"])
def test_more_than_2_31_elements(family, variant):
    done = emulator.execute(params_program(family, variant), "huge")
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def barriers():
    for path in emulator.portable_kernels():
        for number, text in enumerate((emulator.ROOT / path).read_text().splitlines(), 1):
            if re.search(r"\b(sync_threads|sync_warp|sync_named|cp_async_wait(<\d+>)?)\(", text.split("//")[0]):
                yield pytest.param(path.stem, number, id=f"{path.name}-{number}")


@pytest.mark.parametrize(("family", "line"), list(barriers()))
def test_every_barrier_of_the_kernels_is_missed(family, line):
    """Without any one of them the tracked build reports a race: the barrier is needed, and the cases reach it."""
    done = emulator.execute(params_program(family, "tracked"), 300, 3, 0, LRK_EMU_SKIP_LINE=line)
    assert done.returncode == 1
    assert re.search(r"emulator: (race in|read of) shared memory", done.stderr)


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
