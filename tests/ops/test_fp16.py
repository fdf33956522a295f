# SPDX-License-Identifier: Apache-2.0
"""The range of float16: what PEFT's expression keeps finite there, ours keeps finite, forward and every gradient, and as near
the truth. Each form is drawn over magnitudes of x, S, the product and the result, scale among them, and compared with the
expression at PEFT's rounding points. A failure prints the magnitudes and the seed."""

import math
import os

import pytest
import torch
import torch.nn.functional as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lrkern.functional as F
from lrkern import ops
from tests.conftest import enter_device

HALF, MAX = torch.float16, 65504.0
FULL = bool(os.environ.get("LRK_TEST_FULL"))


class Draw:
    """Tensors of float16 whose elements are of one magnitude, by exponents: of x, of S = x Aᵀ, of S Bᵀ, of the result
    scale · S Bᵀ, of its gradient, and of W, each within the range."""

    def __init__(self, x, s, d, y, dy, w, sizes, seed):
        self.T, self.I, self.O, self.R = sizes
        self.e, self.generator = dict(x=x, dy=dy, w=w), torch.Generator().manual_seed(seed)
        fit = lambda e, low=-14, high=15: max(low, min(high, round(e)))
        self.e |= {"a": fit(s - x - math.log2(self.I) / 2), "b": fit(d - s - math.log2(self.R) / 2)}
        self.scale = 2.0 ** fit(y - d, -14, 14)
        self.x, self.bias = self("x", self.T, self.I), self("w", self.O)
        self.weight, self.a, self.b = self("w", self.O, self.I), self("a", self.R, self.I), self("b", self.O, self.R)
        self.y = self("w", self.T, self.O)

    def __call__(self, of, *shape) -> Tensor:
        """Elements of magnitude 2^e, of any sign."""
        v = torch.rand(shape, generator=self.generator) + 1
        sign = torch.randint(2, shape, generator=self.generator) * 2 - 1
        e = self.e[of] if isinstance(of, str) else of
        return (v * sign * 2.0 ** (e - 1)).to(HALF)


@st.composite
def draws(draw):
    exponent = lambda low=-10, high=15: draw(st.integers(low, high))
    pick = lambda *of: draw(st.sampled_from(of))
    sizes = pick(1, 3, 19), pick(8, 33), pick(8, 24), pick(1, 4, 17)
    seed = draw(st.integers(0, 2**31))
    return Draw(exponent(), exponent(), exponent(), exponent(), exponent(-14, 12), exponent(-14, 6), sizes, seed)


def lora(x, a, b, scale):
    return nn.linear(nn.linear(x, a), b) * scale


# ---- forms: name -> function of a Draw that gives (leaves by name, ours, PEFT's), both functions of the leaves

FORMS, OF_OPS = {}, []


def form(fn):
    FORMS[fn.__name__] = fn
    return fn


def of_ops(fn):
    """With kernels on CUDA, so that it is emulated too."""
    OF_OPS.append(fn.__name__)
    return form(fn)


def layer(t: Draw, *names: str) -> dict[str, Tensor]:
    return {n: getattr(t, n) for n in ("x", "weight", "bias", "a", "b", *names)}


@of_ops
def lora_linear(t):
    theirs = lambda x, weight, bias, a, b: nn.linear(x, weight, bias) + lora(x, a, b, t.scale)
    return layer(t), lambda **v: ops.lora_linear(**v, scale=t.scale), theirs


@of_ops
def lora_add(t):
    return (
        {"y": t.y, "x": t.x, "a": t.a, "b": t.b},
        lambda **v: ops.lora_add(**v, scale=t.scale),
        lambda y, x, a, b: y + lora(x, a, b, t.scale),
    )


def products(at_shrink):
    """Both products, with the scale in either of them."""

    def make(t):
        first, second = (t.scale, 1.0) if at_shrink else (1.0, t.scale)

        def ours(x, weight, bias, a, b):
            return ops.linear_expand(x, weight, bias, ops.lora_shrink(x, a, first), b, second)

        return layer(t), ours, lora_linear(t)[2]

    return make


FORMS |= {"shrink_scaled": products(True), "expand_scaled": products(False)}
OF_OPS += ["shrink_scaled", "expand_scaled"]


@of_ops
def expand_of_peft_s(t):
    """An S of float16, as PEFT's own; without a base."""
    theirs = lambda x, a, b: lora(x, a, b, t.scale)
    ours = lambda x, a, b: ops.linear_expand(None, None, None, nn.linear(x, a), b, t.scale)
    return {"x": t.x, "a": t.a, "b": t.b}, ours, theirs


@of_ops
def expand_in_place(t):
    def ours(y, x, a, b):
        y = y.detach().clone()
        ops.lora_expand_(y, ops.lora_shrink(x.detach(), a.detach(), t.scale), b.detach())
        return y

    return lora_add(t)[0], ours, lora_add(t)[2]


