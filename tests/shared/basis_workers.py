# SPDX-License-Identifier: Apache-2.0
"""Data parallelism of the layers over random bases, for test_nn_basis.py: what two processes check together."""

import torch
import torch.distributed as dist
import two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrkern.nn import NOLALinear, RandLoRALinear, VeRALinear


def ddp(cls, settings):
    def check(rank):
        """Seeds are nobody's business: each process draws its own, and they are the same."""
        torch.manual_seed(rank)
        model = nn.Sequential(cls(24, 20, **settings), nn.Tanh(), cls(20, 24, **settings))
        seeds = [None, None]
        dist.all_gather_object(seeds, [model[0].seed, model[2].seed])
        assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2, seeds
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(0.1 * torch.randn(p.shape))
        wrapper = DistributedDataParallel(model)  # everything else is rank 0's from here on
        batches = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(7))
        params = [p for p in model.parameters() if p.requires_grad]
        wrapper(batches[rank]).square().sum().backward()
        losses = [model(x).square().sum() for x in batches]
        for p, *both in zip(params, *(torch.autograd.grad(loss, params) for loss in losses), strict=True):
            torch.testing.assert_close(p.grad, sum(both) / 2, atol=1e-5, rtol=1e-5)
            other = p.grad.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, p.grad) and p.grad.any()

    return check


def drawn(rank):
    """From torch's generator where one asks for it: rank 0's, whether nobody has seeded it or each process in its own way."""
    draws = []
    for cls, settings in ((NOLALinear, {"k": 6, "l": 7}), (VeRALinear, {}), (RandLoRALinear, {})):
        draws.append(
            cls.from_linear(nn.Linear(24, 20, device="meta"), r=4, seed=torch.default_generator, **settings).seed
        )
    torch.manual_seed(rank)
    draws.append(VeRALinear.from_linear(nn.Linear(24, 20, device="meta"), r=4, seed=torch.default_generator).seed)
    both = [None, None]
    dist.all_gather_object(both, draws)
    assert both[0] == both[1] and len(set(draws)) == 4, both
    assert draws[3] == int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0))), "rank 0's"


if __name__ == "__main__":
    two_processes.main(
        {
            "drawn": drawn,  # first: the others seed torch's generator
            "nola": ddp(NOLALinear, {"r": 4, "k": 6, "l": 7}),
            "vera": ddp(VeRALinear, {"r": 8}),
            "randlora": ddp(RandLoRALinear, {"r": 6}),
        }
    )
