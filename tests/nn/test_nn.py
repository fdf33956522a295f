# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear as a user has it."""

import copy
import math

import pytest
import torch
from torch import nn

import lrkern.functional
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
    layer, x = trained().eval(), torch.randn(5, 24)
    y, base, w = layer(x), layer.base_layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    layer.unmerge()  # twice is once
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
    layer = FusedLoRALinear.from_linear(base, r=4, dropout=0.1)
    assert layer.base_layer.weight is base.weight
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight"]
    assert "r=4, scaling=8, dropout=0.1" in repr(layer)
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
    for bad, text in [({"r": 513}, "r must be a whole number in 0..512, got 513"), ({"r": -1}, "got -1"),
                      ({"dropout": 1.1}, r"dropout must lie in \[0, 1\], got 1.1"),
                      ({"init": "zeros"}, "init must be one of .*, got 'zeros'")]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            FusedLoRALinear(8, 8, **bad)
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight"):
        FusedLoRALinear.from_linear(nn.Conv1d(3, 3, 1))


def test_dropout_only_in_training():
    layer, x = trained(dropout=0.5), torch.randn(6, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), expected(layer, x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- DoRA


def dora(**kwargs):
    layer = trained(use_dora=True, **kwargs)
    nn.init.uniform_(layer.lora_magnitude_vector.weight, 0.5, 1.5)
    return layer


def dora_expression(layer, x, dropped=None):
    """Liu et al., arXiv 2402.09353, densely: y = g (x W' + ...) with the norm detached."""
    base, delta = layer.base_layer, layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    w = base.weight.to(delta.dtype)
    g = layer.lora_magnitude_vector.weight / (w + delta).norm(dim=1).detach()
    x, bias = x.to(delta.dtype), 0 if base.bias is None else base.bias
    if dropped is None:
        return g * (x @ (w + delta).T) + bias
    return x @ w.T + bias + (g - 1) * (dropped @ w.T) + g * (dropped @ delta.T)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_its_formula(bias):
    layer, x = dora(bias=bias, lora_alpha=6), torch.randn(2, 5, 24, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 4
    dy = torch.randn(2, 5, 20)
    y, expression = layer(x), dora_expression(layer, x)
    torch.testing.assert_close(y, expression, atol=1e-5, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expression, wanted, dy), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_of_fewer_rows_than_ranks_is_its_formula(bias, autocast):
    """They take another way without gradients: g scales y there, and g B elsewhere."""
    layer, x = dora(bias=bias, lora_alpha=6), torch.randn(9, 24)
    assert layer.r > 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in (0, 1, 3, layer.r, 9):
            y = layer(x[:rows])
            with torch.no_grad():
                got = layer(x[:rows])
            tight = autocast or rows >= layer.r  # the very same way
            assert got.dtype == (torch.bfloat16 if autocast else torch.float32)
            torch.testing.assert_close(got, y, atol=0 if tight else 1e-5, rtol=0 if tight else 1e-5)
            if not autocast:
                torch.testing.assert_close(got, dora_expression(layer, x[:rows]), atol=1e-5, rtol=1e-5)


def test_dora_dropout_drops_in_the_base_term_too():
    layer, x = dora(dropout=0.4), torch.randn(6, 24)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(y, dora_expression(layer, x, torch.dropout(x, 0.4, True)), atol=1e-5, rtol=1e-5)


def test_dora_starts_as_the_base_layer_and_merges():
    base, x = nn.Linear(24, 20), torch.randn(5, 24)
    y = base(x)
    fresh = FusedLoRALinear.from_linear(copy.deepcopy(base), r=4, use_dora=True, init="pissa")
    torch.testing.assert_close(fresh(x), y, atol=1e-5, rtol=1e-5)
    layer = dora().eval()
    y, w = layer(x), layer.base_layer.weight.clone()
    delta = layer.delta_weight()
    layer.merge()
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, w + delta, atol=1e-6, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="use_dora needs r >= 1"):
        FusedLoRALinear(8, 8, r=0, use_dora=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_norm_against_float64(dtype):
    w, a, b = torch.randn(33, 70).to(dtype), torch.randn(5, 70), torch.randn(33, 5)
    truth = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    got = lrkern.functional.dora_norm(w, a, b, 0.7)
    assert got.dtype == torch.float32 and ((got.double() - truth) / truth).abs().max() < 1e-5


def test_dora_norm_is_kept_inside_pefts_opt_in_until_something_changes(monkeypatch):
    """peft.helpers.DoraCaching, in eval mode. Every way of changing a weight that a version counter sees is seen there."""
    helpers = pytest.importorskip("peft").helpers
    layer, x, calls = dora().eval(), torch.randn(3, 24), []
    real = lrkern.functional.dora_norm
    monkeypatch.setattr(lrkern.functional, "dora_norm", lambda *args: calls.append(1) or real(*args))

    def runs() -> int:
        calls.clear()
        torch.testing.assert_close(layer(x), dora_expression(layer, x), atol=1e-5, rtol=1e-5)
        return len(calls)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert [runs(), runs()] == [1, 1], "not asked for"
            with helpers.DoraCaching():
                assert [runs(), runs(), runs()] == [1, 0, 0]
                for tensor in (layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight):
                    with torch.no_grad():
                        tensor.mul_(1.5)
                    assert [runs(), runs()] == [1, 0]
                with torch.no_grad():
                    layer.lora_magnitude_vector.weight.mul_(2)  # not part of the norm
                assert runs() == 0
                layer.scaling *= 2
                assert [runs(), runs()] == [1, 0]
                layer.lora_A.weight = nn.Parameter(torch.randn(4, 24))
                assert [runs(), runs()] == [1, 0]
                layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()})
                assert [runs(), runs()] == [1, 0]
                layer.lora_B.weight.data.mul_(3)  # no version counter sees this
                layer.eval()
                assert [runs(), runs()] == [1, 0]
                layer.train()
                assert [runs(), runs()] == [1, 1], "as PEFT, not in training"
                layer.eval()
                with torch.inference_mode():
                    assert runs() == 1
                assert runs() == 0, "of use in any mode"
                layer(x).sum().backward() if grad else None
            layer.lora_B.weight.data.mul_(3)
            assert [runs(), runs()] == [1, 1]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dora_sees_one_element_written_past_every_counter(grad, training, rows):
    """A norm that outlives its call is off by this."""
    layer, x = dora().train(training), torch.randn(rows, 24)
    with torch.set_grad_enabled(grad):
        for tensor in (layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight):
            before = layer(x)
            if grad and training:
                before.square().sum().backward()
                torch.optim.SGD(layer.parameters(), lr=1e-3).step()
                before = layer(x)
            tensor.data[0, 0] += 4.0
            got = layer(x)
            assert torch.equal(got, copy.deepcopy(layer)(x)), "a copy has computed nothing yet"
            torch.testing.assert_close(got, dora_expression(layer, x), atol=1e-5, rtol=1e-5)
            assert (got - before).abs().max() > 1e-2
