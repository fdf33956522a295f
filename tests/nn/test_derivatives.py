# SPDX-License-Identifier: Apache-2.0
"""Derivatives that layers do not have are refused by the name of the form that the user called, never lost; those that they have are
right."""

import re

import pytest
import torch
from layer_kinds import KINDS, shake
from torch import nn

from lrkern.nn import S2FTLinear

EVERY = KINDS | {
    "s2ft_in": (S2FTLinear, {"index": "0-3,6"}),
    "s2ft_out": (S2FTLinear, {"index": "1-4", "side": "output"}),
}
# What a layer runs over a plain base, and beside any other one.
FORMS = dict.fromkeys(("lora", "nola", "dora"), ("lora_linear", "lora_add"))
FORMS |= dict.fromkeys(("mora", "mora_turned"), ("mora_linear", "mora_add")) | {"miss_bat": ("bone_linear", "bone_add")}
FORMS |= {"vera": ("vera_linear", "vera_add"), "randlora": ("randlora_linear", "randlora_add")}
FORMS |= {"s2ft_in": ("slice_linear", "gather_matmul"), "s2ft_out": ("slice_linear", "scatter_add")}
TWICE = {"miss", "miss_mini"}  # sums and products, all of them linear


class Hidden(nn.Linear):
    """A base layer whose forward is its own."""


def layers(kind):
    """Over a plain base and beside another, wide and narrow, and what errors call each."""
    cls, settings = EVERY[kind]
    for base, i in ((nn.Linear, 0), (Hidden, 1)):
        for I, O in ((16, 8), (8, 16)):
            torch.manual_seed(0)
            yield shake(cls.from_linear(base(I, O), **settings)), FORMS.get(kind, ("mora_compress",) * 2)[i]


def writes(layer):
    """Does it write W by ATen, which torch.func refuses before anything else does?"""
    return isinstance(layer, S2FTLinear) and type(layer.base_layer) is Hidden


def refused(name, what):
    return pytest.raises(RuntimeError, match=re.escape(f"lrkern::{name}: {what}"))


@pytest.mark.parametrize("kind", EVERY)
def test_forward_mode_is_refused(kind):
    for layer, name in layers(kind):
        x = torch.randn(3, layer.in_features)
        for leaf in (x, x.clone().requires_grad_()):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(leaf))
                with refused(name, "forward-mode differentiation is not supported"):
                    layer(dual)
        if writes(layer):
            continue
        with refused(name, "forward-mode differentiation is not supported"):
            torch.func.jvp(layer, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("kind", sorted(EVERY.keys() - TWICE))
def test_double_backward_is_refused(kind):
    for layer, name in layers(kind):
        if name == "scatter_add":
            continue  # has one: it is a sum and ATen's product
        x = torch.randn(3, layer.in_features, requires_grad=True)
        leaves = [x, *(p for p in layer.coefficients().values() if p.requires_grad)]
        grads = torch.autograd.grad(layer(x).square().sum(), leaves, create_graph=True)
        for grad in grads:
            with refused(name, "double backward is not supported"):
                torch.autograd.grad(grad.sum(), x, retain_graph=True)


def plain_miss(layer):
    """The same of torch's operations."""
    columns = torch.arange(layer.in_features)
    fold = torch.zeros(layer.in_features, layer.r).index_put_((columns, columns % layer.r), torch.tensor(1.0))
    block, times = layer.miss_block, layer.out_features // layer.miss_block.shape[1]
    return lambda x: layer.base_layer(x) + (x @ fold @ block).repeat(1, times)


@pytest.mark.parametrize("kind", sorted(TWICE))
def test_double_backward_where_there_is_one(kind):
    for layer, _ in layers(kind):
        x, results = torch.randn(3, layer.in_features, requires_grad=True), []
        for f in (layer, plain_miss(layer)):
            grads = torch.autograd.grad(f(x).pow(3).sum(), (x, layer.miss_block), create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, layer.miss_block)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def per_sample(loss):
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    return lambda params, x: {name: g.sum(0) for name, g in each(params, x[:, None]).items()}


def loss_of(layer):
    return lambda params, x: torch.func.functional_call(layer, params, (x,)).square().sum()


@pytest.mark.parametrize("kind", EVERY)
def test_transforms_of_torch_func_are_right_or_refused(kind):
    """functional_call is no transform. Of the others each is equal to autograd's result or refused with a name."""
    for layer, _ in layers(kind):
        if writes(layer):
            continue
        x, trained = (
            torch.randn(3, layer.in_features),
            {n: p for n, p in layer.coefficients().items() if p.requires_grad},
        )
        params = {name: p.detach().clone() for name, p in layer.coefficients().items()}
        assert torch.equal(torch.func.functional_call(layer, params, (x,)), layer(x))
        want = torch.autograd.grad(layer(x).square().sum(), trained.values())
        for way in (torch.func.grad, per_sample):
            try:
                grads = way(loss_of(layer))(params, x)
            except RuntimeError as error:
                assert re.match(r"lrkern::\w+: torch.func's transforms", str(error)), error
            else:
                assert kind in TWICE
                torch.testing.assert_close([grads[name] for name in trained], [*want], rtol=1e-4, atol=1e-4)
