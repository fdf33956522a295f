# SPDX-License-Identifier: Apache-2.0
"""Every op of the registry on every device kind: forward, gradient, determinism, direct calls, opcheck."""

import inspect

import pytest
import torch
from torch import Tensor

import lrkern.ops
from lrkern import testing
from lrkern.reference import OPS

OP_SAMPLES = [(op, s.name) for op in OPS.values() for s in op.samples("cpu", torch.float32)]
IDS = [f"{op.name}-{name}" for op, name in OP_SAMPLES]
every_sample = pytest.mark.parametrize(("op", "sample_name"), OP_SAMPLES, ids=IDS)
# An op without a gradient must raise where one is asked for: test_direct_call_has_the_gradient.
DIFFERENTIABLE = [(op, name) for op, name in OP_SAMPLES if op.differentiable]
differentiable_sample = pytest.mark.parametrize(
    ("op", "sample_name"), DIFFERENTIABLE, ids=[f"{op.name}-{name}" for op, name in DIFFERENTIABLE]
)


def get_sample(op, name, device, dtype):
    return op.sample(name, device, dtype)


def is_float(a):
    return isinstance(a, Tensor) and a.is_floating_point()


def has_fp32_factor(args, dtype):
    return dtype != torch.float32 and any(is_float(a) and a.dtype == torch.float32 for a in args)


def run_op(op, fn, args, kwargs):
    """The result, or for a mutating op what it wrote."""
    if op.mutates is None:
        return fn(*args, **kwargs)
    target = args[0].clone() if args[0].is_contiguous() else copy_rows(args[0])
    assert fn(target, *args[1:], **kwargs) is None
    return target


def copy_rows(t):
    """A copy with the strides of t; what lies between the rows stays NaN."""
    storage = torch.full(
        (t.untyped_storage().nbytes() // t.element_size(),), float("nan"), dtype=t.dtype, device=t.device
    )
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
    return view.copy_(t)


@every_sample
def test_forward(op, sample_name, device, dtype):
    s = get_sample(op, sample_name, device, dtype)
    got = run_op(op, getattr(lrkern.ops, op.name), s.args, s.kwargs)
    truth = run_op(op, op.truth, [testing.to64(a) for a in s.args], s.kwargs)
    yardstick = run_op(op, op.truth, s.args, s.kwargs)
    testing.check(got, truth, yardstick, f"{op.name}[{s.name}]", has_fp32_factor(s.args, dtype))


def gradients(op, fn, sample, cotangent=None):
    """Gradients of every differentiable argument present, by name."""
    names = list(inspect.signature(op.truth).parameters)
    args = [  # not cloned: pitches stay
        a.detach().requires_grad_() if is_float(a) and n in op.differentiable else a
        for n, a in zip(names, sample.args, strict=False)
    ]
    y = fn(*args, **sample.kwargs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if cotangent is None else cotangent
    wanted = {n: a for n, a in zip(names, args, strict=False) if n in op.differentiable and a is not None}
    truth = fn is op.truth  # may leave out what has no part in the sample; the op may not
    if truth and not y.requires_grad:
        return {n: torch.zeros_like(a) for n, a in wanted.items()}
    grads = torch.autograd.grad(y, list(wanted.values()), g.to(y.device, y.dtype), materialize_grads=truth)
    return dict(zip(wanted, grads, strict=True))


def as64(sample):
    return type(sample)(sample.name, tuple(testing.to64(a) for a in sample.args), sample.kwargs)


@differentiable_sample
def test_gradient(op, sample_name, device, dtype):
    s = get_sample(op, sample_name, device, dtype)
    got = gradients(op, getattr(lrkern.ops, op.name), s)
    truth = gradients(op, op.truth, as64(s))
    yardstick = gradients(op, op.truth, s)
    for name in truth:
        what = f"d {op.name}[{s.name}] / d {name}"
        testing.check(got[name], truth[name], yardstick[name], what, has_fp32_factor(s.args, dtype))


@every_sample
def test_two_runs_are_bit_equal(op, sample_name, device, dtype):
    s = get_sample(op, sample_name, device, dtype)
    fn = getattr(lrkern.ops, op.name)
    first, second = (run_op(op, fn, s.args, s.kwargs) for _ in range(2))
    assert torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    if op.differentiable:
        first, second = (gradients(op, fn, s) for _ in range(2))
        for name in first:
            assert torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7)), name


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_direct_call_has_the_gradient(op):
    """torch.ops.lrkern.X itself, not the wrapper: opcheck does not see a gradient that is silently missing."""
    direct = getattr(torch.ops.lrkern, op.name)
    s = get_sample(op, op.family.direct_sample, "cpu", torch.float32)
    if op.differentiable:
        got, wrapped = gradients(op, direct, s), gradients(op, getattr(lrkern.ops, op.name), s)
        assert got.keys() == set(op.differentiable) & wrapped.keys()
        for name in got:
            assert torch.equal(got[name], wrapped[name]), name
    else:
        args = [a.clone().requires_grad_() if is_float(a) and i else a for i, a in enumerate(s.args)]
        if not any(is_float(a) for a in args):
            return  # integers alone
        with pytest.raises(RuntimeError, match=f"lrkern::{op.name}: .*requires one"):
            direct(*args, **s.kwargs)


