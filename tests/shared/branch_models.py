# SPDX-License-Identifier: Apache-2.0
"""Small models whose layers know of one another, and workers that train them in two processes."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from lrkern.nn import variants

N, D = 4, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        return x + self.proj(x).tanh()


class Stack(nn.Module):
    def __init__(self, n=N):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(n))
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapted(model, cls, names=None, **settings):
    """What lrkern.adapt does with a kind of layer: plan, make, put, connect."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (names is None or n in names)}
    planned = cls.plan(model, linears, {name: settings for name in linears})
    made = {name: cls.from_linear(linears[name], **given) for name, given in planned.items()}
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    cls.connect(made)
    return model


@torch.no_grad()
def shaken(model, by=0.2, seed=5):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return model


KINDS = {
    "reslora_bs": (variants.ResLoRALinear, {"r": 3, "mode": "bs", "pre": 2}),
    "reslora_is": (variants.ResLoRALinear, {"r": 3, "mode": "is"}),
    "reslora_ms": (variants.ResLoRALinear, {"r": 3, "mode": "ms", "pre": 2}),
    "lorta": (variants.LoRTALinear, {"r": 3, "heads": 3}),
}


def of_kind(kind):
    cls, settings = KINDS[kind]
    return shaken(adapted(Stack(), cls, **settings))


def data():
    return torch.randn(8, D, generator=torch.Generator().manual_seed(1))


def stepped(model, x):
    """Its trained parameters after two steps; gradients are means over the batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def two_halves_are_the_batch(kind):
    def check(rank):
        got = stepped(DDP(of_kind(kind)), data().chunk(2)[rank])
        torch.testing.assert_close(got, stepped(of_kind(kind), data()), rtol=1e-5, atol=1e-6)

    return check


if __name__ == "__main__":
    from two_processes import main

    main({kind: two_halves_are_the_batch(kind) for kind in KINDS})
