# SPDX-License-Identifier: Apache-2.0
"""MXFP4 beyond the registry: codes beside torchao's and the published rule, every scale, edges, random rounding, products by rows."""

import math

import pytest
import torch

import lrkern.functional as F
import lrkern.ops
from lrkern import _host, testing
from lrkern.limits import DTYPES
from lrkern.reference import mx as reference

RULES = ("floor", "rceil", "ceil", "even")
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
FINITE = torch.arange(65536).to(torch.int32).short().view(torch.bfloat16)
FINITE = FINITE[FINITE.float().isfinite()]  # all 65,280


def codes_of(packed):
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def scale_of(scales):
    """In float64; 0xFF is NaN."""
    return reference.scale_values(scales.cpu(), torch.float64)


def grids(dtype):
    """Blocks [n, 32]: all finite bfloat16, each as its block's largest and beside a larger one; ties of the elements at several
    scales; random blocks of every size from 2^-140 on."""
    g = torch.Generator().manual_seed(3)
    alone = FINITE.unflatten(0, (-1, 32))
    beside = torch.stack([FINITE, *[FINITE * f for f in (0.5, 0.25, 0.75, -0.125)]], -1)
    beside = torch.nn.functional.pad(beside[::7], (0, 27))
    middle = (VALUES[1:] + VALUES[:-1]) / 2
    ties = torch.cat([torch.tensor([6.0, 5.0, 7.0]), middle, -middle, middle * 1.0078125, middle * 0.9921875])[:32]
    ties = torch.stack(
        [torch.cat([ties[:1] * m, ties[1:]]) * 2.0**e for e in range(-120, 120, 3) for m in (1, 0.7, 1.2)]
    )
    sizes = 2.0 ** torch.arange(-140, 125).repeat_interleave(4)
    drawn = torch.randn(len(sizes), 32, generator=g).double() * sizes[:, None].double()
    blocks = [
        alone.float(),
        beside.float(),
        torch.nn.functional.pad(ties, (0, 32 - ties.shape[1])).float(),
        drawn.float(),
    ]
    blocks = torch.cat(blocks).to(dtype)
    return blocks[blocks.isfinite().all(1)]


