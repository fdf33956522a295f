# SPDX-License-Identifier: Apache-2.0
"""MaestroLinear and Maestro on whole models: prefixes, lasso and shrinking beside float64 and the authors' code."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lrkern import compress
from lrkern.nn import FactorizedLinear, MaestroLinear

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "compress.json").read_text())["Maestro-LoD"]
HIERARCHICAL = {"alone": False, "hierarchical": True}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def made(i=12, o=9, r=None, bias=True, dtype=torch.float32, seed=2):
    torch.manual_seed(seed)
    return MaestroLinear(i, o, bias, r=r, dtype=dtype)


def theirs():
    """The layer of the recorded numbers."""
    a, b, bias, x = (torch.tensor(RECORDED[key]) for key in ("A", "B", "bias", "x"))
    return MaestroLinear.from_factors(a, b, bias), x


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want).to(got), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("b", [None, 0, 1, 4, 9])
def test_forward_and_gradients_are_the_prefix_s(dtype, b):
    layer, x, dy = made(dtype=dtype), torch.randn(7, 12).to(dtype).requires_grad_(), torch.randn(7, 9).to(dtype)
    layer.active = b
    y = layer(x)
    dx, da, db, dbias = torch.autograd.grad(y, (x, layer.A, layer.B, layer.bias), dy)
    n, eps = 9 if b is None else b, torch.finfo(dtype).eps
    a64, b64, x64, dy64 = (t.detach().double() for t in (layer.A[:n], layer.B[:, :n], x, dy))
    wants = x64 @ a64.T @ b64.T + layer.bias.detach().double(), dy64 @ b64 @ a64
    assert relative(y, wants[0]) < 2 * eps and relative(dx, wants[1]) < 2 * eps
    assert relative(da[:n], (dy64 @ b64).T @ x64) < 2 * eps and relative(db[:, :n], dy64.T @ (x64 @ a64.T)) < 2 * eps
    assert not da[n:].any() and not db[:, n:].any() and relative(dbias, dy64.sum(0)) < 2 * eps


def test_at_full_rank_it_is_the_dense_layer():
    dense, x = nn.Linear(20, 13), torch.randn(6, 20)
    layer = MaestroLinear.from_linear(dense)
    assert layer.r == 13 and relative(layer(x), dense(x).detach()) < 1e-6
    layer.active = 13
    assert relative(layer(x), dense(x).detach()) < 1e-6
    layer.active = 5
    assert torch.equal(layer.product(), FactorizedLinear.from_linear(dense, 5).product()), "what forward computes"
    assert relative(layer.to_linear()(x), layer(x)) < 1e-6
    assert repr(layer) == "MaestroLinear(in_features=20, out_features=13, bias=True, r=13, active=5)"
    assert "active" not in layer.state_dict()


def test_it_computes_what_the_authors_code_does():
    layer, x = theirs()
    for b, want in RECORDED["y"].items():
        layer.active = int(b)
        close(layer(x), want)


@pytest.mark.parametrize("kind", HIERARCHICAL)
def test_lasso_importance_and_shrinking_are_the_authors(kind):
    layer, x = theirs()
    want, hierarchical = RECORDED[kind], HIERARCHICAL[kind]
    loss = layer.lasso(hierarchical)
    close(loss, want["lasso"])
    for grad, key in zip(torch.autograd.grad(loss, (layer.A, layer.B)), ("dA", "dB"), strict=True):
        close(grad, want[key])
    close(layer.importance(hierarchical), want["importance"])
    assert layer.shrink(want["threshold"], hierarchical) == len(want["A"]) < 5
    close(layer.A, want["A"])
    close(layer(x), want["y"])


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_lasso_is_its_formula(dtype, hierarchical):
    layer = made(dtype=dtype)
    loss = layer.lasso(hierarchical)
    grads = torch.autograd.grad(loss, (layer.A, layer.B))
    a, b = (p.detach().double().requires_grad_() for p in (layer.A, layer.B))
    tails = [slice(j, None) if hierarchical else slice(j, j + 1) for j in range(9)]
    want = sum(a[j].norm() + b[:, j].norm() for j in tails)
    assert loss.dtype == torch.float32 and relative(loss, want.detach()) < 1e-6
    for got, expected in zip(grads, torch.autograd.grad(want, (a, b)), strict=True):
        assert relative(got, expected) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_ranks_of_zeros_have_a_lasso_with_gradients(hierarchical):
    layer = made()
    with torch.no_grad():
        layer.A[5:] = 0
        layer.B[:, 5:] = 0
    layer.lasso(hierarchical).backward()
    assert layer.A.grad.isfinite().all() and layer.A.grad[:5].any() and not layer.A.grad[5:].any()
    assert layer.shrink(hierarchical=hierarchical) == 5


def test_ranks_are_dropped_one_by_one_where_they_are_asked_alone():
    layer = made()
    with torch.no_grad():
        layer.A[[0, 3]] = 0
    a, b = layer.A.detach()[[1, 2, 4, 5, 6, 7, 8]], layer.B.detach()[:, [1, 2, 4, 5, 6, 7, 8]]
    assert made().shrink(hierarchical=True) == 9 and layer.shrink(hierarchical=False) == 7
    assert torch.equal(layer.A, a) and torch.equal(layer.B, b)


@pytest.mark.parametrize("how", ["shrink", "truncate"])
def test_fewer_ranks_are_those_of_the_whole_and_all_of_them_run(how):
    layer, whole = made(), made()
    layer.active = 2
    for each in (layer, whole):
        with torch.no_grad():
            each.A[6:] = 0
        each.shrink() if how == "shrink" else each.truncate(6)
    assert layer.active is None and layer.r == 6 and torch.equal(layer.product(), whole.product())


KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_shrinks_with_the_layer(kind):
    """It goes on as one of a layer that never had the ranks: they are zeros, and have no part in the others' steps."""
    x, dy = torch.randn(4, 12), torch.randn(4, 9)
    large, small = made(), made(r=5)
    with torch.no_grad():
        small.A.copy_(large.A[:5]), small.B.copy_(large.B[:, :5]), small.bias.copy_(large.bias)
        large.A[5:], large.B[:, 5:] = 0, 0
    optimizers = [KINDS[kind](layer.parameters()) for layer in (large, small)]
    for step in range(4):
        for layer, optimizer in zip((large, small), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).backward(dy)
            optimizer.step()
        if step == 1:
            layer(x).backward(dy)
            parameters = [*large.parameters()]
            assert large.shrink(optimizer=optimizers[0]) == 5
            assert all(p is q for p, q in zip(large.parameters(), parameters, strict=True))
            assert large.A.grad.shape == (5, 12) and large.B.grad.shape == (9, 5)
    for p, q in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_state_in_another_shape_is_refused_and_nothing_changes():
    layer = made()
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(2, 12)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        layer.B[:, 3:] = 0
    state = {name: t.clone() for name, t in optimizer.state[layer.A].items()}
    with pytest.raises(ValueError, match=r"shrink: optimizer must keep its state in the shape of the factors"):
        layer.shrink(optimizer=optimizer)
    assert layer.r == 9 and all(torch.equal(t, optimizer.state[layer.A][name]) for name, t in state.items())


