# SPDX-License-Identifier: Apache-2.0
"""Own files of every variant, with all of its settings: what is loaded computes the same bits, over the base as it came; and a pool
serves what is a LoRA from such a file, or says why not."""

import copy

import pytest
import torch
from torch import nn
from variant_kinds import EACH, change, make

pytest.importorskip("safetensors")
from lrkern import files
from lrkern.nn.linear import AdapterLinear
from lrkern.serving import AdapterPool, MultiLoraModel

each = pytest.mark.parametrize("v", EACH.values(), ids=EACH)


def saved(v, path):
    """A model of one layer, after training, and its base."""
    layer = change(make(v), v).eval()
    files.save(nn.Sequential(layer), path)
    return layer, nn.Sequential(copy.deepcopy(layer.base_layer))


@each
def test_a_file_makes_the_layer_again(v, tmp_path):
    layer, base = saved(v, tmp_path / "a")
    files.load(base, tmp_path / "a")
    x = torch.randn(5, v.sizes[0])
    again = base[0].eval()
    assert type(again) is type(layer) and again.settings == layer.settings
    assert torch.equal(again(x), layer(x))
    mine, its = layer.coefficients(), again.coefficients()
    assert {n: p.requires_grad for n, p in mine.items()} == {n: p.requires_grad for n, p in its.items()}
    assert all(torch.equal(p, its[n]) and p.dtype == its[n].dtype for n, p in mine.items())


@each
def test_a_pool_serves_it_or_says_why_not(v, tmp_path):
    layer, base = saved(v, tmp_path / "a")
    pool = AdapterPool(base.eval(), pages=8)
    if not layer.low_rank:
        with pytest.raises(ValueError, match=layer.FULL):
            pool.load("a", tmp_path / "a")
        return
    pool.load("a", tmp_path / "a")
    x = torch.randn(3, v.sizes[0])
    with MultiLoraModel(base, pool) as served, torch.no_grad():
        got = served(x, adapters=["a", None, "a"])
        torch.testing.assert_close(got[[0, 2]], layer(x)[[0, 2]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], layer.base_layer(x)[1])


def test_every_setting_is_one_that_some_sample_changes():
    """A setting that no file here carries with a value of its own might be lost without a test that sees it."""
    for cls in {type(make(v)) for v in EACH.values()}:
        of_cls = [make(v).settings for v in EACH.values() if v.cls == cls.__name__]
        default = AdapterLinear.KINDS[cls.__name__].from_linear(nn.Linear(64, 64, device="meta")).settings
        same = {n for n, value in default.items() if all(s[n] == value for s in of_cls)} - {"dropout", "lora_alpha"}
        if cls.__name__ == "ResLoRALinear":  # of a model's layers alone: tests/model
            same -= {"before", "pre"}
        assert not same, f"{cls.__name__}: {sorted(same)}"
