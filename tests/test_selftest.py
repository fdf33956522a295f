# SPDX-License-Identifier: Apache-2.0
"""`python -m lrkern selftest` finds the faults that are planted, and none where there are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import build as emulator
import lrkern
from lrkern import selftest, testing
from lrkern.__main__ import collect, main
from lrkern.limits import DTYPES
from lrkern.reference import OPS

PLANTED = Path(__file__).parent / "shared" / "selftest_worker.py"
ELSEWHERE = ("pytest", "peft", "transformers", "safetensors", "tests", "tools", "bench")


@pytest.mark.slow
def test_a_clean_run_by_the_package_alone(tmp_path):
    """Every op in every dtype, without what only tests and tools have, from another folder."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ELSEWHERE})\n")
    path = os.pathsep.join([str(tmp_path), str(Path(lrkern.__file__).parents[1])])
    command = [sys.executable, "-W", "ignore", "-m", "lrkern", "selftest", "--quick", "--json", "out.json"]
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["ok"] and report["quick"] and report["info"]["lrkern"] == lrkern.__version__
    rows = [row for row in report["rows"] if row["sample"] != selftest.TIMING]
    names = [selftest.name_of(dtype) for dtype in DTYPES]
    assert {(row["op"], row["dtype"]) for row in rows} == {(op, dtype) for op in OPS for dtype in names}
    assert len(rows) >= 10 * len(OPS) and not any(row["wrong"] for row in rows)
    assert {op.name: op.family.direct_sample for op in OPS.values()}.items() <= {(r["op"], r["sample"]) for r in rows}
    times = {row["op"]: row["ms"] for row in report["rows"] if "ms" in row}
    assert times.keys() == OPS.keys() and all(t > 0 for pair in times.values() for t in pair)
    for word in (
        report["devices"]["cpu"],
        report["info"]["torch"],
        *OPS,
        "a short timing",
        "two runs equal in every bit",
    ):
        assert word in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["out.json", "sitecustomize.py"]


@pytest.fixture
def planted(monkeypatch, tmp_path, capsys):
    """Runs a quick selftest of some ops with faults: (exit status, its rows, what it printed)."""

    def run(faults, devices=("cpu",)):
        ops = {name: op for name, op in OPS.items() if name in faults}
        monkeypatch.setattr(selftest, "OPS", ops)
        monkeypatch.setattr(selftest, "devices", lambda *_: {device: f"the {device}" for device in devices})
        given = json.dumps({op: fault for op, fault in faults.items() if fault})
        monkeypatch.setattr(selftest, "WORKER", [sys.executable, "-W", "ignore", str(PLANTED), given])
        monkeypatch.setattr(sys, "argv", ["lrkern", "selftest", "--quick", "--json", str(tmp_path / "out.json")])
        status = main()
        return status, json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


FAULTS = {
    "lora_linear": "off", "lora_add": "varies", "basis_fill": "unwritten", "mora_compress": "raises",
    "mora_add": "ends", "mora_linear": "leaves", "mx_dequantize": "hangs", "slice_gather": "",
}  # fmt: skip
FOUND = {
    "off": r"lora_linear[fp32_factors]: max error",
    "varies": ": two runs differ",
    "unwritten": r"basis_fill[odd]: isnan in other places than the expression",
    "raises": "mora_compress[wide]: RuntimeError: an illegal memory access was encountered",
    "ends": "mora_add[one_token]: its process ended with signal 6 (Aborted)",
    "leaves": "mora_linear[one_token]: its process ended with exit status 0",
    "hangs": "mx_dequantize[one_token]: its process ended with exit status 1 Timeout",
}