# ---------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_codes_are_those_of_torchao(device, rule, dtype):
    """From a largest magnitude of 2^-124 on. Below it torchao divides by 2^-126 where the scale that it stores is 2^-127, and takes
    subnormals for zeros; test_codes_are_those_of_the_published_rule goes on to zero."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = grids(dtype)
    theirs_scale, theirs = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode[rule.upper()])
    codes, scales, _ = (t if t is None else t.cpu() for t in lrkern.ops.mx_quantize(x.to(device), rule))
    normal = x.float().abs().amax(1) >= 2.0**-124
    normal |= (x == 0).all(1)
    same_scale = scales[:, 0] == theirs_scale.view(torch.uint8).view(-1)
    assert same_scale[normal].all() and normal.sum() > 10000
    assert torch.equal(codes[normal], theirs.view(torch.uint8).view(-1, 16)[normal])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_the_published_rule(device, dtype):
    """OCP as microxcaling states it: 2^(floor(log2 m) - 2), elements to the nearest with ties to even, in float64; e8m0 ends at 2^-127."""
    x = grids(dtype)
    codes, scales, _ = lrkern.ops.mx_quantize(x.to(device), "floor")
    m = x.double().abs().amax(1)
    exponent = (torch.frexp(m).exponent - 3).clamp(-127, 127)
    exponent = torch.where(m == 0, -127, exponent)
    assert torch.equal(scales.cpu()[:, 0].int(), (exponent + 127).int())
    y = x.double() * 2.0 ** -exponent[:, None].double()
    distance = (y.abs().clamp_max(6)[..., None] - VALUES).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    want = (nearest * (2 - even)).argmax(-1)  # of two at one distance the even code
    assert torch.equal(codes_of(codes.cpu()).long(), want | torch.signbit(y).long() << 3)


@pytest.mark.parametrize("rule", (*RULES, "quest", "quest_nearest"))
def test_every_rule_is_the_reference_bit_for_bit(device, rule):
    x = grids(torch.float32)[::5]
    for gain, mask in ((1.0, True), (0.75, False)):
        got = lrkern.ops.mx_quantize(x.to(device), rule, gain=gain, mask=mask)
        want = reference.mx_quantize(x, rule, gain=gain, mask=mask)
        testing.check(tuple(t if t is None else t.cpu() for t in got), want, want, rule)


def test_gain_of_three_quarters_with_floor_never_clips(device):
    x = grids(torch.float32)
    x = x[x.abs().amax(1) >= 2.0**-120]
    _, _, mask = lrkern.ops.mx_quantize(x.to(device), "floor", gain=0.75, mask=True)
    assert (mask == -1).all()
    _, _, clipped = lrkern.ops.mx_quantize(x.to(device), "floor", mask=True)
    assert (clipped != -1).any()


def test_the_quest_rules_follow_the_root_mean_square(device):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4096, 32, generator=g) * 2.0 ** torch.randint(-20, 20, (4096, 1), generator=g)
    of = 0.487079 * x.double().square().mean(1).sqrt() + 1e-8
    clear = (of.log2() - of.log2().round()).abs() > 1e-5
    floor = lrkern.ops.mx_quantize(x.to(device), "quest")[1][:, 0].cpu().int() - 127
    assert torch.equal(floor[clear], of.log2().floor().int()[clear])
    nearest = lrkern.ops.mx_quantize(x.to(device), "quest_nearest")[1][:, 0].cpu().int() - 127
    clear = (of.log2() - of.log2().floor() - 0.5).abs() > 1e-5
    assert torch.equal(nearest[clear], of.log2().round().int()[clear])


@pytest.mark.parametrize("K", [32, 40, 2048])
@pytest.mark.parametrize("rule", ["even", "quest"])
def test_a_matrix_that_lies_across_is_its_copy(device, dtype, K, rule):
    x = torch.randn(K, 19).to(device, dtype).mT
    for seed in (None, torch.tensor([7]).to(device)):
        across = lrkern.ops.mx_quantize(x, rule, True, seed=seed, mask=True)
        copied = lrkern.ops.mx_quantize(x.contiguous(), rule, True, seed=seed, mask=True)
        assert all(torch.equal(a, b) for a, b in zip(across, copied, strict=True))


# ---------------------------------------------------------------------------------------------- edges

ONE = [1.0] + 31 * [0.0]
# block, rule -> scale, code of its first element: the table of docs/ops.md, "MXFP4"
EDGES = {
    "zeros": ([0.0] * 32, "even", 0x00, 0),
    "minus zero": ([-0.0] * 32, "even", 0x00, 8),
    "nan": ([math.nan, *ONE[:31]], "even", 0xFF, 0),
    "inf": ([math.inf, *ONE[:31]], "floor", 0xFF, 0),
    "-inf": ([-math.inf, *ONE[:31]], "rceil", 0xFF, 0),
    "a nan behind": ([*ONE[:31], math.nan], "ceil", 0xFF, 0),
    "tiny": ([1e-40] * 32, "floor", 0x00, 0),
    "2^-127": ([2.0**-127] * 32, "floor", 0x00, 2),
    "largest, floor": ([torch.finfo(torch.float32).max] * 32, "floor", 252, 7),
    "largest, ceil": ([torch.finfo(torch.float32).max] * 32, "ceil", 253, 6),
    "clips": ([7.99] * 32, "floor", 127, 7),
    "does not clip": ([7.99] * 32, "even", 128, 6),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "random"])
def test_edges(device, name, seed):
    block, rule, scale, code = EDGES[name]
    seed = None if seed is None else torch.tensor([seed]).to(device)
    codes, scales, _ = lrkern.ops.mx_quantize(torch.tensor([block]).to(device), rule, seed=seed)
    assert scales.item() == scale
    if seed is None or scale == 0xFF or code in (0, 8):
        assert codes[0, 0].item() & 15 == code or (seed is not None and name == "tiny")
    back = lrkern.ops.mx_dequantize(codes, scales, 32)
    assert {255: back.isnan(), 253: back.isinf()}.get(scale, back.isfinite()).all()


def test_where_torchao_differs(device):
    """An infinity has a finite scale there (0.18), so that a block becomes numbers; a NaN is NaN as here."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.tensor([[math.inf, *ONE[:31]], [math.nan, *ONE[:31]]])
    theirs = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)[0].view(torch.uint8).view(-1)
    ours = lrkern.ops.mx_quantize(x.to(device), "floor")[1].cpu().view(-1)
    assert theirs.tolist() == [253, 255] and ours.tolist() == [255, 255]


