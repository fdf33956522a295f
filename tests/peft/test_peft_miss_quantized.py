# SPDX-License-Identifier: Apache-2.0
"""MiSS over quantised bases through PEFT's generic quantisation backend: its layer over the same base is the oracle."""

import copy
import warnings

import peft
import pytest
import torch
from peft import MissConfig
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrkern.functional as F
import lrkern.peft

I, O = 128, 96
CONFIGS = {
    "balance": {"r": 24},
    "mini": {"r": 24, "init_weights": "mini", "mini_r": 12},
    "bat": {"r": 16, "init_weights": "bat"},
}
kinds = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Of a quarter of W at most, as those of a large one."""
    monkeypatch.setattr("lrkern.functional.miss.PANEL", 1)


class Int8(nn.Module):
    """As kernels of GPTQ and others: buffers, no parameter, a forward of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def dequantize(self):
        return self.qweight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias.to(x.dtype))


class Backend(QuantizationBackend):
    supports_merge, backend_name, layer_type = True, "int8 of this test", "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()


class ForwardOnly(Backend):
    supports_merge = False


def nf4(linear):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(I, O, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(linear.state_dict())
    return made.requires_grad_(False).to("cpu")


def int8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(I, O, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.requires_grad_(False).to("cpu")


def torchao(linear):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


BASES = {"fake": Int8, "bnb.Linear4bit": nf4, "bnb.Linear8bitLt": int8, "torchao.Int8WeightOnly": torchao}
bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """PEFT meets the fake base as one of a backend that it knows."""
    backend = {"fake": Backend()}
    theirs = peft.utils.quantization_utils.resolve_quantization_backend

    def resolve(base_layer, **kwargs):
        if isinstance(base_layer, Int8):
            return backend["fake"]
        return theirs(
            base_layer, **{"get_apply_tensor_subclass": lambda: None} | {k: v for k, v in kwargs.items() if v}
        )

    for module in (peft.tuners.miss.layer, peft.tuners.miss.model):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    return backend


def models(kind, base, dropout=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(BASES[base](nn.Linear(I, O)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MissConfig(**CONFIGS[kind], miss_dropout=dropout, target_modules=["0"])
        stock = peft.get_peft_model(net, config)
    block = stock.base_model.model[0].miss_block["default"]
    block.data.normal_(0, 0.05)
    ours = copy.deepcopy(stock)
    return stock, ours, lrkern.peft.patch(ours)


def step(m, x, g):
    x = x.clone().requires_grad_()
    y = m(x)
    return y, *torch.autograd.grad(y, [x, m.base_model.model[0].miss_block["default"]], g)


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@bases
@kinds
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_and_gradients_are_those_of_peft(kind, base, training, monkeypatch):
    stock, ours, report = models(kind, base)
    assert report.fused == 1, str(report)
    calls = []
    for name in ("miss_add", "bone_linear"):
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    x, g = torch.randn(2, 5, I), torch.randn(2, 5, O)
    want = step(stock.train(training), x, g)
    for got, expected in zip(step(ours.train(training), x, g), want, strict=True):
        assert got.dtype == expected.dtype and relative(got, expected) <= 2e-6
    assert calls == ["bone_linear" if kind == "bat" else "miss_add"]
    with torch.no_grad():
        assert relative(ours(x), stock(x)) <= 2e-6


@kinds
def test_a_16_bit_x_and_autocast(kind):
    stock, ours, _ = models(kind, "fake")
    x, g = torch.randn(5, I).bfloat16(), torch.randn(5, O).bfloat16()
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert got.dtype == expected.dtype and relative(got, expected) <= 4e-3
    x, g = x.float(), g.float()
    with torch.autocast("cpu", torch.bfloat16):
        results = [step(m, x, g) for m in (ours, stock)]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and relative(got, expected) <= 2e-2


def test_bat_where_nothing_dequantises_is_peft_s_refusal(known):
    known["fake"] = ForwardOnly()
    stock, ours, report = models("bat", "fake")
    assert report.fused == 0 and "nor gives its dequantised weight" in str(report)
    for m in (stock, ours):
        with pytest.raises(ValueError, match="does not support dequantization"):
            m(torch.randn(3, I))
    stock, ours, report = models("balance", "fake")
    x = torch.randn(3, I)
    assert report.fused == 1 and relative(ours(x), stock(x)) <= 2e-6


class Made(TorchDispatchMode):
    """How many buffers of W's size the ops made."""

    def __init__(self):
        super().__init__()
        self.large = {}  # held, so that none comes back as another

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for s in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if s.nbytes() >= I * O * 4:
                self.large[s.data_ptr()] = s
        return out


def test_no_other_buffer_of_w_s_size_and_none_kept():
    """The backend gives the whole W, in forward and in backward. PEFT's own forward makes eight (seen)."""
    stock, ours, _ = models("bat", "fake")
    made = {}
    for name, m in (("peft", stock), ("lrkern", ours)):
        x = torch.randn(4, I, requires_grad=True)
        with Made() as forward:
            y = m(x)
        with Made() as backward:
            y.sum().backward()
        made[name] = len(forward.large), len(backward.large)
    assert made["lrkern"] == (1, 1) and made["peft"][0] > 3

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        ours(torch.randn(4, I))
    assert saved and max(saved) < I * O * 4


@kinds
def test_dropout_and_merging_stay_peft_s(kind):
    stock, ours, report = models(kind, "fake", dropout=0.0 if kind == "bat" else 0.5)
    assert report.fused == 1
    x = torch.randn(3, I)
    if kind != "bat":
        torch.manual_seed(1)
        y = ours(x)
        assert not torch.equal(y, ours(x))
    assert relative(ours.eval()(x), stock.eval()(x)) <= 2e-6
    with ours.disable_adapter():
        assert torch.equal(ours(x), ours.base_model.model[0].base_layer(x))


def test_a_weight_of_another_shape_is_named():
    with pytest.raises(RuntimeError, match=r"weight\(\) must have shape \[O, I\] = \[8, 6\], got \[6, 8\]"):
        F.bone_linear(torch.zeros(3, 6), lambda: torch.zeros(6, 8), None, torch.zeros(4, 2, 2))
