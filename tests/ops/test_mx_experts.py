# SPDX-License-Identifier: Apache-2.0
"""mx_linear and mx_linear_expand with an index of experts, beyond the registry: beside the ops of one weight, expert by expert."""

import math

import pytest
import torch

import lrkern.ops
from lrkern.limits import DTYPES

K, O, R = 136, 40, 6


@pytest.fixture
def on_cpu(request):
    return request.node.callspec.params["device"] == "cpu"


def made(T, E, dtype, device, seed=0):
    """Arguments of mx_linear_expand; rows of expert 0 are many, the last has none, and some rows have none."""
    g = torch.Generator().manual_seed(T + E + seed)
    draw = lambda *n: torch.randn(*n, generator=g)
    codes, scales, _ = lrkern.ops.mx_quantize((draw(E, O, K) * K**-0.5).to(device))
    index = torch.randint(-1, max(E - 1, 1), (T,), generator=g)
    index = torch.where(torch.rand(T, generator=g) < 0.3, 0, index).int().to(device)
    x, bias, b = (draw(*n).to(device, dtype) for n in ((T, K), (E, O), (E, O, R)))
    return x, codes, scales, bias, draw(T, R).to(b if dtype != torch.float16 else draw(1).to(device)), b, index


def by_expert(x, codes, scales, bias, s, b, index):
    """The rows of each expert by the op of one weight."""
    y = torch.zeros(len(x), O, dtype=x.dtype, device=x.device)
    for e in range(len(codes)):
        rows = (index == e).nonzero()[:, 0]
        own = lrkern.ops.mx_linear_expand(x[rows], codes[e], scales[e], bias[e], s[rows], b[e])
        y = y.index_put((rows,), own)
    return y


@pytest.mark.parametrize(("T", "E"), [(1, 1), (5, 3), (16, 2), (40, 3), (64, 4), (70, 3), (200, 5)])
def test_the_rows_of_an_expert_are_those_of_its_weight(device, on_cpu, T, E):
    """Forward and gradients: to the bit on the CPU, and within rounding on CUDA, where y may go another way and ds and db do."""
    dtype = DTYPES[(T + E) % 3]
    x, codes, scales, bias, s, b, index = made(T, E, dtype, device)
    dy = torch.randn(T, O, generator=torch.Generator().manual_seed(T)).to(device, dtype)
    results = []
    for op in (lrkern.ops.mx_linear_expand, by_expert):
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias, s, b)]
        y = op(leaves[0], codes, scales, *leaves[1:], index)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for name, got, want in zip(["y", "dx", "dbias", "ds", "db"], *results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype, name
        if on_cpu or name in ("dx", "dbias"):
            assert torch.equal(got, want), name
        else:
            error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
            assert error < (5e-5 if dtype == torch.float32 else 5e-3), (name, error)
    y, dx, dbias, ds, db = results[0]
    none = index < 0
    assert not any(t[none].any() for t in (y, dx, ds)) and (E == 1 or not (dbias[-1].any() or db[-1].any()))


def test_rows_of_one_launch_are_those_of_the_row_alone(device, on_cpu, dtype):
    """On CUDA up to 16 E rows, whoever shares their expert; on the CPU two of one and more, up to 8, since one alone has an order of its own."""
    x, codes, scales, bias, s, b, index = made(24, 2, dtype, device)
    index[:], index[4:6] = 0, 1
    if on_cpu:
        index[10:] = -1
    y = lrkern.ops.mx_linear_expand(x, codes, scales, bias, s, b, index)
    step = 2 if on_cpu else 1
    for t in range(0, len(x), step):
        own = slice(t, t + step)
        alone = lrkern.ops.mx_linear_expand(x[own], codes, scales, bias, s[own], b, index[own])
        assert torch.equal(alone, y[own]), t


def test_an_expert_that_does_not_exist(device, on_cpu):
    """Refused on the CPU; on CUDA NaN in its row of y and dx, and nowhere else."""
    for T in (9, 90):
        x, codes, scales, bias, _, _, index = made(T, 3, torch.float32, device)
        x, bias = x.requires_grad_(), bias.requires_grad_()
        want = torch.autograd.grad(lrkern.ops.mx_linear(x, codes, scales, bias, index).sum(), x)[0]
        wrong = index.clone()
        wrong[4] = 3
        if on_cpu:
            with pytest.raises(RuntimeError, match=r"mx_linear: experts must lie below 3, .*, got 3 in row 4"):
                lrkern.ops.mx_linear(x, codes, scales, bias, wrong)
            continue
        y = lrkern.ops.mx_linear(x, codes, scales, bias, wrong)
        dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
        others = torch.arange(T, device=x.device) != 4
        assert y[4].isnan().all() and dx[4].isnan().all() and dbias.isfinite().all()
        assert y[others].isfinite().all() and torch.equal(dx[others], want[others])


def test_few_rows_read_nothing_back(device, on_cpu):
    """On CUDA: the plan and one launch. More rows are sorted by ATen and their numbers read."""
    for T, few in ((32, not on_cpu), (33, False)):
        args = made(T, 2, torch.bfloat16, device)
        with torch.profiler.profile() as profile:
            lrkern.ops.mx_linear_expand(*args)
        called = {e.name for e in profile.events()}
        assert ("aten::index_select" in called) != few and ("aten::index_copy_" in called) != few
        assert not few or not called & {"aten::to", "aten::_to_copy", "aten::copy_", "aten::item"}


def test_indices_of_more_dimensions_and_pitched_rows(device, dtype):
    x, codes, scales, bias, *_, index = made(24, 4, dtype, device)
    wide = torch.full((24, K + 5), math.nan, dtype=dtype, device=x.device)
    wide[:, :K] = x
    y = lrkern.ops.mx_linear(wide[:, :K].unflatten(0, (2, 3, 4)), codes, scales, bias, index.view(2, 3, 4))
    assert torch.equal(y.flatten(0, 2), lrkern.ops.mx_linear(x, codes, scales, bias, index))


def test_no_experts_and_no_rows(device):
    x, codes, scales, bias, *_ = made(3, 2, torch.float32, device)
    none = torch.full((3,), -1, dtype=torch.int32, device=x.device)
    assert not lrkern.ops.mx_linear(x, codes[:0], scales[:0], bias[:0], none).any()
    assert lrkern.ops.mx_linear(x[:0], codes, scales, bias, none[:0]).shape == (0, O)


@pytest.mark.parametrize("T", [30, 31])
def test_compiled(T):
    """The fake results of forward and backward have the shapes of experts."""
    x, codes, scales, bias, s, b, index = made(T, 3, torch.float32, "cpu")
    results = []
    for fn in (lrkern.ops.mx_linear_expand, torch.compile(lrkern.ops.mx_linear_expand, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias, s, b)]
        y = fn(leaves[0], codes, scales, *leaves[1:], index)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
