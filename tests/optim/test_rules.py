# SPDX-License-Identifier: Apache-2.0
"""What all rules of lrkern.optim promise: a resumed run is the unbroken one bit for bit, one step for the batches of an accumulated
gradient, torch's generator as it was, and refusals that change nothing."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from optim_rules import RULES, STEPS, adamw, batch, layer_values, model, same, train

import lrkern
from lrkern import optim

each = pytest.mark.parametrize("case", RULES.values(), ids=RULES)


def everything(m, optimizer, rule):
    return {"model": m.state_dict(), "optimizer": optimizer.state_dict(), "rule": rule.state_dict()}


def run(case, steps, parts=1, dtype=torch.float32):
    m = model(case, dtype=dtype)
    rule = case.rule(m)
    optimizer = adamw(m)
    train(m, optimizer, rule, steps, parts)
    return m, optimizer, rule


def test_every_rule_is_tested():
    kinds = {k.__name__ for k in vars(optim).values() if inspect.isclass(k) and issubclass(k, optim.Rule)} - {"Rule"}
    assert kinds == {type(case.rule(model(case))).__name__ for case in RULES.values()}


@each
@pytest.mark.parametrize(
    "half, of", [(3, torch.float32), (6, torch.float32), (9, torch.float32), (6, torch.bfloat16)], ids=str
)
def test_a_resumed_run_is_the_unbroken_one(case, half, of):
    whole = run(case, range(1, STEPS + 1), dtype=of)
    file = io.BytesIO()
    torch.save(everything(*run(case, range(1, half + 1), dtype=of)), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    m = model(case, seed=77, dtype=of)
    rule = case.rule(m)
    rule.load_state_dict(saved["rule"])
    m.load_state_dict(saved["model"])
    optimizer = adamw(m)
    optimizer.load_state_dict(saved["optimizer"])
    same(everything(m, optimizer, rule), saved)
    train(m, optimizer, rule, range(half + 1, STEPS + 1))
    same(everything(m, optimizer, rule), everything(*whole))
    assert rule.steps == STEPS


@each
def test_it_does_something_in_both_halves(case):
    """Else the test above would show nothing."""
    m = model(case)
    optimizer, rule = adamw(m), case.rule(m)
    acted = []
    for n in range(1, STEPS + 1):
        x, want = batch(n)
        torch.nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        before = layer_values(m), [layer.settings for layer in rule.layers.values()]
        rule.step(optimizer)
        now = layer_values(m), [layer.settings for layer in rule.layers.values()]
        names = {key for key, p in now[0].items() if key not in before[0] or not torch.equal(p, before[0][key])}
        names |= {name for a, b in zip(*(t[1] for t in (before, now)), strict=True) for name in a if a[name] != b[name]}
        acted += [n] * any(name.endswith(case.moves) for name in names)
        optimizer.zero_grad()
    assert min(acted) <= STEPS // 2 < max(acted), acted


@each
def test_one_step_for_an_accumulated_gradient(case):
    """Two batches a step: the rule counts steps of the optimizer, and does what it does with the gradient of both at once."""
    m, _, rule = run(case, range(1, STEPS + 1), parts=2)
    assert rule.steps == STEPS
    if case is not RULES["prilora"] and case is not RULES["increlora"]:  # these look at x and dy of each batch
        together, other, again = model(case), None, None
        again, other = case.rule(together), adamw(together)
        for n in range(1, STEPS + 1):
            both = [torch.cat(t) for t in zip(batch(n, 0), batch(n, 1), strict=True)]
            torch.nn.functional.mse_loss(together(both[0]), both[1]).backward()
            other.step()
            again.step(other)
            other.zero_grad()
        for name, p in layer_values(together).items():
            if p.is_floating_point():
                torch.testing.assert_close(layer_values(m)[name], p, rtol=2e-3, atol=2e-3)
            else:
                assert torch.equal(layer_values(m)[name], p), name


@each
def test_torchs_generator_is_as_it_was(case):
    m = model(case)
    torch.manual_seed(5)
    rule = case.rule(m)
    train(m, adamw(m), rule, range(1, STEPS + 1))
    got = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(got, torch.rand(3))


@each
def test_a_wrapped_optimizer_and_a_wrapped_model(case):
    class Wrapped(torch.optim.Optimizer):  # as accelerate's
        def __init__(self, optimizer):
            self.optimizer = optimizer

    plain = run(case, range(1, STEPS + 1))
    m = model(case)
    compiled = torch.nn.Module()
    compiled.module = m
    rule, optimizer = case.rule(compiled), adamw(m)
    given = Wrapped(optimizer)
    for n in range(1, STEPS + 1):
        x, want = batch(n)
        torch.nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        rule.step(given)
        optimizer.zero_grad()
    same(everything(m, optimizer, rule), everything(*plain))


@each
def test_layers_of_a_rule_can_be_copied_and_pickled(case):
    m, *_ = run(case, range(1, 4))
    again = pickle.loads(pickle.dumps(copy.deepcopy(m)))
    x, _ = batch(1)
    assert torch.equal(again.eval()(x), m.eval()(x))


@each
def test_refusals_change_nothing(case):
    m, optimizer, rule = run(case, range(1, 4))
    x, want = batch(4)
    torch.nn.functional.mse_loss(m(x), want).backward()
    before = copy.deepcopy(everything(m, optimizer, rule))
    if rule.OPTIMIZER:
        with pytest.raises(TypeError, match="optimizer must be the one that trains the model, got None"):
            rule.step()
    sharding = torch.optim.SGD(m.parameters(), 0.1)
    sharding.optim = optimizer
    with pytest.raises(TypeError, match="SGD: the optimizer must keep its state itself, got one that shards it"):
        rule.step(sharding)
    rule.layers["2"].merge()
    with pytest.raises(RuntimeError, match="layers must not be merged, got '2'"):
        rule.step(optimizer)
    rule.layers["2"].unmerge()
    after = everything(m, optimizer, rule)
    same(after["rule"], before["rule"])
    same(after["optimizer"], before["optimizer"])

    state = rule.state_dict()
    names = sorted(state["settings"])
    with pytest.raises(ValueError, match="settings must be"):
        rule.load_state_dict(state | {"settings": state["settings"] | {names[0]: -1}})
    with pytest.raises(ValueError, match="kind must be"):
        rule.load_state_dict(state | {"kind": "Other"})
    with pytest.raises(ValueError, match="layers must be"):
        rule.load_state_dict(state | {"layers": {"0": state["layers"]["0"]}})
    same(rule.state_dict(), before["rule"])
    with pytest.raises(ValueError, match="model must have"):
        case.rule(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"relora"}))  # whose W has most of what was trained
def test_a_file_has_what_a_rule_made_of_the_layers(name, tmp_path):
    m, *_ = run(RULES[name], range(1, STEPS + 1))
    lrkern.save(m, tmp_path / "adapter.safetensors")
    again = torch.nn.Sequential(m[0].base_layer, m[1], m[2].base_layer)
    lrkern.load(again, tmp_path / "adapter.safetensors")
    x, _ = batch(1)
    assert torch.equal(again.eval()(x), m.eval()(x))


NEEDS = {"adalora", "roselora", "loraprune"}  # gradients of parameters


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_without_gradients(name):
    m, optimizer, rule = run(RULES[name], range(1, 4))
    before = copy.deepcopy(everything(m, optimizer, rule))
    with pytest.raises(RuntimeError, match="gradient"):
        rule.step(optimizer)
    same(everything(m, optimizer, rule), before)


@pytest.mark.parametrize("name", ["adalora", "increlora", "roselora"])
def test_gradients_that_are_not_finite(name):
    m, optimizer, rule = run(RULES[name], range(1, 4))
    x, _ = batch(4)
    (m(x) * torch.inf).sum().backward()
    before = copy.deepcopy(everything(m, optimizer, rule))
    with pytest.raises(RuntimeError, match="must be finite, got inf or nan; nothing is changed"):
        rule.step(optimizer)
    same(everything(m, optimizer, rule), before)


OF_GRADIENTS = sorted(RULES.keys() - {"prilora"})  # which watches inputs: they are as good in a step that is skipped


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_a_step_that_was_skipped_leaves_nothing(name):
    """Where a GradScaler skips the optimizer's step, for gradients of inf."""
    case = RULES[name]
    m, optimizer, rule = run(case, range(1, 4))
    before = copy.deepcopy(everything(m, optimizer, rule))
    m(batch(4)[0]).mul(torch.inf).sum().backward()
    optimizer.zero_grad()
    rule.skip()
    same(everything(m, optimizer, rule), before)
    train(m, optimizer, rule, range(4, STEPS + 1))
    same(everything(m, optimizer, rule), everything(*run(case, range(1, STEPS + 1))))
