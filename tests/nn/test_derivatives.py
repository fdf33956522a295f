# SPDX-License-Identifier: Apache-2.0
"""Derivatives that layers do not have are refused by the name of the form that the user called, never lost; those that they have are
right."""

import re

import pytest
import torch
from layer_kinds import KINDS, OF_DELTA, shake
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from lrkern.nn import QuartetLinear, S2FTLinear, variants
from lrkern.nn.variants.rank import MiddleLinear

EVERY = KINDS | {
    "s2ft_in": (S2FTLinear, {"index": "0-3,6"}),
    "s2ft_out": (S2FTLinear, {"index": "1-4", "side": "output"}),
    "allora": (variants.ALLoRALinear, {"r": 4, "eta2": 2.0}),
    "hydra": (variants.HydraLinear, {"r": 4}),
    "hydra_biases": (variants.HydraLinear, {"r": 4, "branch_bias": True}),
}
# What a layer runs over a plain base, and beside any other one.
FORMS = dict.fromkeys(("lora", "nola", "dora"), ("lora_linear", "lora_add"))
FORMS |= dict.fromkeys(("mora", "mora_turned"), ("mora_linear", "mora_add")) | {"miss_bat": ("bone_linear", "bone_add")}
FORMS |= {"vera": ("vera_linear", "vera_add"), "randlora": ("randlora_linear", "randlora_add")}
FORMS |= {
    name: ("middle_linear", "middle_add") if issubclass(KINDS[name][0], MiddleLinear) else ("lora_linear", "lora_add")
    for name in OF_DELTA
}
FORMS |= {"allora": ("allora_linear", "allora_add")} | dict.fromkeys(
    ("hydra", "hydra_biases"), ("hydra_linear", "hydra_add")
)
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
        for g in grads:
            with refused(name, "double backward is not supported"):
                torch.autograd.grad(g.sum(), x, retain_graph=True)


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


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_transforms_of_torch_func(kind):
    """Gradients of all samples, of each, of each of several layers: what autograd and the kernels give one at a time."""
    for layer, _ in layers(kind):
        x = torch.randn(3, layer.in_features)
        trained = {n: p for n, p in layer.coefficients().items() if p.requires_grad}
        params = {n: p.detach().clone() for n, p in trained.items()}
        call = lambda params, x, layer=layer: functional_call(layer, params, (x,))
        loss = lambda params, x, call=call: call(params, x).square().sum()
        assert torch.equal(call(params, x), layer(x))
        written = layer.base_layer.weight.clone()

        def by_autograd(x, layer=layer, trained=trained):
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(layer(leaf).square().sum(), (*trained.values(), leaf))

        dparams, dx = grad(loss, (0, 1))(params, x)
        close([*dparams.values(), dx], [*by_autograd(x)])
        dparams, dx = vmap(grad(loss, (0, 1)), (None, 0))(params, x)
        for b in range(3):
            close([*(d[b] for d in dparams.values()), dx[b]], [*by_autograd(x[b])])
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                close(vmap(layer)(x), layer(x))
        several = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
        for b, y in enumerate(vmap(call, (0, None))(several, x)):
            close(y, call({n: p[b] for n, p in several.items()}, x))
        J = torch.autograd.functional.jacobian(layer, x[0])
        close(jacrev(layer)(x[0]), J)
        second = jacrev(grad(lambda x, layer=layer: layer(x).cos().sum()))(x[0])  # of what is affine in x
        close(second, J.T @ (-layer(x[0]).cos()[:, None] * J))
        assert torch.equal(layer.base_layer.weight, written), "W is the layer's own, not a sample's"


@pytest.mark.parametrize("kind", sorted(EVERY.keys() - {"miss_bat", "s2ft_in", "s2ft_out", "allora"}))
def test_dropout_under_vmap_draws_as_randomness_says(kind):
    cls, settings = EVERY[kind]
    layer = shake(cls.from_linear(nn.Linear(64, 8), dropout=0.5, **settings)).train()
    x = torch.randn(64).expand(4, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    same, other = (vmap(layer, randomness=how)(x) for how in ("same", "different"))
    close(same, same[:1].expand(4, -1))
    assert len({tuple(row.tolist()) for row in other}) == 4
    draws = torch.cat([vmap(layer, randomness="different")(x) for _ in range(200)])
    error, of_mean = (draws.mean(0) - layer.eval()(x[0])).abs(), draws.std(0) / len(draws) ** 0.5
    assert (error < 4 * of_mean).all()  # a factor left out is more than 10


def test_quartet_is_refused_under_transforms():
    layer = QuartetLinear(32, 8)
    for call in (
        lambda: vmap(layer)(torch.randn(2, 3, 32)),
        lambda: grad(lambda x: layer(x).sum())(torch.randn(3, 32)),
    ):
        with refused("quartet_linear", "torch.func's transforms (grad, vmap, jacrev, ...) are not supported"):
            call()


@pytest.mark.parametrize("kind", ["vera", "randlora"])
@pytest.mark.parametrize("base", [nn.Linear, Hidden])
def test_a_vector_has_the_gradients_of_one_row(kind, base):
    cls, settings = EVERY[kind]
    layer = shake(cls.from_linear(base(16, 8), **settings))
    x, found = torch.randn(16), []
    for shape in ((16,), (1, 16)):
        leaf = x.view(shape).clone().requires_grad_()
        leaves = [p for p in layer.coefficients().values() if p.requires_grad]
        dx, *rest = torch.autograd.grad(layer(leaf).square().sum(), [leaf, *leaves])
        found.append([dx.view(-1), *rest])
    close(*found)
