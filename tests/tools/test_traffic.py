# SPDX-License-Identifier: Apache-2.0
"""Gates on what the kernels ask of memory, in counts alone: no time is predicted here, and no nvcc is needed."""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import roofline as command
import run

import build as emulator
from tools import families, roofline, sources
from tools.chips import CHIPS
from tools.families import Shape, Timed
from tools.roofline import Counted, Counter, Machine

SHAPE = Shape(A=16, T=1024, I=1024, O=1024, R=16)  # aligned, and small enough for all blocks to run

# What each kernel does not keep to yet, by the kind that roofline.departures names; one that is mended leaves the list.
HALF = {"sectors"}  # stores of 16 bytes a lane that lie 64 apart, or of 4 in pairs: half a sector each
KNOWN = {
    "basis_fill": HALF | {"L2"},
    "basis_combine": HALF | {"L2"},
    "basis_dot": HALF,
    "basis_matmul": HALF | {"L2"},
    "basis_matmul_x": HALF,
    "basis_matmul_transposed": HALF | {"L2"},
    "lora_shrink": HALF,
    "lora_shrink_wgrad": HALF | {"L2"},
    "lora_wgrad": HALF | {"L2"},  # partial sums, two floats a lane
    "lora_sum": HALF | {"L2"},  # of dB, which it stores across its rows
    "lora_expand": {"wavefronts"},  # tiles whose rows are 40 elements apart
    "lora_rescale": HALF | {"wavefronts"},
    "multi_lora_page_shrink": {"index"},  # every warp walks from its tile to its rows and pages
    "multi_lora_shrink": HALF,
    "multi_lora_expand": HALF | {"index"},
    "multi_lora_wgrad": HALF | {"index", "L2"},
    "slice_gather": {"index"},  # every row asks for its columns' numbers
    "slice_scatter": {"index"},
    "mx_quantize": HALF,  # a block of 32 in one thread
    "nvfp4_quantize": HALF,  # a block of 16 in one thread
    "mx_linear": HALF | {"L2"},  # x by every block, and scales a byte at a time
    "mx_linear_experts": HALF | {"L2"},  # the same
    "mx_few": HALF | {"L2"},  # the same
    "mx_gemm": HALF,  # scales a byte at a time, by each of its lanes
}
# Adapters of 64 rows have no partial sums to add.
OTHER_SHAPES = {"multi_lora_wgrad_sum": replace(SHAPE, A=1)}
# Kernels that look up and do not stream, or are one block.
LOOKUPS = {"multi_lora_plan", "multi_lora_lists", "multi_lora_gather", "multi_lora_scatter"}


@functools.cache
def counter() -> Counter:
    if why := emulator.why_not():
        pytest.skip(why)
    chip = CHIPS["h100"]
    made = Counter(emulator.extension("traffic"), chip, Machine(chip, []).resident)
    torch.ops.load_library(str(made.path))
    return made


def launches(family: str, shape: Shape = SHAPE) -> Iterator[tuple[Timed, list[Counted]]]:
    """Each timed call of a family, and what it launches."""
    count = counter()
    for timed in command.calls_of(family, CHIPS["h100"], torch.bfloat16, shape):
        with torch.no_grad():
            yield timed, count.count(timed.call, command.operands(timed))


@pytest.mark.parametrize("family", sources.families())
def test_kernels_ask_for_what_their_tiles_need(family):
    """At least 30 bytes of a sector, few indices, no bank conflicts, L2 by the re-read factor of the tiles; but for what is
    known, which has to be there."""
    found: dict[str, set[str]] = {}
    shapes = {OTHER_SHAPES.get(name, SHAPE) for name in families.load(family).KERNELS}
    for at, (timed, counted) in ((shape, call) for shape in shapes for call in launches(family, shape)):
        for one in counted:
            assert one.run == one.blocks
            if one.name not in (*LOOKUPS, *timed.also) and at == OTHER_SHAPES.get(one.name, SHAPE):
                again = families.kernels()[one.name].again
                found.setdefault(one.name, set()).update(roofline.departures(one, again))
    assert {name: kinds for name, kinds in found.items() if kinds} == {n: KNOWN[n] for n in found if n in KNOWN}


@pytest.mark.parametrize("family", sources.families())
def test_a_call_launches_its_kernel_and_at_most_two_sums(family):
    for timed, counted in launches(family, Shape(A=4, T=64, I=512, O=512, R=16)):
        names = [one.name for one in counted]
        assert names.count(timed.kernel) == 1 and len(names) <= 3, names


def figures(**changed) -> Counted:
    """A tidy launch: 64 rows of x are read once by each of four columns of blocks, and written once."""
    x = {"name": "x", "sectors": 4096, "used": 4096 * 32, "unique": 1024 * 32, "l2": 4096 * 32}
    y = {"name": "scratch", "sectors": 1024, "used": 1024 * 32, "unique": 1024 * 32, "l2": 1024 * 32}
    i = {"name": "index 0", "sectors": 40, "used": 160, "unique": 160, "l2": 1280}
    for name, value in changed.items():
        operand, _, key = name.partition("_")
        {"x": x, "y": y, "i": i}[operand][key] = value
    return Counted("k", {"grid": [8, 4, 1], "landed": 0, "operands": [x, y, i]}, [])


@pytest.mark.parametrize(
    ("changed", "kind"),
    [({}, None), ({"x_used": 4096 * 26}, "sectors"), ({"i_sectors": 200}, "index"), ({"x_l2": 5200 * 32}, "L2")],
)
def test_each_gate_can_fail(changed, kind):
    assert set(roofline.departures(figures(**changed), {"x": "y"})) == ({kind} if kind else set())


def test_a_factor_that_the_grid_does_not_give_fails():
    assert set(roofline.departures(figures(), {})) == {"L2"}


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def no_compiler(monkeypatch):
    counter()
    monkeypatch.setattr(roofline.shutil, "which", lambda name: None)


def test_rows_of_the_command_without_a_compiler(no_compiler, tmp_path, capsys):
    """A line a kernel and case, spelled as the bench spells it; what follows from machine code is left out, and that said."""
    out = tmp_path / "rows.jsonl"
    assert run.main(["roofline", "basis_combine", "--case", "k=1024", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kernel"] for row in rows] == ["basis_combine", "basis_combine_sum"]
    for row in rows:
        assert tuple(row) == command.KEYS and row["arch"] == "h100" and row["dtype"] == "bfloat16"
        assert row["case"] == "k=1024 T=16 I=2048 O=2048 R=8"
        assert row["issue_slots"] is row["in_flight_bytes_per_sm"] is None
        assert row["predicted_us"] >= row["dram_bytes"] / CHIPS["h100"].reached / 1e3 > 0
    assert "no machine code: nvcc is not on PATH" in said and "nothing ran on a GPU" in said


@pytest.mark.parametrize("words", [["nobody"], ["lora", "--arch", "v100"]])
def test_the_command_refuses_what_it_does_not_know(words, capsys):
    with pytest.raises(SystemExit):
        run.main(["roofline", *words])
    assert words[-1] in capsys.readouterr().err
