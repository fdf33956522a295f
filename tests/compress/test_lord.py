# SPDX-License-Identifier: Apache-2.0
"""LoRD: the best projection of a layer's outputs, the mean kept, and how the outputs are collected."""

import pytest
import torch
from torch import nn

from lrkern import compress
from lrkern.compress.lord import Moments
from lrkern.nn import FactorizedLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(10, 14), nn.Linear(14, 8, bias=False), nn.Dropout(0.5)

    def forward(self, x, shift=0.0):
        return self.two(self.drop(self.one(x).tanh()) + shift)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def data(n=6, rows=20, mean=3.0):
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(10, 10, generator=g)
    return [torch.randn(rows, 10, generator=g) @ mix + mean for _ in range(n)]


def inputs(model, batches):
    """Of both layers, in float64, in eval mode."""
    x = torch.cat([b.flatten(0, -2) for b in batches]).double()
    with torch.no_grad():
        return {"one": x, "two": nn.functional.linear(x, model.one.weight.double(), model.one.bias.double()).tanh()}


def by_hand(linear, x, r):
    """W, bias and the mean squared error of the outputs y from their covariance, and y."""
    w, b = linear.weight.detach().double(), 0 if linear.bias is None else linear.bias.detach().double()
    y = x @ w.T + b
    values, v = torch.linalg.eigh(torch.cov(y.T, correction=0))
    p, mean = v[:, -r:] @ v[:, -r:].T, y.mean(0)
    return p @ w, mean - p @ (mean - b), values[:-r].sum().item(), y


@pytest.mark.parametrize("r", [1, 3, 8])
def test_it_is_the_principal_components_with_the_mean_kept(r):
    model, batches = net(), data()
    seen, dense = inputs(model, batches), {"one": model.one, "two": model.two}
    report = compress.lord(model, batches, r)
    assert {name: layer.rank for name, layer in report.layers.items()} == {"one": r, "two": r}
    for name, linear in dense.items():
        layer, x = model.get_submodule(name).double(), seen[name]
        w, bias, error, y = by_hand(linear, x, r)
        torch.testing.assert_close(layer.product(), w, rtol=0, atol=2e-5 * w.abs().max().item())
        torch.testing.assert_close(layer.bias, bias, rtol=1e-5, atol=1e-5)
        got = layer(x)
        torch.testing.assert_close(got.mean(0), y.mean(0), rtol=1e-6, atol=1e-6)
        assert (got - y).square().sum(1).mean().item() == pytest.approx(error, rel=1e-4, abs=1e-8)


def test_no_other_layer_of_this_rank_is_nearer():
    """The truncated SVD of W, random projections, and what a few steps of training on the same data give."""
    model, batches = net(), data()
    x = inputs(model, batches)["one"].float()
    y = model.one(x).detach()
    others = [FactorizedLinear.from_linear(model.one, 3)]
    for seed in range(5):
        q = torch.linalg.qr(torch.randn(14, 3, generator=torch.Generator().manual_seed(seed)))[0]
        w, b = model.one.weight.detach(), y.mean(0) - q @ q.T @ (y.mean(0) - model.one.bias.detach())
        others.append(FactorizedLinear.from_factors(q.T @ w, q, b))
    compress.lord(model, batches, 3, target_modules=["one"])
    loss = lambda layer: (layer(x) - y).square().sum(1).mean()
    best = loss(model.one).item()
    assert all(loss(other).item() > 1.05 * best for other in others)
    optimizer = torch.optim.Adam(model.one.parameters(), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model.one).backward()
        optimizer.step()
    assert loss(model.one).item() > 0.999 * best


def test_the_largest_component_comes_first():
    layers = {}
    for r in (1, 4):
        model = net()
        compress.lord(model, data(), r, target_modules=["one"])
        layers[r] = model.one
    gram = layers[4].B.detach().T @ layers[4].B.detach()
    torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-5)
    assert abs((layers[1].B[:, 0] @ layers[4].B[:, 0]).item()) == pytest.approx(1, abs=1e-5)


def test_at_full_rank_it_is_the_dense_layer():
    model, batches = net(), data()
    dense = model.two
    compress.lord(model, batches, 8, target_modules=["two"])
    x = torch.randn(5, 14)
    torch.testing.assert_close(model.two(x), dense(x), rtol=1e-5, atol=1e-5)


