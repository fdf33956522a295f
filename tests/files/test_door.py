# SPDX-License-Identifier: Apache-2.0
"""lrkern.files.save and load, the one door to adapter files; and old module names."""

import importlib
import inspect
import pickle

import pytest
import torch

pytest.importorskip("safetensors")
from test_basis_files import X, adapted, plain, sharing
from torch import nn

import lrkern.files
from lrkern._moved import MOVED
from lrkern.nn import FusedLoRALinear


def fused(seed):
    torch.manual_seed(seed)
    model = plain()
    model[0] = FusedLoRALinear.from_linear(model[0], r=4)
    nn.init.normal_(model[0].lora_B.weight)
    return model.eval()


def test_a_file_of_each_kind(tmp_path):
    pytest.importorskip("peft")
    ours = adapted()
    lrkern.files.save(ours, tmp_path / "own")
    lrkern.files.save(ours, tmp_path / "four", bits=4)
    again = plain()
    lrkern.files.load(again, tmp_path / "own")
    assert torch.equal(again(X), ours(X)) and (tmp_path / "four").stat().st_size < (tmp_path / "own").stat().st_size
    ours, again = fused(1), fused(2)
    lrkern.files.save(ours, tmp_path / "folder")
    lrkern.files.load(again, tmp_path / "folder")
    assert torch.equal(again[0].lora_B.weight, ours[0].lora_B.weight)
    for kind, model in (("peft", sharing("vera")), ("lora", sharing("vera")), ("lora", ours), ("peft", ours)):
        lrkern.files.save(model, tmp_path / f"{kind} {model is ours}", kind)
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"folder", "peft False", "lora False", "peft True", "lora True"}


def test_what_the_door_refuses(tmp_path):
    with pytest.raises(ValueError, match="kind must be own, peft, lora or None, got 'pickle'"):
        lrkern.files.save(adapted(), tmp_path / "a", "pickle")
    with pytest.raises(ValueError, match="model must have FusedLoRALinear layers, got Sequential with none"):
        lrkern.files.save(plain(), tmp_path / "a")
    with pytest.raises(ValueError, match="cannot be read"):
        lrkern.files.load(plain(), tmp_path / "none")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("old", MOVED)
def test_old_module_names(old):
    if "peft" in old or "serving" in old or "file" in old:
        pytest.importorskip("peft")
    module = importlib.import_module(old)
    assert module.__name__ in (old, *MOVED[old].split())
    for home in map(importlib.import_module, reversed(MOVED[old].split())):
        public = [
            name for name, thing in vars(home).items() if not name.startswith("__") and not inspect.ismodule(thing)
        ]
        assert public and all(hasattr(module, name) for name in public)


PICKLED = {  # names of earlier versions in whole models that torch.save wrote
    "nn.dora": ["DoraNorm"],
    "nn.mixed": ["MixedFactors"],
    "nn.lora": ["Factor", "Magnitude", "FusedLoRALinear"],
    "peft": ["_Fused", "_create"],
    "peft_layer": ["_rebuild"],
    "peft_basis": ["FusedVera", "FusedRandLora"],
}


@pytest.mark.parametrize("old", PICKLED)
def test_what_pickles_name(old):
    pytest.importorskip("peft")
    for name in PICKLED[old]:
        assert callable(pickle.loads(f"clrkern.{old}\n{name}\n.".encode()))
