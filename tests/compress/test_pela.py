# SPDX-License-Identifier: Apache-2.0
"""PELA's ranks, factors and losses beside the authors' code and float64."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lrkern import compress
from lrkern.nn import FactorizedLinear

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "compress.json").read_text())["PELA"]


def dense():
    """The recorded linears."""
    net = nn.ModuleDict()
    for name, w in RECORDED["W"].items():
        w = torch.tensor(w)
        net[name] = nn.Linear(w.shape[1], w.shape[0], bias=False)
        net[name].weight.data = w
    return net


def student(dtype=torch.float32):
    net = nn.ModuleDict()
    for name, kept in RECORDED["student"].items():
        net[name] = FactorizedLinear.from_factors(*(torch.tensor(kept[key]).to(dtype) for key in "AB"))
    return net


def test_ranks_and_products_are_the_authors():
    net = dense()
    report = compress.pela(net, 2)
    assert [layer.rank for layer in report.layers.values()] == RECORDED["ranks"]
    for layer, want in zip(net.values(), RECORDED["products"], strict=True):
        torch.testing.assert_close(layer.product(), torch.tensor(want), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 1.5, 3.0, 7])
def test_a_layer_has_one_in_ratio_of_the_parameters(ratio):
    net = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 30))
    report = compress.pela(net, ratio)
    for layer, (i, o) in zip(report.layers.values(), ((48, 96), (96, 30)), strict=True):
        assert layer.rank == int(i * o // (ratio * (i + o)))
        assert layer.rank * (i + o) <= i * o / ratio < (layer.rank + 1) * (i + o)


def test_weight_loss_is_the_authors():
    net = student()
    loss = compress.weight_loss(net, dense())
    assert loss.item() == pytest.approx(RECORDED["loss"], rel=1e-5)
    loss.backward()
    for name, kept in RECORDED["student"].items():
        for p, key in ((net[name].A, "dA"), (net[name].B, "dB")):
            torch.testing.assert_close(p.grad, torch.tensor(kept[key]), rtol=1e-4, atol=1e-5)


def test_weight_loss_is_its_formula(dtype):
    net, teacher = student(dtype), dense().to(dtype)
    loss = compress.weight_loss(net, teacher, eps=0.2)
    grads = torch.autograd.grad(loss, [*net.parameters()])
    wide, total = copy.deepcopy(net).double(), 0
    for name, layer in wide.items():
        total = total + ((layer.B @ layer.A - teacher[name].weight.double()).abs().max() - 0.2) ** 2
    wants = torch.autograd.grad(total / 2, [*wide.parameters()])
    assert loss.item() == pytest.approx((total / 2).item(), rel=1e-5) and loss.dtype == torch.float32
    for got, want in zip(grads, wants, strict=True):
        assert (got.double() - want).norm() <= max(1e-5, torch.finfo(dtype).eps) * want.norm()


def test_weight_loss_keeps_nothing_of_the_size_of_w_and_gives_the_teacher_no_gradient():
    net, teacher, saved = nn.Sequential(FactorizedLinear(60, 50, r=2)), nn.Sequential(nn.Linear(60, 50)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = compress.weight_loss(net, teacher)
    loss.backward()
    assert max(saved) <= 2 * 60 and teacher[0].weight.grad is None
    assert (net[0].A.grad.count_nonzero(), net[0].B.grad.count_nonzero()) == (2, 2), "a column of A, a row of B"


def test_feature_loss_is_the_mean_of_means():
    g = torch.Generator().manual_seed(0)
    s = [torch.randn(2, n, generator=g).requires_grad_() for n in (3, 40)]
    t = [torch.randn(2, n, generator=g).requires_grad_() for n in (3, 40)]
    loss = compress.feature_loss(s, t)
    want = sum((a.double() - b.double()).square().mean() for a, b in zip(s, t, strict=True)) / 2
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(s[1].grad, (s[1] - t[1]).detach() / 80)
    assert t[0].grad is None


def test_what_does_not_fit_is_refused():
    for ratio in (0.5, float("inf"), "3", True):
        with pytest.raises(ValueError, match=r"compress\.pela: ratio must be a finite number >= 1"):
            compress.pela(dense(), ratio)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2))
    with pytest.raises(ValueError, match=r"pela: 1 \[2, 30\] must have a rank >= 1 at this ratio, got 0; see exclude"):
        compress.pela(net, 3)
    assert type(net[0]) is nn.Linear
    assert list(compress.pela(net, 3, exclude_modules=["1"]).layers) == ["0"]
    x = torch.zeros(2, 3)
    for pair in (([x], [x, x]), ([], []), ([x], [torch.zeros(2, 1)])):
        with pytest.raises(ValueError, match=r"compress\.feature_loss: student and teacher must have one shape each"):
            compress.feature_loss(*pair)
    with pytest.raises(ValueError, match=r"weight_loss: student must have FactorizedLinear layers, got none"):
        compress.weight_loss(dense(), dense())
    with pytest.raises(ValueError, match=r"weight_loss: u\.weight of teacher must have shape \[12, 9\], got None"):
        compress.weight_loss(student(), nn.ModuleDict())


def test_distillation_brings_a_student_to_its_teacher():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    compress.pela(net, 1.5)
    x, losses = torch.randn(200, 16), []
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        feature, weight = compress.feature_loss([net(x)], [teacher(x)]), compress.weight_loss(net, teacher)
        losses.append((feature.item(), weight.item()))
        optimizer.zero_grad()
        (feature + 0.1 * weight).backward()
        optimizer.step()
    assert losses[-1][0] < 0.6 * losses[0][0] and losses[-1][1] < losses[0][1]
