# SPDX-License-Identifier: Apache-2.0
"""Rules that give, take, weigh and draw ranks: IncreLoRA, SoRA, BeamLoRA, DyLoRA, and the restarts of COLA and ReLoRA."""

import math

import pytest
import torch
from optim_rules import IN, MID, OUT, RULES, adamw, batch, layer_values, model, train
from torch import nn

from lrkern import optim
from lrkern.nn import FusedLoRALinear
from lrkern.nn.variants import increlora

# ---- IncreLoRA


def grown(seed=2, **settings):
    m = model(RULES["increlora"])
    return m, optim.IncreLoRAGrowth(m, **{"target_r": 4, "every": 3, "add": 2, "seed": seed} | settings)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_increlora_scores_are_those_of_the_dense_gradient(root, parts):
    m, rule = grown(root=root)
    wanted = {name: 0.0 for name in rule.layers}
    for part in range(parts):
        x, want = batch(1, part)
        inputs = {"0": x}
        inputs["2"] = m[1](m[0](x)).detach()
        y0 = m[0](x)
        y2 = m[2](m[1](y0))
        loss = nn.functional.mse_loss(y2, want)
        for name, dy in zip(rule.layers, torch.autograd.grad(loss, (y0, y2)), strict=True):
            layer = rule.layers[name]
            a, b, s = layer.factors()
            size = layer.in_features * layer.out_features
            score = (s * (b @ a) * (dy.mT @ inputs[name])).abs().sum()
            wanted[name] += float(score.detach()) / (math.sqrt(size) if root else size)
    rule._seen.clear()
    optimizer = adamw(m)
    for part in range(parts):
        x, want = batch(1, part)
        nn.functional.mse_loss(m(x), want).backward()
    rule.step(optimizer)
    for name, score in wanted.items():
        mean = 0.15 * score
        assert float(rule.averages.mean[name]) == pytest.approx(mean, rel=1e-4)
        assert float(rule.averages.spread[name]) == pytest.approx(0.15 * (score - mean), rel=1e-4)


@pytest.mark.parametrize("top_h, add, warmup, totals", [
    (1, 2, 0, {3: 4, 6: 6, 9: 8}),
    (2, 3, 4, {6: 8}),  # 2 layers by 3, of 6 that are left
    (2, 4, 0, {3: 8}),  # one by 4, one by what is left, 2
    (2, 6, 0, {3: 8}),  # one by 6, none is left for the other
])  # fmt: skip
def test_increlora_reaches_exactly_its_target_in_time(top_h, add, warmup, totals):
    m, rule = grown(top_h=top_h, add=add, warmup=warmup)
    optimizer, now = adamw(m), 2
    for n in range(1, 13):
        x, want = batch(n)
        nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        new = rule.step(optimizer)
        assert new == (n in totals)
        now = totals.get(n, now)
        assert rule.total == now
        for layer in m[::2]:
            p = layer.lora_A
            assert any(q is p for q in optimizer.param_groups[0]["params"]) and p in optimizer.state
            assert optimizer.state[p]["exp_avg"].shape == p.shape == (layer.r + layer.reserve, layer.in_features)
        optimizer.zero_grad()
    assert not m[0].reserve and not m[2].reserve and not m[0]._forward_hooks
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_increlora_gives_to_the_layer_of_the_highest_score_and_keeps_y():
    m, rule = grown(every=1)
    with torch.no_grad():
        m[2].lora_E.fill_(1.0), m[0].lora_E.fill_(1e-3)
    optimizer = adamw(m)
    x, want = batch(1)
    nn.functional.mse_loss(m(x), want).backward()
    assert rule._seen["2"] > 10 * rule._seen["0"]
    before = m(x), m[2].scaling
    rule.step(optimizer)
    assert (m[0].r, m[2].r) == (1, 3)
    m[2].scaling = before[1]  # which follows the ranks
    torch.testing.assert_close(m(x), before[0], rtol=0, atol=100 * increlora.RESERVE)


