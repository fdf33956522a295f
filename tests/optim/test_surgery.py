# SPDX-License-Identifier: Apache-2.0
"""An optimizer goes on with parameters that took others' places."""

import pytest
import torch
from torch import nn

from lrkern.optim import surgery

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.1),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, 0.1, fused=True),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, 0.1, foreach=True, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1),
    "sgd momentum": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 0.1, centered=True),
}
each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def steps(p, optimizer, n, first=0):
    """Of a loss whose elements do not know of one another."""
    for i in range(first, first + n):
        g = torch.Generator().manual_seed(i)
        want = torch.randn(6, 5, generator=g)[tuple(map(slice, p.shape))]
        optimizer.zero_grad()
        (p - want).square().sum().backward()
        optimizer.step()


def parameter(rows, cols):
    return nn.Parameter(torch.arange(30.0).view(6, 5)[:rows, :cols].clone())


@each
@pytest.mark.parametrize("shape", [(4, 5), (6, 3), (2, 2)], ids=str)
def test_what_stays_of_a_smaller_parameter_trains_as_in_the_larger(make, shape):
    large, other = parameter(6, 5), parameter(3, 3)
    optimizer = make([{"params": [other], "lr": 0.3}, {"params": [other.detach().clone().requires_grad_(), large]}])
    steps(large, optimizer, 3)
    small = nn.Parameter(large.detach()[tuple(map(slice, shape))].clone())
    surgery.replace(optimizer, {large: surgery.Change(small, surgery.corner(small.shape))})
    assert optimizer.param_groups[1]["params"][1] is small and large not in optimizer.state
    steps(small, optimizer, 3, 3)

    whole = parameter(6, 5)
    steps(whole, make([whole]), 6)
    assert torch.equal(small, whole[tuple(map(slice, shape))])


@each
def test_rows_that_are_new_begin_with_zero_moments_and_the_others_go_on(make):
    small = parameter(4, 5)
    optimizer = make([small])
    steps(small, optimizer, 3)
    large = nn.Parameter(torch.cat([small.detach(), torch.zeros(2, 5)]))
    surgery.replace(optimizer, {small: surgery.Change(large, surgery.corner(large.shape))})
    for name, t in surgery.by_element(optimizer, large).items():
        assert (t.shape == large.shape and not t[4:].any() and t[:4].any()) or name == "grad_avg"
    steps(large, optimizer, 3, 3)
    whole = parameter(6, 5)
    steps(whole, make([whole]), 6)
    assert torch.equal(large[:4], whole[:4]) and large[4:].all()


def test_a_scheduler_goes_on():
    p = parameter(4, 5)
    optimizer = torch.optim.AdamW([p], 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    new = nn.Parameter(p.detach()[:2].clone())
    steps(p, optimizer, 1)
    surgery.replace(optimizer, {p: surgery.Change(new, surgery.corner(new.shape))})
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[0]["params"] == [new]


@each
def test_reset(make):
    p, other = parameter(6, 5), parameter(4, 4)
    optimizer = make([p, other])
    steps(p, optimizer, 2)
    steps(other, optimizer, 2)
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in optimizer.state[other].items()}
    before = {n: t.clone() for n, t in surgery.by_element(optimizer, p).items()}
    surgery.reset(optimizer, [p], keep=0.25)
    for name, t in surgery.by_element(optimizer, p).items():
        index = before[name].flatten().abs().sort(descending=True).indices
        assert torch.equal(t.flatten()[index[:7]], before[name].flatten()[index[:7]])  # floor(0.25 · 30)
        assert not t.flatten()[index[7:]].any()
    surgery.reset(optimizer, [p])
    assert p not in optimizer.state
    for name, t in optimizer.state[other].items():
        assert torch.equal(t, kept[name]) if isinstance(t, torch.Tensor) else t == kept[name]


class AdamW8bit(torch.optim.SGD):
    """State as bitsandbytes keeps it."""

    def keep(self, p, **state):
        self.state[p] = {"step": 3} | state
        return self


EIGHT_BITS = {
    "bytes": ({"state1": torch.zeros(4, 5, dtype=torch.uint8)}, r"'state1': \[4, 5\] torch.uint8"),
    "scales": ({"state1": torch.zeros(4, 5), "absmax1": torch.zeros(2)}, r"'absmax1': \[2\] torch.float32"),
    "a list": ({"history": [1]}, "'history': list"),
}


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_state_of_another_form_is_refused_by_name(kind):
    state, says = EIGHT_BITS[kind]
    p, q = parameter(4, 5), parameter(2, 2)
    optimizer = AdamW8bit([q, p], 0.1).keep(p, **state)
    new = {
        old: surgery.Change(nn.Parameter(old.detach()[:1].clone()), surgery.corner(torch.Size([1, 5])))
        for old in (q, p)
    }
    for call in (lambda: surgery.replace(optimizer, new), lambda: surgery.reset(optimizer, [p], 0.5)):
        with pytest.raises(TypeError, match=f"AdamW8bit: .* shape \\[4, 5\\] or single numbers, got {says}"):
            call()
    assert optimizer.param_groups[0]["params"] == [q, p] and optimizer.state[p].keys() >= state.keys()
    surgery.reset(optimizer, [p])  # forgetting all needs to know nothing
    assert p not in optimizer.state


def test_a_parameter_that_it_does_not_train_is_refused():
    p, stranger = parameter(4, 5), parameter(2, 2)
    optimizer = torch.optim.SGD([p], 0.1)
    with pytest.raises(ValueError, match=r"SGD: the optimizer must hold every .* \[2, 2\] is missing"):
        surgery.check(optimizer, [p, stranger])
