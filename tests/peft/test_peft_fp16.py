# SPDX-License-Identifier: Apache-2.0
"""Models of float16 whose scale · S is out of its range, which PEFT's order of the products never forms: PEFT's answers."""

import copy

import peft
import pytest
import torch
from torch import nn

import lrkern.peft
from lrkern.nn import FusedLoRALinear

X = torch.zeros(3, 16)
X[:, 0] = 1000.0
ANSWER = torch.full((3, 8), 160.0)  # 16 · (1000 · 10) · 1e-3


def pair(dtype=torch.float16, watched=False, **config):
    """Two adapters over W = 0, stock and patched; a watched base runs itself, the adapter beside it."""
    net = nn.Sequential(nn.Linear(16, 8, bias=False))
    if watched:
        net[0].register_forward_hook(lambda *_: None)
    nn.init.zeros_(net[0].weight)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["0"], **config)
    model = peft.get_peft_model(net.to(dtype), config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name in "ab":
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.zero_(), b.zero_()
            a[0, 0], b[:, 0] = 10.0, 1e-3
            if config.use_dora:
                layer.lora_magnitude_vector[name].weight.fill_(0.16)
    ours = copy.deepcopy(model)
    lrkern.peft.patch(ours)
    return model, ours


def same(got, want, of=ANSWER):
    assert got.dtype == want.dtype == torch.float16
    for y in (want, got):
        torch.testing.assert_close(y.float(), of, rtol=4e-3, atol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
def test_float16_models(dora, train, watched):
    grads, answers = [], []
    for model in pair(use_dora=dora, watched=watched):
        x = X.half().requires_grad_(train)
        y = model.train(train)(x)
        answers.append(y.detach())
        if train:
            y.backward(torch.full_like(y, 0.01))
            grads.append([x.grad] + [p.grad for p in model.parameters() if p.grad is not None])
    same(*answers[::-1])
    for stock, ours in zip(*grads, strict=True) if train else ():
        assert stock.isfinite().all()
        torch.testing.assert_close(ours, stock, rtol=4e-3, atol=2e-3)


def test_float16_autocast():
    stock, ours = pair(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        same(ours(X), stock(X))


@torch.no_grad()
def test_mixed_batches():
    stock, ours = (model.eval() for model in pair())
    who = ["b", "__base__", "a"]
    same(*(m(X.half(), adapter_names=who) for m in (ours, stock)), of=ANSWER * torch.tensor([[1.0], [0.0], [1.0]]))


@torch.no_grad()
def test_a_scale_that_is_a_tensor():
    """peft.utils.hotswap.prepare_model_for_compiled_hotswap; scale · B would leave the range."""
    stock, ours = pair()
    for model in (stock, ours):
        layer = model.base_model.model[0]
        layer.lora_A["a"].weight[0, 0], layer.lora_B["a"].weight[:, 0] = 1e-3, 5000.0
        layer.scaling["a"] = torch.tensor(16.0)
    x = (X / 1000).half()
    same(ours(x), stock(x), of=torch.full((3, 8), 80.0))


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
def test_layers_of_our_own(dora, watched):
    linear = nn.Linear(16, 8, bias=False).half()
    nn.init.zeros_(linear.weight)
    layer = FusedLoRALinear.from_linear(linear, r=4, lora_alpha=64, use_dora=dora, adapter_dtype=torch.float16)
    layer.lora_A.weight.zero_()
    layer.lora_A.weight[0, 0], layer.lora_B.weight[:, 0] = 10.0, 1e-3
    if dora:
        layer.lora_magnitude_vector.weight.fill_(0.16)
    if watched:
        linear.register_forward_hook(lambda *_: None)
    same(layer(X.half()), layer(X.half()))