def test_what_does_not_fit_is_refused():
    layer = made()
    for b in (10, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"MaestroLinear: active must be a whole number in 0\.\.9"):
            layer.active = b
    for threshold in (-1, float("nan"), "x", True):
        with pytest.raises(ValueError, match=r"MaestroLinear\.shrink: threshold must be a number >= 0"):
            layer.shrink(threshold)
    layer.A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"MaestroLinear\.shrink: A and B must be finite"):
        layer.shrink()
    with pytest.raises(TypeError, match=r"MaestroLinear\.from_linear: linear must be a plain nn\.Linear, got Conv1d"):
        MaestroLinear.from_linear(nn.Conv1d(2, 2, 1))
    assert layer.r == 9 and layer.active is None


def test_in_autocast_a_prefix_is_the_same():
    layer, x = made(), torch.randn(3, 12)
    for b in (3, None):
        layer.active = b
        want = layer(x).detach()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16 and relative(layer(x), want) < 0.02


@pytest.mark.parametrize("symbol", [False, True])
def test_compiled_it_has_a_graph_for_each_prefix_or_one_for_all(symbol):
    layer, x, prefixes = made(40, 30), torch.randn(3, 40), (3, 5, 7, 9, 12, 20)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=symbol):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for b in prefixes:
            layer.active = b
            gradients = [torch.autograd.grad(run(x).square().sum(), [*layer.parameters()]) for run in (compiled, layer)]
            assert all(relative(got, want) < 1e-6 for got, want in zip(*gradients, strict=True))
    assert backend.frame_count == (2 if symbol else len(prefixes)), "the first prefix is met as a constant"
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- whole models


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 8))


def test_a_model_computes_the_same_and_reports():
    net, x = model(), torch.randn(5, 6)
    want = net(x).detach()
    report = compress.maestro(net, target_modules=["0", "4"])
    torch.testing.assert_close(net(x), want)
    assert [type(m).__name__ for m in net[::2]] == ["MaestroLinear", "Linear", "MaestroLinear"]
    assert report.layers["0"] == (4, 4, 4 * 10 + 4, 28) and report.layers["4"] == (3, 3, 3 * 11 + 8, 32)
    assert report.parameters == report.trainable == 44 + 41 + 15 and report.before == 75


