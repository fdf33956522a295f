# SPDX-License-Identifier: Apache-2.0
"""S2FT's ops beyond the registry: slices beside the dense gradient, W written in place, rows that are wrong, adjoints."""

import pytest
import torch

import lrkern.ops
from lrkern import testing

SIZES = [1, 15, 16, 64, "all", 0]


def drawn(I, O, s, dim, dtype, device, lead=(7,)):
    g = torch.Generator().manual_seed(I + 3 * O + s + dim)
    x, w, bias = (
        torch.randn(*lead, I, generator=g),
        torch.randn(O, I, generator=g) * I**-0.5,
        torch.randn(O, generator=g),
    )
    index = torch.randperm((O, I)[dim], generator=g)[:s].sort().values.int()
    dy = torch.randn(*lead, O, generator=g)
    return *(t.to(device, dtype) for t in (x, w, bias)), index.to(device), dy.to(device, dtype)


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)], ids=str)
def test_the_gradient_is_the_slice_of_the_dense_one(device, dtype, s, dim, lead):
    I, O = 96, 72
    x, w, bias, index, dy = drawn(I, O, (O, I)[dim] if s == "all" else s, dim, dtype, device, lead)
    slice = w.index_select(dim, index.long()).requires_grad_()
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    y = lrkern.ops.slice_linear(leaves[0], w.clone(), leaves[1], slice, index, dim)
    y.backward(dy)
    dense = [t.double().requires_grad_() for t in (x, w, bias)]
    torch.nn.functional.linear(*dense).backward(dy.double())
    plain = [t.clone().requires_grad_() for t in (x, w, bias)]
    torch.nn.functional.linear(*plain).backward(dy)
    cut = lambda t: t.grad.index_select(dim, index.long())
    testing.check(slice.grad, cut(dense[1]), cut(plain[1]), "dslice")
    testing.check(leaves[0].grad, dense[0].grad, plain[0].grad, "dx")
    testing.check(leaves[1].grad, dense[2].grad, plain[2].grad, "dbias")


@pytest.mark.parametrize("dim", [0, 1])
def test_the_slice_is_written_into_w_and_nothing_else_is(device, dtype, dim):
    x, w, bias, index, _ = drawn(64, 48, 9, dim, dtype, device)
    slice = torch.randn(w.index_select(dim, index.long()).shape).to(device, torch.float32)
    want = w.index_copy(dim, index.long(), slice.to(dtype))
    for layout in (w.clone(), w.t().contiguous().t(), torch.full((48, 70), 7.0).to(w)[:, :64].copy_(w)):
        y = lrkern.ops.slice_linear(x, layout, bias, slice, index, dim)
        assert torch.equal(layout, want)
        testing.check(y, x.double() @ want.double().T + bias.double(), torch.nn.functional.linear(x, want, bias), "y")


def test_backward_is_of_the_w_of_its_own_forward(device):
    """Another forward between the two wrote another slice, or FSDP gathered W from its shards again."""
    x, w, _, index, dy = drawn(40, 24, 6, 1, torch.float32, device)
    one, other = (torch.randn(24, 6).to(device).requires_grad_() for _ in range(2))
    want = dy @ w.index_copy(1, index.long(), one.detach())
    x.requires_grad_()
    y = lrkern.ops.slice_linear(x, w, None, one, index)
    lrkern.ops.slice_linear(x, w, None, other, index)
    y.backward(dy)
    torch.testing.assert_close(x.grad, want)
    y = lrkern.ops.slice_linear(x, w, None, one, index)
    with torch.no_grad():
        one += 1  # a step between forward and backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("dim", [0, 1])
