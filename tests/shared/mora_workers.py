# SPDX-License-Identifier: Apache-2.0
"""MoRA's ops on DTensors, for test_mora_sharded.py: what two processes check together."""

import itertools

import torch
import two_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import lrkern.ops as ops

I, O, R = 20, 26, 8
SHAPES = {
    "x": (4, 6, I),
    "y": (4, 6, O),
    "weight": (O, I),
    "bias": (O,),
    "m": (R, R),
    "h": (4, 6, R),
    "h6": (4, 6, 3, R),
}
WHOLE, SHARD = Replicate(), Shard
TYPES = (1, 2, 3, 4, 6)


def parallel(op, placements, *args, train=True, to=None, frozen=(), **shapes):
    """An op on DTensors of these placements against the same on whole tensors, forward and backward, of a dY placed as y is, or
    as ``to``. Gives how y is placed, and how often something was sent in forward and in backward."""
    mesh, results = init_device_mesh("cpu", (2,)), []
    torch.manual_seed(0)
    tensors = {name: torch.randn((SHAPES | shapes)[name]) for name in placements}
    for shard in (False, True):
        t = {
            name: (distribute_tensor(v, mesh, [placements[name]]) if shard else v.clone()).requires_grad_(
                train and name not in frozen
            )
            for name, v in tensors.items()
        }
        with CommDebugMode() as forward:
            y = op(*t.values(), *args)
        if train:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            like_y = distribute_tensor(dy, mesh, [to] if to else y.placements) if shard else dy
            with CommDebugMode() as backward:
                y.backward(like_y)
        full = lambda v, shard=shard: v.full_tensor() if shard else v
        grads = {name: full(v.grad) for name, v in t.items() if v.requires_grad} if train else {}
        results.append((full(y).detach(), grads))
    (want, want_grads), (got, grads) = results
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for name, grad in want_grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    return y.placements, forward.get_total_counts(), backward.get_total_counts() if train else 0


def folds(rank):
    for type, dim in itertools.product(TYPES, (0, 1)):
        h = "h6" if type == 6 else "h"
        assert parallel(ops.mora_compress, {"x": SHARD(dim)}, R, type) == ((SHARD(dim),), 0, 0)
        assert parallel(ops.mora_decompress, {h: SHARD(dim)}, O, type) == ((SHARD(dim),), 0, 0)
    for type, dim in itertools.product((1, 6), (-1, -2)):  # a side that no rule splits is gathered first
        parallel(ops.mora_compress, {"x": SHARD(2)}, R, type)
        parallel(ops.mora_decompress, {"h6" if type == 6 else "h": SHARD(dim % (4 if type == 6 else 3))}, O, type)


def add(rank):
    for type, dim in itertools.product(TYPES, (0, 1)):
        by_tokens = {"y": SHARD(dim), "x": SHARD(dim), "m": WHOLE}
        assert parallel(ops.mora_add, by_tokens, type) == (
            (SHARD(dim),),
            0,
            0,
        )  # dM stays in parts until it is asked for
    for y, x, m in itertools.product((WHOLE, SHARD(0), SHARD(2)), (WHOLE, SHARD(1), SHARD(2)), (WHOLE, SHARD(0))):
        parallel(ops.mora_add, {"y": y, "x": x, "m": m}, 1)


def linear(rank):
    places = lambda x: {"x": x, "weight": WHOLE, "bias": WHOLE, "m": WHOLE}
    for type, dim in itertools.product(TYPES, (0, 1)):
        assert parallel(ops.mora_linear, places(SHARD(dim)), type, train=False)[:2] == ((SHARD(dim),), 0)
        placed, *sent = parallel(ops.mora_linear, places(SHARD(dim)), type)
        if dim == 0:
            assert (placed, sent) == ((SHARD(0),), [0, 0])
        for to, frozen in itertools.product((WHOLE, SHARD(0), SHARD(1), SHARD(2)), ((), ("weight", "bias"))):
            parallel(ops.mora_linear, places(SHARD(dim)), type, to=to, frozen=frozen)  # what was saved may go elsewhere
    for x, w, m in itertools.product(
        (WHOLE, SHARD(0), SHARD(1), SHARD(2)), (WHOLE, SHARD(0), SHARD(1)), (WHOLE, SHARD(1))
    ):
        parallel(ops.mora_linear, {"x": x, "weight": w, "bias": WHOLE, "m": m}, 1)


def uneven(rank):
    """Three rows on two ranks: what has all leading dimensions as one would lie elsewhere than it says."""
    for type in (1, 6):
        for to in (None, WHOLE, SHARD(0), SHARD(1), SHARD(2)):
            by_tokens = {"x": SHARD(0), "weight": WHOLE, "bias": WHOLE, "m": WHOLE}
            parallel(ops.mora_linear, by_tokens, type, to=to, frozen=("weight", "bias"), x=(3, 5, I))
        by_tokens = {"y": SHARD(0), "x": SHARD(0), "m": WHOLE}
        assert parallel(ops.mora_add, by_tokens, type, x=(3, 5, I), y=(3, 5, O))[1] == 0


if __name__ == "__main__":
    two_processes.main({f.__name__: f for f in (folds, add, linear, uneven)})
