# SPDX-License-Identifier: Apache-2.0
"""tools/sources.py: its includes are the compiler's, and evidence goes stale exactly when what it was compiled from changed."""

import shutil
import subprocess

import pytest

import build as emulator
from tools import sources
from tools.sources import ROOT


@pytest.mark.parametrize("source", sources.sources("cuda") + sources.sources("policy"), ids=lambda s: str(s.path))
def test_the_closure_is_the_compilers(source):
    if why := emulator.why_not():
        pytest.skip(why)
    command = [emulator.CXX, *emulator.COMMON, "-MM", "-x", "c++", source.path]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = {(ROOT / word).resolve().relative_to(ROOT) for word in said.replace("\\\n", " ").split()[1:]}
    assert set(sources.closure([source.path])) == {path for path in known if path.parts[0] == "csrc"}


def test_without_cmake_the_kept_list_is_read(monkeypatch, tmp_path):
    found = sources.sources()
    monkeypatch.setattr(sources, "KEPT", tmp_path / "sources.txt")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    sources.KEPT.write_text(sources.printed())
    monkeypatch.setattr(sources, "tool", lambda name: "")
    monkeypatch.setattr(sources, "printed", sources.printed.__wrapped__)
    assert sources.sources() == found
    sources.KEPT.unlink()
    with pytest.raises(RuntimeError, match="no cmake, and no sources.txt"):
        sources.sources()


@pytest.mark.parametrize(
    ("path", "stale"),
    [
        ("csrc/policy/basis.cpp", {"basis"}),
        ("csrc/policy/lora.cpp", {"lora"}),
        ("csrc/multi_lora.h", {"multi_lora", "mx"}),  # whose plan sorts MX's rows by expert
        ("csrc/lora.h", {"lora", "multi_lora", "mx"}),  # whose chunks and limits multi-LoRA shares, and what S is MX
        ("csrc/common.h", {*sources.families()}),
        ("csrc/cuda/launch.cuh", {*sources.families()}),
        ("csrc/cpu/lora.cpp", set()),
        ("csrc/ops/check.h", set()),
    ],
)
def test_what_makes_evidence_stale(path, stale, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = {family: sources.digest(family) for family in sources.families()}
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    assert {family: sources.digest(family) for family in sources.families()} == before
    with (tmp_path / path).open("a") as f:
        f.write("// changed\n")
    assert {family for family in before if sources.digest(family) != before[family]} == stale
