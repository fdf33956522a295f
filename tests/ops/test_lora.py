# SPDX-License-Identifier: Apache-2.0
"""LoRA's ops beyond the registry's samples. What PyTorch users do around them: compile, export, checkpoint, autocast, dropout as
nn.Dropout, hooks, sharing. Invariances of rows, the mask's bits, many rows, memory between them."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lrkern.functional as F
import lrkern.ops
from lrkern import reference, testing
from lrkern.nn import FusedLoRALinear
from lrkern.ops.dispatch import library
from lrkern.reference import Draw
from tests.conftest import enter_device

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
    module = FusedLoRALinear(I, O, r=R, dropout=0.5, init="gaussian")
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
    net = FusedLoRALinear(I, O, r=R, dropout=p, init="gaussian")
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
    assert y.dtype == dtype and s.dtype == (torch.float32 if dtype == torch.float16 else dtype)
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


# ---------------------------------------------------------------------------------------------------- autograd


def test_one_gradient_alone_may_be_recorded():
    x, a = torch.randn(5, 8), torch.randn(3, 8, requires_grad=True)
    (da,) = torch.autograd.grad(lrkern.ops.lora_shrink(x, a).sum(), a, create_graph=True)
    torch.testing.assert_close(da.detach(), x.sum(0).expand(3, 8))
    with pytest.raises(RuntimeError, match="lrkern::lora_shrink: double backward is not supported"):
        da.sum().backward()


@pytest.mark.parametrize(
    "name",
    ["lora_shrink_bwd", "linear_expand_bwd", "lora_linear_bwd", "lora_linear_fwd", "lora_add_bwd", "lora_add_fwd"],
)
def test_inner_ops_refuse_to_lose_a_gradient(name):
    draw = lambda *s: torch.randn(*s, requires_grad=True)
    x, w, a, b, s, dy = draw(3, 8), draw(5, 8), draw(2, 8), draw(5, 2), draw(3, 2), draw(3, 5)
    args = {
        "lora_shrink_bwd": (s, x, a, 1.0, 0.0, None, True, True),
        "linear_expand_bwd": (dy, x, w, s, b, 1.0, True, True, True, True, True),
        "lora_linear_bwd": (dy, x, w, a, b, s, 1.0, 0.0, None, None, None, True, True, True, True, True, False),
        "lora_linear_fwd": (x, w, None, a, b),
        "lora_add_bwd": (dy, x, a, b, s, 1.0, 0.0, None, True, True, True),
        "lora_add_fwd": (dy, x, a, b),
    }[name]
    with pytest.raises(RuntimeError, match=f"lrkern::{name}: "):
        getattr(torch.ops.lrkern, name)(*args)


def test_writing_in_place_is_seen_by_autograd():
    y, s, b = torch.randn(4, 8), torch.randn(4, 2), torch.randn(8, 2)
    w = torch.randn(4, 8, requires_grad=True)
    out = (y * w).sum()  # keeps y
    lrkern.ops.lora_expand_(y, s, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with torch.inference_mode():  # no versions there
        lrkern.ops.lora_expand_(torch.randn(4, 8), s, b)


def test_saves_x_s_and_seed_only():
    """Beyond parameters: x, S [T, R], the seed [1]. No mask, no dropped copy of x, nothing of y's size."""
    x, w = torch.randn(50, 64, requires_grad=True), torch.randn(48, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lrkern.ops.lora_linear(x, w, None, a, b, 1.0, 0.1, torch.tensor([3]))
    own = [t for t in saved if t.data_ptr() not in {p.data_ptr() for p in (x, w, a, b)}]
    assert sorted(tuple(t.shape) for t in own) == [(1,), (50, 4)]


# ---------------------------------------------------------------------------------------------------- rows and devices


def test_a_row_does_not_depend_on_its_batch(device, dtype):
    """The adapter part is batch-invariant: a row alone and inside any batch give the same bits."""
    draw = Draw(device, dtype)
    x, a, b, y = draw(200, 1100), draw(24, 1100), draw(600, 24), draw(200, 600)
    s = lrkern.ops.lora_shrink(x, a, 0.5)
    full = y.clone()
    lrkern.ops.lora_expand_(full, s, b)
    for lo, hi in ((0, 1), (17, 18), (60, 70), (100, 190)):
        part = lrkern.ops.lora_shrink(x[lo:hi], a, 0.5)
        assert torch.equal(part, s[lo:hi]), (lo, hi)
        row = y[lo:hi].clone()
        lrkern.ops.lora_expand_(row, part, b)
        assert torch.equal(row, full[lo:hi]), (lo, hi)


def test_a_row_has_the_same_bits_in_a_batch_of_thousands(device):
    """On CUDA blocks walk more chunks of I in a large batch than in a small one: one, a group of four, several groups."""
    draw = Draw(device, torch.bfloat16)
    for T, I in ((8200, 300), (8200, 1100), (12800, 2100)):
        x, a = draw(T, I), draw(4, I)
        s = lrkern.ops.lora_shrink(x, a)
        for lo, hi in ((0, 1), (T - 10, T)):
            assert torch.equal(lrkern.ops.lora_shrink(x[lo:hi], a), s[lo:hi])


def test_gradients_of_factors_over_thousands_of_tokens(device):
    """Beyond 16 segments of tokens the segments grow instead: the last one is short, and 8201 is a multiple of nothing."""
    draw = Draw(device, torch.float32)
    x, dy = draw(8201, 40), draw(8201, 24)
    a, b, s = (draw(*shape).requires_grad_() for shape in ((3, 40), (24, 3), (8201, 3)))
    (da,) = torch.autograd.grad(lrkern.ops.lora_shrink(x, a), a, s.detach())
    ds, db = torch.autograd.grad(lrkern.ops.linear_expand(None, None, None, s, b), (s, b), dy)
    for got, truth in (
        (da, s.detach().double().T @ x.double()),
        (db, dy.double().T @ s.detach().double()),
        (ds, dy.double() @ b.detach().double()),
    ):
        assert (got - truth).norm() <= 1e-6 * truth.norm()


def test_rank_0_is_the_base_layer(device, dtype):
    draw = Draw(device, dtype)
    x, w, bias = draw(5, 33), draw(9, 33), draw(9)
    y = lrkern.ops.lora_linear(x, w, bias, x.new_empty(0, 33), x.new_empty(9, 0))
    assert torch.equal(y, torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize("sizes", [(9,), (1, 9), (20, 9), (2, 5, 9), (2, 3, 2, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("layout", ["whole", "part of a larger one", "transposed"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_base_product_has_the_bits_of_torchs_linear(sizes, layout, with_bias, device, dtype):
    """Wherever its operands lie in their storage."""
    draw = Draw(device, dtype)
    bias = draw(30)[7:18] if with_bias else None
    if layout == "transposed":
        x, w = draw(*sizes[:-1][::-1], 9).permute(*range(len(sizes) - 1)[::-1], len(sizes) - 1), draw(9, 11).mT
    elif layout == "whole":
        x, w = draw(*sizes), draw(11, 9)
    else:
        x, w = draw(3, *sizes)[1], draw(24, 9)[5:16]
    with torch.no_grad():
        y = lrkern.ops.lora_linear(x, w, bias, draw(4, 9), torch.zeros(11, 4, dtype=dtype, device=x.device), 0.5)
        assert torch.equal(y, torch.nn.functional.linear(x, w, bias))


def test_what_lies_between_rows_is_neither_read_nor_written(device, dtype):
    draw = Draw(device, dtype)
    y = draw(20, 40, pitch=64)
    wide = y.as_strided((20, 64), (64, 1))
    s, b = draw(20, 3), draw(40, 3)
    lrkern.ops.lora_expand_(y, s, b)
    assert y.isfinite().all() and wide[:, 40:].isnan().all()
    assert lrkern.ops.lora_shrink(y, draw(5, 40)).isfinite().all()


def test_nan_and_inf_stay_in_their_rows(device, dtype):
    draw = Draw(device, dtype)
    x, a = draw(130, 300), draw(8, 300)
    clean = lrkern.ops.lora_shrink(x, a)
    x[7, 5], x[66, 0] = float("nan"), float("inf")
    s = lrkern.ops.lora_shrink(x, a)
    dirty = torch.tensor([7, 66], device=device)
    keep = torch.ones(130, dtype=torch.bool, device=device)
    keep[dirty] = False
    assert torch.equal(s[keep], clean[keep])
    assert not s[dirty].isfinite().any()


def test_a_dropped_nan_is_dropped(device, dtype):
    x, a = (t.to(device, dtype) for t in (torch.full((40, 64), float("nan")), torch.eye(64)))
    seed = torch.tensor([5], device=device)
    kept = lrkern.ops.lora_shrink(torch.ones_like(x), a, 1.0, 0.5, seed) != 0
    rows = lrkern.ops.lora_shrink(x, torch.ones(1, 64, device=device, dtype=dtype), 1.0, 0.99, seed)
    none_kept = (lrkern.ops.lora_shrink(torch.ones_like(x), a, 1.0, 0.99, seed) == 0).all(1)
    assert 0.4 < kept.double().mean() < 0.6 and 0 < none_kept.sum() < 40
    assert torch.equal(rows[:, 0] == 0, none_kept)


@pytest.mark.parametrize(
    ("rows", "cols", "p", "seed"),
    [(1, 8, 0.5, 0), (7, 13, 0.3, 1), (130, 264, 0.1, 2**62 + 12345), (70, 300, 0.9, 2**63 - 1), (512, 65, 2**-16, 77)],
)
def test_dropout_bits(rows, cols, p, seed, device, dtype):
    """Each kernel's mask, read off through identity factors, is the written stream of rng.h."""
    seed = torch.tensor([seed])
    keep = (reference.dropout_multiplier(rows, cols, p, seed) != 0).cpu()
    make = lambda *shape: torch.ones(*shape, dtype=dtype, device=device)
    eye = lambda n: torch.eye(n, dtype=dtype, device=device)
    seed = seed.to(device)

    x = make(rows, cols)
    shrink = lrkern.ops.lora_shrink(x, eye(cols), 1.0, p, seed)
    assert torch.equal(shrink.cpu() != 0, keep)

    a = make(1, cols).requires_grad_()
    (dx,) = torch.autograd.grad(lrkern.ops.lora_shrink(x.requires_grad_(), a, 1.0, p, seed), x, make(rows, 1))
    assert torch.equal(dx.cpu() != 0, keep), "expand"

    a = make(rows, cols).requires_grad_()
    (da,) = torch.autograd.grad(lrkern.ops.lora_shrink(x, a, 1.0, p, seed), a, eye(rows))
    assert torch.equal(da.cpu() != 0, keep), "wgrad"


def test_threads_do_not_change_bits(dtype):
    x = torch.randn(300, 1100).to(dtype)
    a, b = torch.randn(20, 1100), torch.randn(700, 20)
    dy = torch.randn(300, 700).to(dtype)

    def adapter_part():
        s = torch.ops.lrkern.lora_shrink(x, a, 1.0, 0.1, torch.tensor([1]))
        y = torch.zeros(300, 700).to(dtype)
        lrkern.ops.lora_expand_(y, s, b)
        grads = torch.ops.lrkern.linear_expand_bwd(dy, None, None, s, b, 1.0, False, False, False, True, True)
        return [s, y, *grads[3:], *torch.ops.lrkern.lora_shrink_bwd(grads[3], x, a, 1.0, 0.0, None, True, True)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = adapter_part()
        torch.set_num_threads(3)
        three = adapter_part()
    finally:
        torch.set_num_threads(before)
    for i, (p, q) in enumerate(zip(one, three, strict=True)):
        assert torch.equal(p, q), i


def test_poison_reaches_the_allocations_of_ops(device):
    x, a = torch.randn(8, 600, device=device), torch.randn(4, 600, device=device)
    with testing.poisoned(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        library().lora_shrink(x, a)
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["aten::fill_"] == count["aten::empty"] >= 1
    with testing.poisoned():
        assert torch.empty(1000, device=device).isnan().all()
        assert torch.empty(1000, device=device, dtype=torch.uint8).min() == 255  # scratch is bytes: NaN again


@pytest.mark.parametrize("other", ["cpu", "cuda:1"], ids="cuda:0 {}".format)
def test_devices_do_not_mix(other, stack):
    enter_device("cuda", stack)
    if other == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, a = torch.randn(4, 16, device="cuda:0"), torch.randn(2, 16, device=other)
    with pytest.raises(RuntimeError, match="lrkern::lora_shrink: all tensors must be on one device"):
        lrkern.ops.lora_shrink(x, a)


@pytest.mark.parametrize("kind", ["cuda"])
def test_more_than_2_31_elements(kind, stack):
    enter_device(kind, stack)
    T, N, R = (1 << 21) + 70, 1024, 4
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB free")
    x = torch.randn(T, N, device="cuda", dtype=torch.bfloat16)
    a, b = torch.randn(R, N, device="cuda").bfloat16(), torch.randn(N, R, device="cuda").bfloat16()
    ends = [slice(0, 5), slice(T // 2, T // 2 + 5), slice(T - 5, T)]
    s = lrkern.ops.lora_shrink(x, a)
    for rows in ends:
        assert torch.equal(s[rows], lrkern.ops.lora_shrink(x[rows], a))
        x[rows] = 0
    lrkern.ops.lora_expand_(x, s, b)
    for rows in ends:
        alone = torch.zeros_like(x[rows])
        lrkern.ops.lora_expand_(alone, s[rows], b)
        assert torch.equal(x[rows], alone)