def test_every_op_of_the_library_has_a_gradient_or_refuses():
    """No schema may slip past the registry: each op is in it, is the gradient of one that is, or takes no tensors."""
    schemas = {
        s.name.removeprefix("lrkern::"): s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lrkern::")
    }
    assert OPS.keys() <= schemas.keys()
    for name, schema in schemas.items():
        if name in OPS or name == "build_info":
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lrkern::{name}", "Autograd"), name
        base = name.removesuffix("_bwd").removesuffix("_fwd")
        assert base in OPS, f"{name}: neither in the registry nor a part of an op that is ({schema})"


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable and not op.twice_differentiable], ids=lambda op: op.name
)
def test_double_backward_is_refused(op):  # of random bases: test_rng.py
    s = get_sample(op, "odd", "cpu", torch.float32)
    names = list(inspect.signature(op.truth).parameters)
    args = [
        a.clone().requires_grad_() if n in op.differentiable and a is not None else a
        for n, a in zip(names, s.args, strict=False)
    ]
    y = getattr(lrkern.ops, op.name)(*args, **s.kwargs)
    leaf = args[names.index(op.differentiable[-1] if "x" not in op.differentiable else "x")]
    (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"lrkern::{op.name}: double backward is not supported"):
        g.sum().backward()


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


OPCHECK = ("one_token", "rank_17_fp32", "pitch", "dropout_fp32_pitch", "rank_0", "no_tokens", "odd_no_base")


@pytest.mark.parametrize(
    ("op", "sample_name"), [(o, n) for o, n in OP_SAMPLES if n in OPCHECK], ids=lambda v: getattr(v, "name", v)
)
def test_opcheck(op, sample_name):
    s = get_sample(op, sample_name, "cpu", torch.float32)
    names = list(inspect.signature(op.truth).parameters)
    args = tuple(
        a.detach().clone().requires_grad_(n in op.differentiable) if is_float(a) else a
        for n, a in zip(names, s.args, strict=False)
    )
    torch.library.opcheck(getattr(torch.ops.lrkern, op.name).default, args, s.kwargs)


