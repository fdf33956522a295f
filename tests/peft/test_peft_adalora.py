# SPDX-License-Identifier: Apache-2.0
"""PEFT's AdaLoRA layers patched: its own layer is the oracle, and its allocator must not see a difference."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import lrkern.peft

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Linear(i, o, bias=bias, dtype=dtype) for i, o in ((24, 40), (40, 24)))

    def forward(self, x):
        return self.down(self.up(x).tanh())


def adapted(net, wide=True, **settings):
    config = AdaLoraConfig(target_modules=["up", "down"], **{"init_r": 6, "target_r": 3, "total_step": 20} | settings)
    made = get_peft_model(net, config, autocast_adapter_dtype=wide)
    g = torch.Generator().manual_seed(1)
    for name, p in made.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g).mul(0.2).to(p.dtype)
    return made


def pair(**more):
    dtype, bias = more.pop("dtype", torch.float32), more.pop("bias", True)
    stock = adapted(Net(dtype, bias), **more)
    ours = copy.deepcopy(stock)
    return stock, ours, lrkern.peft.patch(ours)


def layer_of(m, name="up"):
    return getattr(m.base_model.model, name)


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)).item()


def step(m, x, g):
    x = x.clone().requires_grad_()
    y = m(x)
    # PEFT makes ranknum trainable where it casts it, over a base of 16 bits: a number that no allocator means to train
    trained = [p for name, p in m.named_parameters() if p.requires_grad and "ranknum" not in name]
    assert len(trained) == 6
    return y, *torch.autograd.grad(y, [x, *trained], g)


@pytest.mark.parametrize("wide", [True, False], ids=["fp32 factors", "factors of the base"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
def test_forward_and_gradients_are_those_of_peft(wide, dtype, lead):
    stock, ours, report = pair(dtype=dtype, wide=wide, bias=wide)
    assert report.fused == 2, str(report)
    x, g = torch.randn(*lead, 24).to(dtype), torch.randn(*lead, 24).to(dtype)
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert relative(got, expected) <= (1 if wide else 2) * DTYPES[dtype]


def test_it_runs_the_ops(monkeypatch):
    """A patch that leaves PEFT's code would pass every comparison with PEFT."""
    stock, ours, _ = pair()
    called = []
    monkeypatch.setattr(lrkern.functional, "lora_linear", lambda x, w, b, *more: called.append(more) or x @ w.mT + b)
    ours(torch.randn(3, 24))
    (a, b, scale, p), _ = called
    layer = layer_of(stock)
    gain = layer.lora_E["default"] * layer.scaling["default"] / (6 + 1e-5)
    torch.testing.assert_close(a, layer.lora_A["default"] * gain)
    assert torch.equal(b, layer.lora_B["default"]) and (scale, p) == (1.0, 0.0)


def test_the_allocator_sees_no_difference():
    """Training with PEFT's budget, from all ranks to half of them: the same ranks go in the same steps."""
    torch.manual_seed(2)
    stock, ours, report = pair(tinit=2, tfinal=5, deltaT=2, total_step=20)
    assert report
    x, target = torch.randn(30, 24), torch.randn(30, 24)
    patterns, seen = [], []
    for model in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        zeros = []
        for i in range(20):
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
            model.base_model.update_and_allocate(i)
            optimizer.zero_grad()
            zeros.append([int((layer_of(model, n).lora_E["default"] == 0).sum()) for n in ("up", "down")])
        seen.append(zeros), patterns.append(model.peft_config["default"].rank_pattern)
    assert seen[0] == seen[1] and sum(seen[0][-1]) == 6 and patterns[0] == patterns[1]
    assert relative(ours(x), stock(x)) < 1e-4
    assert lrkern.peft.report(ours)


def test_dropout_drops_x_of_the_adapter_alone():
    stock, ours, _ = pair(lora_dropout=0.5)
    up, x = layer_of(ours), torch.ones(4000, 24)
    y, base = up(x), up.base_layer(x)
    ours.eval(), stock.eval()
    assert relative((y - base).mean(0), up(x)[0] - base[0]) < 0.06 and not torch.equal(y[0], y[1])
    assert relative(ours(x), stock(x)) < 2e-6


