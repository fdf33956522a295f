# SPDX-License-Identifier: Apache-2.0
"""MoRA beside its published formulation, written from the formulas: every type over sizes that divide and do not."""

import pytest
import torch
from torch import Tensor

import lrkern.ops
from lrkern import testing
from lrkern.reference import OPS

TYPES = (1, 2, 3, 4, 6)
SIZES = [(64, 64), (96, 64), (64, 96), (100, 60), (60, 100), (97, 61), (64, 256), (256, 64)]
layers = pytest.mark.parametrize(("I", "O"), SIZES, ids=lambda n: str(n))
types = pytest.mark.parametrize("type", TYPES)


def rank_of(I, O, type, r=8):
    rank = int(((I + O) * r) ** 0.5 + 0.5)
    return rank // 2 * 2 if type == 6 else rank


def cut(t: Tensor, rank: int) -> list[Tensor]:
    """Neighbouring columns in rank parts, the first ones longer."""
    q, rest = divmod(t.shape[-1], rank)
    return list(t.split([q + 1] * rest + [q] * (rank - rest), -1))


def published(x: Tensor, m: Tensor, O: int, type: int) -> Tensor:
    """The adapter's part in torch's own views, pads, sums and concatenations."""
    r, I = m.shape[0], x.shape[-1]
    padded = torch.cat([x, *[x] * (r // max(I, 1) + 1)], -1)[..., : -(-I // r) * r]
    if type == 6:
        chunks = padded.unflatten(-1, (-1, r))
        n, half = chunks.shape[-2], r // 2
        angle = torch.arange(n)[:, None] * 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / r)
        cos, sin = (torch.cat([t, t], -1).to(x) for t in (angle.cos(), angle.sin()))
        swapped = torch.cat([-chunks[..., half:], chunks[..., :half]], -1)
        y = ((chunks * cos + swapped * sin) @ m.mT).flatten(-2)
        return torch.cat([y] * (O // (n * r) + 1), -1)[..., :O]
    h = padded.unflatten(-1, (-1, r)).sum(-2) if type in (1, 4) else torch.stack([c.sum(-1) for c in cut(x, r)], -1)
    z = h @ m.mT
    if type in (1, 3):
        return torch.cat([z] * -(-O // r), -1)[..., :O]
    q, rest = divmod(O, r)
    return z.repeat_interleave(torch.tensor([q + 1] * rest + [q] * (r - rest)), -1)


def drawn(I, O, r, T=5):
    g = torch.Generator().manual_seed(I + 7 * O + r)
    new = lambda *shape: torch.randn(*shape, generator=g)
    return new(T, I), new(O, I) * I**-0.5, new(O), new(r, r) * I**-0.5, new(T, O)


def delta(m, I, O, type, circular=True):
    return lrkern.ops.mora_add(m.new_zeros(I, O), torch.eye(I, dtype=m.dtype), m, type, circular).mT


@layers
@types
def test_forward_and_gradients_are_the_published(I, O, type, device):
    x, w, bias, m, dy = drawn(I, O, rank_of(I, O, type))
    results = []
    for convert, ours in ((lambda t: t, True), (testing.to64, False), (lambda t: t, False)):
        own = [convert(t).detach().to(device).requires_grad_() for t in (x, w, bias, m)]
        if ours:
            y = lrkern.ops.mora_linear(*own, type)
        else:
            y = torch.nn.functional.linear(*own[:3]) + published(own[0], own[3], O, type)
        results.append((y, *torch.autograd.grad(y, own, dy.to(y))))
    testing.check(*results, f"type {type}")


@pytest.mark.parametrize(("I", "O", "r"), [(20, 24, 32), (20, 12, 50), (7, 9, 8), (64, 64, 64), (16, 40, 16)])
@types
def test_an_m_wider_than_a_side(I, O, r, type, device):
    """r over I, which the published code takes up to 2 I, over O, and one chunk."""
    x, _, _, m, _ = drawn(I, O, r)
    y = lrkern.ops.mora_add(torch.zeros(5, O, device=device), x.to(device), m.to(device), type)
    torch.testing.assert_close(y.cpu(), published(x, m, O, type), atol=2e-5, rtol=1e-4)


@types
def test_the_maps_are_the_index_formulas(type):
    """ΔW[i, j] = M[out(i), in(j)], with the first columns twice where cycles pad."""
    I, O, r = 97, 61, 22
    m = torch.randn(r, r)
    if type == 6:
        want = torch.zeros(O, I)
        for i in range(-(-O // r)):
            for p in range(r):
                c = torch.zeros(r)
                angle = torch.tensor(float(i)) * 10000.0 ** (-2 * (p % (r // 2)) / r)
                c[p], c[(p + r // 2) % r] = angle.cos(), angle.sin() * (1 if p < r // 2 else -1)
                rows = slice(i * r, min((i + 1) * r, O))
                want[rows, i * r + p] += (m @ c)[: rows.stop - rows.start]
    else:
        g = lambda j, q, n: j // (q + 1) if j < n * (q + 1) else n + (j - n * (q + 1)) // q
        into = [g(j, *divmod(I, r)) if type in (2, 3) else j % r for j in range(I)]
        out = [g(i, *divmod(O, r)) if type in (2, 4) else i % r for i in range(O)]
        want = m[out][:, into]
        if type in (1, 4):
            for j in range(-I % r):
                want[:, j] += m[out, (I + j) % r]
    torch.testing.assert_close(delta(m, I, O, type), want, atol=1e-6, rtol=1e-5)


@layers
@types
def test_fold_and_unfold_are_adjoint(I, O, type, device):
    """<fold x, h> = <x, foldᵀ h>, of both sides and paddings; in float64 sums of what the kernels give."""
    r = rank_of(I, O, type)
    n = min(-(-I // r), -(-O // r))
    dot = lambda a, b: (a.double() * b.double()).sum().item()
    draw = lambda *shape: torch.randn(*shape, device=device)
    x, y, h = draw(3, I), draw(3, O), draw(3, *((n, r) if type == 6 else (r,)))
    chunks = n if type == 6 else 0
    fold, unfold = lrkern.ops.mora_compress, lrkern.ops.mora_decompress
    for circular in (True, False):
        left = dot(fold(x, r, type, circular, chunks), h)
        assert left == pytest.approx(dot(x, unfold(h, I, type, circular, adjoint=True)), abs=1e-4)
    left = dot(unfold(h, O, type), y)
    assert left == pytest.approx(dot(h, fold(y, r, type, chunks=chunks, adjoint=True)), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.bfloat16], ids=["m_float32", "m_bfloat16"])
def test_type_6_goes_some_tokens_at_a_time(dtype, m_dtype):
    """Of 16384 slots 32 tokens on the CPU: three times, the last one fewer. dM of a 16-bit M is rounded once for all that."""
    if m_dtype != torch.float32 and dtype == torch.float32:
        return
    I, r, T = 16384, 32, 70
    x, dy, m = torch.randn(T, I).to(dtype), torch.randn(T, I).to(dtype), (torch.randn(r, r) / 6).to(m_dtype)
    results = []
    for convert, ours in ((lambda t: t, True), (testing.to64, False), (lambda t: t, False)):
        x_, m_ = (convert(t).detach().requires_grad_() for t in (x, m))
        y = convert(torch.zeros_like(dy))
        part = lambda y, x, m, ours=ours: lrkern.ops.mora_add(y, x, m, 6) if ours else y + published(x, m, I, 6).to(y)
        y = part(y, x_ if ours else x_.to(m_.dtype), m_)
        results.append((y, *torch.autograd.grad(y, (x_, m_), dy.to(y))))
    testing.check(*results, "panels", fp32_factor=m_dtype != dtype)


def test_padding_counts_twice_or_is_zero(device):
    x = torch.randn(4, 10, device=device)
    plain = torch.stack([x[:, p::4].sum(1) for p in range(4)], 1)
    twice = plain + torch.cat([torch.zeros(4, 2, device=device), x[:, :2]], 1)
    torch.testing.assert_close(lrkern.ops.mora_compress(x, 4), twice)
    torch.testing.assert_close(lrkern.ops.mora_compress(x, 4, circular=False), plain)
    torch.testing.assert_close(lrkern.ops.mora_compress(x, 4, 2), torch.stack([c.sum(1) for c in cut(x, 4)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dead_inputs_of_type_6(dtype, device):
    """Of in > out only ceil(out / r) r inputs count: the others get exactly the base's gradient, and may hold anything."""
    r = rank_of(256, 64, 6)
    assert r == 50
    x, _, _, m, dy = (t.to(device, dtype) for t in drawn(256, 64, r))
    live = -(-64 // r) * r
    x.requires_grad_()
    y = lrkern.ops.mora_add(torch.zeros_like(dy), x, m, 6)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert not dx[:, live:].any() and dx[:, :live].any(0).all()
    with torch.no_grad():
        x[:, live:] = torch.inf
        assert torch.equal(lrkern.ops.mora_add(torch.zeros_like(dy), x, m, 6), y)


@types
def test_gradients_of_the_maps_have_gradients(type):
    x = torch.randn(2, 13, dtype=torch.float32, requires_grad=True)
    for circular in (True, False):
        h = lrkern.ops.mora_compress(x, 4, type, circular)
        (g,) = torch.autograd.grad(h.square().sum() / 2, x, create_graph=True)  # FᵀF x
        (gg,) = torch.autograd.grad(g.square().sum() / 2, x)  # (FᵀF)² x
        f = OPS["mora_compress"].truth(torch.eye(13, dtype=torch.float64), 4, type, circular).flatten(1)
        torch.testing.assert_close(g.double(), x.double() @ f @ f.mT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gg.double(), x.double() @ f @ f.mT @ f @ f.mT, atol=1e-5, rtol=1e-5)


@types
def test_thread_counts_give_the_same_bits(type):
    """Of the kernels; products are ATen's, which fold and unfold surround."""
    x, results = torch.randn(300, 520), []
    h = torch.randn(300, *((5, 104) if type == 6 else (104,)))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made = lrkern.ops.mora_compress(x, 104, type), lrkern.ops.mora_decompress(h, 520, type, adjoint=True)
        results.append(made)
    torch.set_num_threads(1)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("type", [1, 6])
def test_what_is_saved(type):
    """Type 1 keeps the fold alone and lets x go; type 6 keeps x, and nothing else of its size."""
    x, w, _, m, _ = drawn(256, 256, 32, T=64)
    x.requires_grad_(), m.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lrkern.ops.mora_linear(x, w, None, m, type)
    sizes = sorted(t.numel() for t in kept if t is not None)
    assert sizes == ([m.numel(), 64 * 32, w.numel()] if type == 1 else [m.numel(), x.numel(), w.numel()])


def test_16_bit_sums_of_many_columns_stay_in_range():
    """As LoRA's S, the fold beside float16 is float32: 100 columns of 1000 leave float16's range."""
    x, m = torch.full((2, 400), 1000.0).half(), (torch.eye(4) * 1e-3).half()
    y = lrkern.ops.mora_add(torch.zeros(2, 8).half(), x, m)
    assert y.isfinite().all() and torch.allclose(y.float(), torch.tensor(100.0), rtol=1e-2)
    assert lrkern.ops.mora_compress(x, 4).dtype == torch.float32


def test_type_5_does_not_exist(device):
    x, w, bias, m, _ = (t.to(device) for t in drawn(16, 12, 4))
    for type in (0, 5, 7, -1):
        for call in (
            lambda type=type: lrkern.ops.mora_linear(x, w, bias, m, type),
            lambda type=type: lrkern.ops.mora_compress(x, 4, type),
            lambda type=type: lrkern.ops.mora_decompress(x, 4, type),
            lambda type=type: lrkern.ops.mora_add(x @ w.T, x, m, type),
        ):
            with pytest.raises(RuntimeError, match=rf"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got {type}"):
                call()