def test_every_code_and_scale_is_decoded(device, dtype):
    """Each of 4096 pairs once: exact, and rounded once where dtype's range ends."""
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = (codes[::2] | codes[1::2] << 4).expand(256, 16).contiguous()
    got = lrkern.ops.mx_dequantize(packed.to(device), scales.to(device), 32, dtype).cpu()
    values = torch.cat([VALUES, -VALUES]).repeat(2) * scale_of(scales)
    want = values.to(dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all() and torch.equal(got[:255].signbit(), want[:255].signbit())
    exact = {torch.float32: (0, 253), torch.bfloat16: (0, 253), torch.float16: (104, 141)}[dtype]
    assert torch.equal(got[slice(*exact)].double(), values[slice(*exact)])
    assert got[255].isnan().all() and got[253, 7].isinf() and (dtype == torch.float16 or got[0, 1] == 2.0**-128)


# ---------------------------------------------------------------------------------------------- Hadamard, random rounding


def sylvester():
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / 32**0.5


@pytest.mark.parametrize("signs", [None, 0, -1, 0x5A3C96F1 - 2**32, 12345], ids=str)
def test_the_transform_is_the_matrix_and_the_same_everywhere(device, signs):
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(5))
    given = None if signs is None else torch.tensor([signs]).int()
    turned = x if signs is None else x * torch.tensor([1 - 2 * (signs >> i & 1) for i in range(32)])
    want = turned.double() @ sylvester()
    torch.testing.assert_close(reference.transformed(x, given).double(), want, rtol=0, atol=1e-6)
    for rule in ("even", "quest"):
        got = lrkern.ops.mx_quantize(x.to(device), rule, True, None if given is None else given.to(device))
        plain = reference.mx_quantize(x, rule, True, given)
        assert torch.equal(got[0].cpu(), plain[0]) and torch.equal(got[1].cpu(), plain[1])
        back = lrkern.ops.mx_dequantize(*got[:2], 32).cpu().double()
        assert (back - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("hadamard", [False, True])
def test_random_rounding_has_one_seed_everywhere(device, dtype, hadamard):
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    seed = torch.tensor([2**62 + 9])
    got = lrkern.ops.mx_quantize(x.to(device), "floor", hadamard, None, seed.to(device), 0.75)
    want = reference.mx_quantize(x, "floor", hadamard, None, seed, 0.75)
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])
    other = lrkern.ops.mx_quantize(x.to(device), "floor", hadamard, None, seed.to(device) + 1, 0.75)
    assert not torch.equal(got[0], other[0])


def test_random_rounding_is_unbiased(device):
    """The mean of 1024 draws of each value is the value, within five standard errors; to the nearest it is not."""
    values = torch.linspace(-6, 6, 31)
    x = torch.cat([torch.tensor([6.0]), values]).expand(1024, 32).to(device)
    back = lambda seed: lrkern.ops.mx_dequantize(*lrkern.ops.mx_quantize(x, "floor", seed=seed)[:2], 32).cpu().double()
    draws = back(torch.tensor([11]).to(device))
    below = torch.tensor([VALUES[abs(v) >= VALUES].amax() for v in x[0].cpu().double()])
    above = torch.tensor([VALUES[abs(v) <= VALUES].amin() for v in x[0].cpu().double()])
    error = (draws.mean(0) - x[0].cpu()).abs()
    deviation = (above - below) / 2  # at most
    assert (error <= 5 * deviation / 32 + (above - below) * 2.0**-16).all()
    assert (back(None).mean(0) - x[0].cpu()).abs().max() > 0.2


# ---------------------------------------------------------------------------------------------- products


def weight(O, K, device, rule="even", seed=0):
    g = torch.Generator().manual_seed(O + K + seed)
    w = torch.randn(O, K, generator=g) * K**-0.5
    codes, scales, _ = lrkern.ops.mx_quantize(w.to(device), rule)
    return codes, scales


