# SPDX-License-Identifier: Apache-2.0
"""PEFT's AdaLoRA folders: into AdaLoRALinear layers and out of them, and into a pool, each way to the same y."""

import json

import pytest
import torch
from door_models import LINEARS, Net, X, adapted
from safetensors.torch import load_file
from torch import nn

import lrkern
import lrkern.files

pytest.importorskip("peft")
import peft


def out(net):
    with torch.no_grad():
        return net(X)


@torch.no_grad()
def stock():
    config = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["l"], lora_alpha=6)
    model, g = peft.get_peft_model(Net(), config).eval(), torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad and "ranknum" not in name:
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def pruned(masks):
    """PEFT's AdaLoRA whose allocator has left these ranks."""
    theirs = stock()
    pattern = {f"{name}.lora_E.default": list(mask) for name, mask in masks.items()}
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    theirs.peft_config["default"].rank_pattern = pattern
    return theirs


def test_adaloras_ranks_come_and_go(tmp_path):
    """A rank that the allocator took away is not in the file; the scaling stays that of the rank there was."""
    theirs = pruned({"l": [True, False, True, False], "x.l": [False] * 4, "x.m.l": [True] * 4})
    theirs.save_pretrained(tmp_path / "theirs")
    net = Net().eval()
    lrkern.load(net, tmp_path / "theirs")
    torch.testing.assert_close(out(net), out(theirs), rtol=1e-5, atol=1e-6)
    assert (net.l.r, net.l.ranknum, net.x["m"]["l"].r) == (2, 4.0, 4) and type(net.x["l"]) is nn.Linear
    lrkern.save(net, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["init_r"] == 4 and config["rank_pattern"] == {"l.lora_E": [True, True, False, False]}
    again = peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "ours")
    torch.testing.assert_close(out(again), out(theirs), rtol=1e-5, atol=1e-6)
    ours = adapted("adalora")
    y = out(ours)
    ours.l.lora_E.data[1] = 0
    z = out(ours)
    ours.l.keep(torch.tensor([True, False, True, True]))
    torch.testing.assert_close(out(ours), z)
    assert not torch.allclose(y, z, atol=1e-4)
    lrkern.save(ours, tmp_path / "kept")
    torch.testing.assert_close(
        out(peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "kept")), z, rtol=1e-5, atol=1e-6
    )
    lrkern.files.save(ours, tmp_path / "by files", "peft")  # but for the head
    assert load_file(tmp_path / "by files" / "adapter_model.safetensors").keys() == {
        f"base_model.model.{n}.{k}" for n in LINEARS for k in ("lora_A", "lora_E", "lora_B")
    }


def test_a_pool_serves_pefts_folder(tmp_path):
    from lrkern.serving import AdapterPool, MultiLoraModel

    theirs = pruned({"l": [True, False, True, False], "x.l": [False] * 4, "x.m.l": [True] * 4})
    theirs.save_pretrained(tmp_path)
    base = Net().eval()
    pool = AdapterPool(base, pages=8)
    pool.load("a", tmp_path)
    got = MultiLoraModel(base, pool)(X, adapters=["a", None] * 3 + ["a"])
    torch.testing.assert_close(got[::2], out(theirs)[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1::2], out(Net().eval())[1::2], rtol=1e-4, atol=1e-5)


def test_an_alpha_of_zero_is_the_rank(tmp_path):
    theirs = stock()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    net = Net().eval()
    lrkern.load(net, tmp_path)
    torch.testing.assert_close(
        out(net), out(peft.PeftModel.from_pretrained(Net().eval(), tmp_path)), rtol=1e-5, atol=1e-6
    )


WRONG = {
    "half": ({"ranknum": 4.5}, "l.ranknum must be whole and in 4..65536, as PEFT's init_r is, got 4.5"),
    "less": ({"ranknum": 3.0}, "l.ranknum must be whole and in 4..65536, as PEFT's init_r is, got 3"),
    "two": ({"rank_pattern": {"x.l": 3}}, r"x.l.ranknum must be 4.0, as the first layer's, got 3.0: PEFT has one for all layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_peft_does_not_have(case, tmp_path):
    settings, why = WRONG[case]
    with pytest.raises(ValueError, match=f"^lrkern.save: {why}"):
        lrkern.save(adapted("adalora", **settings), tmp_path / "a")
    assert not (tmp_path / "a").exists()