def test_only_the_slice_of_the_activation_is_saved(device, dim):
    x, w, bias, index, _ = drawn(256, 128, 16, dim, torch.float32, device, (64,))
    slice = w.index_select(dim, index.long()).requires_grad_()
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lrkern.ops.slice_linear(x, w, bias, slice, index, dim)
    own = [t for t in saved if t.data_ptr() not in (w.data_ptr(), slice.data_ptr(), index.data_ptr())]
    assert [list(t.shape) for t in own] == [[64, 16] if dim == 1 else [64, 256]]
    saved.clear()  # a frozen slice saves nothing of the activation
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        lrkern.ops.slice_linear(x, w, bias, slice.detach(), index, 0) if dim == 0 else None
    assert torch.Size([64, 256]) not in saved


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_gather_and_scatter_are_adjoint(device, slots, scaled):
    g, T, N, s, A = torch.Generator().manual_seed(5), 33, 50, 7, 4
    index = torch.stack([torch.randperm(N, generator=g)[:s].sort().values for _ in range(A)]).int()
    index[2, 5:] = -1
    shape = (T,) if slots == 1 else (T, slots)
    ids = torch.randint(-1, A, shape, generator=g).int().to(device) if slots else None
    scales = torch.randn(shape, generator=g).to(device) if slots and scaled else None
    x, h = torch.randn(T, N, generator=g), torch.randn(*(shape if slots else (T,)), s, generator=g)
    x, h, index = x.to(device), h.to(device), (index if slots else index[0]).to(device)
    down = (lrkern.ops.slice_gather(x, index, ids, scales).double() * h.double()).sum()
    up = (lrkern.ops.scatter_add(torch.zeros_like(x), h, index, ids, scales).double() * x.double()).sum()
    torch.testing.assert_close(down, up, rtol=1e-6, atol=1e-5)


def test_rows_of_a_batch_use_different_slices(device, dtype):
    """Each row equals its own adapter's product alone, and a row without one is the base's, bit for bit."""
    g, T, I, O, A, s = torch.Generator().manual_seed(9), 21, 64, 40, 3, 20
    x, y, d = (torch.randn(*n, generator=g).to(device, dtype) for n in ((T, I), (T, O), (A, s, O)))
    index = torch.stack([torch.randperm(I, generator=g)[:s].sort().values for _ in range(A)]).int().to(device)
    ids = (torch.arange(T) % (A + 1) - 1).int().to(device)
    got = lrkern.ops.gather_matmul(y, x, d, index, ids)
    assert torch.equal(got[ids < 0], y[ids < 0])
    for a in range(A):
        mine = ids == a
        alone = lrkern.ops.gather_matmul(y[mine], x[mine], d[a].contiguous(), index[a].contiguous())
        picked = x[mine].double()[:, index[a].long()]
        truth = y[mine].double() + picked @ d[a].double()
        same = y[mine] + (x[mine][:, index[a].long()] @ d[a])
        for each in (got[mine], alone):
            testing.check(each, truth, same, f"adapter {a}")