def low_rank(T, O, R, dtype, device):
    g = torch.Generator().manual_seed(T + O + R)
    s, b = torch.randn(T, R, generator=g), torch.randn(O, R, generator=g)
    return s.to(device, torch.float32 if dtype == torch.float16 else dtype), b.to(device, dtype)


@pytest.mark.parametrize("K", [32, 96, 2048, 40])
@pytest.mark.parametrize("O", [64, 504])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 17, 129])
def test_products_and_their_gradients(device, T, O, K):
    dtype = DTYPES[(T + K + 1) % 3]
    codes, scales = weight(O, K, device)
    g = torch.Generator().manual_seed(T)
    x, bias, dy = (torch.randn(*n, generator=g).to(device, dtype) for n in ((T, K), (O,), (T, O)))
    s, b = low_rank(T, O, 5, dtype, device)
    for names, op, truth, args in (
        ("x bias", lrkern.ops.mx_linear, reference.mx_linear, (x, bias)),
        ("x bias s b", lrkern.ops.mx_linear_expand, reference.mx_linear_expand, (x, bias, s, b)),
    ):
        results = []
        for fn, convert in ((op, lambda t: t), (truth, testing.to64), (truth, lambda t: t)):
            leaves = [convert(t).detach().clone().requires_grad_() for t in args]
            y = fn(leaves[0], codes, scales, *leaves[1:])
            y.backward(dy.to(y.dtype))
            results.append((y, *(t.grad for t in leaves)))
        for what, *parts in zip(["y", *names.split()], *results, strict=True):
            # Seen beyond 2 x: 11.3 ulps of dx, sums of 504 terms of 58 in all that come to 8 (MKL, AVX-512).
            ulps = 12 if (T, O, what) == (1, 504, "x") else 4
            testing.check(*parts, f"{op.__name__} {what}", fp32_factor=dtype != torch.float32, ulps=ulps)


@pytest.mark.parametrize("T", [1, 5, 8, 9, 16, 40])
@pytest.mark.parametrize("K", [40, 544])
def test_products_are_exact_where_sums_are(device, dtype, T, K):
    """Small integers: no sum needs more than 24 bits, so that every order gives the same, and it fits bfloat16's 8."""
    g = torch.Generator().manual_seed(K)
    integers = lambda *n: torch.randint(-2, 3, n, generator=g).float()
    w = integers(48, K) * (torch.rand(48, K, generator=g) < 12 / K)
    w[:, 0::32] = 4.0  # every block has the scale 1
    codes, scales, _ = lrkern.ops.mx_quantize(w.to(device), "floor")
    assert torch.equal(lrkern.ops.mx_dequantize(codes, scales, K).cpu(), w) and (scales == 127).all()
    x, s, b = integers(T, K).to(device, dtype), integers(T, 3), integers(48, 3)
    want = x.cpu().double() @ w.double().T
    y = lrkern.ops.mx_linear(x, codes, scales)
    assert torch.equal(y.cpu(), want.to(dtype))
    s = s.to(device, torch.float32 if dtype == torch.float16 else dtype)
    y = lrkern.ops.mx_linear_expand(x, codes, scales, None, s, b.to(device, dtype))
    assert torch.equal(y.cpu(), (want + s.cpu().double() @ b.double().T).to(dtype))


@pytest.mark.parametrize("T", [1, 12])
def test_large_scales_take_part(device, dtype, T):
    """Scales above 2 and below beside each other, to the ends: on CUDA a warp multiplies once for small ones, else twice."""
    K = 544
    codes = torch.randint(0, 256, (24, 16 * 17), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).to(dtype)
    for scales in ([126, 127, 128], [128, 129, 130], [0, 1, 128], [90, 128, 135]):
        chosen = torch.tensor(scales)[torch.randint(0, 3, (24, 17), generator=torch.Generator().manual_seed(1))]
        chosen = chosen.to(torch.uint8)
        y = lrkern.ops.mx_linear(x.to(device), codes.to(device), chosen.to(device)).cpu()
        w = reference.mx_dequantize(codes, chosen, K, torch.float64)
        want = x.double() @ w.T
        bound = testing.ulp(1.0, dtype) * want.abs() + 3e-6 * (x.double().abs() @ w.abs().T)
        assert ((y.double() - want).abs() <= bound).all()


