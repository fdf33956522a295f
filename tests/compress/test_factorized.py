# SPDX-License-Identifier: Apache-2.0
"""FactorizedLinear beside a float64 statement of its formula, the SVD it begins as, and what it refuses."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrkern.nn import FactorizedLinear, FusedLoRALinear, MXFP4Linear, QuartetLinear

SHAPES = {"tokens": ((17, 24), 20, 5), "batch": ((2, 3, 12), 33, 12), "vector": ((9,), 4, 1), "none": ((0, 8), 6, 2)}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def svd_error(dtype):
    """Of decompositions in float32 at least, and factors in dtype."""
    return max(4 * torch.finfo(dtype).eps, 5e-6)


def made(i, o, r, bias=True, dtype=torch.float32, seed=3):
    torch.manual_seed(seed)
    return FactorizedLinear(i, o, bias, r=r, dtype=dtype)


def truncated(w, r):
    """Of rank r in float64."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


# ---------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient(dtype, shape, bias):
    (*lead, i), o, r = SHAPES[shape]
    layer, x = made(i, o, r, bias, dtype), torch.randn(*lead, i).to(dtype).requires_grad_()
    dy = torch.randn(*lead, o).to(dtype)
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    a, b = layer.A.detach().double(), layer.B.detach().double()
    x64, dy64 = x.detach().double().reshape(-1, i), dy.double().reshape(-1, o)
    s = x64 @ a.T
    want = s @ b.T + (layer.bias.detach().double() if bias else 0)
    wants = [(dy64 @ b @ a).view(x.shape), (dy64 @ b).T @ x64, dy64.T @ s, *([dy64.sum(0)] if bias else [])]
    eps = torch.finfo(dtype).eps
    assert y.shape == (*lead, o) and y.dtype == dtype
    assert relative(y, want.view(y.shape)) < 2 * eps
    for got, expected in zip(grads, wants, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape and relative(got, expected) < 2 * eps


def test_all_of_it_trains_and_there_is_no_dense_weight():
    layer = FactorizedLinear(40, 30, r=4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"A": (4, 40), "B": (30, 4), "bias": (30,)}
    assert all(p.requires_grad for p in layer.parameters())
    with pytest.raises(AttributeError, match="weight"):
        getattr(layer, "weight")  # noqa: B009
    assert repr(layer) == "FactorizedLinear(in_features=40, out_features=30, bias=True, r=4)"
    assert layer.A.abs().max() <= 40**-0.5 and layer.B.abs().max() <= 4**-0.5 < 3 * layer.B.abs().mean()


def test_rank_0_is_the_bias_alone():
    layer, x = FactorizedLinear(5, 3, r=0), torch.randn(2, 5, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 3))
    y.sum().backward()
    assert not x.grad.any() and layer.bias.grad.tolist() == [2.0] * 3


def test_derivatives_are_torch_s_own():
    layer, x = made(5, 4, 2, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    run = lambda *t: torch.func.functional_call(layer, dict(zip(("A", "B", "bias"), t[1:], strict=True)), t[0])
    tensors = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, tensors) and torch.autograd.gradgradcheck(run, tensors)


# ---------------------------------------------------------------------------------------------- from dense and back


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (7, 7)], ids=str)
def test_it_begins_as_the_truncated_svd(dtype, size):
    dense = nn.Linear(*size).to(dtype)
    for r in (1, 3, min(size)):
        layer = FactorizedLinear.from_linear(dense, r)
        assert layer.r == r and layer.A.dtype == dtype
        got, want = layer.B.double() @ layer.A.double(), truncated(dense.weight.detach(), r)
        assert relative(got, want) < svd_error(dtype)
        s = torch.linalg.svdvals(dense.weight.detach().double())[:r]
        for gram in (layer.A.double() @ layer.A.double().T, layer.B.double().T @ layer.B.double()):
            assert relative(gram, s.diag()) < svd_error(dtype), "√S with each"


def test_at_full_rank_it_is_the_dense_layer():
    dense, x = nn.Linear(20, 13).double(), torch.randn(6, 20).double()
    layer = FactorizedLinear.from_linear(dense, 13)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_to_linear_is_the_same_function(dtype, bias):
    dense = nn.Linear(24, 16, bias).to(dtype).eval()
    layer = FactorizedLinear.from_linear(dense, 5)
    layer.bias is None or layer.bias.requires_grad_(False)
    back, x = layer.to_linear(), torch.randn(7, 24).to(dtype)
    assert type(back) is nn.Linear and back.weight.dtype == dtype and not back.training and back.weight.requires_grad
    assert torch.equal(back.weight, (layer.B.float() @ layer.A.float()).to(dtype)), "rounded once"
    assert relative(back(x), layer(x)) < 4 * torch.finfo(dtype).eps
    if bias:
        assert torch.equal(back.bias, dense.bias) and not back.bias.requires_grad
        assert len({t.data_ptr() for t in (back.bias, layer.bias, dense.bias)}) == 3


