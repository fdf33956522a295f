# SPDX-License-Identifier: Apache-2.0
"""lrkern.peft on a net of two plain linears, and its files; on a real model: test_peft_*.py."""

import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

import lrkern.peft  # noqa: E402
from lrkern.nn import FusedLoRALinear  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def peft_net(dtype=torch.float32, **config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False} | config
    return peft.get_peft_model(Net().to(dtype), peft.LoraConfig(**config))


def lora_grads(model, x):
    y = model(x)
    y.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), grads


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 9}},
                                    {"target_modules": "all-linear"}, {"bias": "lora_only"}, {"use_dora": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_equals_peft(config, dtype):
    model, x = peft_net(dtype, **config), torch.randn(3, 5, 16).to(dtype)
    y, grads = lora_grads(model, x)
    report = lrkern.peft.patch(model)
    assert report.fused == len(report.layers) == 2 and "2 of 2" in str(report)
    got, got_grads = lora_grads(model, x)
    tol = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(got, y, **tol)
    assert got_grads.keys() == grads.keys()
    for name in grads:
        assert got_grads[name].dtype == grads[name].dtype
        error = (got_grads[name].double() - grads[name].double()).norm() / grads[name].double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-2), name  # 0.030 seen: both round y and dx to bf16
    lrkern.peft.unpatch(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


@pytest.mark.parametrize(("config", "why"), [({"lora_bias": True}, "lora_bias")], ids=str)
def test_what_is_not_fused_runs_as_peft_bit_for_bit(config, why):
    model, x = peft_net(**config), torch.randn(3, 16)
    y = model(x)
    report = lrkern.peft.patch(model)
    assert report.fused == 0 and all(why in r for r in report.layers.values()) and why in str(report)
    assert torch.equal(model(x), y)


def test_layers_that_change_after_patch_fall_back():
    model, x = peft_net(), torch.randn(3, 16)
    lrkern.peft.patch(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.base_model.model(x))
    y = model(x)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.equal(model(x), y)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    calls = []
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1], "a hook on the base layer still fires"


def test_patch_is_idempotent_and_local():
    model, other = peft_net(), peft_net()
    lrkern.peft.patch(model)
    lrkern.peft.patch(model)
    assert type(other.base_model.model.up) is peft.tuners.lora.layer.Linear
    assert "lora.Linear" in repr(model)
    with pytest.raises(ValueError, match="must have PEFT LoRA layers"):
        lrkern.peft.patch(Net())


def test_save_and_load_both_ways(tmp_path):
    model, x = peft_net(), torch.randn(3, 16)
    lrkern.peft.patch(model)
    y = model(x)
    model.save_pretrained(tmp_path / "patched")
    base = Net()
    base.load_state_dict({k.replace("base_model.model.", "").replace("base_layer.", ""): v
                          for k, v in model.state_dict().items() if "lora" not in k})  # fmt: skip
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "patched"))
    torch.testing.assert_close(stock(x), y, atol=1e-5, rtol=1e-5)


def fused_net(net, r=4, **kw):
    net.up = FusedLoRALinear.from_linear(net.up, r=r, lora_alpha=6, **kw)
    net.down = FusedLoRALinear.from_linear(net.down, r=3, lora_alpha=6, **kw)
    for m in (net.up, net.down):
        nn.init.normal_(m.lora_B.weight)
    return net


@pytest.mark.parametrize("kw", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_fused_modules_write_a_folder_stock_peft_loads(tmp_path, kw):
    plain, x = Net(), torch.randn(3, 16)
    ours = fused_net(Net(), **kw)
    ours.up.base_layer.load_state_dict(plain.up.state_dict())
    ours.down.base_layer.load_state_dict(plain.down.state_dict())
    lrkern.peft.save_adapter(ours, tmp_path)
    stock = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(stock(x), ours(x), atol=1e-5, rtol=1e-5)
    twin = fused_net(Net(), **kw)
    lrkern.peft.load_adapter(twin, tmp_path)
    trained = {k: v for k, v in ours.state_dict().items() if "lora" in k}
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in trained.items())
    if kw.get("use_dora"):
        with pytest.raises(ValueError, match="has base_model.model.down.lora_magnitude_vector and 1 more that the"):
            lrkern.peft.load_adapter(fused_net(Net()), tmp_path)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def pickle_only(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def rewrite(change):
    def f(folder):
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return f


def rescale(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"lora_alpha": 60}
    path.write_text(json.dumps(config))


A = "base_model.model.up.lora_A.weight"
BROKEN = [
    (truncate, "cannot be read"),
    (pickle_only, r"must hold adapter_model.safetensors, or shards .* \(pickle"),
    (rewrite(lambda t: t.pop(A)), "lacks base_model.model.up.lora_A.weight"),
    (rewrite(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(1)})), "has base_model.model.x"),
    (rewrite(lambda t: t.update({A: torch.zeros(4, 17)})), r"must have shape \[4, 16\], got \[4, 17\]"),
    (rewrite(lambda t: t.update({A: torch.full((4, 16), float("nan"))})), "must be finite floats"),
    (rescale, "must have r=4, scaling=1.5, got r=4, scaling=15"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "text"), BROKEN, ids=[t for _, t in BROKEN])
def test_a_broken_file_changes_nothing(tmp_path, damage, text):
    net = fused_net(Net())
    lrkern.peft.save_adapter(net, tmp_path)
    damage(tmp_path)
    target = fused_net(Net())
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        lrkern.peft.load_adapter(target, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
