# SPDX-License-Identifier: Apache-2.0
"""TRP: projections and subgradients beside the authors' code and float64, their place in a step, and the factors at the end."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lrkern import compress
from lrkern.compress.trp import kept
from lrkern.nn import FactorizedLinear

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "compress.json").read_text())["Trained-Rank-Pruning"]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    with torch.no_grad():
        net[0].weight *= torch.linspace(1, 0.05, 12).to(dtype)
    return net


def sgd(net, lr=0.1, **how):
    return torch.optim.SGD(net.parameters(), lr=lr, **how)


def projected(w, energy):
    u, s, vh = torch.linalg.svd(w.detach().double(), full_matrices=False)
    k = next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= energy * s.square().sum())
    return k, (u[:, :k] * s[:k]) @ vh[:k], u[:, :k] @ vh[:k]


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["energy"]))
def test_projection_and_subgradient_are_the_authors(case):
    net = nn.Sequential(nn.Linear(6, 8, bias=False))
    net[0].weight.data = torch.tensor(case["W"])
    trp = compress.TRP(net, sgd(net, lr=1.0), energy=case["energy"], nuclear=0.25)
    assert trp.step() and trp.ranks == {"0": case["k"]}
    torch.testing.assert_close(net[0].weight.detach(), torch.tensor(case["T"]), rtol=0, atol=2e-6)
    net[0].weight.grad = torch.zeros(8, 6)
    trp._add(None, (), {})
    torch.testing.assert_close(net[0].weight.grad, 0.25 * torch.tensor(case["sub"]), rtol=0, atol=2e-6)
    assert torch.linalg.matrix_norm(net[0].weight.grad / 0.25, 2).item() == pytest.approx(1, abs=1e-5)


def test_a_step_is_the_paper_s():
    """T - lr (∇f(T) + λ U Vᵀ) on the steps that project, W - lr ∇f(W) on the others."""
    net, x = model(), torch.randn(9, 12)
    optimizer = sgd(net)
    trp = compress.TRP(net, optimizer, period=3, energy=0.8, nuclear=0.02, target_modules=["0"])
    for step in range(7):
        w, projects = net[0].weight.detach().double(), step % 3 == 0
        k, t, sub = projected(w, 0.8)
        assert trp.step() == projects and trp.steps == step + 1
        start = net[0].weight.detach().double()
        torch.testing.assert_close(start, t if projects else w, rtol=0, atol=1e-6)
        assert not projects or trp.ranks == {"0": k}
        optimizer.zero_grad()
        net(x).square().mean().backward()
        grad = net[0].weight.grad.double()
        optimizer.step()
        want = start - 0.1 * (grad + (0.02 * sub if projects else 0))
        torch.testing.assert_close(net[0].weight.detach().double(), want, rtol=0, atol=1e-6)


def test_projecting_twice_changes_nothing_and_ranks_do_not_grow():
    net = model()
    trp = compress.TRP(net, sgd(net), energy=0.7)
    trp.step()
    first, ranks = net[0].weight.detach().clone(), dict(trp.ranks)
    again = compress.TRP(net, sgd(net), energy=1.0 - 1e-9)
    again.step()
    torch.testing.assert_close(net[0].weight.detach(), first, rtol=0, atol=1e-6)
    assert again.ranks == ranks and 1 <= ranks["0"] < 12


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_the_rank_is_the_smallest_that_keeps_the_energy(energy):
    s = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.5])
    k = kept(s, energy)
    part = lambda n: s[:n].square().sum() / s.square().sum()
    assert part(k) >= energy > part(k - 1)
    assert kept(torch.zeros(4), energy) == 0


def test_micro_batches_scaling_and_clipping_leave_the_subgradient_whole():
    """Added once, by the optimizer's step: to gradients that are unscaled and clipped."""
    torch.manual_seed(1)
    net, x = model(), torch.randn(8, 12)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=1024.0)
    trp = compress.TRP(net, optimizer, nuclear=0.5, target_modules=["0"])
    trp.step()
    start, (u, vh) = net[0].weight.detach().clone(), trp._subgradients["0"]
    for part in x.split(4):
        scaler.scale(net(part).square().sum()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    grad = net[0].weight.grad.clone()
    scaler.step(optimizer)
    torch.testing.assert_close(net[0].weight.detach(), start - 0.1 * (grad + 0.5 * u @ vh))
    before = net[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before - 0.1 * grad - 0.05 * u @ vh, msg="grad holds it")
    assert not trp._subgradients


def test_a_step_that_the_optimizer_skips_takes_its_subgradient_along():
    net = model()
    optimizer = sgd(net)
    trp = compress.TRP(net, optimizer, period=2, nuclear=0.5)
    assert trp.step() and not trp.step(), "GradScaler skips the first where it finds inf"
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not any(p.grad.any() for p in net.parameters())


def test_a_closure_is_refused_where_the_subgradient_would_be_lost():
    net = model()
    optimizer = sgd(net)
    for nuclear in (0.0, 0.1):
        trp = compress.TRP(net, optimizer, nuclear=nuclear)
        trp.step()
        if nuclear:
            for call in (lambda: optimizer.step(lambda: 0), lambda: optimizer.step(closure=lambda: 0)):
                with pytest.raises(ValueError, match=r"compress\.TRP: SGD\.step must have no closure"):
                    call()
        else:
            optimizer.step(lambda: 0)
        trp.remove()
    optimizer.step(lambda: 0)


def test_training_with_it_lowers_the_rank_and_factorize_keeps_the_function():
    torch.manual_seed(0)
    x = torch.randn(200, 12)
    y = x @ (torch.randn(12, 2) @ torch.randn(2, 16)) + 0.3 * torch.randn(200, 16)
    ranks = {}
    for nuclear in (0.0, 0.3):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16))
        optimizer = sgd(net, lr=0.02)
        trp = compress.TRP(net, optimizer, period=5, energy=0.98, nuclear=nuclear)
        for _ in range(200):
            trp.step()
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        for m in net:
            m.weight.data = projected(m.weight, 0.98)[1].float()
        want = net(x).detach()
        report = trp.factorize()
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
        ranks[nuclear] = [layer.rank for layer in report.layers.values()]
        assert all(isinstance(m, FactorizedLinear) and m.bias is not None for m in net)
        with pytest.raises(ValueError, match=r"compress\.TRP\.step: must come before factorize"):
            trp.step()
        assert not optimizer._optimizer_step_pre_hooks
    assert all(low < without for low, without in zip(ranks[0.3], ranks[0.0], strict=True)), ranks