def test_increlora_draws_the_same_ranks_from_the_same_seed():
    ends = []
    for seed in (2, 2, 3):
        m, rule = grown(seed)
        torch.manual_seed(len(ends))
        train(m, adamw(m), rule, range(1, 10))
        ends.append(m[2].lora_A.detach().clone())
    assert ends[0].shape == ends[1].shape == ends[2].shape
    assert torch.equal(*ends[:2]) and not torch.equal(*ends[1:])


def test_increlora_refuses_what_it_cannot_score_or_move():
    m, rule = grown(every=1)
    optimizer = adamw(m)
    with pytest.raises(RuntimeError, match="layers must have run in training mode and backward, '0' has not"):
        rule.step(optimizer)
    x, want = batch(1)
    nn.functional.mse_loss(m.eval()(x), want).backward()
    with pytest.raises(RuntimeError, match="'0' has not"):
        rule.step(optimizer)
    nn.functional.mse_loss(m.train()(x), want).backward()
    with pytest.raises(ValueError, match="must hold every parameter"):
        rule.step(torch.optim.SGD([m[0].lora_A], 0.1))
    assert rule.total == 2 and rule.steps == 0
    with pytest.raises(ValueError, match="target_r must give at least 8 ranks"):
        for layer in m[::2]:
            layer.grow(3)
        optim.IncreLoRAGrowth(m, 3, 1)


def test_increlora_refuses_an_optimizer_made_before_the_layers_had_their_shapes():
    m, rule = grown()
    train(m, adamw(m), rule, range(1, 5))
    again, its = grown()
    early = adamw(again)
    its.load_state_dict(rule.state_dict())
    again.load_state_dict(m.state_dict())
    with pytest.raises(ValueError, match="make it after load_state_dict of the rule"):
        train(again, early, its, [5])
    assert its.steps == 4


# ---- SoRA


def test_sora_thresholds_by_each_groups_learning_rate():
    m = model(RULES["sora"])
    gates = [torch.tensor([0.5, -0.3, 0.05, -0.02]), torch.tensor([1.0, -0.2, 0.1, 0.0])]
    with torch.no_grad():
        for layer, g in zip(m[::2], gates, strict=True):
            layer.lora_gate.copy_(g)
    optimizer = torch.optim.SGD([{"params": m[0].parameters(), "lr": 0.1}, {"params": m[2].parameters(), "lr": 0.5}])
    rule = optim.SoRAProx(m, 0.4)
    rule.step(optimizer)
    torch.testing.assert_close(m[0].lora_gate, torch.tensor([0.46, -0.26, 0.01, 0.0]))
    torch.testing.assert_close(m[2].lora_gate, torch.tensor([0.8, 0.0, 0.0, 0.0]))
    optimizer.param_groups[1]["lr"] = 0.0
    rule.step(optimizer)
    torch.testing.assert_close(m[2].lora_gate, torch.tensor([0.8, 0.0, 0.0, 0.0]))


def test_sora_as_code():
    """By lam whatever the learning rate, and nothing of up to 2 lam is left."""
    m = model(RULES["sora"])
    g = torch.tensor([0.5, -0.19, 0.21, -0.05])
    with torch.no_grad():
        for layer in m[::2]:
            layer.lora_gate.copy_(g)
    optim.SoRAProx(m, 0.1, as_code=True).step(adamw(m))
    torch.testing.assert_close(m[0].lora_gate, torch.tensor([0.4, 0.0, 0.11, 0.0]))


@pytest.mark.parametrize("lam", [-1.0, math.inf, math.nan, "1", True])
def test_sora_refuses(lam):
    with pytest.raises(ValueError, match="SoRAProx: lam must be a finite number"):
        optim.SoRAProx(model(RULES["sora"]), lam)


# ---- BeamLoRA


def beam(**settings):
    m = model(RULES["beamlora"])
    rule = optim.BeamLoRABeam(m, **{"every": 2, "end": 100, "threshold": 0.5} | settings)
    gates = [[0.3, 0.1, 0.0, -0.1], [0.02, 0.01, 0.0, -0.01]]
    with torch.no_grad():
        for layer, g in zip(m[::2], gates, strict=True):
            layer.lora_gate.copy_(torch.tensor(g))
            layer.lora_B.normal_()
    return m, rule


