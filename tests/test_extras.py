# SPDX-License-Identifier: Apache-2.0
"""Without the packages of an extra, the rooms that need them say what to install; the others work."""

import re
import subprocess
import sys
from pathlib import Path

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()

TRY = """
import importlib, sys
import torch
sys.modules[MISSING] = None  # as if it were not installed
import lrkern
layer = lrkern.nn.NOLALinear(8, 4, r=2)
layer(torch.ones(1, 8))
for room in ("peft", "files", "serving", "s2ft", "convert", "compress", "model"):
    try:
        importlib.import_module("lrkern." + room)
        print(room, "works")
    except ModuleNotFoundError as error:
        print(room, error)
try:
    lrkern.peft
except ModuleNotFoundError as error:
    print("attribute", error)
model = torch.nn.Sequential(lrkern.nn.FusedLoRALinear(8, 4, r=2), lrkern.nn.FusedLoRALinear(4, 4, r=2))
for kind in ("vera", "miss", "lora") if MISSING == "peft" else ():
    try:
        layer = {"vera": lrkern.nn.VeRALinear, "miss": lrkern.nn.MissLinear, "lora": lrkern.nn.FusedLoRALinear}[kind]
        lrkern.files.save(torch.nn.Sequential(layer(8, 4, r=2)), "never", kind="peft")
    except ModuleNotFoundError as error:
        print(kind, error)
"""


def said_without(package, folder):
    code = TRY.replace("MISSING", repr(package))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not [*folder.iterdir()], "nothing was written"
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def needs(who, package):
    return f'lrkern.{who} needs {package}, which is not installed; run `pip install "lrkern[peft]"`'


def test_without_peft(tmp_path):
    said = said_without("peft", tmp_path)
    assert said["peft"] == said["attribute"] == needs("peft", "peft")
    assert said["serving"] == needs("serving", "peft")
    assert said["files"] == said["s2ft"] == said["convert"] == said["compress"] == said["model"] == "works"
    assert said["lora"] == needs("peft.save_adapter", "peft")
    assert said["vera"] == said["miss"] == needs("files.save", "peft")


def test_without_safetensors(tmp_path):
    said = said_without("safetensors", tmp_path)
    assert (
        said["files"]
        == said["s2ft"]
        == said["convert"]
        == said["compress"]
        == said["model"]
        == needs("files", "safetensors")
    )
    assert said["peft"] == said["attribute"] == needs("peft", "safetensors")
    assert said["serving"] == needs("serving", "safetensors")


def test_the_extra_brings_them():
    assert re.search(r'^peft = \["peft>=[\d.]+", "safetensors"\]$', PYPROJECT, re.M)