def test_each_planted_fault_is_named_and_the_other_ops_run(planted):
    status, report, said = planted(FAULTS)
    assert status == 1 and not report["ok"]
    for op, fault in FAULTS.items():
        wrong = [row["wrong"] for row in report["rows"] if row["op"] == op and row["wrong"]]
        assert bool(wrong) == bool(fault), f"{op}: {wrong}"
        if fault:
            assert any(FOUND[fault] in text for text in wrong), wrong
            assert all(f"float32: {text}" in said for text in wrong[:1]) and all(
                text.startswith((op, f"d {op}")) for text in wrong
            )
    assert {row["op"] for row in report["rows"]} == FAULTS.keys()
    assert said.endswith(f"cpu (the cpu): WRONG: {', '.join(op for op in OPS if FAULTS.get(op))}\n")


@pytest.mark.slow
@pytest.mark.skipif(bool(emulator.why_not()), reason="no emulator")
def test_a_second_device_has_its_own_verdict(planted):
    """The emulated kernels, as cuda:0."""
    status, report, said = planted({"lora_add": "", "mora_compress": ""}, ("cpu", "cuda:0"))
    assert status == 0 and said.count("two runs equal in every bit") == 2
    count = [sum(row["device"] == device for row in report["rows"]) for device in ("cpu", "cuda:0")]
    assert count[0] == count[1] >= 2 * len(DTYPES) * 2


@pytest.mark.slow
def test_a_device_that_does_not_answer_is_left(planted):
    status, report, said = planted({"mora_compress": "loses", "mora_decompress": "", "mora_add": ""}, ("cuda:1", "cpu"))
    assert status == 1 and "cuda:1 (the cuda:1): WRONG: mora_compress, mora_decompress, mora_add\n" in said
    found = [row["wrong"] for row in report["rows"] if row["device"] == "cuda:1"]
    assert "mora_compress[one_token]: RuntimeError: an illegal" in found[0]
    assert found[1:] == [f"{op}: not run, cuda:1 does not answer" for op in ("mora_decompress", "mora_add")]
    assert any(row["device"] == "cpu" for row in report["rows"]), "the next device has its turn"


def test_fused_paths_have_a_pass_and_a_verdict_of_their_own(planted, monkeypatch):
    """Whatever the variable says outside."""
    monkeypatch.setenv(testing.FUSED, "1")
    status, report, said = planted({"lora_add": "fused"}, ("cuda:1", "cuda:1 fused"))
    assert status == 1 and "  cuda:1 (the cuda:1): as their references" in said
    assert "cuda:1 fused (the cuda:1 fused): WRONG: lora_add\n" in said
    assert {row["device"] for row in report["rows"] if row["wrong"]} == {"cuda:1 fused"}


def test_a_file_that_cannot_be_written_is_an_error_before_the_run(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "found_on", lambda *_: pytest.fail("it ran"))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "out.json", tmp_path / "folder"):
        assert selftest.run(collect(), path=path) == 2
        assert "--json must name a file that can be written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_interrupted_run_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "out.json").write_text("an earlier one")
    monkeypatch.setattr(selftest, "found_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        selftest.run({}, path=tmp_path / "out.json")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.json", "an earlier one")]


def test_devices_are_those_that_the_build_has_code_for(monkeypatch):
    monkeypatch.setattr(selftest.torch.cuda, "get_device_name", lambda i: ["H", "H", "L"][i])
    monkeypatch.setattr(selftest.torch.cuda, "get_device_capability", lambda i: [(9, 0), (9, 0), (8, 9)][i])
    info = collect()
    assert [*selftest.devices(info, False)] == ["cpu"]
    info["gpu"] = {"count": 3}
    for op in info["ops"].values():
        op["cuda"]["implementation"] = "CUDA kernel, sm_90"
    both = [f"cuda:{i}{path}" for i in (0, 1) for path in ("", " fused")]
    assert [*selftest.devices(info, False)] == ["cpu", *both, "cuda:2"]
    assert [*selftest.devices(info, True)] == ["cpu", *both[:2], "cuda:2"]
    assert selftest.devices(info, True)["cuda:0 fused"] == "H, LRKERN_FUSED=all"
