# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear over linears that keep W packed: their own forward and backward run, and the adapter adds to what they give."""

import copy
import io
import warnings

import pytest
import torch
from recorder import Recorder
from torch import nn

import lrkern.files
from lrkern.nn import FusedLoRALinear, MXFP4Linear, VeRALinear
from lrkern.ops.dispatch import library, use_library

I, O, R = 64, 128, 4  # bitsandbytes rounds to bf16 in eval, in blocks of columns


class Packed(nn.Module):
    """As GPTQ, AWQ and HQQ have a linear: sizes, buffers, a forward of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype), bias)


class NoBias(Packed):
    """One that does not know of a bias at all."""

    def __init__(self, linear):
        super().__init__(linear)
        del self.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype))


class Unpacking(Packed):
    @property
    def weight(self):
        return self.qweight * self.scale


class PackedWeight(nn.Linear):
    """As bitsandbytes has one: an nn.Linear whose weight is bytes of another shape."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = nn.Parameter(linear.weight.detach().bfloat16().view(torch.uint8).view(-1, 1), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        w = self.weight.flatten().view(torch.bfloat16).view(self.out_features, self.in_features)
        return nn.functional.linear(x, w.to(x.dtype), self.bias.to(x.dtype))


class Marked(torch.Tensor):
    """A weight of a kind of its own, as torchao's."""


def marked(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked), requires_grad=False)
    return linear


def nf4(linear):
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear4bit(I, O, compute_dtype=torch.float32, quant_type="nf4")
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def int8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear8bitLt(I, O, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.requires_grad_(False).to("cpu")


def sharded():
    class DTensor(torch.Tensor):
        """By this name is known what a process group holds in parts."""

    linear = nn.Linear(I, O)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(DTensor))
    return linear


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


BASES = {
    "duck": Packed, "no bias": NoBias, "unpacking": Unpacking, "bytes": PackedWeight, "marked": marked, "mxfp4": MXFP4Linear.from_linear,
    "bnb.Linear4bit": nf4, "bnb.Linear8bitLt": int8, "torchao": torchao_int8,
}  # fmt: skip
every_base = pytest.mark.parametrize("base", BASES)


def layer_over(base, **settings):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = FusedLoRALinear.from_linear(BASES[base](nn.Linear(I, O)), **{"r": R, "lora_alpha": 6.0} | settings)
    with torch.no_grad():
        for p in layer.coefficients().values():
            p.copy_(torch.randn(p.shape) * 0.3)
    return layer


def stepped(f, x, dy, parameters):
    x = x.detach().requires_grad_()
    y = f(x)
    return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)


@every_base
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_forward_and_gradients(base, shape):
    layer = layer_over(base)
    a, b, scale = layer.factors()
    x, dy = torch.randn(*shape, I), torch.randn(*shape, O)
    assert scale == 1.5 and {p.dtype for p in (a, b)} == {torch.float32}
    want = stepped(lambda x: layer.base_layer(x) + scale * (x @ a.T) @ b.T, x, dy, (a, b))
    recorder = Recorder(library(), "cpu")
    with use_library(recorder):
        got = stepped(layer, x, dy, (a, b))
    called = {name.removesuffix("_fwd") for name in recorder.calls} & {"lora_linear", "lora_add", "mx_linear_expand"}
    assert called == {"mx_linear_expand" if base == "mxfp4" else "lora_add"}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert all(p.grad_fn is None and not p.requires_grad for p in layer.base_layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, "x"])
@pytest.mark.parametrize("base", ["duck", "bytes", "mxfp4", "bnb.Linear4bit"])
def test_16_bits(base, dtype, adapter_dtype):
    adapter_dtype = dtype if adapter_dtype == "x" else adapter_dtype
    layer = layer_over(base, adapter_dtype=adapter_dtype)
    assert layer.lora_A.weight.dtype == adapter_dtype or adapter_dtype is None
    x, dy = torch.randn(5, I).to(dtype), torch.randn(5, O).to(dtype)
    a, b, scale = layer.factors()
    got = stepped(layer, x, dy, (a, b))
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    want = stepped(
        lambda x: layer.base_layer(x).double() + scale * (x.double() @ wide[0].T) @ wide[1].T, x, dy.double(), wide
    )
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == a.dtype
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other.double()).norm() <= 0.02 * other.double().norm()


@every_base
def test_autocast_and_dropout(base):
    layer, x = layer_over(base, dropout=0.5), torch.randn(6, I)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    y = layer(x)
    assert torch.equal(y, layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), y, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("base", ["duck", "bytes", "mxfp4"])
def test_compile(base):
    torch._dynamo.reset()
    layer, x = layer_over(base), torch.randn(6, I)
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x), atol=1e-5, rtol=1e-5
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("base", ["duck", "no bias", "bytes", "mxfp4"])
def test_state_dicts_copies_and_pickles(base):
    layer, other, x = layer_over(base), layer_over(base), torch.randn(6, I)
    nn.init.ones_(other.lora_B.weight)
    y = layer(x)
    state = layer.state_dict()
    assert {"lora_A.weight", "lora_B.weight"} <= state.keys() and len(state) > 3
    other.load_state_dict(state)
    assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert type(layer.base_layer).__name__ in repr(layer) and "r=4, scaling=1.5" in repr(layer)


