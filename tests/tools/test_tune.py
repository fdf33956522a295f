# SPDX-License-Identifier: Apache-2.0
"""What tools/tune.py makes of the output of programs that need a GPU."""

import json

import pytest

from tools import tune
from tools.families import load

TABLE = """struct Tuned {};
constexpr Tuned kTuned[] = {
    {80, 108, 2},  // an old row
    {0, 132, 1},  // counts
};
"""


def start(over_best: float, at: float, arch: int = 90) -> dict:
    return {"tune": "start", "arch": arch, "sms": 114, "start": at, "over_best": over_best}


def test_the_constants_that_choose_best_become_a_row():
    rows = [start(1.2, 0.5), start(1.02, 2.0), start(1.05, 1.0)]
    text = tune.table_with(tune.row_of(rows), "NVIDIA H100 PCIe", TABLE)
    lines = text.splitlines()
    assert lines[2:5] == [
        "    {80, 108, 2},  // an old row",
        "    {90, 114, 2},  // NVIDIA H100 PCIe, tools/gpu.py --tune",
        "    {0, 132, 1},  // counts",
    ]
    again = tune.table_with(tune.row_of([start(1.0, 4.0)]), "NVIDIA H200", text)
    assert again.count("{90, ") == 1 and "{90, 114, 4},  // NVIDIA H200" in again


def test_of_equal_constants_the_one_nearest_the_counts_stays():
    assert tune.row_of([start(1.01, at) for at in (0.25, 0.5, 1.0, 2.0, 4.0)])["start"] == 1.0


def test_the_table_of_the_checkout_takes_a_row():
    text = tune.table_with(start(1.0, 1.5), "a GPU", tune.TABLE.read_text())
    assert text.index("{90, 114, 1.5}") < text.index("{0, 132, 1}")


def test_bits_that_depend_on_the_split_fail(tmp_path):
    rows = [{"tune": "sweep", "T": 1, "R": 16, "span": s, "us": 1.0, "equal": s != 8} for s in (1, 4, 8)]
    assert tune.sweep([*rows, start(1.0, 1.0)], "a GPU", tmp_path) == (
        "failed",
        "bits depend on the split: T=1 R=16 span=8",
    )
    assert not list(tmp_path.iterdir())


def test_wrong_results_of_the_ladder_fail():
    rows = [
        {"step": "gemm_naive", "n": 64, "us": 2.0, "right": True},
        {"step": "copy_1", "n": 4, "us": 1.0, "right": False},
    ]
    assert tune.ladder(rows) == ("failed", "wrong results: copy_1")
    assert tune.ladder(rows[:1]) == ("passed", "gemm_naive 262 GFLOP/s")


@pytest.mark.parametrize(
    ("gpu", "chip"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B200", "b200"),
     ("NVIDIA RTX A6000", "a6000"), ("NVIDIA GeForce RTX 4090", ""), ("none", "")],
)  # fmt: skip
def test_a_gpu_is_found_in_the_table_by_its_name(gpu, chip):
    assert tune.chip_of(gpu) == chip


# ---------------------------------------------------------------------------------------------- beside predictions

CSV = """==PROF== Connected to process 1
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","h","void lrk::<unnamed>::lora_shrink_kernel<lrk::bf16, lrk::bf16, 64, 1, 1>(lrk::LoraShrinkParams)","1","7","(128, 1, 1)","(128, 1, 4)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","{dram}"
"0","1","python","h","void lrk::<unnamed>::lora_shrink_kernel<lrk::bf16, lrk::bf16, 64, 1, 1>(lrk::LoraShrinkParams)","1","7","(128, 1, 1)","(128, 1, 4)","0","9.0","Command line profiler metrics","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","1,000"
"0","1","python","h","void lrk::<unnamed>::lora_shrink_kernel<lrk::bf16, lrk::bf16, 64, 1, 1>(lrk::LoraShrinkParams)","1","7","(128, 1, 1)","(128, 1, 4)","0","9.0","Command line profiler metrics","l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum","sector","20"
"""


@pytest.fixture
def predictions(tmp_path, monkeypatch):
    case = str(load("lora").SHAPES[-1])
    row = {"arch": "h200", "family": "lora", "kernel": "lora_shrink", "case": case, "us": 20.0, "bound_by": "DRAM",
           "sectors": {"lora_shrink": 1000.0}, "dram": {"lora_shrink": 5e6}}  # fmt: skip
    path = tmp_path / "predicted.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"arch": arch, "us": us}) + "\n" for arch, us in (("h100", 1.0), ("h200", 20.0)))
    )
    monkeypatch.setattr(tune, "PREDICTED", path)
    return case


def test_calls_are_held_against_what_was_predicted(predictions):
    rows = [
        {"kernel": "lora_shrink", "case": predictions, "p50_ms": 0.03},
        {"kernel": "other", "case": "T=1", "p50_ms": 1.0},
    ]
    joined, (status, note) = tune.beside(rows, "h200")
    assert status == "passed" and "1 of 2 calls" in note and "median 1.50" in note
    assert joined[0]["predicted_ms"] == 0.02 and joined[0]["bound_by"] == "DRAM" and "predicted_ms" not in joined[1]
    assert tune.beside(rows, "")[1][1] == "0 of 2 calls have a prediction for this GPU"


def test_counters_are_held_against_those_of_the_emulator(predictions):
    rows, (status, note) = tune.counters(CSV.format(dram="5,100,000"), ["lora"], "h200")
    assert status == "passed" and "furthest off lora_shrink: +2.0%" in note
    assert rows == [{"suite": "counters", "kernel": "lora_shrink", "sectors": 1020.0, "dram": 5.1e6,
                     "predicted_sectors": 1000.0, "predicted_dram": 5e6}]  # fmt: skip


def test_a_machine_that_does_not_allow_profiling_says_so(predictions):
    said = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"
    rows, (status, note) = tune.counters(said, ["lora"], "h200")
    assert (rows, status) == ([], "refused") and "ERR_NVGPUCTRPERM" in note
