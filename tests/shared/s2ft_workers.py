# SPDX-License-Identifier: Apache-2.0
"""Data parallelism and FSDP2 of a model that lrkern.s2ft prepared, for tests/s2ft/test_prepare.py: what two processes check together."""

import torch
import torch.distributed as dist
import two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lrkern.nn import S2FTLinear
from lrkern.s2ft import extract, prepare


class Attention(nn.Module):
    num_heads, head_dim = 4, 6

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.o_proj = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """One of nobody's: two blocks of grouped heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def trained(model: nn.Module, wrapper: nn.Module, rows: slice) -> None:
    """Three steps on some rows of each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(step))[rows]
        wrapper(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def data_parallel(rank: int) -> None:
    """Each rank its half of the rows: what one process learns of all of them, and the same bits on both."""
    one, two = Model(), Model()
    for model in (one, two):
        done = prepare(model, o=0.5, v=0.5, down=0.5, up=0.5, generator=0)
        assert len(done.layers) == 8
    trained(one, one, slice(None))
    trained(two, DistributedDataParallel(two), slice(2 * rank, 2 * rank + 2))
    want, got = extract(one), extract(two)
    for name, s in want.items():
        assert s.change.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name].change, s.change, rtol=0, atol=1e-6)
        other = got[name].change.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, got[name].change), name


def fsdp2(rank: int) -> None:
    """Slices and W are sharded, and W comes from its shards again for backward, without what forward wrote into it."""
    one, two = Model(), Model()
    for model in (one, two):
        prepare(model, o=0.5, v=0.5, down=0.5, up=0.5, generator=0)
    trained(one, one, slice(None))
    for block in two.blocks:
        fully_shard(block)
    fully_shard(two)
    trained(two, two, slice(2 * rank, 2 * rank + 2))
    layers = {name: m for name, m in one.named_modules() if isinstance(m, S2FTLinear)}
    assert len(layers) == 8
    for name, layer in layers.items():
        got = two.get_submodule(name).slice.full_tensor()
        assert layer.change().abs().max() > 1e-4, name
        torch.testing.assert_close(got, layer.slice, rtol=0, atol=1e-6)


if __name__ == "__main__":
    two_processes.main({"data_parallel": data_parallel, "fsdp2": fsdp2})