def test_the_dense_layer_is_left_as_it_is():
    dense = nn.Linear(9, 8).requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    layer = FactorizedLinear.from_linear(dense, 4)
    with torch.no_grad():
        [p.add_(1) for p in layer.parameters()]
    assert all(torch.equal(dense.state_dict()[k], v) for k, v in before.items()) and not dense.weight.requires_grad
    assert all(p.requires_grad for p in layer.parameters())


def test_random_is_a_new_layer_with_the_bias():
    dense = nn.Linear(30, 20)
    torch.manual_seed(1)
    layer = FactorizedLinear.from_linear(dense, 6, "random")
    torch.manual_seed(1)
    new = FactorizedLinear(30, 20, r=6)
    assert torch.equal(layer.A, new.A) and torch.equal(layer.B, new.B) and torch.equal(layer.bias, dense.bias)


def test_over_the_meta_device_it_is_made_empty():
    layer = FactorizedLinear.from_linear(nn.Linear(8, 6, device="meta", dtype=torch.bfloat16), 3)
    assert layer.A.is_meta and layer.A.shape == (3, 8) and layer.B.shape == (6, 3) and layer.B.dtype == torch.bfloat16


@pytest.mark.parametrize("r", [0, 1, 4, 7])
def test_truncate_is_the_nearest_of_lower_rank(dtype, r):
    layer = made(24, 16, 7, dtype=dtype)
    product, parameters = layer.product(), [*layer.parameters()]
    layer(torch.randn(2, 24).to(dtype)).sum().backward()
    layer.truncate(r)
    assert layer.r == r and all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
    assert relative(layer.product(), truncated(product, r)) < svd_error(dtype)
    assert (layer.A.grad is None) == (r < 7), "unless nothing was to be done"
    layer(torch.randn(2, 24).to(dtype)).sum().backward()
    assert layer.A.grad.shape == (r, 24)


def test_an_optimizer_goes_on_after_truncate_or_says_that_it_cannot():
    for kind, fits in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        layer = made(8, 6, 4)
        optimizer = kind(layer.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            layer(torch.ones(1, 8)).sum().backward()
            before = layer.A.detach().clone()
            if fits or not step:
                optimizer.step()
                assert not torch.equal(layer.A, before)
            else:
                with pytest.raises(RuntimeError):
                    optimizer.step()
            layer.truncate(2)


# ---------------------------------------------------------------------------------------------- around it


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low):
    layer, x, dy = made(24, 16, 5), torch.randn(6, 24, requires_grad=True), torch.randn(6, 16)
    with torch.autocast("cpu", low):
        y = layer(x)
    assert y.dtype == low and torch.equal(y, copy.deepcopy(layer).to(low)(x.to(low)))
    grads = torch.autograd.grad(y, (x, *layer.parameters()), dy.to(low))
    wants = torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
    for got, want in zip(grads, wants, strict=True):
        assert got.dtype == torch.float32 and relative(got, want) < 4 * torch.finfo(low).eps


def results(layer, run, x, dy):
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    return y, *torch.autograd.grad(y, (leaf, *layer.parameters()), dy)


def test_compiled_it_is_the_same(dtype):
    layer, x, dy = made(24, 16, 5, dtype=dtype), torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 16).to(dtype)
    torch._dynamo.reset()  # torch gives up on code that other tests have compiled too often
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(layer, compiled, x, dy), results(layer, layer, x, dy), strict=True):
        assert relative(got, want) < torch.finfo(dtype).eps


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_is_the_same(reentrant):
    layer, x, dy = made(24, 16, 5), torch.randn(7, 24), torch.randn(7, 16)
    run = lambda t: checkpoint(layer, t, use_reentrant=reentrant)
    found = []
    for each in (layer, run):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        layer.zero_grad()
        y.backward(dy)
        found.append((y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_state_dict_is_loaded_in_another_process(tmp_path):
    layer, x = FactorizedLinear.from_linear(nn.Linear(24, 16), 5), torch.randn(3, 24)
    torch.save({"state": layer.state_dict(), "x": x, "y": layer(x).detach()}, tmp_path / "f.pt")
    code = (
        "import sys, torch; from lrkern.nn import FactorizedLinear; kept = torch.load(sys.argv[1])\n"
        "layer = FactorizedLinear(24, 16, r=kept['state']['A'].shape[0]); layer.load_state_dict(kept['state'])\n"
        "assert torch.equal(layer(kept['x']), kept['y']); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.pt")], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x)) and again.A is not layer.A


