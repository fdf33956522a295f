# SPDX-License-Identifier: Apache-2.0
"""The installed _C.so and `python -m lrkern info`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrkern
from lrkern.__main__ import main
from lrkern.reference import OPS
from tools.abi_gate import symbol_faults

LIBRARY = Path(lrkern.ops.LIBRARY)


@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="binutils (nm, readelf) not installed")
def test_library_keeps_to_the_stable_abi():
    assert not symbol_faults(LIBRARY)


def test_build_info():
    info = json.loads(lrkern.ops.build_info())
    assert info["target_abi"] == "2.11"
    assert set(info) == {"target_abi", "with_cuda", "cuda_archs", "cpu_isa", "compiler"}
    assert bool(info["cuda_archs"]) == info["with_cuda"]
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_import_is_silent():
    done = run("-W", "error::UserWarning:lrkern", "-c", "import lrkern")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "lrkern" not in done.stderr


def lrkern_says(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lrkern", *arguments])
    main()


def test_info_as_json():
    done = run("-m", "lrkern", "info", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["lrkern"] == lrkern.__version__
    assert info["torch"] == torch.__version__
    assert info["library"] == str(LIBRARY)
    assert set(info["ops"]) == set(OPS)
    for op in info["ops"].values():
        assert op["cpu"]["implementation"].startswith("CPU kernel")
        assert op["cuda"]["why"]


def test_info_as_text(monkeypatch, capsys):
    lrkern_says(monkeypatch)
    said = capsys.readouterr().out
    for word in ("lrkern", "torch", "CUDA", "CPU"):
        assert word in said
    lines = [line.split("  ") for line in said.splitlines() if line.startswith("  ")]
    formulas = {words[1]: words[-1].strip() for words in lines if len(words) > 2}
    for name, op in OPS.items():
        assert formulas[name] == op.formula, "a name apart from its formula"
    lrkern_says(monkeypatch, "info")
    assert capsys.readouterr().out == said
    if not torch.cuda.is_available():
        assert said.partition("\nchoices")[0].count("GPU") == 1, said


def test_version_and_a_reader_who_leaves(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        lrkern_says(monkeypatch, "--version")
    assert capsys.readouterr().out == f"lrkern {lrkern.__version__}\n"
    read, write = os.pipe()
    os.close(read)  # whoever reads has gone before a line is written
    done = subprocess.run(
        [sys.executable, "-m", "lrkern"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_wants_a_command(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        lrkern_says(monkeypatch, "benchmark")
    assert "info" in capsys.readouterr().err