def test_the_mean_survives_rounding(dtype):
    """Factors in 16 bits project less exactly; the bias is made for them as they are. At full rank they have the whole mean."""
    model, batches = net(dtype), [b.to(dtype) for b in data(mean=30.0)]
    x = torch.cat(batches).double()
    y = torch.cat([model.one(b) for b in batches]).detach().double().mean(0)
    dense = model.one
    compress.lord(model, batches, 10, target_modules=["one"])
    layer, eps = model.one, torch.finfo(dtype).eps
    assert layer.A.dtype == layer.bias.dtype == dtype
    off = layer.double()(x).mean(0) - y
    assert off.abs().max() < 0.6 * eps * layer.bias.abs().max() + 1e-6, "the rounding of the bias alone"
    kept = torch.nn.functional.linear(x, layer.product(), dense.bias.double()).mean(0) - y
    assert dtype == torch.float32 or kept.abs().max() > 3 * off.abs().max(), "the projection's own bias would not do"


def test_moments_join_as_if_they_were_one_batch():
    """Where means are a million times the deviations, which sums of squares alone would lose."""
    linear, x = nn.Linear(3, 4).double(), torch.randn(60, 3, dtype=torch.float64)
    y = torch.randn(60, 4, dtype=torch.float64) + torch.tensor([1e6, -1e6, 3.0, 0.0])
    moments = Moments(linear)
    for rows in ((0, 1), (1, 20), (20, 20), (20, 60)):
        moments(linear, (x[slice(*rows)],), {}, y[slice(*rows)])
    assert moments.rows == 60
    torch.testing.assert_close(moments.scatter / 60, torch.cov(y.T, correction=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.y, y.mean(0))
    torch.testing.assert_close(moments.x, x.mean(0))


BATCHES = {
    "tensors": lambda x: [x],
    "tuples": lambda x: [(x,), [x, 1.0]],
    "mappings": lambda x: [{"x": x}, {"x": x, "shift": 1.0}],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_are_what_the_model_takes(kind):
    model, (x, *_) = net(), data()
    batches = BATCHES[kind](x)
    hidden = torch.cat([model.one(x).tanh() + (n and 1.0) for n in range(len(batches))]).detach().double()
    want = by_hand(model.two, hidden, 4)[0]
    compress.lord(model, batches, 4, target_modules=["two"])
    torch.testing.assert_close(model.two.product().double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_in_groups_it_is_the_same_and_the_model_runs_as_often():
    results, calls = [], []
    for at_once in (None, 1, 2):
        model = net()
        model.drop.register_forward_hook(lambda m, args, y: calls.append(m.training))
        compress.lord(model, data(), 3, layers_at_once=at_once)
        assert model.training and model.drop.training, "as before"
        results.append(model.state_dict())
    assert len(calls) == 6 * (1 + 2 + 1) and not any(calls)
    for state in results[1:]:
        assert all(torch.equal(t, results[0][key]) for key, t in state.items())
    model = net()
    assert not model.one._forward_hooks
    compress.lord(model, iter(data()), 3)


def test_ranks_by_pattern():
    report = compress.lord(net(), data(), 3, rank_pattern={"tw.": 5})
    assert [layer.rank for layer in report.layers.values()] == [3, 5]


def test_what_trains_stays():
    model = net()
    model.one.requires_grad_(False)
    compress.lord(model, data(), 3, target_modules=["two"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["two.A", "two.B", "two.bias"]


WRONG = {
    "rank": ({"r": 9}, r"r of two must be a whole number in 1\.\.8, got 9"),
    "zero": ({"r": 0}, r"r of one must be a whole number in 1\.\.10, got 0"),
    "word": ({"r": "4"}, "r must be a whole number"),
    "pattern": ({"rank_pattern": {"two": 2.5}}, "rank_pattern must be an object of whole numbers by regex"),
    "few": ({"batches": [torch.randn(3, 10)]}, "one must see more rows in batches than its rank 3, got 3"),
    "empty": ({"batches": []}, "one must see more rows in batches than its rank 3, got 0"),
    "nan": ({"batches": [torch.full((5, 10), torch.nan)]}, "inputs and outputs of one must be finite, got inf or nan"),
    "groups": ({"layers_at_once": 0}, "layers_at_once must be a whole number > 0 or None, got 0"),
    "iterator": ({"layers_at_once": 1, "batches": iter(data())}, "batches must begin anew for layers_at_once"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused(kind):
    how, text = WRONG[kind]
    model = net()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=text):
        compress.lord(model, **{"batches": data(), "r": 3} | how)
    assert dict(model.named_modules()) == modules and not model.one._forward_hooks and model.training


def test_a_model_that_fails_is_as_it_was():
    model = net()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compress.lord(model, [*data(1), torch.randn(4, 9)], 3)
    assert not model.one._forward_hooks and type(model.one) is nn.Linear and model.drop.training