def test_a_nan_block_and_an_infinite_feature_show(device, dtype):
    """In their row of W and of x, and nowhere else."""
    codes, scales = weight(20, 96, device)
    scales[3, 1] = 255
    for T in (2, 11, 40):
        x = torch.ones(T, 96).to(device, dtype)
        y = lrkern.ops.mx_linear(x, codes, scales)
        assert y[:, 3].isnan().all() and y.isnan().sum() == T
        x[1, 40] = math.inf
        y, w = lrkern.ops.mx_linear(x, codes, scales), lrkern.ops.mx_dequantize(codes, scales, 96)
        zero = w[:, 40] == 0
        assert not y[1].isfinite().any() and y[0].isfinite().sum() == 19
        assert (y[1][~zero & ~w[:, 40].isnan()] == math.inf * w[~zero & ~w[:, 40].isnan(), 40].sign()).all()


@pytest.mark.parametrize("T", [1, 6, 33])
def test_lora_on_top_is_the_dense_formula(device, T):
    K, O, R = 96, 64, 8
    codes, scales = weight(O, K, device)
    g = torch.Generator().manual_seed(T)
    x, a, b, dy = (torch.randn(*n, generator=g).to(device) for n in ((T, K), (R, K), (O, R), (T, O)))
    w = lrkern.ops.mx_dequantize(codes, scales, K)

    def packed(x, a, b):
        return lrkern.ops.mx_linear_expand(x, codes, scales, None, lrkern.ops.lora_shrink(x, a, 0.5), b)

    dense = lambda x, a, b: x @ (w.to(x.dtype) + 0.5 * b @ a).T
    results = []
    for fn, convert in ((packed, lambda t: t), (dense, testing.to64), (dense, lambda t: t)):
        leaves = [convert(t).clone().requires_grad_() for t in (x, a, b)]
        y = fn(*leaves)
        y.backward(dy.to(y.dtype))
        results.append((y, *(t.grad for t in leaves)))
    for what, *parts in zip(("y", "dx", "da", "db"), *results, strict=True):
        testing.check(*parts, what, fp32_factor=True, ulps=8)


def test_few_rows_do_not_depend_on_the_others(device, dtype, request):
    """On CUDA up to 16, on the CPU 2 to 8 or 32, and one alone; each row of x is summed in one order."""
    codes, scales = weight(48, 544, device)
    x = torch.randn(32, 544).to(device, dtype)
    on_cpu = request.node.callspec.params["device"] == "cpu"
    question = dict(O=48, K=544, halves=int(dtype != torch.float32), device="cpu" if on_cpu else "cuda")
    few = [T for T in range(1, 33) if _host.explain("mx_linear", T=T, **question)["few"]]
    assert few == [*range(1, few[-1] + 1)] and few[-1] in ((8, 32) if on_cpu else (16,))
    all_rows = lrkern.ops.mx_linear(x[: few[-1]], codes, scales)
    for T in few[1 if on_cpu else 0 : -1]:
        assert torch.equal(lrkern.ops.mx_linear(x[:T], codes, scales), all_rows[:T]), T
    one = lrkern.ops.mx_linear(x[:1], codes, scales).float()
    assert (one - all_rows[:1].float()).abs().max() <= testing.ulp(8.0, dtype)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("power", [-130, -60, -46, 0, 50, 58, 110])