def state_of(m, optimizer):
    """Moments that tell every element apart."""
    for i, layer in enumerate(m[::2]):
        for p in (layer.lora_A, layer.lora_B, layer.lora_gate):
            t = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) + 1 + 1000 * i
            optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": t, "exp_avg_sq": t + 0.5}


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9, 0.97, 0.999])
def test_beamlora_keeps_the_smallest_set_that_reaches_top_p(top_p):
    m, rule = beam()
    weak = torch.cat([*rule._weak(top_p).values()])
    importance = torch.cat([layer.importance() for layer in m[::2]]).double()
    kept = importance[~weak].sum()
    least = importance[~weak].min()
    assert kept >= top_p * importance.sum() > kept - least
    assert not weak.any() or importance[weak].max() <= least


@pytest.mark.parametrize("present", [False, True])
def test_beamlora_copies_and_moves_the_moments(present):
    m, rule = beam(present=present)
    optimizer = adamw(m)
    state_of(m, optimizer)
    rule.step(optimizer)
    first = layer_values(m)
    with torch.no_grad():
        for layer in m[::2]:
            layer.lora_A += 1
            layer.lora_B += 1
    now = layer_values(m)
    moments = {p: t["exp_avg"].clone() for p, t in optimizer.state.items()}
    order = {name: layer.importance().sort(descending=True).indices.tolist() for name, layer in rule.layers.items()}
    top_p = 1 - 0.5 * (1 + math.cos(math.pi * 2 / 100)) / 2
    weak = rule._weak(top_p)
    rule.step(optimizer)
    source, changed = now if present else first, 0
    for name, layer in rule.layers.items():
        n = min(int(weak[name].sum()), 2)
        lost, best = order[name][4 - n :], order[name][:n]
        rest = [i for i in range(4) if i not in lost]
        assert torch.equal(layer.lora_A[rest], now[f"{name}.lora_A"][rest])
        for i in lost:
            copied = [j for j in best if torch.equal(layer.lora_A[i], source[f"{name}.lora_A"][j])]
            assert len(copied) == 1
            (j,) = copied
            assert torch.equal(layer.lora_B[:, i], source[f"{name}.lora_B"][:, j])
            g = now[f"{name}.lora_gate"]
            assert layer.lora_gate[i] == layer.lora_gate[j] == (g[i] + g[j]) / 2
            assert torch.equal(optimizer.state[layer.lora_A]["exp_avg"][i], moments[layer.lora_A][j])
            assert torch.equal(optimizer.state[layer.lora_B]["exp_avg"][:, i], moments[layer.lora_B][:, j])
            assert not optimizer.state[layer.lora_gate]["exp_avg"][[i, j]].any()
            best.remove(j)
            changed += 1
    assert changed


def test_beamlora_copies_part_ways():
    """With what was, as the docstring says; copies of what is stay copies."""
    apart = {}
    for present in (False, True):
        m, rule = beam(every=4, present=present)
        optimizer = adamw(m)
        train(m, optimizer, rule, range(1, 5))
        rule.every = 10**6
        train(m, optimizer, rule, range(5, 9))
        rows = m[0].lora_A.detach()
        apart[present] = min(float((rows[i] - rows[j]).norm()) for i in range(4) for j in range(i))
    assert apart[True] == 0.0 < 1e-3 < apart[False]


def test_beamlora_ends():
    m, rule = beam(end=2)
    optimizer = adamw(m)
    before = layer_values(m)
    for _ in range(4):
        rule.step(optimizer)
    assert all(torch.equal(p, before[n]) for n, p in layer_values(m).items()) and not rule.earlier


# ---- DyLoRA


def test_dylora_draws_one_prefix_for_all_and_every_one_as_often():
    m = model(RULES["dylora"])
    rule = optim.DyLoRASampler(m, low=2, seed=1)
    seen = []
    for _ in range(600):
        assert m[0].active == m[2].active
        seen.append(m[0].active)
        rule.step()
    counts = [seen.count(b) for b in (1, 2, 3, 4)]
    assert counts[0] == 0 and sum(counts) == 600 and min(counts[1:]) > 200 - 4 * math.sqrt(600 * 2 / 9)
    again = optim.DyLoRASampler(model(RULES["dylora"]), low=2, seed=1)
    assert [again.layers["0"].active, again.step(), again.layers["2"].active] == [seen[0], False, seen[1]]