def pools(t: Draw, slots=2):
    """Two adapters of t.R ranks, rows of either of them or none, scales of their own: leaves, metadata, rows by adapter."""
    M = -(-t.R // ops.multi_lora.PAGE)
    rows = 16 * M
    index = torch.randint(-1, 2, (t.T, slots), generator=t.generator, dtype=torch.int32)
    scales = t.scale * (torch.rand(t.T, slots, generator=t.generator) + 0.5)
    pages = torch.arange(2 * M, dtype=torch.int32).reshape(2, 1, M)
    table = pages, torch.full((2, 1), t.R, dtype=torch.int32), ops.multi_lora_plan(index, 2)
    return {"a_pool": t("a", 2 * rows, t.I), "b_pool": t("b", 2 * rows, t.O)}, table, index, scales, rows


def of_rows(t: Draw, y, x, a_pool, b_pool, index, scales, rows):
    """As PEFT's mixed batch, adapter by adapter, slot by slot."""
    for k in range(index.shape[1]):
        for i in range(2):
            who = (index[:, k] == i).nonzero().flatten()
            a, b = (pool[rows * i : rows * i + t.R] for pool in (a_pool, b_pool))
            s = x[who] @ a.mT if x.is_floating_point() else nn.embedding(x[who], a.mT)
            out = (s @ b).float() * scales[who, k, None] if s.dtype == HALF else (s @ b) * scales[who, k, None]
            y = y.index_add(0, who, out.to(y.dtype))
    return y


@of_ops
def multi_linear(t):
    leaves, table, index, scales, rows = pools(t)
    leaves = {"x": t.x, "weight": t.weight, "bias": t.bias} | leaves
    ours = lambda x, weight, bias, a_pool, b_pool: ops.multi_lora_linear(
        x, weight, bias, a_pool, b_pool, *table, scales
    )
    theirs = lambda x, weight, bias, a_pool, b_pool: of_rows(
        t, nn.linear(x, weight, bias), x, a_pool, b_pool, index, scales, rows
    )
    return leaves, ours, theirs


@of_ops
def multi_products(t):
    leaves, table, index, scales, rows = pools(t)

    def ours(y, x, a_pool, b_pool):
        return ops.multi_lora_expand(y, ops.multi_lora_shrink(x, a_pool, *table, scales), b_pool, *table)

    theirs = lambda y, x, a_pool, b_pool: of_rows(t, y, x, a_pool, b_pool, index, scales, rows)
    return {"y": t.y, "x": t.x} | leaves, ours, theirs


@of_ops
def multi_embedding(t):
    leaves, table, index, scales, rows = pools(t)
    ids = torch.randint(t.I, (t.T,), generator=t.generator)

    def ours(y, a_pool, b_pool):
        return ops.multi_lora_expand(y, ops.multi_lora_embedding(ids, a_pool, *table, scales), b_pool, *table)

    theirs = lambda y, a_pool, b_pool: of_rows(t, y, ids, a_pool, b_pool, index, scales, rows)
    return {"y": t.y} | leaves, ours, theirs


@of_ops
def multi_in_place(t):
    leaves, table, index, scales, rows = pools(t)
    theirs = lambda y, x, a_pool, b_pool: of_rows(t, y, x, a_pool, b_pool, index, scales, rows)

    def ours(y, x, a_pool, b_pool):
        y = y.detach().clone()
        s = ops.multi_lora_shrink(x.detach(), a_pool.detach(), *table, scales)
        ops.multi_lora_expand_(y, s, b_pool.detach(), *table)
        return y

    return {"y": t.y, "x": t.x} | leaves, ours, theirs


def dora(p):
    def make(t):
        def theirs(x, weight, bias, a, b, magnitude):
            y = nn.linear(x, weight, bias)
            norm = torch.linalg.vector_norm(weight.double() + t.scale * (b.double() @ a.double()), dim=1)
            g = magnitude / norm.detach().to(weight.dtype)
            dropped = mask(x, p)
            base = nn.linear(dropped, weight) if p else y - bias
            return y + ((g - 1) * base + g * nn.linear(nn.linear(dropped, a), b) * t.scale)

        def ours(x, weight, bias, a, b, magnitude):
            torch.manual_seed(3)
            return F.dora_linear(x, weight, bias, a, b, magnitude, t.scale, p)

        t.magnitude = t(int(torch.randint(-8, 9, (1,), generator=t.generator)), t.O)
        return layer(t, "magnitude"), ours, theirs

    def mask(x, p):
        torch.manual_seed(3)
        return x * torch.dropout(torch.ones_like(x, dtype=HALF), p, True).to(x.dtype)

    return make


FORMS |= {"dora": dora(0.0), "dora_dropout": dora(0.5)}


def vera(generated, save_output):
    def make(t):
        e = t.e["b"]
        d, b = t(min(15, max(-14, e // 2 + int(math.log2(t.scale)))), t.R), t(e - e // 2, t.O)
        # The scale of a Basis makes it as small as a stored projection may be.
        A, B = t("a", t.R, t.I), t(-3, t.R, t.O)
        ours_ab = A, B
        if generated:
            ours_ab = tuple(
                F.Basis(5 + i, "vera", t.R, n, t.R, 2.0**e) for i, (n, e) in enumerate(((t.I, t.e["a"]), (t.O, -3)))
            )
            A, B = (p.fill(t.x.float()).to(HALF) for p in ours_ab)

        def ours(x, weight, bias, d, b):
            return F.vera_linear(x, weight, bias, d, b, *ours_ab, save_output=save_output)

        def theirs(x, weight, bias, d, b):
            u = nn.linear(x, A.to(x.dtype))
            return nn.linear(x, weight, bias) + b * nn.linear(d * u, B.mT.to(x.dtype))

        return {"x": t.x, "weight": t.weight, "bias": t.bias, "d": d, "b": b}, ours, theirs

    return make


FORMS |= {
    f"vera_{'basis' if g else 'stored'}{'_output' if save else ''}": vera(g, save)
    for g in (False, True)
    for save in (False, True)
}


@form
def randlora(t):
    r, n = t.R, -(-min(t.I, t.O) // t.R)
    lam, gam = t(-1, r, n), t(int(math.log2(t.scale)) // 2, n, min(t.I, t.O))
    A, B = t("a", r, min(t.I, t.O)), t("b", n * r, max(t.I, t.O))

    def ours(x, weight, bias, lam, gam):
        return F.randlora_linear(x, weight, bias, lam, gam, A, B, t.scale)

    def theirs(x, weight, bias, lam, gam):  # as PEFT: the larger one from lambda and gamma
        u = (lam[:, :, None] * A.to(x.dtype)[:, None] * gam).flatten(0, 1)
        first, second = (u, B.to(x.dtype)) if t.I <= t.O else (B.to(x.dtype), u)
        return nn.linear(x, weight, bias) + nn.linear(nn.linear(x, first), second.mT) * t.scale

    return {"x": t.x, "weight": t.weight, "bias": t.bias, "lam": lam, "gam": gam}, ours, theirs


@form
def nola(t):
    alpha, beta = t("a", 3), t("b", 3)
    args = 5, t.R, t.I, t.O

    def theirs(x, weight, bias, alpha, beta):
        a, b = F.nola_factors(alpha.float(), beta.float(), *args)
        return nn.linear(x, weight, bias) + lora(x, a.to(x.dtype), b.to(x.dtype), t.scale)

    ours = lambda x, weight, bias, alpha, beta: F.nola_linear(x, weight, bias, alpha, beta, *args[:2], t.scale)
    return {"x": t.x, "weight": t.weight, "bias": t.bias, "alpha": alpha, "beta": beta}, ours, theirs


# ---- the comparison


def run(fn, leaves, dy, dtype):
    """The result and the gradients, in float64."""
    leaves = {n: v.detach().to(dtype).requires_grad_() for n, v in leaves.items()}
    y = fn(**leaves)
    if not y.requires_grad:
        return {"result": y.double()}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    return {"result": y.detach().double()} | {
        f"d {n}": g.double() for n, g in zip(leaves, grads, strict=True) if g is not None
    }


def check(made, dy, autocast=False, told=""):
    """How many results were finite in PEFT's expression, all of which are."""
    leaves, ours, theirs = made
    dtype, finite = torch.float32 if autocast else HALF, 0
    with torch.autocast("cpu", HALF, enabled=autocast):
        got, expression = run(ours, leaves, dy, dtype), run(theirs, leaves, dy, dtype)
    truth = run(theirs, leaves, dy, torch.float64)
    for name, value in got.items():
        peft, true = expression[name], truth[name]
        if not peft.isfinite().all() or true.abs().amax() > 0.99 * MAX:  # at the edge a rounding decides
            continue
        finite += 1
        what = f"{name}, {told}"
        assert value.isfinite().all(), f"{what}: not finite where PEFT's is, at most {peft.abs().max()}"
        off, theirs_off = ((v - true).abs().amax().item() for v in (value, peft))
        step = max(2.0**-24, true.abs().amax().item() * 2.0**-9)
        assert off <= 2 * theirs_off + step, f"{what}: off by {off}, PEFT by {theirs_off} at {true.abs().amax()}"
    return finite


def check_all(name, count, autocast=False):
    finite = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(draws())
    def each(t):
        nonlocal finite
        told = f"{name} of 2^{t.e}, scale {t.scale}, T I O R {t.T, t.I, t.O, t.R}, seed {t.generator.initial_seed()}"
        finite += check(FORMS[name](t), t("dy", t.T, t.O), autocast, told)

    each()
    assert finite >= count // 2, f"{finite} results were finite in PEFT's expression: nothing was compared"


@pytest.mark.parametrize("name", FORMS)
def test_finite_where_pefts_expression_is(name):
    check_all(name, 600 if FULL else 60)


@pytest.mark.parametrize("name", OF_OPS)
def test_the_kernels_for_cuda_too(name, stack):
    enter_device("emulated", stack)
    check_all(name, 60 if FULL else 12)


@pytest.mark.parametrize("name", ["lora_linear", "lora_add", "shrink_scaled", "expand_scaled", "dora", "dora_dropout"])
def test_under_autocast(name):
    check_all(name, 300 if FULL else 40, autocast=True)