def test_what_bitsandbytes_saves_it_loads_again():
    """Its own layer makes the packed weight of a state_dict; ours takes it under base_layer."""
    layer, x = layer_over("bnb.Linear4bit"), torch.randn(6, I)
    again = copy.deepcopy(layer)
    nn.init.zeros_(again.lora_B.weight)
    missing, unexpected = again.load_state_dict(layer.state_dict(), strict=False)
    assert not missing and all(key.startswith("base_layer.weight.") for key in unexpected)
    assert torch.equal(again(x), layer(x))


@every_base
def test_a_file_has_the_adapter_alone(base, tmp_path):
    pytest.importorskip("peft")
    net, x = nn.Sequential(layer_over(base)), torch.randn(6, I)
    lrkern.files.save(net, tmp_path / "a")
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.0.lora_{f}.weight" for f in "AB"}
    other = nn.Sequential(layer_over(base))
    nn.init.ones_(other[0].lora_A.weight)
    assert not torch.equal(other(x), net(x))
    lrkern.files.load(other, tmp_path / "a")
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("base", ["duck", "bytes", "bnb.Linear4bit"])
def test_its_bias_may_train(base, tmp_path):
    pytest.importorskip("peft")
    layer = layer_over(base, train_bias=True)
    for shape in ((5,), (2, 3)):
        dy = torch.randn(*shape, O)
        (grad,) = torch.autograd.grad(layer(torch.randn(*shape, I)), layer.base_layer.bias, dy)
        torch.testing.assert_close(grad, dy.flatten(0, -2).sum(0))
    lrkern.files.save(nn.Sequential(layer), tmp_path / "a")
    other = layer_over(base, train_bias=True)
    nn.init.ones_(other.base_layer.bias)
    lrkern.files.load(nn.Sequential(other), tmp_path / "a")
    assert torch.equal(other.base_layer.bias, layer.base_layer.bias)


@every_base
def test_what_needs_w_is_refused(base):
    layer = layer_over(base)
    kind = type(layer.base_layer).__name__
    with pytest.raises(
        RuntimeError, match=f"merge: the layer must have a plain nn.Linear as base_layer, {kind} keeps W packed"
    ):
        layer.merge()
    assert not layer.merged
    with pytest.raises(ValueError, match=f"use_dora needs a W of floats, got {kind}; lrkern.peft runs"):
        layer_over(base, use_dora=True)
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"init={init!r} needs a plain nn.Linear, whose W it changes, got {kind}"):
            layer_over(base, init=init)
    with pytest.raises(ValueError, match="adapter_dtype must be float32, float16 or bfloat16"):
        layer_over(base, adapter_dtype=torch.float64)
    low = layer.delta_weight()
    torch.testing.assert_close(low, 1.5 * layer.lora_B.weight @ layer.lora_A.weight)


def test_a_hook_on_mxfp4_ends_the_one_accumulator():
    layer, x, seen = layer_over("mxfp4"), torch.randn(6, I), []
    y = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    assert seen == [1]


class OfFloats(Packed):
    def __init__(self, linear):
        super().__init__(linear)
        self.weight = linear.weight


class Holder(Packed):
    def __init__(self, linear):
        super().__init__(linear)
        self.inside = linear


class Sizes(nn.Module):
    in_features, out_features = 3, 4


NO_LINEARS = {
    "Bilinear": lambda: nn.Bilinear(3, 4, 5), "Identity": nn.Identity, "Sizes": Sizes, "FusedLoRALinear": lambda: layer_over("duck"),
    "Holder": lambda: Holder(nn.Linear(3, 4)), "OfFloats, no nn.Linear, with a weight of floats": lambda: OfFloats(nn.Linear(3, 4)),
    "Linear with a DTensor": sharded, "str": lambda: "linear",
}  # fmt: skip


@pytest.mark.parametrize("got", NO_LINEARS)
def test_what_is_no_linear(got):
    module = NO_LINEARS[got]()
    with pytest.raises(
        TypeError, match=f"must be an nn.Linear with a plain weight, or a linear that keeps W packed .*, got {got}$"
    ):
        FusedLoRALinear.from_linear(module)


def test_other_kinds_take_no_packed_w():
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight, got Packed"):
        VeRALinear.from_linear(Packed(nn.Linear(I, O)))
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight, got MXFP4Linear"):
        VeRALinear.from_linear(MXFP4Linear(I, O))
    with pytest.raises(ValueError, match="dtype of the base layer must be .*, got torch.uint8"):
        VeRALinear.from_linear(PackedWeight(nn.Linear(I, O)))
    plain = nn.Linear(I, O)
    plain.weight = nn.Parameter(plain.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="dtype of the base layer must be .*, got torch.int8"):
        FusedLoRALinear.from_linear(plain)
