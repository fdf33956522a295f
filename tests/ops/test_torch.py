# SPDX-License-Identifier: Apache-2.0
"""What PyTorch users do around an op: compile, export, checkpoint, autocast, dropout as nn.Dropout, hooks, sharing."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lrkern.functional as F
import lrkern.ops
from lrkern.nn import FusedLoRALinear

I, O, R = 48, 40, 6


def tensors(dtype=torch.float32, t=9):
    x, w, bias = torch.randn(t, I), torch.randn(O, I), torch.randn(O)
    a, b = torch.randn(R, I), torch.randn(O, R)
    return [v.to(dtype) for v in (x, w, bias, a, b)]


def lora(x, w, bias, a, b):
    return lrkern.ops.lora_linear(x, w, bias, a, b, 0.5)


def composed(x, w, bias, a, b):
    s = lrkern.ops.lora_shrink(x, a, 0.5)
    return lrkern.ops.linear_expand(x, w, bias, torch.tanh(s), b)  # torch ops between the two primitives


@pytest.mark.slow
@pytest.mark.parametrize("fn", [lora, composed])
def test_compile_fullgraph_dynamic(fn):
    torch._dynamo.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(fn, backend=compiles, fullgraph=True, dynamic=True)
    counts = set()
    for t in (9, 4, 17):
        args = [v.requires_grad_() for v in tensors(t=t)]
        eager, got = fn(*args), compiled(*args)
        torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
        g = torch.randn_like(eager)
        for p, q in zip(torch.autograd.grad(got, args, g), torch.autograd.grad(eager, args, g), strict=True):
            torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
        counts.add(compiles.frame_count)
    assert len(counts) == 1, "one graph for every number of tokens"


@pytest.mark.slow
def test_compile_with_dropout_follows_the_seed():
    torch._dynamo.reset()
    x, w, bias, a, b = tensors()
    compiled = torch.compile(lambda x, seed: lrkern.ops.lora_linear(x, w, bias, a, b, 1.0, 0.5, seed), fullgraph=True)
    for n in (1, 2):
        seed = torch.tensor([n])
        torch.testing.assert_close(compiled(x, seed), lrkern.ops.lora_linear(x, w, bias, a, b, 1.0, 0.5, seed))
    module = FusedLoRALinear(I, O, r=R, lora_dropout=0.5, init="gaussian")
    torch.nn.init.normal_(module.lora_B.weight)
    fast = torch.compile(module, fullgraph=True)
    assert not torch.equal(fast(x), fast(x)), "two calls draw two masks"


def test_compile_of_the_in_place_op():
    torch._dynamo.reset()

    def f(x, s, b):
        y = x.relu()
        lrkern.ops.lora_expand_(y, s, b, 2.0)
        return y * 2

    args = torch.randn(5, O), torch.randn(5, R), torch.randn(O, R)
    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(*args), f(*args))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = FusedLoRALinear(I, O, r=R, init="gaussian")
        torch.nn.init.normal_(self.inner.lora_B.weight)

    def forward(self, x):
        return self.inner(x).relu()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    net, x = Net(), torch.randn(2, 3, I)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("t")},), strict=strict)
    ours = [n for n in program.graph.nodes if "lrkern" in str(n.target)]
    assert len(ours) == 1
    y = torch.randn(5, 3, I)
    torch.testing.assert_close(program.module()(y), net(y))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_activation_checkpointing(p):
    net = FusedLoRALinear(I, O, r=R, lora_dropout=p, init="gaussian")
    torch.nn.init.normal_(net.lora_B.weight)
    x = torch.randn(7, I, requires_grad=True)

    def grads(f):
        torch.manual_seed(3)
        return torch.autograd.grad(f(x).square().sum(), (x, net.lora_A.weight, net.lora_B.weight))

    for p_, q in zip(grads(net), grads(lambda v: checkpoint(net, v, use_reentrant=False)), strict=True):
        assert torch.equal(p_, q)


def test_selective_checkpointing_sees_the_op():
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "lrkern" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    net, x = Net(), torch.randn(4, I, requires_grad=True)
    checkpoint(
        net, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    ).sum().backward()
    assert "lrkern.lora_linear_fwd.default" in seen
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(dtype):
    x, w, bias, a, b = tensors()
    a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = lora(x, w, bias, a, b)
        s = lrkern.ops.lora_shrink(x, a)
    assert y.dtype == s.dtype == dtype
    expected = lora(*(v.to(dtype) for v in (x, w, bias, a, b)))
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert a.grad.dtype == torch.float32 and b.grad.dtype == torch.float32
    assert torch.ops.lrkern.lora_linear(x, w, bias, a, b).dtype == torch.float32, "autocast is off again"


def test_dropout_behaves_as_nn_dropout():
    x, w, bias, a, b = tensors()

    def call(training=True):
        return F.lora_linear(x, w, bias, a, b, 1.0, 0.5, training)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first) and torch.equal(call(), second) and not torch.equal(first, second)
    assert torch.equal(call(training=False), lrkern.ops.lora_linear(x, w, bias, a, b))
    assert torch.equal(F.lora_linear(x, w, bias, a, b, 1.0, 1.0), torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_expectation(p):
    """Per element and per row: kept with probability 1 - p, scaled by its inverse. Columns are read through A = I."""
    n, eye = 4096, torch.eye(256)
    x = torch.ones(n, 256)
    s = lrkern.ops.lora_shrink(x, eye, 1.0, p, torch.tensor([12345]))
    kept = s != 0
    torch.testing.assert_close(s[kept], torch.full_like(s[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma / math.sqrt(kept.numel())
    assert (kept.double().mean(0) - (1 - p)).abs().max() < 6 * sigma / math.sqrt(n)
    assert (kept.double().mean(1) - (1 - p)).abs().max() < 6 * sigma / math.sqrt(256)
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean().item()  # neighbours are independent
    assert abs(pairs - (1 - p) ** 2) < 5 * sigma / math.sqrt(kept.numel())


def test_the_mask_is_one_mask_in_forward_and_backward():
    """dA = dS^T D(x) and dx = D(dS A) with the forward's own mask, read off with indicator factors."""
    x = torch.ones(64, 40, requires_grad=True)
    eye = torch.eye(40, requires_grad=True)
    seed = torch.tensor([77])
    s = lrkern.ops.lora_shrink(x, eye, 1.0, 0.3, seed)
    mask = s.detach()
    dx, da = torch.autograd.grad(s, (x, eye), torch.ones_like(s))
    ones = torch.ones(40, 40)
    torch.testing.assert_close(dx, mask, rtol=1e-6, atol=0)
    torch.testing.assert_close(da, ones * mask.sum(0), rtol=1e-5, atol=1e-5)
    fused = lrkern.ops.lora_linear(x, torch.zeros(40, 40), None, eye, torch.eye(40), 1.0, 0.3, seed)
    torch.testing.assert_close(fused, mask, rtol=1e-6, atol=0)


def test_under_inference_mode_and_no_grad():
    args = [v.requires_grad_() for v in tensors()]
    expected = lora(*args).detach()
    with torch.no_grad():
        assert torch.equal(lora(*args), expected)
        assert torch.equal(torch.ops.lrkern.lora_linear(*args, 0.5), expected)
    with torch.inference_mode():
        assert torch.equal(lora(*args), expected)


def test_expanded_and_transposed_gradients():
    """y.sum() gives an expanded dy (stride 0), a transposed consumer one with columns first."""
    args = [v.requires_grad_() for v in tensors()]
    ref = [v.detach().clone().requires_grad_() for v in args]
    for f in (lambda y: y.sum(), lambda y: (y.T.contiguous() * torch.arange(y.shape[0])).sum()):
        got = torch.autograd.grad(f(lora(*args)), args)
        x, w, bias, a, b = ref
        want = torch.autograd.grad(f(torch.nn.functional.linear(x, w, bias) + 0.5 * (x @ a.T) @ b.T), ref)
        for p, q in zip(got, want, strict=True):
            torch.testing.assert_close(p, q, atol=2e-3, rtol=1e-4)
