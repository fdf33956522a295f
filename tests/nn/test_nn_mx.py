# SPDX-License-Identifier: Apache-2.0
"""MXFP4Linear: what it computes, its gradients, what it refuses, and its bytes in state_dicts and files."""

import copy
import io

import pytest
import torch
from torch import nn

import lrkern.functional as F
from lrkern import ops
from lrkern.nn import MXFP4Linear
from lrkern.nn.plain import offers

DTYPES = torch.float32, torch.bfloat16, torch.float16
EPS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (in, out, tokens): few rows and panels, whole blocks and not
SIZES = [(64, 48, 3), (70, 33, 5), (96, 64, 40)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def linear(I=64, O=48, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(I, O, bias).to(dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@sizes
@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(size, dtype, bias):
    I, O, T = size
    of = linear(I, O, bias, dtype)
    layer = MXFP4Linear.from_linear(of)
    x, g = torch.randn(2, T, I).to(dtype), torch.randn(2, T, O).to(dtype)
    w = layer.dequantize(torch.float32).double()
    assert 0 < relative(w, of.weight) < 0.13  # the format's own error on such weights: 0.11
    y = layer(x.requires_grad_())
    want = nn.functional.linear(x.double(), w, of.bias.double() if bias else None)
    assert y.dtype == dtype and relative(y, want) < EPS[dtype]
    y.backward(g)
    assert x.grad.dtype == dtype and relative(x.grad, g.double() @ w) < EPS[dtype]
    if bias:
        assert layer.bias is of.bias and relative(of.bias.grad, g.double().sum((0, 1))) < EPS[dtype]
    assert {name for name, _ in layer.named_parameters()} == ({"bias"} if bias else set())
    assert relative(layer.product(x), x.double() @ w.T) < EPS[dtype]


@sizes
@dtypes
@pytest.mark.parametrize("factors", ["float32", "x's"])
def test_lora_in_the_accumulator_of_the_base(size, dtype, factors):
    I, O, T = size
    layer = MXFP4Linear.from_linear(linear(I, O, dtype=dtype))
    of = torch.float32 if factors == "float32" else dtype
    x, g = torch.randn(T, I).to(dtype).requires_grad_(), torch.randn(T, O).to(dtype)
    a, b = (nn.Parameter((0.2 * torch.randn(*s)).to(of)) for s in ((5, I), (O, 5)))
    y = F.lora_into(layer.with_low_rank, x, a, b, 0.5)
    got = torch.autograd.grad(y, [x, a, b, layer.bias], g)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b, layer.bias)]
    X, A, B, bias = wide
    truth = X @ layer.dequantize(torch.float32).double().T + bias + 0.5 * (X @ A.T) @ B.T
    want = torch.autograd.grad(truth, wide, g.double())
    assert y.dtype == dtype and relative(y, truth.detach()) < EPS[dtype]
    for mine, theirs, t in zip(got, want, (x, a, b, layer.bias), strict=True):
        assert mine.dtype == t.dtype and relative(mine, theirs) < 2 * EPS[dtype]


def test_dropout_acts_on_the_adapter_alone():
    layer = MXFP4Linear.from_linear(linear())
    x, a, b = torch.randn(6, 64), torch.eye(64), torch.randn(48, 64)
    torch.manual_seed(1)
    y = F.lora_into(layer.with_low_rank, x, a, b, 1.0, 0.5)
    assert not torch.equal(y, F.lora_into(layer.with_low_rank, x, a, b, 1.0, 0.5))
    assert relative(F.lora_into(layer.with_low_rank, x, a, b, 1.0, 0.5, False), layer(x) + x @ b.T) < 1e-6
    torch.manual_seed(1)
    assert relative(y, F.lora_add(layer(x), x, a, b, 1.0, 0.5)) < 1e-6


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low):
    layer, x = MXFP4Linear.from_linear(linear()), torch.randn(7, 64)
    a, b = torch.randn(3, 64), torch.randn(48, 3)
    with torch.autocast("cpu", low):
        y, z = layer(x), F.lora_into(layer.with_low_rank, x, a, b, 0.1)
    assert y.dtype == z.dtype == low
    want = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert relative(y, want) < 2 * EPS[low] and relative(z, want + 0.1 * (x @ a.T) @ b.T) < 2 * EPS[low]


def test_nothing_of_the_size_of_w_is_kept():
    layer, saved = MXFP4Linear.from_linear(linear(256, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(4, 256, requires_grad=True))
    assert max(saved) == layer.codes.nbytes == 256 * 128
    assert 8 * sum(t.nbytes for t in layer.buffers()) == 4.25 * 256 * 256


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even", "quest", "quest_nearest"])
def test_a_rule_is_that_of_the_op(rule):
    of = linear()
    layer = MXFP4Linear.from_linear(of, rule)
    codes, scales, _ = ops.mx_quantize(of.weight.detach(), rule)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scales, scales)
    new = torch.randn(48, 64)
    layer.write(new)
    codes, scales, _ = ops.mx_quantize(new, rule)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scales, scales)


def test_to_leaves_the_bytes_and_moves_the_dtype():
    layer = MXFP4Linear.from_linear(linear())
    codes, scales = layer.codes.clone(), layer.scales.clone()
    for change, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ):
        change(layer)
        assert torch.equal(layer.codes, codes) and torch.equal(layer.scales, scales)
        assert layer.codes.dtype == layer.scales.dtype == torch.uint8
        assert layer.dtype == layer.bias.dtype == layer.dequantize().dtype == dtype


