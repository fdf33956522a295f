# SPDX-License-Identifier: Apache-2.0
"""What the traffic model counts of boxes, wgmma and clusters: the GEMM of cases_sm90.cu, against counts by hand."""

import ctypes
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import build as emulator
from tools import roofline, sources
from tools.chips import CHIPS
from tools.roofline import Counted, Counter

M, N, K, TILE, COLUMNS, STEPS = 300, 100, 200, 128, 64, 4
SECTOR = 32
ROW = 13  # sectors of a row of a or b that boxes of 64 columns ask for: 4, 4, 4, and 8 columns in one
TILES = {"none": 3 * 2, "pair": 4 * 2}  # a pair's second block may have no rows


@functools.cache
def counted(kernel: str) -> Counted:
    if why := emulator.why_not():
        pytest.skip(why)
    device = [s.path for s in sources.sources("cuda") if not s.family]
    path = emulator.counted("gemm_sm90", [Path("tests/emulator/cases_sm90.cu"), *device])
    counter = Counter(path, CHIPS["h100"], lambda kernel, threads, shared: 1)
    matrices = {
        name: np.zeros((rows, pitch), np.uint16) for name, rows, pitch in (("a", M, 208), ("b", N, 208), ("c", M, 112))
    }
    run = counter.lib.lrk_gemm_sm90
    run.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    operands = {name: (m.ctypes.data, m.nbytes) for name, m in matrices.items()}
    (found,) = counter.count(lambda: run(kernel.encode(), *(at for at, _ in operands.values())), operands)
    return found


@pytest.mark.parametrize("kernel", TILES)
def test_bytes_of_global_memory(kernel):
    """a is read by each of two columns of tiles; b by each of three rows of tiles, or by two pairs, whose blocks share a copy."""
    one = counted(kernel)
    assert (one.run, one.blocks) == (4, 4)
    of = {o["name"]: o for o in one.operands}
    again = {"none": 3, "pair": 2}[kernel]
    assert of["a"]["sectors"] == 2 * M * ROW and of["b"]["sectors"] == again * N * ROW
    assert of["a"]["used"] == 2 * M * K * 2 and of["b"]["used"] == again * N * K * 2
    assert of["c"]["sectors"] == M * (4 + 3) and of["c"]["used"] == M * N * 2  # 64 columns, and 36 in three sectors
    for o in (of["a"], of["b"], of["c"]):  # past L1
        assert o["l2"] == o["sectors"] * SECTOR
    unique = SECTOR * ((M + N) * ROW + M * 7)
    assert one.dram == sum(o["unique"] for o in one.operands) == unique


@pytest.mark.parametrize("kernel", TILES)
def test_bytes_of_shared_memory_and_products(kernel):
    one, tiles = counted(kernel), TILES[kernel]
    products = tiles * STEPS * 4 * 2  # m64n64k16: of each step four, by two warpgroups
    assert one.multiplied == products * 64 * 64 * 16
    assert one.landed == tiles * STEPS * (TILE + COLUMNS) * 64 * 2  # zeros, too, and in both blocks of a pair
    assert one.operands_read == products * (
        64 * 16 * 2 + 64 * 16 * 2 / 2
    )  # b by both, a by one: the other has it in registers
    assert one.stored == tiles * TILE * COLUMNS * 2


@pytest.mark.parametrize(("kernel", "most"), [("none", 2), ("pair", 2)])
def test_time_is_that_of_the_block_with_most_tiles(kernel, most):
    """Six tiles of four blocks: two have two."""
    one, h100 = counted(kernel), CHIPS["h100"]
    assert one.busy == TILES[kernel] / most
    said = roofline.predict(one, h100, None, 0, 0)
    us = h100.clock * 1e3  # cycles
    assert said.parts["tensor cores"] == pytest.approx(most * STEPS * 4 * 2 * 64 * 64 * 16 / 2048 / us)
    assert said.parts["L2 into SMs"] == pytest.approx(most * STEPS * (TILE + COLUMNS) * 64 * 2 / 64 / us)
    assert said.parts["DRAM"] == pytest.approx(one.dram / h100.reached / 1e3)
    assert said.predicted_us == max(said.parts.values()) == said.parts[said.bound_by]
    assert roofline.predict(one, replace(h100, wgmma=1), None, 0, 0).bound_by == "tensor cores"
    flop = 2 * 2048 * 132 * 1000  # a thousand cycles of all tensor cores
    assert roofline.predict(one, h100, None, 0, flop).roof_us == pytest.approx(1000 / us)


def test_a_chip_without_wgmma_is_refused():
    with pytest.raises(ValueError, match="sm_80 has no wgmma"):
        roofline.predict(counted("none"), CHIPS["a100"], None, 0, 0)