def test_a_lora_stands_beside_it():
    layer, x = FactorizedLinear.from_linear(nn.Linear(24, 16), 5), torch.randn(3, 24)
    lora = FusedLoRALinear.from_linear(layer, r=2)
    assert torch.equal(lora(x), layer(x)) and not layer.A.requires_grad
    nn.init.normal_(lora.lora_B.weight)
    low = lora.scaling * (x @ lora.lora_A.weight.T) @ lora.lora_B.weight.T
    torch.testing.assert_close(lora(x), layer(x) + low)
    with pytest.raises(RuntimeError, match=r"merge: the layer must have a plain nn\.Linear"):
        lora.merge()


# ---------------------------------------------------------------------------------------------- what it refuses


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda m, args, y: y * 2)
    return linear


NO_LINEARS = {
    "conv": (lambda: nn.Conv1d(4, 4, 1), "got Conv1d"),
    "attention": (lambda: nn.MultiheadAttention(4, 2).out_proj, "inside nn.MultiheadAttention"),
    "hooked": (hooked, "got Linear with more to it"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "with more to it"),
    "subclass": (lambda: QuartetLinear(4, 4), "got QuartetLinear with more to it"),
    "packed": (lambda: MXFP4Linear.from_linear(nn.Linear(32, 32)), "got MXFP4Linear"),
    "factors": (lambda: FactorizedLinear(4, 4, r=2), "got FactorizedLinear"),
}


@pytest.mark.parametrize("kind", NO_LINEARS)
def test_what_is_no_plain_linear_is_refused(kind):
    make, got = NO_LINEARS[kind]
    with pytest.raises(TypeError, match="FactorizedLinear.from_linear: linear must be a plain nn.Linear") as error:
        FactorizedLinear.from_linear(make(), 2)
    assert got in str(error.value)


WRONG = {
    "r": (lambda: FactorizedLinear(4, 6, r=5), r"r must be a whole number in 0\.\.4, got 5"),
    "negative": (lambda: FactorizedLinear(4, 6, r=-1), r"r must be a whole number in 0\.\.4, got -1"),
    "flag": (lambda: FactorizedLinear(4, 6, r=True), "r must be a whole number"),
    "sizes": (lambda: FactorizedLinear(0, 6, r=0), "in_features must be a whole number in 1"),
    "dtype": (lambda: FactorizedLinear(4, 6, r=2, dtype=torch.float8_e4m3fn), "dtype must be a float of 16 bits"),
    "whole": (lambda: FactorizedLinear(4, 6, r=2, dtype=torch.int32), "dtype must be a float of 16 bits"),
    "method": (
        lambda: FactorizedLinear.from_linear(nn.Linear(4, 4), 2, "qr"),
        r"from_linear: method must be one of \['random', 'svd'\], got 'qr'",
    ),
    "rank": (lambda: FactorizedLinear.from_linear(nn.Linear(4, 6), 5), r"r must be a whole number in 0\.\.4"),
    "factors": (
        lambda: FactorizedLinear.from_factors(torch.zeros(2, 4), torch.zeros(6, 3)),
        r"from_factors: a, b and bias must be \[r, in\], \[out, r\] and \[out\], got \[\[2, 4\], \[6, 3\]\]",
    ),
    "bias": (
        lambda: FactorizedLinear.from_factors(torch.zeros(2, 4), torch.zeros(6, 2), torch.zeros(1)),
        "a, b and bias must be",
    ),
    "up": (lambda: FactorizedLinear(4, 6, r=2).truncate(3), r"r must be a whole number in 0\.\.2, got 3"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused(kind):
    make, text = WRONG[kind]
    with pytest.raises(ValueError, match=f"^FactorizedLinear.*{text}"):
        make()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value):
    dense = nn.Linear(4, 4)
    dense.weight.data[1, 2] = value
    with pytest.raises(ValueError, match="from_linear: weight must be finite, got inf or nan"):
        FactorizedLinear.from_linear(dense, 2)
    layer = FactorizedLinear(4, 4, r=3)
    layer.A.data[1, 2] = value
    with pytest.raises(ValueError, match="truncate: A and B must be finite, got inf or nan"):
        layer.truncate(1)
    assert layer.r == 3
