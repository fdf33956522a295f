# SPDX-License-Identifier: Apache-2.0
"""Every rule in transformers' Trainer: what the plain loop does, and the same after going on from a checkpoint."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import transformers
from optim_rules import RULES, STEPS, batch, layer_values, model, same
from torch import nn

from lrkern import optim

each = pytest.mark.parametrize("case", RULES.values(), ids=RULES)
PARTS = 2  # batches of a step


class Supervised(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, labels):
        y = self.layers(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def data():
    rows = [batch(n, part) for n in range(1, STEPS + 1) for part in range(PARTS)]
    return [{"x": x, "labels": y} for xs, ys in rows for x, y in zip(xs, ys, strict=True)]


def trainer(m, callback, folder, **more):
    settings = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": PARTS,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "save_steps": STEPS // 2,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    arguments = transformers.TrainingArguments(str(folder), **settings | more)
    return transformers.Trainer(m, arguments, train_dataset=data(), callbacks=[callback])


def made(case, seed=3):
    m = Supervised(model(case, seed))
    rule = case.rule(m.layers)
    return m, rule, optim.StepCallback(rule)


@each
def test_a_run_that_goes_on_from_a_checkpoint(case, tmp_path):
    m, rule, callback = made(case)
    first = trainer(m, callback, tmp_path)
    first.train()
    assert rule.steps == STEPS == first.state.global_step

    folder = tmp_path / f"checkpoint-{STEPS // 2}"
    again, its, callback = made(case, seed=77)
    callback.resume(folder)
    assert its.steps == STEPS // 2
    second = trainer(again, callback, tmp_path / "second")
    second.train(resume_from_checkpoint=str(folder))
    same(layer_values(again), layer_values(m))
    same(its.state_dict(), rule.state_dict())
    same(second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"])


def test_a_run_is_that_of_the_plain_loop(tmp_path):
    """Of the same optimizer without clipping and without a schedule of the learning rate."""
    case = RULES["adalora"]
    m, rule, callback = made(case)
    still = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"}
    trainer(m, callback, tmp_path, save_strategy="no", **still).train()
    plain = model(case)
    its = case.rule(plain)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 0.02, weight_decay=0.0)
    for n in range(1, STEPS + 1):
        for part in range(PARTS):
            x, want = batch(n, part)
            (nn.functional.mse_loss(plain(x), want) / PARTS).backward()
        optimizer.step()
        its.step(optimizer)
        optimizer.zero_grad()
    for name, p in layer_values(plain).items():
        torch.testing.assert_close(m.get_parameter(f"layers.{name}"), p, rtol=1e-4, atol=1e-5)
    assert {n: t.tolist() for n, t in rule.ranks.items()} == {n: t.tolist() for n, t in its.ranks.items()}


def test_going_on_without_the_rules_is_refused(tmp_path):
    case = RULES["dylora"]
    m, _, callback = made(case)
    trainer(m, callback, tmp_path).train()
    folder = tmp_path / f"checkpoint-{STEPS // 2}"
    again, _, callback = made(case)
    with pytest.raises(ValueError, match=f"call resume.* got step {STEPS // 2}"):
        trainer(again, callback, tmp_path / "second").train(resume_from_checkpoint=str(folder))
    callback.resume(folder)
    with pytest.raises(ValueError, match=f"must go on from step {STEPS // 2}.* got step 0"):
        trainer(again, callback, tmp_path / "second").train()
    with pytest.raises(ValueError, match="rules must be 1, got 0"):
        optim.StepCallback().resume(folder)


@pytest.mark.parametrize("name", ["cola", "increlora"])
def test_the_best_model_of_other_shapes_is_refused(name, tmp_path):
    m, _, callback = made(RULES[name])
    t = trainer(m, callback, tmp_path)
    t.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="must go without load_best_model_at_end, got True"):
        t.train()


def test_new_parameters_in_several_processes_without_ddp_are_refused():
    """With it see test_rules_ddp.py."""
    m, rule, callback = made(RULES["increlora"])
    arguments = type("Arguments", (), {"world_size": 2, "load_best_model_at_end": False})
    state = type("State", (), {"global_step": 0})
    callback.on_train_begin(arguments, state, None, model=m)
    m(*batch(1))["loss"].backward()
    with pytest.raises(
        ValueError, match="IncreLoRAGrowth must train in DistributedDataParallel where it has 2 processes, found"
    ):
        callback.on_optimizer_step(arguments, state, None, optimizer=torch.optim.SGD(m.parameters(), 0.1))
    assert rule.steps == 0
    callback.on_train_end(arguments, state, None)
    assert not m._forward_pre_hooks


def test_a_step_that_was_skipped_is_none():
    _, rule, callback = made(RULES["dylora"])
    skipped = type("Skipped", (), {"step_was_skipped": True})
    callback.on_optimizer_step(None, None, None, optimizer=skipped)
    assert rule.steps == 0
    callback.on_optimizer_step(None, None, None)
    assert rule.steps == 1