def test_saves_x_s_and_seed_only():
    """Beyond parameters: x, S [T, R], the seed [1]. No mask, no dropped copy of x, nothing of y's size."""
    x, w = torch.randn(50, 64, requires_grad=True), torch.randn(48, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lrkern.ops.lora_linear(x, w, None, a, b, 1.0, 0.1, torch.tensor([3]))
    own = [t for t in saved if t.data_ptr() not in {p.data_ptr() for p in (x, w, a, b)}]
    assert sorted(tuple(t.shape) for t in own) == [(1,), (50, 4)]


@differentiable_sample
def test_each_gradient_alone(op, sample_name):
    """Where only one argument requires a gradient, it gets what it gets among all, and no other argument gets one."""
    fn, s = getattr(lrkern.ops, op.name), get_sample(op, sample_name, "cpu", torch.float32)
    names = list(inspect.signature(op.truth).parameters)
    together = gradients(op, fn, s)
    for name, expected in together.items():
        args = [a.detach().requires_grad_(n == name) if is_float(a) else a for n, a in zip(names, s.args, strict=False)]
        y = fn(*args, **s.kwargs)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        grads = {n: a.grad for n, a in zip(names, args, strict=False) if isinstance(a, Tensor) and a.grad is not None}
        assert grads.keys() == {name}
        testing.check(grads[name], expected.double(), expected, name, ulps=4)  # dS and dB may take separate passes


def test_a_row_does_not_depend_on_its_batch(device, dtype):
    """The adapter part is batch-invariant: a row alone and inside any batch give the same bits."""
    x, a = torch.randn(200, 1100).to(dtype), torch.randn(24, 1100).to(dtype)
    b, y = torch.randn(600, 24).to(dtype), torch.randn(200, 600).to(dtype)
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
    """On CUDA a large batch walks the chunks of I in one block, a small one gives each chunk a block of its own."""
    x, a = torch.randn(8200, 300).bfloat16(), torch.randn(4, 300).bfloat16()
    s = lrkern.ops.lora_shrink(x, a)
    for lo, hi in ((0, 1), (8190, 8200)):
        assert torch.equal(lrkern.ops.lora_shrink(x[lo:hi], a), s[lo:hi])


def test_gradients_of_factors_over_thousands_of_tokens(device):
    """Beyond 16 segments of tokens the segments grow instead: the last one is short, and 8201 is a multiple of nothing."""
    x, a, b = torch.randn(8201, 40), torch.randn(3, 40, requires_grad=True), torch.randn(24, 3, requires_grad=True)
    s, dy = torch.randn(8201, 3, requires_grad=True), torch.randn(8201, 24)
    (da,) = torch.autograd.grad(lrkern.ops.lora_shrink(x, a), a, s.detach())
    ds, db = torch.autograd.grad(lrkern.ops.linear_expand(None, None, None, s, b), (s, b), dy)
    for got, truth in (
        (da, s.detach().double().T @ x.double()),
        (db, dy.double().T @ s.detach().double()),
        (ds, dy.double() @ b.detach().double()),
    ):
        assert (got - truth).norm() <= 1e-6 * truth.norm()


def test_rank_0_is_the_base_layer(device, dtype):
    x, w, bias = torch.randn(5, 33).to(dtype), torch.randn(9, 33).to(dtype), torch.randn(9).to(dtype)
    y = lrkern.ops.lora_linear(x, w, bias, x.new_empty(0, 33), x.new_empty(9, 0))
    assert torch.equal(y, torch.nn.functional.linear(x, w, bias))


def test_what_lies_between_rows_is_neither_read_nor_written(device, dtype):
    wide = torch.full((20, 64), float("nan")).to(dtype)
    wide[:, :40] = torch.randn(20, 40).to(dtype)
    y = wide[:, :40]
    s, b = torch.randn(20, 3).to(dtype), torch.randn(40, 3).to(dtype)
    lrkern.ops.lora_expand_(y, s, b)
    assert y.isfinite().all() and wide[:, 40:].isnan().all()
    assert lrkern.ops.lora_shrink(y, torch.randn(5, 40).to(dtype)).isfinite().all()


def test_nan_and_inf_stay_in_their_rows(device, dtype):
    x, a = torch.randn(130, 300).to(dtype), torch.randn(8, 300).to(dtype)
    clean = lrkern.ops.lora_shrink(x, a)
    x[7, 5], x[66, 0] = float("nan"), float("inf")
    s = lrkern.ops.lora_shrink(x, a)
    dirty = torch.tensor([7, 66])
    keep = torch.ones(130, dtype=torch.bool)
    keep[dirty] = False
    assert torch.equal(s[keep], clean[keep])
    assert not s[dirty].isfinite().any()


def test_a_dropped_nan_is_dropped(device, dtype):
    x, a = torch.full((40, 64), float("nan")).to(dtype), torch.eye(64).to(dtype)
    seed = torch.tensor([5])
    kept = lrkern.ops.lora_shrink(torch.ones_like(x), a, 1.0, 0.5, seed) != 0
    rows = lrkern.ops.lora_shrink(x, torch.ones(1, 64).to(dtype), 1.0, 0.99, seed)
    none_kept = (lrkern.ops.lora_shrink(torch.ones_like(x), a, 1.0, 0.99, seed) == 0).all(1)
    assert 0.4 < kept.double().mean() < 0.6 and 0 < none_kept.sum() < 40
    assert torch.equal(rows[:, 0] == 0, none_kept)


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
