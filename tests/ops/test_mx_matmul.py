# SPDX-License-Identifier: Apache-2.0
"""FP4 times FP4 beyond the registry: exact where sums are, every pair of extreme scales, alpha, what lies past the columns, memory."""

import pytest
import torch

from lrkern import ops
from lrkern.limits import DTYPES
from lrkern.reference import mx as reference
from tests.conftest import AMX


def packed(rows, K, device, scales=(126, 129), seed=0):
    """Any codes beside scales drawn from a range of bytes."""
    g, G = torch.Generator().manual_seed(rows + K + seed), -(-K // 32)
    draw = lambda n, low, high: torch.randint(low, high, (rows, n), generator=g).to(torch.uint8).to(device)
    return draw(16 * G, 0, 256), draw(G, *scales)


def product(a, b, K, size=lambda t: t):
    """In float64, of the operands in float64."""
    a, b = (reference.mx_dequantize(*(t.cpu() for t in each), K, torch.float64) for each in (a, b))
    return size(a) @ size(b).mT


@pytest.mark.parametrize("K", [32, 40, 96, 2048])
@pytest.mark.parametrize("O", [1, 64, 504])
def test_exact_where_sums_are(device, O, K):
    """Scales of 1/2, 1 and 2: products are multiples of 2^-4 up to 144, so that no sum needs more than 24 bits, in any order. alpha is a
    GEMM's, which may round alpha times an element (MKL) or alpha times the sum, in float32 in either case."""
    b = packed(O, K, device)
    for i, T in enumerate((1, 2, 7, 16, 17, 129, 257)):
        a = packed(T, K, device, seed=1)
        want = product(a, b, K)
        assert torch.equal(ops.mx_matmul(*a, *b, K).cpu().double(), want)
        dtype = DTYPES[i % 3]
        assert torch.equal(ops.mx_matmul(*a, *b, K, dtype).cpu(), want.to(dtype)), "rounded once"
        scaled, eps = want / 9, torch.finfo(dtype).eps
        error = (ops.mx_matmul(*a, *b, K, dtype, 1 / 9).cpu().double() - scaled).abs()
        bound = 0.505 * eps * scaled.abs() + 2.0**-21 * product(a, b, K, torch.abs) / 9
        assert (error <= bound).all(), "alpha before the one rounding"


def test_leading_dimensions_and_views(device, dtype):
    codes, scales = packed(12, 96, device)
    b = packed(20, 96, device, seed=1)
    flat = ops.mx_matmul(codes, scales, *b, 96, dtype)
    for shape in ((3, 4), (1, 12), (2, 2, 3)):
        assert torch.equal(
            ops.mx_matmul(codes.view(*shape, 48), scales.view(*shape, 3), *b, 96, dtype), flat.view(*shape, 20)
        )
    assert torch.equal(
        ops.mx_matmul(codes[5], scales[5], *b, 96, dtype), ops.mx_matmul(codes[5:6], scales[5:6], *b, 96, dtype)[0]
    )
    wide = torch.cat([codes, codes], 1)[:, :48], torch.cat([scales, scales], 1)[:, 3:]
    assert torch.equal(ops.mx_matmul(*wide, *b, 96, dtype), flat)
    assert ops.mx_matmul(codes, scales, b[0][:0], b[1][:0], 96, dtype).shape == (12, 0)
    empty = torch.empty(3, 0, dtype=torch.uint8).to(device)
    assert torch.equal(ops.mx_matmul(empty, empty, empty, empty, 0, dtype).cpu(), torch.zeros(3, 3, dtype=dtype))


def test_what_lies_past_the_columns_has_no_part(device):
    """Whatever its codes are, in both operands."""
    a, b = packed(5, 64, device), packed(7, 64, device, seed=1)
    assert torch.equal(ops.mx_matmul(*a, *b, 41).cpu().double(), product(a, b, 41))
    assert not torch.equal(product(a, b, 41), product(a, b, 64))


def low_rank(T, O, R, device, dtype):
    """Small whole numbers, which every dtype holds."""
    g = torch.Generator().manual_seed(T + O + R)
    return [torch.randint(-3, 4, n, generator=g).to(dtype).to(device) for n in ((O,), (T, R), (O, R))]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("R", [0, 1, 16, 72])
def test_bias_and_a_low_rank_before_the_one_rounding(device, dtype, R, wide):
    """Exact, as above: alpha (A Bᵀ + S Uᵀ) + bias is rounded once."""
    T, O, K = 33, 40, 96
    a, b = packed(T, K, device), packed(O, K, device, seed=1)
    values = reference.mx_dequantize(*(t.cpu() for t in a), K, torch.float64)
    if wide:  # of the same values
        ones = torch.full_like(a[1], 127)
        a = reference.mx_dequantize(a[0].cpu(), ones.cpu(), K).to(torch.float8_e4m3fn).to(device), a[1]
    bias, s, u = low_rank(T, O, R, device, dtype)
    double = lambda t: t.cpu().double()
    want = values @ reference.mx_dequantize(*(t.cpu() for t in b), K, torch.float64).mT
    whole = ((want + double(s) @ double(u).mT) * 2 + double(bias)).to(dtype)
    assert torch.equal(ops.mx_matmul(*a, *b, K, dtype, 2.0, bias, s, u).cpu(), whole)
    assert torch.equal(
        ops.mx_matmul(*a, *b, K, dtype, 2.0, None, s, u).cpu(), ((want + double(s) @ double(u).mT) * 2).to(dtype)
    )
    assert torch.equal(ops.mx_matmul(*a, *b, K, dtype, 1.0, bias).cpu(), (want + double(bias)).to(dtype))
    assert torch.equal(ops.mx_matmul(*a, *b, 70, dtype), ops.mx_matmul(a[0].clone(), a[1].clone(), *b, 70, dtype))


def test_no_features_leave_the_low_rank_and_the_bias(device, dtype):
    empty = torch.empty(3, 0, dtype=torch.uint8).to(device)
    bias, s, u = low_rank(3, 3, 5, device, dtype)
    for none in (empty, empty.view(torch.float8_e4m3fn)):
        y = ops.mx_matmul(none, empty, empty, empty, 0, dtype, 1.0, bias, s, u)
        assert torch.equal(y.cpu(), (s.cpu().double() @ u.cpu().double().mT + bias.cpu()).to(dtype))
        y = ops.mx_matmul(none, empty, empty, empty, 0, dtype, 1.0, bias)
        assert torch.equal(y.cpu(), bias.cpu().expand(3, 3))


def test_a_in_8_bits_reads_its_scales(device):
    """Every byte of e4m3 but NaN, under every byte of e8m0 whose product float32 holds."""
    codes = torch.arange(256)[(torch.arange(256) & 127) != 127].to(torch.uint8).repeat(2)[:480].view(15, 32)
    scales = torch.arange(40, 220, 12)[:, None].to(torch.uint8)
    b = torch.zeros(32, 16, dtype=torch.uint8)
    for k in range(32):
        b[k, k // 2] = 2 << k % 2 * 4  # the matrix of ones on its diagonal
    ones = torch.full((32, 1), 127, dtype=torch.uint8)
    to = lambda *each: (t.to(device) for t in each)
    y = ops.mx_matmul(*to(codes.view(torch.float8_e4m3fn), scales, b, ones), 32)
    assert torch.equal(y.cpu(), codes.view(torch.float8_e4m3fn).float() * torch.exp2(scales.float() - 127))
    scales[3] = 255
    assert ops.mx_matmul(*to(codes.view(torch.float8_e4m3fn), scales, b, ones), 32).cpu().isnan().sum() == 32


BYTES = torch.tensor([0, 1, 2, 64, 126, 190, 252, 253, 254, 255])


@pytest.mark.parametrize("code", [2, 4, 7])
@pytest.mark.parametrize("T", [1, 3])
def test_every_pair_of_extreme_scales(request, device, dtype, code, T):
    """All codes 1, 2 or 6, rows of one scale each: elements are those of float32, and their products IEEE's. Beyond its range infinite
    (2^127 times 2, 2^126 times 6), nothing flushed on the way in: 2^-127 times 2^127 is 1."""
    if AMX and dtype == torch.bfloat16 and request.node.callspec.params["device"] == "emulated":
        pytest.skip("ATen's product on the CPU stands here for the GPU's, and AMX takes subnormal bf16 for zero")
    n, K = len(BYTES), 64
    codes = torch.full((n, 32), code | code << 4).to(torch.uint8).to(device)
    scales = BYTES[:, None].repeat(1, 2).to(torch.uint8).to(device)
    got = ops.mx_matmul(codes.repeat(T, 1), scales.repeat(T, 1), codes, scales, K, dtype).cpu()
    rows = ops.mx_dequantize(codes, scales, K).cpu().double()
    want = (rows @ rows.mT).float().to(dtype).repeat(T, 1)
    same = (got == want) | (got.isnan() & want.isnan())
    tiny = want.abs() < torch.finfo(dtype).tiny  # a GEMM may flush a result that is subnormal
    assert (same | (tiny & (got == 0))).all(), (got[:n], want[:n])
    one = BYTES.tolist().index(0), BYTES.tolist().index(254)
    if code == 2:
        assert got[one] == 64 and got[one[::-1]] == 64
    assert got[:, -1].isnan().all() and got[n - 1].isnan().all() and got[:1, : n - 3].isfinite().all()


def test_a_block_of_nan_stays_in_its_row(device, dtype):
    a, b = packed(9, 96, device), packed(11, 96, device, seed=1)
    a[1][4, 2] = 255
    y = ops.mx_matmul(*a, *b, 96, dtype)
    assert y[4].isnan().all() and y.isnan().sum() == 11


def test_b_is_decoded_in_panels():
    """Of 2^19 elements, and A whole: nothing of the size of B in float32 is made."""
    K, O, T = 1024, 4096, 16
    a, b = packed(T, K, "cpu"), packed(O, K, "cpu", seed=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.mx_matmul(*a, *b, K)
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events) == 4 * 2**19 < 4 * O * K and torch.equal(y.double(), product(a, b, K))


def test_what_does_not_fit_is_refused(device):
    a, b, low = packed(3, 64, device), packed(5, 64, device), low_rank(3, 5, 4, device, torch.float32)
    wide = torch.ones(3, 64).to(torch.float8_e4m3fn).to(device)
    for args, text in (
        ((a[0], a[1][:2], *b, 64), r"a_scales must have shape \[..., G\] = \[3, 2\], got \[2, 2\]"),
        ((a[0].int(), a[1], *b, 64), "a_codes must be uint8 or float8_e4m3fn, got int32"),
        ((*a, b[0], b[1].float(), 64), "b_scales must be uint8, got float32"),
        ((*a, b[0][0], b[1][0], 64), r"b_codes must have shape \[O, 16 G\], got \[32\]"),
        ((*a, b[0][:, :16], b[1][:, :1], 64), "b_codes must have 2 blocks a row, as a_codes has, got 1"),
        ((*a, b[0][:, :8], b[1], 64), "b_codes must have whole blocks of 16 bytes"),
        ((*a, *b, 32), r"columns must lie in \[33, 64\], the features of 2 blocks, got 32"),
        ((*a, *b, 64, torch.float64), "dtype must be float32, float16 or bfloat16, got float64"),
        ((*a, *b, 64, torch.float32, float("inf")), "alpha must be finite in float32, got inf"),
        ((*a, *b, 64, torch.float32, 1.0, low[0][:3]), r"bias must have shape \[O\] = \[5\], got \[3\]"),
        ((*a, *b, 64, torch.bfloat16, 1.0, low[0]), "bias must be bfloat16, got float32"),
        ((*a, *b, 64, torch.float32, 1.0, None, low[1]), "s and u must be given together, got one of them"),
        (
            (*a, *b, 64, torch.float32, 1.0, None, low[1][:2], low[2]),
            r"s must have shape \[..., R\] = \[3, 4\], got \[2, 4\]",
        ),
        (
            (*a, *b, 64, torch.float32, 1.0, None, low[1], low[2][:2]),
            r"u must have shape \[O, R\] = \[5, \*\], got \[2, 4\]",
        ),
        ((*a, *b, 64, torch.float32, 1.0, None, low[1].half(), low[2]), "s must be float32, got float16"),
        (
            (wide[:, :33], a[1], *b, 64),
            r"a_codes must have whole blocks of 32 bytes as its last dimension, got \[3, 33\]",
        ),
        ((wide[:, :32], a[1], *b, 64), r"a_scales must have shape \[..., G\] = \[3, 1\], got \[3, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=f"lrkern::mx_matmul: {text}"):
            ops.mx_matmul(*args)
    with pytest.raises(
        RuntimeError, match="b_codes must be on the device of a_codes|all tensors must be on one device"
    ):
        ops.mx_matmul(*a, b[0].to("meta"), b[1].to("meta"), 64)