def test_numbers_of_all_sizes(device, T, power, request):
    """The CPU's integers hold rows of [2^-48, 2^56), its sums of a block those below 2^112; an outlier beside small ones too. CUDA's terms
    end at 2^-133."""
    smallest = 2.0**-140 if request.node.callspec.params["device"] == "cpu" else 2.0**-130
    codes, scales = weight(24, 544, device)
    codes[5:9, 16:18] = 0  # W has no part in the outlier
    g = torch.Generator().manual_seed(T)
    x = torch.randn(T, 544, generator=g, dtype=torch.float64) * 2.0**power
    x[:, 32:36] *= 2.0 ** (14 if power else 20)
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        y = lrkern.ops.mx_linear(given.to(device), codes, scales).cpu().double()
        w = reference.mx_dequantize(codes, scales, 544, torch.float64).cpu()
        want, size = given.double() @ w.T, given.double().abs() @ w.abs().T
        least = max(smallest, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert ((y - want).abs() <= testing.ulp(1.0, dtype) * want.abs() + 1e-6 * size + least).all()


# ---------------------------------------------------------------------------------------------- memory, bad buffers


def test_no_decoded_copy_of_w_is_made_or_saved():
    """T = 64 takes panels: the largest tensor is one of them; the gradient keeps W's bytes alone."""
    O = K = 2048
    codes, scales = weight(O, K, "cpu")
    x = torch.randn(64, K).requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        lrkern.ops.mx_linear(x, codes, scales).sum().backward()
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {codes.data_ptr(), scales.data_ptr()}
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(events) <= 2 * 4 * 2**19 < 4 * O * K


def test_bad_buffers_are_refused_before_anything_is_made(device):
    codes, scales = weight(20, 96, device)
    x = torch.randn(3, 96).to(device)
    for bad, text in (
        ((codes[:, :24], scales), "codes must have whole blocks"),
        ((codes, scales[:, :2]), "scales must have shape"),
        ((codes[:-1], scales), "scales must have shape"),
        ((codes.int(), scales), "codes must be uint8"),
        ((codes, scales.view(torch.int8)), "scales must be uint8"),
        ((codes[:, :32], scales[:, :2]), r"must lie in \[33, 64\]"),
    ):
        for call in (lambda c, s: lrkern.ops.mx_linear(x, c, s), lambda c, s: lrkern.ops.mx_dequantize(c, s, 96)):
            with pytest.raises(RuntimeError, match=text):
                call(*bad)


def test_codes_between_blocks(device, request):
    """A view that begins anywhere: the CPU reads it, a GPU's loads of whole blocks could not."""
    codes, scales = weight(20, 96, device)
    x, moved = torch.randn(3, 96).to(device), torch.empty(codes.numel() + 32, dtype=torch.uint8).to(device)
    start = 1 - moved.data_ptr() % 16 + 16
    view = moved[start : start + codes.numel()].view_as(codes).copy_(codes)
    if request.node.callspec.params["device"] == "cpu":
        assert torch.equal(lrkern.ops.mx_linear(x, view, scales), lrkern.ops.mx_linear(x, codes, scales))
    else:
        with pytest.raises(RuntimeError, match="codes must begin at a multiple of 16 bytes"):
            lrkern.ops.mx_linear(x, view, scales)


# ---------------------------------------------------------------------------------------------- Blackwell's layout of scales


@pytest.mark.parametrize(("R", "G"), [(1, 1), (128, 4), (129, 5), (200, 6), (300, 64), (64, 3), (0, 4), (7, 0)])
def test_scales_lie_as_blackwell_reads_them(R, G):
    scales = torch.randint(0, 256, (R, G)).to(torch.uint8)
    swizzled = F.swizzle_scales(scales)
    assert torch.equal(F.unswizzle_scales(swizzled, R, G), scales)
    assert F.swizzle_scales(scales.view(torch.float8_e8m0fnu)).dtype == torch.float8_e8m0fnu
    r, g = torch.arange(R)[:, None], torch.arange(G)[None]
    at = (r // 128 * -(-G // 4) + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4  # as csrc/mx.h
    assert torch.equal(swizzled[at.flatten()].view(R, G), scales)
    assert swizzled.long().sum() == scales.long().sum(), "the padding is zeros"
    if R and G:
        utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
        assert torch.equal(swizzled, utils.to_blocked(scales))
        assert torch.equal(utils.from_blocked(swizzled, R, G), scales)


def test_the_layout_of_scales_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"swizzle_scales: scales must have shape \[R, G\] .*, got \[3\] of uint8"):
        F.swizzle_scales(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"a dtype of one byte, got \[3, 4\] of int32"):
        F.swizzle_scales(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"swizzled must have 1024 elements of one byte.*, got 512 of uint8"):
        F.unswizzle_scales(torch.zeros(512, dtype=torch.uint8), 130, 4)