def test_every_pair_of_layer_and_rank_is_drawn_alike():
    net = model()
    compress.maestro(net)
    g, counts = torch.Generator().manual_seed(3), Counter()
    for _ in range(4000):
        with compress.prefix(net, g) as drawn:
            active = {name: net[int(name)].active for name in "024"}
            assert active == {**dict.fromkeys("024"), drawn[0]: drawn[1]}
        counts[drawn] += 1
    pairs = {(name, b + 1) for name, r in {"0": 4, "2": 3, "4": 3}.items() for b in range(r)}
    assert counts.keys() == pairs
    assert all(abs(n - 400) < 5 * 19 for n in counts.values()), "5 standard errors"


def test_prefixes_end_with_the_block_and_follow_a_seed():
    net = model()
    compress.maestro(net)
    net[2].active = 2
    drawn = []
    for _ in range(2):
        with pytest.raises(KeyError), compress.prefix(net, torch.Generator().manual_seed(7)) as pair:
            drawn.append(pair)
            raise KeyError
        assert [net[n].active for n in (0, 2, 4)] == [None, 2, None]
    assert drawn[0] == drawn[1]


def test_whole_models_shrink_and_finish(tmp_path):
    net, x = model(), torch.randn(5, 6)
    compress.maestro(net)
    with torch.no_grad():
        net[0].A[2:] = 0
    optimizer = torch.optim.Adam(net.parameters())
    assert compress.group_lasso(net).item() == pytest.approx(sum(net[n].lasso().item() for n in (0, 2, 4)), rel=1e-6)
    assert compress.shrink(net, optimizer=optimizer) == {"0": 2, "2": 3, "4": 3}
    want = net(x).detach()
    net[4].active = 1
    with pytest.raises(ValueError, match=r"compress\.finish: 4\.active must be None, got 1"):
        compress.finish(net)
    net[4].active = None
    report = compress.finish(net)
    assert [type(m) for m in net[::2]] == [FactorizedLinear, nn.Linear, nn.Linear]
    assert report.layers["0"].rank == 2 and report.layers["2"].rank is None
    torch.testing.assert_close(net(x), want)
    again = model()
    compress.restore(again, net.state_dict())
    assert torch.equal(again(x), net(x))
    for name in ("prefix", "shrink", "finish", "group_lasso"):
        with pytest.raises(ValueError, match=rf"compress\.{name}: model must have MaestroLinear layers, got none"):
            done = getattr(compress, name)(net)
            done.__enter__()


def test_training_goes_on_from_a_state_with_fewer_ranks():
    net, again, x = model(), model(), torch.randn(5, 6)
    compress.maestro(net), compress.maestro(again)
    with torch.no_grad():
        net[0].A[2:] = 0
    assert compress.shrink(net)["0"] == 2
    kept = again[2]
    compress.restore(again, net.state_dict())
    assert torch.equal(again(x), net(x)) and again[2] is kept
    assert type(again[0]) is MaestroLinear and again[0].r == 2 and again[0].active is None


def test_one_layer_that_refuses_stops_all():
    net = model()
    compress.maestro(net)
    with torch.no_grad():
        net[0].A[2:] = 0
        net[4].A[0] = torch.nan
    with pytest.raises(ValueError, match=r"MaestroLinear\.shrink: A and B must be finite, got nan"):
        compress.shrink(net)
    assert [net[n].r for n in (0, 2, 4)] == [4, 3, 3]


def test_training_by_prefixes_recovers_the_svd():
    """The paper's theorem: of a linear map on whitened inputs each prefix becomes the nearest map of its rank. A layer that learns the
    map at full rank alone does not order its ranks."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(5, 4))[0], torch.linalg.qr(torch.randn(6, 4))[0]
    w = (u * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ v.T
    x = torch.eye(6)
    worst = {}
    for sampled in (False, True):
        layer = made(6, 5, bias=False)
        net, g = nn.Sequential(layer), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        for _ in range(1500):
            optimizer.zero_grad()
            if sampled:
                with compress.prefix(net, g):
                    loss = (net(x) - x @ w.T).square().sum()
            else:
                loss = (net(x) - x @ w.T).square().sum()
            loss.backward()
            optimizer.step()
            schedule.step()
        off = []
        for b in range(1, 5):
            layer.active = b
            best = (u[:, :b] * torch.tensor([4.0, 3.0, 2.0, 1.0])[:b]) @ v[:, :b].T
            off.append(relative(layer.product(), best))
        worst[sampled] = max(off)
    assert worst[True] < 0.06 and worst[False] > 0.3, worst
