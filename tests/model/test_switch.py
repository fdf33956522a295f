# SPDX-License-Identifier: Apache-2.0
"""lrkern.merge, unmerge and disable: all layers of a model or none."""

import pytest
import torch
from door_models import LINEARS, Layered, Net, X, adapted, same, state
from torch import nn

import lrkern
from lrkern.nn.linear import AdapterLinear


def layers_in(net):
    return [m for m in net.modules() if isinstance(m, AdapterLinear)]


def weights(net):
    return {name: net.get_submodule(name).base_layer.weight.clone() for name in LINEARS}


def test_a_merge_that_fails_unmerges_what_came_before():
    net = adapted("lora").double().float()
    before = weights(net)
    net.x["m"]["l"].lora_B.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="^lrkern.merge: x.m.l: FusedLoRALinear.merge: .* must be finite"):
        lrkern.merge(net)
    assert not any(m.merged for m in layers_in(net))
    for name, w in weights(net).items():
        torch.testing.assert_close(w, before[name], rtol=1e-6, atol=1e-7)


def test_a_merge_that_is_refused_touches_nothing():
    net = adapted("lora")
    before = weights(net)
    net.x["l"].disable_adapter()
    with pytest.raises(RuntimeError, match="^lrkern.merge: x.l: FusedLoRALinear.merge: the layer must be enabled"):
        lrkern.merge(net)
    net.x["l"].enable_adapter()
    assert same(weights(net), before) and not any(m.merged for m in layers_in(net))
    lrkern.merge(net)
    now = weights(net)
    with pytest.raises(RuntimeError, match="^lrkern.merge: l: .* not be merged already"):
        lrkern.merge(net)
    assert same(weights(net), now) and all(m.merged for m in layers_in(net))
    lrkern.unmerge(net)
    lrkern.unmerge(net)
    packed = nn.Sequential(nn.Linear(32, 32), lrkern.nn.MXFP4Linear.from_linear(nn.Linear(32, 32)))
    lrkern.adapt(packed, "lora", r=2)
    with pytest.raises(RuntimeError, match="^lrkern.merge: 1: .*keeps W packed"):
        lrkern.merge(packed)
    assert not packed[0].merged


def test_a_tied_w_is_not_merged():
    net = Net()
    net.other = nn.Embedding(16, 24)
    net.other.weight = net.l.weight
    lrkern.adapt(net, "lora", r=2, target_modules=["l"])
    with pytest.raises(ValueError, match="^lrkern.merge: l: W must be of one module, got .* tied"):
        lrkern.merge(net)
    assert not any(m.merged for m in layers_in(net))


@pytest.mark.parametrize("mode", ["is", "ms"])
def test_methods_without_a_merge_are_named(mode):
    net = adapted("reslora", kind=Layered, mode=mode)
    before = {n: m.base_layer.weight.clone() for n, m in net.named_modules() if isinstance(m, AdapterLinear)}
    y = net(X).detach()
    with pytest.raises(RuntimeError, match=r"^lrkern.merge: layers.\d.\w+: ResLoRALinear.merge: "):
        lrkern.merge(net)
    assert all(torch.equal(net.get_submodule(n).base_layer.weight, w) for n, w in before.items())
    assert not any(m.merged for m in layers_in(net)) and torch.equal(net(X), y)
    with lrkern.disable(net):
        assert torch.equal(net(X), Layered().eval()(X))


@pytest.mark.parametrize("method", ["lora", "s2ft"])
def test_disable_restores_whatever_happens(method):
    net, base = adapted(method), Net().eval()
    y, before = net(X).detach(), state(net)
    with pytest.raises(KeyError), lrkern.disable(net) as same_net:
        assert same_net is net and torch.equal(net(X), base(X))
        raise KeyError
    assert torch.equal(net(X), y) and same(state(net), before) and all(m.enabled for m in layers_in(net))
    assert net.head[1].weight.requires_grad


def test_disable_misused():
    net = adapted("lora")
    with lrkern.disable(net):
        with (
            pytest.raises(RuntimeError, match="^lrkern.disable: no layer may be .*, got l, disabled already$"),
            lrkern.disable(net),
        ):
            pass
        assert not any(m.enabled for m in layers_in(net))
        with pytest.raises(RuntimeError, match="^lrkern.merge: l: .* be enabled"):
            lrkern.merge(net)
    assert all(m.enabled for m in layers_in(net))
    lrkern.merge(net)
    with pytest.raises(RuntimeError, match="got l, merged$"), lrkern.disable(net):
        pass
    assert torch.equal(net.head[1].weight, adapted("lora").head[1].weight)  # the trained head stayed


def test_what_is_no_adapted_model():
    for name in ("merge", "unmerge"):
        with pytest.raises(ValueError, match=f"^lrkern.{name}: model must have adapters of lrkern, got Net with none"):
            getattr(lrkern, name)(Net())
        with pytest.raises(TypeError, match=f"^lrkern.{name}: model must be an nn.Module, got 3"):
            getattr(lrkern, name)(3)
    with pytest.raises(ValueError, match="^lrkern.disable: model must have adapters"), lrkern.disable(Net()):
        pass
