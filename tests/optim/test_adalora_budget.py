# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's budget beside PEFT's RankAllocator."""

import peft
import pytest
import torch
from optim_rules import IN, MID, OUT, batch
from torch import nn

from lrkern import optim
from lrkern.nn import variants
from lrkern.nn.variants.adalora import orthogonality

R = 5
SCHEDULES = [
    {"target_r": 2, "total_step": 20, "tinit": 3, "tfinal": 5, "deltaT": 2},
    {"target_r": 1, "total_step": 15, "tinit": 0, "tfinal": 1, "deltaT": 1, "beta1": 0.5, "beta2": 0.9},
    {"target_r": 3, "total_step": 18, "tinit": 1, "tfinal": 0, "deltaT": 5},
]


def of_peft(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, MID), nn.Tanh(), nn.Linear(MID, OUT))
    config = peft.AdaLoraConfig(init_r=R, target_modules=["0", "2"], lora_alpha=8, **settings)
    return peft.get_peft_model(model, config)


def ours(theirs, **settings):
    """The same layers, with the same values."""
    of = theirs.base_model.model
    model = nn.Sequential(*(of[i] for i in range(3)))
    for i in (0, 2):
        base = nn.Linear(of[i].in_features, of[i].out_features)
        base.load_state_dict(of[i].base_layer.state_dict())
        model[i] = variants.AdaLoRALinear.from_linear(base, r=R, lora_alpha=8)
        with torch.no_grad():
            for part in ("lora_A", "lora_E", "lora_B"):
                getattr(model[i], part).copy_(getattr(of[i], part)["default"])
    names = {"total_step": "total_steps"}
    return model, optim.AdaLoRABudget(model, **{names.get(k, k): v for k, v in settings.items()})


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_a_training_is_pefts(settings):
    """The same numbers in every step: budgets, masks, all parameters."""
    theirs = of_peft(**settings)
    model, rule = ours(theirs, **settings)
    allocator = theirs.base_model.rankallocator
    one, two = (torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.02) for m in (theirs, model))
    masked = 0
    for n in range(1, settings["total_step"] + 3):
        x, want = batch(n)
        for m, optimizer, forward in ((theirs, one, theirs.base_model.model), (model, two, model)):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(forward(x), want)
            apart = orthogonality(m.modules()) if m is model else orthogonal(m)
            (loss + 0.5 * apart).backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(n)
        rule.step(two)
        assert rule.budget(n) == allocator.budget_schedule(n)[0]
        for i in (0, 2):
            for part in ("lora_A", "lora_E", "lora_B"):
                got, it = getattr(model[i], part), getattr(theirs.base_model.model[i], part)["default"]
                torch.testing.assert_close(got, it, rtol=2e-5, atol=2e-6)
                assert part != "lora_E" or torch.equal(got == 0, it == 0)
        masked += int(sum((model[i].lora_E == 0).sum() for i in (0, 2)) > 0)
    assert masked > 3 and sum(int((model[i].lora_E != 0).sum()) for i in (0, 2)) == 2 * settings["target_r"]


def orthogonal(m):
    """PEFT's term, which its forward without a task_type leaves out."""
    norms = []
    for name, p in m.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            q = p if "lora_A" in name else p.T
            norms.append((q @ q.T - torch.eye(len(q))).norm())
    return sum(norms) / len(norms)


def made(r=4, **settings):
    torch.manual_seed(1)
    model = nn.Sequential(*(variants.AdaLoRALinear.from_linear(nn.Linear(6, 6), r=r) for _ in range(2)))
    return model, optim.AdaLoRABudget(model, **settings)


def test_ties_leave_exactly_the_budget():
    """Where PEFT zeroes all that compete."""
    model, rule = made(target_r=2, total_steps=4)
    for layer in model:
        with torch.no_grad():
            layer.lora_E.fill_(1.0)
            layer.lora_A.fill_(1.0), layer.lora_B.fill_(1.0)
        for p in layer.coefficients().values():
            p.grad = torch.ones_like(p)
    for n in range(1, 7):
        rule.step()
        left = sum(int((layer.lora_E != 0).sum()) for layer in model)
        assert left == rule.budget(n), n
    assert left == 4 and model[0].lora_E.all(), "the first in the model's order stay"


def test_a_budget_of_all_ranks_zeroes_none():
    model, rule = made(target_r=4, total_steps=3)
    for n in range(4):
        for layer in model:
            for p in layer.coefficients().values():
                p.grad = torch.ones_like(p)
            with torch.no_grad():
                layer.lora_E.fill_(0.5 + n)
        rule.step()
        assert all(layer.lora_E.all() for layer in model)


def test_ranks_is_what_keep_takes():
    model, rule = made(target_r=1, total_steps=3)
    with torch.no_grad():
        for layer in model:
            layer.lora_E.normal_()
    x = torch.randn(5, 6)
    for _ in range(3):
        model(x).square().sum().backward()
        rule.step()
    before = [layer.factors() for layer in model]
    for name, mask in rule.ranks.items():
        if mask.any():
            rule.layers[name].keep(mask)
    assert sum(layer.r for layer, mask in zip(model, rule.ranks.values(), strict=True) if mask.any()) == 2
    for layer, (a, b, _) in zip(model, before, strict=True):
        torch.testing.assert_close(layer.factors()[1] @ layer.factors()[0], b @ a)


REFUSED = [
    ({"target_r": 5, "total_steps": 9}, "target_r must give a budget of at most 8"),
    ({"target_r": 2, "total_steps": 9, "tinit": 5, "tfinal": 4}, r"total_steps must be more than tinit \+ tfinal = 9"),
    ({"target_r": 2.5, "total_steps": 9}, "target_r must be a whole number >= 1"),
    ({"target_r": 2, "total_steps": 9, "deltaT": 0}, "deltaT must be a whole number >= 1"),
    ({"target_r": 2, "total_steps": 9, "beta1": 1.5}, r"beta1 must lie in \[0, 1\]"),
]


@pytest.mark.parametrize("settings, says", REFUSED, ids=[says for _, says in REFUSED])
def test_refusals(settings, says):
    with pytest.raises(ValueError, match=f"AdaLoRABudget: {says}"):
        made(**settings)
