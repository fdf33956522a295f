# SPDX-License-Identifier: Apache-2.0
"""Rules under DistributedDataParallel, for tests/optim/test_rules_ddp.py: processes that see other batches come to the same decisions."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import two_processes
from optim_rules import RULES, STEPS, adamw, batch, flat, layer_values, model, same
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lrkern import optim


def equal_everywhere(state) -> None:
    both = [None, None]
    dist.all_gather_object(both, flat(state))
    one, two = both
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for key, value in one.items():
        same = torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        assert same, f"{key}: {value}, in the other process {two[key]}"


def decisions(case):
    def check(rank):
        wrapped = DistributedDataParallel(model(case, seed=3 + rank))
        rule, optimizer = case.rule(wrapped), adamw(wrapped.module)
        assert [*rule.layers] == ["0", "2"]
        torch.manual_seed(50 + rank)  # a rule that drew from torch's generator would draw otherwise here
        for n in range(1, STEPS + 1):
            x, want = batch(n, rank)
            nn.functional.mse_loss(wrapped(x), want).backward()
            optimizer.step()
            if rule.step(optimizer):
                if n % 2:
                    wrapped = DistributedDataParallel(wrapped.module)
                else:
                    optim.surgery.rewrap(wrapped)
            optimizer.zero_grad()
            equal_everywhere(layer_values(wrapped.module))
            equal_everywhere([layer.settings for layer in rule.layers.values()])
            equal_everywhere(rule.state_dict())  # one process saves for all, and all go on from that

    return check


def a_communication_hook_stays(rank):
    calls = []

    def hook(state, bucket):
        calls.append(state)
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped = DistributedDataParallel(nn.Linear(3, 2))
    wrapped.register_comm_hook("a state", hook)
    for _ in range(2):  # rewrapped once more
        wrapped.module.weight = nn.Parameter(torch.ones(2, 3))
        optim.surgery.rewrap(wrapped)
        calls.clear()
        wrapped(torch.full((1, 3), 1.0 + rank)).sum().backward()
        assert calls == ["a state"]
        assert torch.equal(wrapped.module.weight.grad, torch.full((2, 3), 1.5))


def sharded(rank):
    for case in RULES.values():
        m = model(case)
        rule = case.rule(m)
        layer = m[2]
        weight = distribute_tensor(layer.base_layer.weight.detach(), init_device_mesh("cpu", (2,)))
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            rule.step(torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1))
        except TypeError as error:
            assert "parameters must be whole in every process, got a DTensor in '2'" in str(error)
        else:
            raise AssertionError(f"{type(rule).__name__} takes sharded parameters")


def one_layer_ran_in_one_process(rank):
    m = model(RULES["prilora"])
    rule = RULES["prilora"].rule(m)
    x = torch.ones(4, m[0].in_features) * (1 + rank)
    if rank:
        m[2](m[0](x))
    else:
        m[0](x)
    y = m[2].x_norm
    rule.step()
    torch.testing.assert_close(m[0].x_norm, torch.full_like(m[0].x_norm, 3.0))  # of 2 and 4
    equal_everywhere(rule.state_dict())
    assert not rank or torch.equal(m[2].x_norm, y)


def in_a_trainer(rank):
    """Two processes, from the beginning and from a checkpoint."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    import transformers

    folder = Path(sys.argv[2]) / "trainer"
    rows = [{"x": x, "labels": y} for n in range(1, 2 * STEPS + 1) for x, y in zip(*batch(n), strict=True)]

    class Supervised(nn.Sequential):
        def forward(self, x, labels):
            y = super().forward(x)
            return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

    def trained(name, seed, checkpoint=None):
        m = Supervised(*model(RULES[name], seed))
        rule = RULES[name].rule(m)
        callback = optim.StepCallback(rule)
        settings = {
            "per_device_train_batch_size": 6,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "learning_rate": 0.02,
        }
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
        arguments = transformers.TrainingArguments(str(folder / name), **settings, **quiet)
        trainer = transformers.Trainer(m, arguments, train_dataset=rows, callbacks=[callback])
        assert arguments.world_size == 2
        if checkpoint:
            callback.resume(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert rule.steps == STEPS
        return layer_values(m) | flat(rule.state_dict())

    for name in ("adalora", "beamlora", "cola", "dylora", "increlora", "prilora"):
        whole = trained(name, 3 + rank)
        equal_everywhere(whole)
        dist.barrier()
        equal_everywhere(again := trained(name, 70 + rank, str(folder / name / f"checkpoint-{STEPS // 2}")))
        same(again, whole)


CHECKS = {name: decisions(case) for name, case in RULES.items()} | {
    "a communication hook": a_communication_hook_stays,
    "sharded": sharded,
    "one layer ran in one process": one_layer_ran_in_one_process,
    "in a trainer": in_a_trainer,  # last: accelerate keeps what it found
}

if __name__ == "__main__":
    two_processes.main(CHECKS)