def test_factorize_leaves_dense_what_would_not_be_smaller():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    with torch.no_grad():
        net[1].weight.copy_(torch.outer(torch.arange(1.0, 9), torch.ones(8)))
    trp = compress.TRP(net, sgd(net), energy=0.999)
    want, dense = net(x).detach(), net[0]
    report = trp.factorize()
    assert net[0] is dense and report.layers["0"].rank is None and report.layers["1"].rank == net[1].r == 1
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)


def test_steps_are_counted_on_after_a_checkpoint():
    net = model()
    first, second = (compress.TRP(net, sgd(net), period=3) for _ in range(2))
    assert [first.step() for _ in range(2)] == [True, False]
    second.load_state_dict(first.state_dict())
    assert [second.step() for _ in range(3)] == [False, True, False]


def test_a_weight_that_is_not_finite_stops_it_and_nothing_changes():
    net = model()
    trp = compress.TRP(net, sgd(net), energy=0.5)
    net[2].weight.data[0, 0] = torch.nan
    before = net[0].weight.detach().clone()
    for call in (trp.step, trp.factorize):
        with pytest.raises(ValueError, match=r"compress\.TRP: weight of 2 must be finite, got inf or nan"):
            call()
    assert torch.equal(net[0].weight, before) and trp.steps == 0 and type(net[0]) is nn.Linear


def test_what_does_not_fit_is_refused():
    net = model()
    wrong = {"period": (0, 1.5, True), "energy": (0, 1.01, "x"), "nuclear": (-1, float("inf"))}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"compress\.TRP: {name} must be"):
                compress.TRP(net, sgd(net), **{name: value})
    with pytest.raises(
        ValueError, match=r"TRP: weight of 2 must train in optimizer, got one that does not; see exclude"
    ):
        compress.TRP(net, torch.optim.SGD(net[0].parameters(), lr=1))
    net[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"TRP: weight of 2 must train in optimizer"):
        compress.TRP(net, sgd(net))
