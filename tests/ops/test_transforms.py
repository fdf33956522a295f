# SPDX-License-Identifier: Apache-2.0
"""torch.func over ops: each transform is equal to a loop of single calls of the kernels, or refused by the op's name."""

import pytest
import torch
from op_checks import is_float
from torch.func import grad, jacrev, vjp, vmap

import lrkern.ops
from lrkern.reference import OPS

EACH = 3
WAYS = {"wrapper": lambda name: getattr(lrkern.ops, name), "direct": lambda name: getattr(torch.ops.lrkern, name)}
SOME = (
    "odd",
    "dropout",
    "dropout_slots_fp32_pitch",
    "fp32_factors",
    "experts",
    "mixed_slots",
    "turned_padded",
    "rank_0",
    "no_tokens",
)
SAMPLES = [(op, s.name) for op in OPS.values() for s in op.samples("cpu", torch.float32) if s.name in SOME]
every_sample = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op.name}-{name}" for op, name in SAMPLES])
DIFFERENTIABLE = [(op, name) for op, name in SAMPLES if op.differentiable]
differentiable_sample = pytest.mark.parametrize(
    ("op", "name"), DIFFERENTIABLE, ids=[f"{op.name}-{name}" for op, name in DIFFERENTIABLE]
)


def close(got, want):
    torch.testing.assert_close(
        got, want, rtol=1e-4, atol=1e-4 * max([1e-3, *want.abs().flatten().tolist()]), equal_nan=True
    )


def drawn(op, name):
    """The sample, and its differentiable arguments once more for each of a batch; where they stand."""
    s, g = op.sample(name, "cpu", torch.float32), torch.Generator().manual_seed(3)
    at = [
        i for i, (n, a) in enumerate(zip(op.parameters, s.args, strict=False)) if n in op.differentiable and is_float(a)
    ]
    args = [
        torch.stack([a + 0.1 * torch.randn(a.shape, generator=g) for _ in range(EACH)]) if i in at else a
        for i, a in enumerate(s.args)
    ]
    return s, args, tuple(at)


def one(args, at, b):
    return [a[b].clone() if i in at else a for i, a in enumerate(args)]


def loss_of(fn, s):
    return lambda *args: fn(*args, **s.kwargs).cos().sum()


def gradients(loss, args, at, b):
    """Of one of the batch by autograd, and so by the kernels."""
    mine = [a.requires_grad_() if i in at else a for i, a in enumerate(one(args, at, b))]
    return torch.autograd.grad(loss(*mine), [mine[i] for i in at])


@differentiable_sample
@pytest.mark.parametrize("way", sorted(WAYS))
def test_gradients_of_each_sample(op, name, way):
    s, args, at = drawn(op, name)
    loss = loss_of(WAYS[way](op.name), s)
    got = vmap(grad(loss, at), tuple(0 if i in at else None for i in range(len(args))))(*args)
    for b in range(EACH):
        for g, want in zip(got, gradients(loss, args, at, b), strict=True):
            close(g[b], want)


@differentiable_sample
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_a_batch_without_gradients(op, name, recorded):
    s, args, at = drawn(op, name)
    for way in WAYS.values():
        fn = lambda *args, way=way: way(op.name)(*args, **s.kwargs)
        with torch.set_grad_enabled(recorded):
            got = vmap(fn, tuple(0 if i in at else None for i in range(len(args))))(*args)
        for b in range(EACH):
            close(got[b], fn(*one(args, at, b)))


@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.differentiable], ids=lambda op: op.name)
def test_a_batch_of_ops_without_gradients(op):
    """In place, or of integers: over their first tensor."""
    s = op.sample("odd", "cpu", torch.float32)
    i = next(i for i, a in enumerate(s.args) if isinstance(a, torch.Tensor))

    def call(t):
        args = [*s.args[:i], t.clone(), *s.args[i + 1 :]]
        out = getattr(lrkern.ops, op.name)(*args, **s.kwargs)
        out = args[i] if op.mutates else out
        return tuple(t for t in out if t is not None) if isinstance(out, tuple) else (out,)

    batch = torch.stack([s.args[i], s.args[i].flip(0)])
    if op.name == "multi_lora_plan":  # its numbers decide what is where
        with pytest.raises(
            RuntimeError, match="lrkern::multi_lora_plan: index must be the same for all samples of vmap"
        ):
            vmap(call)(batch)
        return
    got = vmap(call)(batch)
    for b, t in enumerate(batch):
        for g, want in zip(got, call(t), strict=True):
            close(g[b].float(), want.float())


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name)
def test_vjp_jacrev_and_second_derivatives(op):
    """The second ones, which autograd has of few ops, are those of the expression."""
    s, args, at = drawn(op, "odd")
    args = one(args, at, 0)
    leaves = [args[i] for i in at]

    def of(function):
        def call(*leaves):
            given = dict(zip(at, leaves, strict=True))
            return function(*(given.get(i, a) for i, a in enumerate(args)), **s.kwargs)

        return call

    fn = of(getattr(lrkern.ops, op.name))
    y, back = vjp(fn, *leaves)
    dy, mine = torch.randn(y.shape), [t.clone().requires_grad_() for t in leaves]
    for got, want in zip(back(dy), torch.autograd.grad(fn(*mine), mine, dy), strict=True):
        close(got, want)
    some = lambda t: fn(t, *leaves[1:]).flatten()[:4]
    close(jacrev(some)(leaves[0]), torch.autograd.functional.jacobian(some, leaves[0]))

    def slope(function):
        first = grad(lambda *leaves: of(function)(*leaves).cos().sum(), tuple(range(len(at))))
        return lambda *leaves: sum(g.square().sum() for g in first(*leaves))

    every = tuple(range(len(at)))
    second, truth = (grad(slope(f), every)(*leaves) for f in (getattr(lrkern.ops, op.name), op.truth))
    for got, want in zip(second, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1e-3, want.abs().max().item()))


def test_a_seed_may_be_each_samples_own():
    """One mask is a seed's: the same for all samples, or each its own."""
    x, a = torch.randn(3, 5, 40), torch.randn(4, 40)
    call = lambda x, seed: lrkern.ops.lora_shrink(x, a, 1.0, 0.5, seed)
    seeds = torch.tensor([[7], [8], [9]])
    for dims, of in (((0, None), lambda b: seeds[0]), ((0, 0), lambda b: seeds[b])):
        got = vmap(call, dims)(x, seeds[0] if dims[1] is None else seeds)
        for b in range(3):
            close(got[b], call(x[b], of(b)))


def test_metadata_of_a_batch_is_refused_by_name():
    table = torch.zeros(2, 1, 1, dtype=torch.int32)
    index = torch.tensor([[0, 1, 0], [1, 1, -1]]).int()
    plans = torch.stack([lrkern.ops.multi_lora_plan(i, 2) for i in index])
    pool, ranks = torch.randn(16, 8), torch.full((2, 1), 4, dtype=torch.int32)
    call = lambda x, plan: lrkern.ops.multi_lora_shrink(x, pool, table, ranks, plan)
    with pytest.raises(RuntimeError, match="lrkern::multi_lora_shrink: plan must be the same for all samples of vmap"):
        vmap(call)(torch.randn(2, 3, 8), plans)
