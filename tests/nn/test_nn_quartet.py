# SPDX-License-Identifier: Apache-2.0
"""QuartetLinear beside a float64 statement of the algorithm, the bias of its gradients, what it keeps, draws and refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrkern.functional as F
from lrkern import ops
from lrkern.functional.quartet import drawn
from lrkern.nn import FusedLoRALinear, QuartetLinear
from lrkern.reference import mx as reference

RULES = ("quest", "quest_nearest")
# (rows, in, out): whole blocks and none whole
SIZES = [(64, 64, 96), (37, 70, 50), (1, 33, 5)]


def layer(K, O, bias=False, rule="quest", dtype=torch.float32):
    torch.manual_seed(K + O)
    return QuartetLinear(K, O, bias, rule=rule, dtype=dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradients(of, x, dy, seed=3):
    """y, dx and dW; the random numbers of backward are those of the seed."""
    x = x.detach().requires_grad_()
    y = of(x)
    torch.manual_seed(seed)
    return y.detach(), *torch.autograd.grad(y, (x, of.weight), dy)


def statement(of, x, dy, seed=3):
    torch.manual_seed(seed)
    x, dy = x.detach().flatten(0, -2), dy.flatten(0, -2)
    return reference.quartet_linear(x, of.weight.detach(), dy, *drawn(x.device), of.rule)


# ---------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_statement_in_float64(device, dtype, size, rule, master):
    """Codes are equal, so that all that differs is how products are summed and rounded: dx and dW twice, behind the product and behind H."""
    T, K, O = size
    of = layer(K, O, rule=rule, dtype=master).to(device)
    x, dy = torch.randn(T, K).to(device, dtype), torch.randn(T, O).to(device, dtype)
    y, dx, dw = gradients(of, x, dy)
    want, (want_dx, want_dw), _ = statement(of, x, dy)
    eps = torch.finfo(dtype).eps
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, master)
    assert relative(y, want) < max(eps, 1e-6) and relative(dx, want_dx) < max(eps, 1e-6)
    assert relative(dw, want_dw) < max(eps, 1e-6, torch.finfo(master).eps)


def test_errors_are_those_of_the_paper():
    """Relative squared errors of Gaussian data: 2e-2 to 6e-2 forward, 6e-2 to 15e-2 of gradients."""
    x, dy = torch.randn(128, 256), torch.randn(128, 256)
    for rule in RULES:
        of = layer(256, 256, rule=rule)
        nn.init.normal_(of.weight)
        y, dx, dw = gradients(of, x, dy)
        w = of.weight.detach()
        assert 2e-2 < relative(y, x @ w.T) ** 2 < 6e-2
        assert 6e-2 < relative(dx, dy @ w) ** 2 < 15e-2 and 6e-2 < relative(dw, dy.T @ x) ** 2 < 15e-2


def estimate(of, x, dy, seeds):
    """Of dx and dW: how far the mean of many draws lies from the exact gradient of the quantised forward, in squares of its standard
    error (1 without a bias), and how long it is along that gradient, with its standard error."""
    *_, exact = statement(of, x, dy)
    draws = zip(*(gradients(of, x, dy, seed)[1:] for seed in range(seeds)), strict=True)
    for drawn_of, want in zip(draws, exact, strict=True):
        g = torch.stack(drawn_of).double()
        along = (g * want).sum((1, 2)) / want.square().sum()
        z = (g.mean(0) - want) / (g.std(0) / seeds**0.5)
        yield z.square().mean().item(), along.mean().item(), along.std().item() / seeds**0.5


def test_gradients_have_no_bias_and_to_the_nearest_they_would(monkeypatch):
    torch.manual_seed(0)
    of, x, dy = layer(64, 64), torch.randn(64, 64), torch.randn(64, 64)
    for z, along, error in estimate(of, x, dy, 400):
        assert 0.8 < z < 1.2 and abs(along - 1) < 4 * error < 0.01
    quantize = ops.mx_quantize
    monkeypatch.setattr(ops, "mx_quantize", lambda *a, **k: quantize(*a[:4], None, *a[5:], **k))
    for z, along, error in estimate(of, x, dy, 100):
        assert z > 1.5 and along < 0.99 < 1 - 6 * error


def test_the_operands_of_a_product_round_apart():
    """dy = Ŵᵀ: under one seed both operands of dx would round alike, as squares, whose mean is larger (5 standard errors in the mean)."""
    of = layer(32, 32)
    codes, scales, _ = reference.mx_quantize(of.weight.detach(), "quest", True)
    dy = reference.mx_dequantize(codes, scales, 32).mT.contiguous()
    for z, along, error in estimate(of, torch.eye(32), dy, 300):
        assert z < 1.3 and abs(along - 1) < 4 * error


def test_what_forward_clipped_has_no_gradient():
    of = layer(64, 64)
    x, dy = torch.randn(32, 64), torch.randn(32, 64)
    _, dx, dw = gradients(of, x, dy)
    for t, g in ((x, dx), (of.weight.detach(), dw)):
        _, _, mask = reference.mx_quantize(t, "quest", True, mask=True)
        kept = (mask[..., None] >> torch.arange(32) & 1).bool()
        turned = reference.transformed(g.unflatten(-1, (-1, 32)))
        assert 0.01 < (~kept).float().mean() < 0.1
        assert (
            turned[~kept].abs().max() < 1e-5 * turned[kept].abs().max()
            and (turned[kept].abs() > 1e-4).float().mean() > 0.9
        )


# ---------------------------------------------------------------------------------------------- what it draws


def test_forward_draws_nothing_and_backward_follows_the_generator():
    of, x, dy = layer(64, 32), torch.randn(8, 64), torch.randn(8, 32)
    state = torch.get_rng_state()
    first, again = of(x), of(x)
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    results = [gradients(of, x, dy, seed) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(results[0][1:], results[2][1:], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_number(reentrant):
    """With dropout behind it, whose numbers a forward that drew would shift between the two passes of a reentrant checkpoint."""
    block = nn.Sequential(layer(64, 64, True), nn.Dropout(0.5), nn.GELU(), layer(64, 64, True), nn.Dropout(0.5))
    x, found = torch.randn(16, 64), []
    for run in (block, lambda t: checkpoint(block, t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = run(run(leaf))
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad, *(p.grad for p in block.parameters())))
        block.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_it_is_the_same():
    of, x, dy = layer(64, 48, True), torch.randn(2, 5, 64), torch.randn(2, 5, 48)
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    results = []
    for run in (of, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        torch.manual_seed(2)
        results.append((y, *torch.autograd.grad(y, (leaf, of.weight, of.bias), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------- what it keeps and takes


def test_codes_scales_and_masks_are_all_that_is_kept():
    of, saved = layer(256, 64, True), []
    blocks = {"x": 40 * 8, "w": 64 * 8}
    for frozen, want in (
        ((), 21 * (blocks["x"] + blocks["w"])),
        ("w", 17 * blocks["w"] + 4 * blocks["x"]),
        ("x", 17 * blocks["x"] + 4 * blocks["w"]),
    ):
        saved.clear()
        of.weight.requires_grad_("w" not in frozen)
        x = torch.randn(40, 256, requires_grad="x" not in frozen)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = of(x)
        assert sum(t.nbytes for t in saved) == want and not any(t.is_floating_point() for t in saved)
        y.sum().backward()
        assert (x.grad is None) == ("x" in frozen) and (of.weight.grad is None) == ("w" in frozen)
        of.zero_grad(set_to_none=True)


def test_one_gradient_alone_is_that_of_both():
    of, x, dy = layer(64, 48), torch.randn(20, 64), torch.randn(20, 48)
    _, dx, dw = gradients(of, x, dy)
    torch.manual_seed(3)
    assert torch.equal(torch.autograd.grad(of(x), of.weight, dy)[0], dw)
    of.weight.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    y = of(leaf)
    torch.manual_seed(3)
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], dx)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (4, 0, 64)], ids=str)
def test_leading_dimensions_and_the_bias(shape):
    of = layer(64, 48, True)
    x = torch.randn(*shape, requires_grad=True)
    y = of(x)
    assert y.shape == (*shape[:-1], 48)
    assert torch.equal(y, (F.quartet_linear(x.reshape(-1, 64), of.weight) + of.bias).view(y.shape))
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(of.bias.grad, torch.full((48,), float(y.numel() // 48)))
    assert of.weight.grad.isfinite().all() and (x.numel() or not of.weight.grad.any())


def test_strides_do_not_matter():
    of, x, dy = layer(64, 48), torch.randn(64, 20), torch.randn(48, 20)
    for a, b in zip(gradients(of, x.T, dy.T), gradients(of, x.T.contiguous(), dy.T.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low):
    """x is cast, W is quantised from what it is; a backward inside autocast is that of the forward."""
    of, x, dy = layer(64, 48, True), torch.randn(20, 64), torch.randn(20, 48)
    with torch.autocast("cpu", low):
        y = of(x)
    assert y.dtype == low and torch.equal(y, of(x.to(low)))
    results = []
    for inside in (False, True):
        leaf = x.clone().requires_grad_()
        y = of(leaf)
        torch.manual_seed(1)
        with torch.autocast("cpu", low, enabled=inside):
            results.append(torch.autograd.grad(y, (leaf, of.weight, of.bias), dy))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_double_backward_is_refused():
    of, x = layer(32, 32), torch.randn(4, 32, requires_grad=True)
    (g,) = torch.autograd.grad(of(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lrkern::quartet_linear: double backward is not supported"):
        g.sum().backward()


def test_it_is_an_nn_linear_by_its_parameters(tmp_path):
    dense = nn.Linear(70, 33).eval()
    of = QuartetLinear.from_linear(dense, "quest_nearest")
    assert of.weight is dense.weight and of.bias is dense.bias and not of.training
    assert list(of.state_dict()) == list(dense.state_dict()) == ["weight", "bias"]
    again, x = QuartetLinear(70, 33, rule="quest_nearest"), torch.randn(3, 70)
    torch.save(of.state_dict(), tmp_path / "w")
    again.load_state_dict(torch.load(tmp_path / "w"))
    assert torch.equal(again(x), of(x)) and torch.equal(copy.deepcopy(of)(x), of(x))
    assert repr(of) == "QuartetLinear(in_features=70, out_features=33, bias=True, rule=quest_nearest)"
    assert of.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    lora = FusedLoRALinear.from_linear(layer(32, 32), r=2)
    assert torch.equal(lora(x[:, :32]), lora.base_layer(x[:, :32])), "an adapter over it: B is 0"


def test_what_does_not_fit_is_refused():
    of = layer(32, 16, True)
    with pytest.raises(TypeError, match="must be an nn.Linear with a plain weight, got Conv2d"):
        QuartetLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="inside nn.MultiheadAttention"):
        QuartetLinear.from_linear(nn.MultiheadAttention(4, 2).out_proj)
    with pytest.raises(ValueError, match=r"rule must be one of \['quest', 'quest_nearest'\], got 'even'"):
        QuartetLinear.from_linear(nn.Linear(2, 2), "even")
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got torch.float64"):
        QuartetLinear.from_linear(nn.Linear(2, 2).double())
    for args, text in (
        (
            (torch.randn(3, 31), of.weight),
            r"x and weight must have shapes \[..., I\] and \[O, I\], got \[3, 31\] and \[16, 32\]",
        ),
        (
            (torch.randn(3, 32).double(), of.weight),
            "x and weight must be float32, float16 or bfloat16, got torch.float64 and",
        ),
        ((torch.randn(3, 32), of.weight, torch.randn(1)), r"bias must have shape \[O\] = \[16\], got \[1\]"),
        ((torch.randn(3, 32), of.weight, None, "floor"), "rule must be one of"),
    ):
        with pytest.raises(RuntimeError, match=f"lrkern::quartet_linear: {text}"):
            F.quartet_linear(*args)


def test_it_learns():
    """A teacher's outputs, with AdamW, as a dense layer does but for the noise of 4 bits."""
    torch.manual_seed(0)
    teacher, x = nn.Linear(64, 32), torch.randn(256, 64)
    losses = {}
    for kind in (nn.Linear, QuartetLinear):
        torch.manual_seed(1)
        student = kind(64, 32)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        found = []
        for _ in range(80):
            loss = (student(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[kind] = found
    assert (
        losses[QuartetLinear][-1] < 0.1 * losses[QuartetLinear][0] and losses[nn.Linear][-1] < losses[QuartetLinear][-1]
    )
