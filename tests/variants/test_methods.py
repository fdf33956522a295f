# SPDX-License-Identifier: Apache-2.0
"""Every variant of lrkern.nn.variants beside its formula (lrkern.reference.variants): values, gradients, start, merge, what it
keeps, and what people do with layers. Files and the one door are in tests/model."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from variant_kinds import EACH, change, formula, make

from lrkern.nn import variants

each = pytest.mark.parametrize("v", EACH.values(), ids=EACH)
DEVICES = pytest.mark.parametrize("device", ["cpu", "emulated", "cuda"], indirect=True)


def run(layer, x, dy):
    """y and the gradients of x and of what trains, by name."""
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = {n: p for n, p in layer.coefficients().items() if p.requires_grad} | {"x": x}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def by_formula(layer, v, x, dy, as_type):
    y, leaves = formula(layer, v, x, as_type)
    grads = torch.autograd.grad(y, list(leaves.values()), as_type(dy))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


# Relative Frobenius error of what is float32, against the formula in float64. Two bf16 terms give 3.5e-6; seen emulated 1.7e-5 of AdaLoRA's
# E and 5.1e-5 of LoRTA's L, sums over a factor's gradient whose terms cancel.
ALLOWED = {"cpu": 1e-5, "emulated": 1e-4, "cuda": 1e-4}
ROUNDINGS = 2.0  # errors of truth rounded once that a 16-bit result may have: the base layer's y is stored before an adapter adds to it

# Hydra's branch behind the base layer takes its y as it is stored, rounded.
OF_STORED_Y = ("sequential_A", "sequential_B")


@DEVICES
@each
def test_values_and_gradients(v, dtype, device, request):
    kind = request.node.callspec.params["device"]
    layer = change(make(v, dtype), v).to(device)
    for lead in ((5,), (2, 20)):
        x = torch.randn(*lead, v.sizes[0], generator=torch.Generator().manual_seed(1)).to(device, dtype)
        dy = torch.randn(*lead, v.sizes[1], generator=torch.Generator().manual_seed(2)).to(device, dtype)
        got, truth = run(layer, x, dy), by_formula(layer, v, x, dy, lambda t: t.double())
        assert got.keys() == truth.keys()
        for name, value in got.items():
            of_base, want = name in ("y", "x"), truth[name]
            assert value.dtype == (dtype if of_base else layer.get_parameter(name).dtype), name
            error, norm = (value.double() - want).norm(), want.norm()
            if of_base and dtype != torch.float32:
                assert error <= ROUNDINGS * (want.to(dtype) - want).norm(), f"{name}: {error / norm:.2e}"
            else:
                allowed = ALLOWED[kind] + (name in OF_STORED_Y and dtype != torch.float32) * torch.finfo(dtype).eps / 2
                assert error <= allowed * norm, f"{name}: {error / norm:.2e}"


@each
def test_starts_as_the_base_layer(v):
    layer = make(v)
    x = torch.randn(6, v.sizes[0])
    same = torch.equal(layer(x), layer.base_layer(x))
    assert same != bool(v.at_first), v.at_first or "changes y before it is trained"


@each
def test_an_activation_may_follow_in_place(v):
    layer = change(make(v), v)
    x = torch.randn(2, 5, v.sizes[0])
    y = layer(x)
    torch.relu_(y).sum().backward()
    assert torch.equal(y, layer(x).relu())


@each
def test_its_first_gradient_moves_it(v):
    """A start that no gradient leaves would train nothing."""
    layer = make(v)
    got = run(layer, torch.randn(9, v.sizes[0]), torch.randn(9, v.sizes[1]))
    assert any(g.abs().max() > 0 for n, g in got.items() if n not in ("y", "x"))


@each
def test_factors_delta_weight_and_merge_are_the_forward(v):
    layer = change(make(v), v).eval()
    x, base = torch.randn(7, v.sizes[0]), copy.deepcopy(layer.base_layer)
    y, w = layer(x).detach(), layer.base_layer.weight.clone()
    if layer.low_rank:
        a, b, scale = layer.factors()
        assert a.shape == (layer.lora_rank, v.sizes[0]) and b.shape == (v.sizes[1], layer.lora_rank)
        torch.testing.assert_close(base(x) + scale * (x @ a.mT) @ b.mT, y, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, w, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.base_layer.bias, base.bias) or not layer.low_rank


class Formed(TorchDispatchMode):
    """Shapes of all tensors that come out of calls."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and "t.default" not in str(func) and "transpose" not in str(func):
                self.shapes.append(tuple(t.shape))
        return out