@pytest.mark.parametrize("how", ["torch.save", "safetensors", "pickle of the module", "deepcopy"])
def test_it_comes_back_from_files(how, tmp_path):
    layer = MXFP4Linear.from_linear(linear(70, 33))
    again, x = MXFP4Linear(70, 33), torch.randn(3, 70)
    assert not again(x).any()
    if how == "torch.save":
        torch.save(layer.state_dict(), tmp_path / "w")
        again.load_state_dict(torch.load(tmp_path / "w"))
    elif how == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(layer.state_dict(), tmp_path / "w")
        again.load_state_dict(safetensors.load_file(tmp_path / "w"))
    elif how == "deepcopy":
        again = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), layer(x)) and repr(again) == repr(layer)
    assert list(layer.state_dict()) == ["bias", "codes", "scales"]


def test_blocks_of_transformers():
    of = MXFP4Linear.from_linear(linear())
    blocks = of.codes.view(48, 2, 16)
    layer = MXFP4Linear.from_blocks(blocks, of.scales, of.bias, dtype=torch.float32)
    again, x = MXFP4Linear(64, 48), torch.randn(3, 64)
    again.load_state_dict({"weight_blocks": blocks, "weight_scales": of.scales, "bias": of.bias})
    assert torch.equal(layer(x), of(x)) and torch.equal(again(x), of(x))
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    theirs = integration.convert_moe_packed_tensors(blocks[None], of.scales[None], dtype=torch.bfloat16)  # [1, in, out]
    assert torch.equal(layer.dequantize(torch.bfloat16), theirs[0].mT)
    narrow = MXFP4Linear.from_blocks(blocks, of.scales, in_features=40)
    assert narrow(torch.zeros(1, 40).bfloat16()).shape == (1, 48) and narrow.dtype == torch.bfloat16


def test_bytes_that_do_not_fit_are_refused_and_change_nothing():
    layer = MXFP4Linear.from_linear(linear())
    good, before = layer.state_dict(), {k: v.clone() for k, v in layer.state_dict().items()}
    bad = [
        ({"codes": good["codes"].float()}, r"codes must be uint8 of \[48, 32\] bytes, got torch.float32 \[48, 32\]"),
        ({"codes": good["codes"][:, :16]}, r"codes must be uint8 of \[48, 32\] bytes, got torch.uint8 \[48, 16\]"),
        ({"scales": good["scales"].int()}, r"scales must be uint8 of \[48, 2\]"),
        ({"scales": good["scales"][:, :1]}, r"scales must be uint8 of \[48, 2\]"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(good | {"bias": torch.ones(48)} | change)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"weight": torch.zeros(48, 64), "bias": torch.zeros(48)})
    blocks = good["codes"].view(48, 2, 16)
    for args, message in (
        ((good["codes"], good["scales"]), r"blocks must have shape \[out, G, 16\], got \[48, 32\]"),
        ((blocks.int(), good["scales"]), "blocks must be uint8"),
        ((blocks, good["scales"][:, :1]), "scales must be uint8"),
        ((blocks, good["scales"], None, 65), r"in_features must lie in \(32, 64\], got 65"),
        ((blocks, good["scales"], torch.zeros(3)), r"bias must have shape \[48\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MXFP4Linear.from_blocks(*args)


def test_what_is_no_plain_linear_is_refused():
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight, got Conv2d"):
        MXFP4Linear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="inside nn.MultiheadAttention"):
        MXFP4Linear.from_linear(nn.MultiheadAttention(4, 2).out_proj)
    with pytest.raises(ValueError, match="rule must be one of"):
        MXFP4Linear.from_linear(linear(), "round")
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got torch.float64"):
        MXFP4Linear.from_linear(linear().double())
    of = linear()
    with torch.no_grad():
        of.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="from_linear: weight must be finite"):
        MXFP4Linear.from_linear(of)
    layer = MXFP4Linear.from_linear(linear())
    before = layer.codes.clone()
    for bad, message in ((of.weight, "must be finite"), (torch.zeros(64, 48), r"must have shape \[48, 64\]")):
        with pytest.raises(ValueError, match=message):
            layer.write(bad)
    assert torch.equal(layer.codes, before)


def test_nobody_finds_a_dense_weight_by_accident():
    layer = MXFP4Linear.from_linear(linear())
    assert not hasattr(layer, "weight")
    with pytest.raises(
        AttributeError, match=r"keeps W in codes and scales and has no weight; dequantize\(\) makes one"
    ):
        layer.weight.data += 1
    dense = layer.to_linear()
    assert not dense.weight.requires_grad and dense.bias is layer.bias
    assert torch.equal(dense.weight, layer.dequantize())
    assert layer.to_linear(torch.bfloat16).bias.dtype == torch.bfloat16


def test_who_watches_the_layer_sees_every_call():
    class Louder(MXFP4Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = MXFP4Linear.from_linear(linear())
    assert offers(layer, "with_low_rank") and offers(nn.Linear(2, 2), "with_low_rank") is None
    assert offers(Louder.from_linear(linear()), "with_low_rank") is None
    handle = layer.register_forward_hook(lambda *_: None)
    assert offers(layer, "with_low_rank") is None
    handle.remove()
    assert offers(layer, "product")
