# SPDX-License-Identifier: Apache-2.0
"""Data parallelism of every variant of LoRA, for tests/variants/test_ddp.py: a step of two processes is that of both batches."""

import torch
import torch.distributed as dist
import two_processes
from torch.nn.parallel import DistributedDataParallel
from variant_kinds import EACH, change, make


def ddp(v):
    def check(rank):
        """Each process seeds itself; what trains and what is frozen is rank 0's after DDP has begun."""
        layer = make(v, seed=3 + rank)
        change(layer, v, seed=5 + rank)
        wrapper = DistributedDataParallel(layer)
        for name, p in layer.named_parameters():
            other = p.detach().clone().to(torch.float32)
            dist.broadcast(other, 0)
            assert torch.equal(other, p.float()), f"{name} is not rank 0's"
        batches = torch.randn(2, 5, v.sizes[0], generator=torch.Generator().manual_seed(7))
        trained = {n: p for n, p in layer.coefficients().items() if p.requires_grad}
        wrapper(batches[rank]).square().sum().backward()
        got = {n: p.grad.clone() for n, p in trained.items()}
        both = [torch.autograd.grad(layer(x).square().sum(), [*trained.values()]) for x in batches]
        for name, *grads in zip(trained, *both, strict=True):
            want = sum(grads) / 2
            torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        torch.optim.SGD([*trained.values()], 0.1).step()
        moved = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
        assert moved and moved <= trained.keys()

    return check


if __name__ == "__main__":
    two_processes.main({name: ddp(v) for name, v in EACH.items()})