@pytest.mark.parametrize("low, high", [(0, 0), (3, 2), (1, 5), (1.0, 2)])
def test_dylora_refuses(low, high):
    with pytest.raises(ValueError, match="DyLoRASampler: (low|high) must"):
        optim.DyLoRASampler(model(RULES["dylora"]), low, high)


# ---- COLA


def test_cola_restarts_keep_y_and_forget_the_moments():
    m = model(RULES["cola"])
    rule, optimizer, links = optim.COLARestart(m, 3, times=2), adamw(m), []
    for n in range(1, 12):
        x, want = batch(n)
        nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        y, a = m(x).detach(), m[0].lora_A.detach().clone()
        rule.step(optimizer)
        torch.testing.assert_close(m(x), y, rtol=1e-5, atol=1e-5)
        began = n in (3, 6)
        assert (not optimizer.state) == began == (not m[0].lora_B.any()) and torch.equal(a, m[0].lora_A) != began
        links.append(m[0].links)
        optimizer.zero_grad()
    assert links == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_cola_refuses_before_the_first_layer_restarts():
    m = model(RULES["cola"])
    m[2] = RULES["cola"].layer.from_linear(nn.Linear(MID, OUT), r=300)
    rule = optim.COLARestart(m, 1)
    with pytest.raises(RuntimeError, match="layers must have ranks of at most 512 together, '2' would have 600"):
        rule.step(adamw(m))
    assert m[0].links == 0 == rule.steps


# ---- ReLoRA


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_relora_adds_to_w_and_begins_anew(init, keep):
    torch.manual_seed(0)
    m = nn.Sequential(FusedLoRALinear.from_linear(nn.Linear(IN, OUT), r=4, init=init))
    layer, optimizer = m[0], adamw(m)
    rule = optim.ReLoRARestart(m, 3, keep=keep)
    for n in range(1, 4):
        x, want = batch(n)
        nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        if n == 3:
            w, delta, y = layer.base_layer.weight.clone(), layer.delta_weight(), m(x).detach()
            a, moment = layer.lora_A.weight.clone(), optimizer.state[layer.lora_A.weight]["exp_avg"].clone()
        rule.step(optimizer)
        optimizer.zero_grad()
    assert torch.equal(layer.base_layer.weight, w + delta) and delta.any()
    torch.testing.assert_close(m(x), y, rtol=1e-5, atol=1e-5)
    assert not layer.lora_B.weight.any() and not torch.equal(layer.lora_A.weight, a)
    bound = 1 / math.sqrt(IN) if init == "kaiming" else 1.2  # uniform within ±1 / sqrt(in), or normal / 4
    assert 0.5 * bound / (1 if init == "kaiming" else 4) < layer.lora_A.weight.abs().max() <= bound
    if keep:
        left = optimizer.state[layer.lora_A.weight]
        index = moment.flatten().abs().topk(12).indices  # a quarter of 4 x 12
        assert torch.equal(left["exp_avg"].flatten()[index], moment.flatten()[index])
        assert int((left["exp_avg"] != 0).sum()) == 12 and left["step"] == 3
    else:
        assert not optimizer.state
    assert not layer.merged
    layer.merge(), layer.unmerge()


def test_relora_refuses():
    for settings, says in (({"use_dora": True}, "got use_dora as '0'"), ({"init": "pissa"}, "got init='pissa' as '0'")):
        odd = nn.Sequential(FusedLoRALinear.from_linear(nn.Linear(IN, OUT), r=4, **settings))
        with pytest.raises(ValueError, match=says):
            optim.ReLoRARestart(odd, 3)
    m = model(RULES["relora"])
    with torch.no_grad():
        m[2].lora_B.weight.fill_(torch.inf)
        m[0].lora_B.weight.fill_(1.0)
    before = layer_values(m)
    with pytest.raises(ValueError, match="must be finite, got inf or nan in '2'; nothing is changed"):
        optim.ReLoRARestart(m, 1).step(adamw(m))
    assert all(torch.equal(p, before[n]) for n, p in layer_values(m).items())
