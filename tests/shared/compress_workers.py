# SPDX-License-Identifier: Apache-2.0
"""Compressed models under DDP, for ../compress/test_compress_ddp.py: two processes with half of a batch each train as one with all of it."""

import copy

import torch
import two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrkern import compress


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))


def trained(model, rank, step):
    """step(model, optimizer, x), three times, alone with all of x and in DDP with a half; the same parameters?"""
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    alone, shared = model, DistributedDataParallel(copy.deepcopy(model))
    for each, rows in ((alone, x), (shared, x.chunk(2)[rank])):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        run = step(each, optimizer)
        for _ in range(3):
            run(rows)
    moved = [not torch.equal(p, q) for p, q in zip(alone.parameters(), net().parameters(), strict=False)]
    assert all(moved)
    for (name, p), q in zip(alone.named_parameters(), shared.module.parameters(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda text, n=name: f"{n}: {text}")


def plain(model, optimizer):
    def run(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def factors(rank):
    model = net()
    compress.pela(model, 2)
    trained(model, rank, plain)


def trp(rank):
    def step(model, optimizer):
        trp = compress.TRP(getattr(model, "module", model), optimizer, period=2, energy=0.8, nuclear=0.1)

        def run(x):
            trp.step()
            plain(model, optimizer)(x)

        return run

    trained(net(), rank, step)


def maestro(rank):
    """The same prefixes from generators of one seed."""

    def step(model, optimizer):
        g = torch.Generator().manual_seed(5)

        def run(x):
            with compress.prefix(model, g):
                plain(model, optimizer)(x)

        return run

    model = net()
    compress.maestro(model)
    trained(model, rank, step)


if __name__ == "__main__":
    two_processes.main({check.__name__: check for check in (factors, trp, maestro)})