def test_ranks_that_are_gone_and_several_adapters():
    stock, ours, _ = pair()
    for m in (stock, ours):
        m.add_adapter("second", AdaLoraConfig(init_r=4, total_step=9, target_modules=["up"], inference_mode=True))
        m.base_model.resize_modules_by_rank_pattern(
            {f"{n}.lora_E": [True, False, True, False, False, n == "up"] for n in ("up", "down")}, "default"
        )
        for p in (p for n, p in m.named_parameters() if "second" in n):
            p.data = torch.linspace(-0.3, 0.3, p.numel()).view_as(p)
        for name in ("up", "down"):
            layer_of(m, name).set_adapter(["default", "second"])
    lrkern.peft.patch(ours)
    assert layer_of(ours).lora_A["default"].shape == (3, 24) and layer_of(ours, "down").lora_A["default"].shape == (
        2,
        40,
    )
    assert lrkern.peft.report(ours).fused == 2
    x = torch.randn(7, 24)
    assert relative(ours(x), stock(x)) < 2e-6


def test_over_a_base_of_another_kind():
    other = type("Other", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x).sin()})
    stock, ours, _ = pair()
    for m in (stock, ours):
        layer_of(m).base_layer.__class__ = other
    assert lrkern.peft.report(ours).fused == 2
    x, g = torch.randn(6, 24), torch.randn(6, 24)
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_over_bitsandbytes(inside):
    bnb = pytest.importorskip("bitsandbytes")
    net = Net(inside)
    for name in ("up", "down"):
        linear = getattr(net, name)
        quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=inside, quant_type="nf4")
        quantised.load_state_dict(linear.state_dict())
        setattr(net, name, quantised.requires_grad_(False).to("cpu"))
    net.is_loaded_in_4bit = True
    stock = adapted(net)
    ours = copy.deepcopy(stock)
    assert lrkern.peft.patch(ours).fused == 2
    up, theirs, x = layer_of(ours), layer_of(stock), torch.randn(6, 24, dtype=inside)
    assert type(theirs).__name__ == "SVDLinear4bit" and theirs(x).dtype == up(x).dtype == inside
    assert relative(up(x), theirs(x)) < (2e-6 if inside == torch.float32 else 1e-2)


def test_what_is_not_fused_says_why():
    stock, ours, _ = pair()
    x = torch.randn(3, 24)
    reasons = []
    with torch.no_grad():
        for change in (
            lambda up: up.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
            lambda up: setattr(up.lora_E["default"], "data", up.lora_E["default"].double()),
            lambda up: up.lora_A.update({"default": nn.Parameter(torch.zeros(513, 24))}),
            lambda up: up.enable_adapters(False),
        ):
            changed = copy.deepcopy(ours)
            change(layer_of(changed))
            reasons += lrkern.peft.report(changed).reasons
    assert reasons == [
        "dropout AlphaDropout", "factors of dtype torch.float32, torch.float64 and torch.float32",
        "factors [513, 24], [6, 1] and [40, 6]", "adapters disabled or merged",
    ]  # fmt: skip
    ours.merge_adapter()
    assert relative(ours(x), stock(x)) < 1e-5
    ours.unmerge_adapter()
    lrkern.peft.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    conv = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), AdaLoraConfig(target_modules=["0"], total_step=9))
    assert "SVDConv2d is no linear layer" in str(lrkern.peft.patch(conv))


def test_autocast_as_peft():
    stock, ours, _ = pair()
    x = torch.randn(9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), stock(x)
    assert y.dtype == expected.dtype == torch.bfloat16 and relative(y, expected) < 1e-2


def test_a_folder_goes_both_ways(tmp_path):
    stock, ours, _ = pair()
    ours.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(Net(), tmp_path / "a")
    x = torch.randn(3, 24)
    expected = stock(x)
    assert relative(again(x), expected) < 2e-6
    lrkern.peft.patch(again)
    assert relative(again(x), expected) < 2e-6


def test_lora_beside_it_stays_lora():
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"]))
    assert lrkern.peft.patch(model) and type(layer_of(model))._lrkern_mixin is lrkern.peft._Fused
    assert type(layer_of(pair()[1]))._lrkern_mixin is lrkern.peft.FusedAdaLora