def test_more_columns_than_a_kernel_takes_at_once(device):
    x, y, d = torch.randn(5, 1100), torch.randn(5, 24), torch.randn(1050, 24) * 0.03
    index = torch.randperm(1100)[:1050].sort().values.int()
    x, y, d, index = (t.to(device) for t in (x, y, d, index))
    leaves = [t.clone().requires_grad_() for t in (y, x, d)]
    lrkern.ops.gather_matmul(*leaves, index).square().sum().backward()
    truth = [t.double().requires_grad_() for t in (y, x, d)]
    out = truth[0] + truth[1][:, index.long()] @ truth[2]
    out.square().sum().backward()
    for a, b in zip(leaves, truth, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
    ids = torch.zeros(5, dtype=torch.int32).to(device)
    with pytest.raises(
        RuntimeError, match="gather_matmul: d must have at most 512 columns where rows have ids, got 1050"
    ):
        lrkern.ops.gather_matmul(y, x, d[None], index[None], ids)


def test_a_column_that_several_slots_have_is_rounded_once(device):
    y = torch.tensor([[256.0, 1.0]]).to(device, torch.bfloat16)
    h = torch.tensor([[[0.75], [0.75]]]).to(device, torch.bfloat16)
    index, ids = torch.tensor([[0], [0]]).int().to(device), torch.tensor([[0, 1]]).int().to(device)
    assert lrkern.ops.scatter_add(y, h, index, ids).tolist() == [
        [258.0, 1.0]
    ]  # 257.5; one after the other stays at 256


WRONG = {
    "too far": ([0, 8], r"index must ascend in \[0, 8\), with -1 behind the end, got 8 at 1"),
    "twice": ([3, 3], "got 3 at 1"),
    "falling": ([5, 2], "got 2 at 1"),
    "after an end": ([-1, 2], "got 2 at 1"),
}


@pytest.mark.parametrize(("index", "text"), WRONG.values(), ids=WRONG)
def test_columns_that_are_wrong(index, text):
    """On the CPU they are refused by every op, and nothing is written."""
    x, w, i = torch.randn(3, 8), torch.randn(6, 8), torch.tensor(index).int()
    was = w.clone()
    calls = {
        "slice_gather": lambda: lrkern.ops.slice_gather(x, i),
        "scatter_add": lambda: lrkern.ops.scatter_add(x, torch.zeros(3, 2), i),
        "scatter_add_": lambda: lrkern.ops.scatter_add_(x, torch.zeros(3, 2), i),
        "gather_matmul": lambda: lrkern.ops.gather_matmul(torch.zeros(3, 6), x, torch.zeros(2, 6), i),
        "slice_linear": lambda: lrkern.ops.slice_linear(x, w, None, torch.zeros(6, 2), i),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"lrkern::{name}: .*{text}"):
            call()
    ended = torch.tensor([3, -1]).int()
    with pytest.raises(RuntimeError, match="index must have a feature of weight in each place, got -1 at 1"):
        lrkern.ops.slice_linear(x, w, None, torch.zeros(6, 2), ended)
    with pytest.raises(RuntimeError, match="slice_gather: ids must lie below A = 1, got 1 in row 2"):
        lrkern.ops.slice_gather(x, ended[None], torch.tensor([0, -1, 1]).int())
    assert torch.equal(w, was)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_on_a_device_a_wrong_row_is_nan_and_no_other(device):
    """Values are not validated there. An adapter that does not exist, a column that does not, columns twice."""
    x, h = torch.randn(5, 8).to(device), torch.randn(5, 2).to(device)
    index = torch.tensor([[0, 4], [1, 9], [3, 3]]).int().to(device)
    ids = torch.tensor([0, 1, 2, 7, -1]).int().to(device)
    bad = torch.tensor([False, True, True, True, False])
    y = lrkern.ops.scatter_add(x, h, index, ids)
    assert torch.equal(y.isnan().all(1).cpu(), bad) and torch.equal(y.isnan().any(1).cpu(), bad)
    gathered = lrkern.ops.slice_gather(x, index, ids)
    assert gathered.isnan().any(1).tolist() == [False, True, False, True, False]  # twice is no fault where it is read
    d = torch.randn(3, 2, 6).to(device)
    y = lrkern.ops.gather_matmul(torch.randn(5, 6).to(device), x, d, index, ids)
    assert y.isnan().any(1).tolist() == [False, True, False, True, False]


def test_compiled_slice_linear_equals_eager():
    x, w, bias, index, dy = drawn(32, 24, 5, 1, torch.float32, "cpu")
    slice = torch.randn(24, 5)

    def step(f):
        w_, s_, x_ = w.clone(), slice.clone().requires_grad_(), x.clone().requires_grad_()
        y = f(x_, w_, bias, s_, index)
        y.backward(dy)
        return y, w_, s_.grad, x_.grad

    compiled = torch.compile(lrkern.ops.slice_linear, backend="aot_eager", fullgraph=True)
    for got, want in zip(step(compiled), step(lrkern.ops.slice_linear), strict=True):
        torch.testing.assert_close(got, want)