MIDDLE = {name: v for name, v in EACH.items() if issubclass(getattr(variants, v.cls), variants.rank.MiddleLinear)}


@pytest.mark.parametrize("v", MIDDLE.values(), ids=MIDDLE)
def test_frozen_factors_get_no_gradient_formed_and_x_is_not_kept(v):
    layer, T = change(make(v), v), 37
    kept = []
    x = torch.randn(T, v.sizes[0], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = layer(x)
    assert (T, v.sizes[0]) not in kept and (T, v.sizes[1]) not in kept, kept
    with Formed() as formed:
        y.backward(torch.randn_like(y))
    assert x.grad is not None and formed.shapes
    frozen = {tuple(p.shape) for p in layer.coefficients().values() if not p.requires_grad and p.dim() == 2}
    trained = {tuple(p.shape) for p in layer.coefficients().values() if p.requires_grad}
    wrong = (frozen | {s[::-1] for s in frozen}) - trained
    assert frozen and not wrong & set(formed.shapes), (frozen, formed.shapes)
    assert all(p.grad is None for p in layer.coefficients().values() if not p.requires_grad)


@each
def test_a_layer_over_a_meta_base_takes_a_state_dict(v):
    """As files make it: nothing of W is needed, every coefficient has its shape."""
    layer = change(make(v), v)
    settings = layer.settings | {"adapter_dtype": torch.float32}
    empty = type(layer).from_linear(torch.nn.Linear(*v.sizes, device="meta"), **settings)
    mine, its = layer.coefficients(), empty.coefficients()
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in mine.items()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in its.items()
    }
    again = make(v, seed=11)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, v.sizes[0])
    assert torch.equal(again(x), layer(x))


DROPPING = {name: v for name, v in EACH.items() if "dropout" in getattr(variants, v.cls).SETTINGS}
# What is left where all of the adapter's input is dropped: a mask of y, biases, a chain that is as frozen as W.
MORE = {"loraprune", "hydra-biases", "cola-links"}


@pytest.mark.parametrize("v", DROPPING.values(), ids=DROPPING)
def test_dropout_is_on_the_adapters_input(v):
    layer, x = change(make(v, dropout=0.5), v), torch.randn(64, v.sizes[0])
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    whole = change(make(v), v)(x)
    assert torch.equal(layer.eval()(x), whole)
    none = change(make(v, dropout=1.0), v).train()
    same = torch.allclose(none(x), none.base_layer(x), rtol=1e-5, atol=1e-6)
    assert same != (v.name in MORE)


def test_what_has_no_dropout_says_so():
    assert {v.method for v in EACH.values()} - {v.method for v in DROPPING.values()} == {"allora"}


@each
def test_compile_autocast_and_checkpoint(v):
    layer = change(make(v), v)
    x, dy = torch.randn(6, v.sizes[0]), torch.randn(6, v.sizes[1])
    want = run(layer, x, dy)
    again = run(lambda_of(layer, lambda t: checkpoint(layer, t, use_reentrant=False)), x, dy)
    compiled = run(lambda_of(layer, torch.compile(layer, fullgraph=True, backend="aot_eager")), x, dy)
    for name, value in want.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(layer, x, dy)
    assert got["y"].dtype == torch.bfloat16
    for name, value in want.items():
        error = (got[name].float() - value).norm() / value.norm()
        assert error <= 3e-2, f"{name}: {error:.1e}"


class lambda_of:
    """A call beside the coefficients of a layer."""

    def __init__(self, layer, call):
        self.call, self.coefficients = call, layer.coefficients

    def __call__(self, x):
        return self.call(x)


@each
def test_refusals_name_the_setting(v):
    cls = getattr(variants, v.cls)
    with pytest.raises(TypeError, match=rf"{v.cls}.*'no_such_setting'"):
        make(v, no_such_setting=1)
    for name, value in (("r", 0), ("r", 2.0), ("r", True), ("lora_alpha", float("nan")), ("dropout", 1.5)):
        if name in cls.SETTINGS:
            base = torch.nn.Linear(*v.sizes)
            with pytest.raises(ValueError, match=rf"^{v.cls}: {name} must .*, got "):
                cls.from_linear(base, **{**v.settings, name: value})
            assert base.weight.requires_grad and base.bias.requires_grad
    for wrong in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"^{v.cls}: adapter_dtype must be .*, got torch"):
            make(v, adapter_dtype=wrong)
