# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear as a user has it."""

import copy
import math

import pytest
import torch
from torch import nn

from lrkern.nn import FusedLoRALinear


def trained(**kwargs):
    layer = FusedLoRALinear(24, 20, **({"r": 4, "init": "gaussian"} | kwargs))
    nn.init.normal_(layer.lora_B.weight)
    return layer


def expected(layer, x):
    delta = (x.to(layer.lora_A.weight.dtype) @ layer.lora_A.weight.T) @ layer.lora_B.weight.T * layer.scaling
    return layer.base_layer(x) + delta.to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_forward_and_gradients(bias, rslora):
    layer, x = trained(bias=bias, use_rslora=rslora, lora_alpha=6), torch.randn(2, 5, 24)
    assert layer.scaling == pytest.approx(6 / math.sqrt(4) if rslora else 6 / 4)
    torch.testing.assert_close(layer(x), expected(layer, x), atol=1e-5, rtol=1e-5)
    layer(x).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_A.weight", "lora_B.weight"}


def test_train_bias():
    layer = trained(train_bias=True)
    layer(torch.randn(3, 24)).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((20,), 3.0))
    assert layer.base_layer.weight.grad is None
    with pytest.raises(ValueError, match="train_bias needs a layer with a bias"):
        FusedLoRALinear(8, 8, bias=False, train_bias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base_keeps_fp32_factors(dtype):
    layer, x = trained(dtype=dtype), torch.randn(7, 24).to(dtype)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(layer, x), atol=2e-1, rtol=2e-2)
    y.float().sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32
    assert trained(dtype=dtype, adapter_dtype=dtype).lora_A.weight.dtype == dtype
    moved = layer.to(torch.float32)
    assert moved(x.float()).dtype == torch.float32


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_every_init_starts_as_the_base_layer(init):
    base, x = nn.Linear(24, 20), torch.randn(5, 24)
    y = base(x)
    layer = FusedLoRALinear.from_linear(base, r=4, lora_alpha=8, init=init)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    changed = not torch.equal(layer.base_layer(x), y)
    assert changed == (init in ("pissa", "olora"))
    assert layer.lora_A.weight.abs().sum() > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_are_those_of_peft(init):
    peft = pytest.importorskip("peft")
    base = nn.Linear(24, 20)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init),
    ).base_model.model[0]
    ours = FusedLoRALinear.from_linear(base, r=4, lora_alpha=8, init=init)
    torch.testing.assert_close(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-5, rtol=1e-5)
    delta = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight * 2
    torch.testing.assert_close(ours.delta_weight(), delta, atol=1e-5, rtol=1e-5)


def test_merge_unmerge_enable():
    layer, x = trained(), torch.randn(5, 24)
    y, base, w = layer(x), layer.base_layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    layer.merge()  # twice is once
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, w, atol=1e-6, rtol=1e-5)
    layer.disable_adapter()
    torch.testing.assert_close(layer(x), base)
    assert "disabled" in repr(layer)
    layer.enable_adapter()
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_merge_refuses_non_finite_and_changes_nothing():
    layer = trained()
    w = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_B.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="must be finite"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, w) and not layer.merged


def test_state_dict_repr_copy_and_wrap():
    base = nn.Linear(24, 20)
    layer = FusedLoRALinear.from_linear(base, r=4, lora_dropout=0.1)
    assert layer.base_layer.weight is base.weight
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight"]
    assert "r=4, scaling=8, lora_dropout=0.1" in repr(layer)
    twin = copy.deepcopy(layer).eval()
    nn.init.normal_(twin.lora_B.weight)
    other = FusedLoRALinear(24, 20, r=4).eval()
    other.load_state_dict(twin.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(other(x), twin(x))


def test_rank_0_and_limits():
    layer = FusedLoRALinear(8, 8, r=0)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.merge()
    for bad, text in [({"r": 513}, "r must lie in 0..512, got 513"), ({"r": -1}, "got -1"),
                      ({"lora_dropout": 1.1}, r"lora_dropout must lie in \[0, 1\], got 1.1"),
                      ({"init": "zeros"}, "init must be one of .*, got 'zeros'")]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            FusedLoRALinear(8, 8, **bad)
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight"):
        FusedLoRALinear.from_linear(nn.Conv1d(3, 3, 1))


def test_dropout_only_in_training():
    layer, x = trained(lora_dropout=0.5), torch.randn(6, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), expected(layer, x), atol=1e-5, rtol=1e-5)
