# SPDX-License-Identifier: Apache-2.0
"""A base layer that is no plain nn.Linear keeps its forward; which is one is asked in every call."""

import copy

import pytest
import torch
from layer_kinds import EACH, beside, drop, shake, starts_as_base
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

import lrkern.functional
from lrkern.nn import FusedLoRALinear, VeRALinear
from lrkern.nn.plain import no_linear, plain_linear


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


def with_forward(m):
    m.forward = lambda x: nn.functional.linear(x, m.weight, m.bias).relu()


def doubled(m):
    m.__class__ = Doubling


# What a base layer may be, and be made when it is wrapped already.
CHANGES = {
    "subclass": doubled,
    "forward": with_forward,
    "hook": lambda m: m.register_forward_hook(lambda m, args, y: y.tanh()),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Halved()),
    "parametrized bias": lambda m: parametrize.register_parametrization(m, "bias", Halved()),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
    "normed": lambda m: nn.utils.parametrizations.spectral_norm(m).eval(),
}
changes = pytest.mark.parametrize("change", CHANGES)


def of_kinds(change, wrapped_first, cls, settings, **more):
    """A layer and its base layer."""
    base = nn.Linear(24, 20)
    if not wrapped_first:
        CHANGES[change](base)
    layer = cls.from_linear(base, **settings | more)
    if wrapped_first:
        CHANGES[change](base)
    return layer, base


@EACH
@changes
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_base_that_is_not_plain_keeps_its_forward(cls, settings, change, wrapped_first):
    layer, base = of_kinds(change, wrapped_first, cls, settings)
    x = torch.randn(5, 24)
    assert (base(x) - nn.functional.linear(x, base.weight, base.bias)).abs().max() > 0.1 or change[:2] in (
        "pa",
        "pr",
        "no",
    )
    if starts_as_base(cls, settings) and not (
        settings.get("use_dora") and wrapped_first
    ):  # its magnitude is that of the W it began with
        torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=1e-5)
    shake(layer)
    for rows in (x, torch.randn(2, 30, 24)):
        torch.testing.assert_close(layer(rows), beside(layer, base(rows), rows), atol=1e-4, rtol=1e-4)


@EACH
@changes
def test_gradients_beside_it(cls, settings, change):
    layer, base = of_kinds(change, True, cls, settings)
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 20)
    wanted = {"x": x} | {name: p for name, p in layer.coefficients().items() if p.requires_grad}
    shake(layer)
    got = dict(zip(wanted, torch.autograd.grad(layer(x), [*wanted.values()], dy), strict=True))
    if settings.get("use_dora"):  # its norm has no gradient
        want = torch.autograd.grad(beside(layer, base(x), x), [*wanted.values()], dy)
        for name, grad in zip(wanted, want, strict=True):
            torch.testing.assert_close(got[name], grad, atol=1e-3, rtol=1e-3)
        return
    step = 1e-2
    for name, t in wanted.items():  # along the gradient itself, in differences
        way, ends = got[name] / got[name].norm(), []
        for side in (step, -step):
            with torch.no_grad():
                t += side * way
                ends.append((layer(x) * dy).sum())
                t -= side * way
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), got[name].norm(), atol=0.05, rtol=0.05)


@EACH
def test_a_hook_of_later_is_seen_while_it_is_there(cls, settings):
    layer, x, calls = shake(cls(24, 20, **settings)), torch.randn(5, 24), []
    y = layer(x)
    observer = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    assert calls == [1]
    observer.remove()
    assert torch.equal(layer(x), y) and calls == [1]
    everywhere = register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    finally:
        everywhere.remove()
    assert calls[1:] == [layer.base_layer, layer]
    assert torch.equal(layer(x), y)


def test_the_plain_way_is_one_op(monkeypatch):
    layer, x, calls = FusedLoRALinear(24, 20, r=4), torch.randn(5, 24), []
    real = lrkern.functional.lora_linear
    monkeypatch.setattr(lrkern.functional, "lora_linear", lambda *args: calls.append(1) or real(*args))
    layer(x)
    assert calls == [1]
    layer.base_layer.register_forward_hook(lambda *_: None)
    layer(x)
    assert calls == [1]


@EACH
@pytest.mark.parametrize("change", ["hook", "parametrized"])
def test_dropout_16_bit_autocast_and_compile_beside_it(cls, settings, change):
    dropout = drop(cls, settings, 0.5)
    layer, base = of_kinds(change, False, cls, settings, **dropout)
    x = torch.randn(6, 24)
    shake(layer)
    assert torch.equal(layer(x), layer(x)) != bool(dropout)
    layer.eval()
    y = layer(x)
    torch.testing.assert_close(y, beside(layer, base(x), x), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), y, atol=0.15, rtol=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), y, atol=0.15, rtol=0.1)


@EACH
@changes
def test_merge_is_refused_where_w_is_not_all(cls, settings, change):
    layer, base = of_kinds(change, True, cls, settings)
    shake(layer)
    w = base.weight.clone()
    with pytest.raises(
        RuntimeError, match=f"{cls.__name__}.merge: the layer must have a plain nn.Linear without hooks"
    ):
        layer.merge()
    assert not layer.merged and torch.equal(base.weight, w)


@changes
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changes_w_is_refused_too(change, init):
    base = nn.Linear(24, 20)
    CHANGES[change](base)
    w = base.weight.clone()
    with pytest.raises(ValueError, match=f"FusedLoRALinear: init='{init}' needs a plain nn.Linear, whose W it changes"):
        FusedLoRALinear.from_linear(base, r=4, init=init)
    assert torch.equal(base.weight, w) and all(p.requires_grad for p in base.parameters())


class Marked(torch.Tensor):
    pass


@EACH
def test_what_is_no_linear(cls, settings):
    attention = nn.MultiheadAttention(8, 2).out_proj
    quantised = nn.Linear(8, 8)
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(Marked))
    cases = [(nn.Conv1d(3, 3, 1), "Conv1d"), (attention, r"NonDynamicallyQuantizableLinear \(inside nn.Multi"),
             (nn.LazyLinear(3), "LazyLinear with a Uninit")]  # fmt: skip
    if not cls.PACKED:  # test_packed.py
        cases.append((quantised, "Linear with a Marked"))
    for module, got in cases:
        with pytest.raises(TypeError, match=f"{cls.__name__}.from_linear: linear must be an nn.Linear .* got {got}"):
            cls.from_linear(module, **settings)
    assert all(p.requires_grad for p in attention.parameters()) and quantised.weight.requires_grad


def test_one_rule():
    """PEFT's layers and ours ask the same function."""
    layer = pytest.importorskip("lrkern.peft.layer")
    assert layer.plain_linear is plain_linear
    base = nn.Linear(3, 3)
    assert plain_linear(base) == (base.weight, base.bias) and no_linear(base) is None
    assert plain_linear(Doubling(3, 3)) == (None, None) and no_linear(Doubling(3, 3)) is None
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Marked))
    assert plain_linear(base) == (None, None)


def test_a_file_puts_layers_over_them(tmp_path):
    own = pytest.importorskip("lrkern.files.own")
    net = nn.Sequential(shake(VeRALinear(24, 20, r=8)))
    own.save_adapter(net, tmp_path / "a")
    other, x = nn.Sequential(nn.Linear(24, 20)), torch.randn(5, 24)
    other[0].register_forward_hook(lambda m, args, y: y.tanh())
    y = other(x)
    own.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(x), y + x @ net[0].delta_weight().T, atol=1e-4, rtol=1e-4)
