# SPDX-License-Identifier: Apache-2.0
"""Hooks on and inside the layers that lrkern.peft.patch took fire and act as in PEFT."""

import pytest
import torch

from minilm import (  # isort: skip
    INNER, adapted, assert_equal, assert_same, batch, first, forward, fused_calls, pair, patched, step,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from torch import nn

import lrkern.peft


def own_forward(module, hook):
    inner = module.forward
    module.forward = lambda *args, **kwargs: (hook(), inner(*args, **kwargs) * 1.5)[1]


HOOKS = {
    "forward": lambda m, hook: m.register_forward_hook(lambda m, x, y: (hook(), y * 1.5)[1]),
    "forward_pre": lambda m, hook: m.register_forward_pre_hook(lambda m, x: (hook(), (x[0] * 1.5,))[1]),
    "full_backward": lambda m, hook: m.register_full_backward_hook(lambda m, i, o: hook()),
    "full_backward_pre": lambda m, hook: m.register_full_backward_pre_hook(lambda m, g: (hook(), (g[0] * 1.5,))[1]),
    "own_forward": own_forward,
}


PLACES = [(place, dora) for place in INNER for dora in (False, True) if dora or place != "lora_magnitude_vector"]


@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.slow), "after"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("place", "dora"), PLACES)
def test_a_hook_on_an_inner_module_acts_as_in_peft(place, dora, kind, order):
    want, fired = None, []
    for ours in (False, True):
        model = adapted(1, target_modules=["query"], use_dora=dora)
        if ours and order == "after":
            lrkern.peft.patch(model)
        calls = []
        HOOKS[kind](INNER[place](first(model)), lambda calls=calls: calls.append(1))
        if ours and order == "before":
            lrkern.peft.patch(model)
        got = step(model)
        fired.append(len(calls))
        if ours and place == "base_layer":  # runs as it is, hooks and all, below what we add
            assert_same(got, want)
        elif ours:
            assert_equal(got, want)
            assert "hook" in str(lrkern.peft.report(model))
        want = got
    assert fired[0] == fired[1]


def test_hooks_on_the_layer_itself_fire_around_the_fused_forward():
    model = patched(1, target_modules=["query"])
    layer, seen = first(model), []
    handles = [
        layer.register_forward_pre_hook(lambda m, x: seen.append("pre")),
        layer.register_forward_hook(lambda m, x, y: seen.append("forward")),
        layer.register_full_backward_hook(lambda m, i, o: seen.append("backward")),
    ]
    with fused_calls() as calls:
        step(model)
    assert seen == ["pre", "forward", "backward"] and calls == {"lora_linear": 1}
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*ackward hook:UserWarning")
@pytest.mark.parametrize("register", [nn.modules.module.register_module_forward_hook,
                                      nn.modules.module.register_module_forward_pre_hook,
                                      nn.modules.module.register_module_full_backward_hook])  # fmt: skip
def test_global_module_hooks_see_the_modules_they_see_in_peft(register):
    seen = []
    for model in pair(target_modules=["query"]):
        names = {m: name for name, m in model.named_modules()}
        calls = []
        handle = register(lambda m, *_, names=names, calls=calls: calls.append(names.get(m)))
        try:
            step(model)
        finally:
            handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


def test_an_accelerate_hook_on_the_layer_is_reported_or_fused():
    """accelerate replaces a module's forward on the instance: a class swap behind it has no effect."""
    hooks = pytest.importorskip("accelerate.hooks")
    want = step(adapted(1, target_modules=["query"]))
    before = adapted(1, target_modules=["query"])
    hooks.add_hook_to_module(first(before), hooks.ModelHook())
    lrkern.peft.patch(before)
    after = patched(1, target_modules=["query"])
    hooks.add_hook_to_module(first(after), hooks.ModelHook())
    for model in (before, after):
        with fused_calls() as calls:
            assert_same(step(model), want)
        assert calls.total() == lrkern.peft.report(model).fused


def test_accelerate_offload():
    """The weights are on the meta device, and hooks of each inner module bring them for its forward."""
    accelerate = pytest.importorskip("accelerate")
    stock, ours = pair()
    with torch.no_grad():
        want = forward(stock)
        accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
        got = ours(**batch())
    torch.testing.assert_close(torch.cat([got.last_hidden_state.flatten(0, 1), got.pooler_output]), want)
