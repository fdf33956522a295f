# SPDX-License-Identifier: Apache-2.0
"""MXFP4. Formats and rules: see ops/mx.py."""

from collections.abc import Iterator
from functools import partial

import torch

from .lora import add, s_dtype
from .registry import Draw, Family, Sample, register
from .rng import philox4x32

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX, BITS16 = 5, 1  # method and distribution of the stream


def blocks_of(x):
    """[..., G, 32], zeros past the end"""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))


def transformed(v, signs=None):
    """H v / sqrt(32) of blocks, sums in the order of the butterfly"""
    if signs is not None:
        v = v * (1 - 2 * (signs.long() >> torch.arange(32, device=v.device) & 1)).to(v.dtype)
    for h in (1, 2, 4, 8, 16):
        a, b = v.unflatten(-1, (-1, 2, h)).unbind(-2)
        v = torch.stack([a + b, a - b], -2).flatten(-3)
    return v * torch.tensor(0.17677669529663687, dtype=torch.float32).to(v)


def scale_bytes(v, rule):
    """e8m0 of blocks v [..., 32] of float32"""
    finite = v.isfinite().all(-1)
    if rule.startswith("quest"):
        total = torch.zeros_like(v[..., 0])
        for x in v.unbind(-1):  # fused, in order: the product of two fp32 is exact in fp64
            total = (total.double() + x.double() * x.double()).float()
        of = (total / 32).sqrt()
        x = (of.double() * torch.tensor(0.487079, dtype=torch.float32).double() + 1e-8).float()
    else:
        of = v.abs().amax(-1)
        x = of / 6 if rule == "rceil" else of
    add, less = {"floor": (0, 2), "rceil": (0x7FFFFF, 0), "ceil": (0x7FFFFF, 2), "even": (0x200000, 2),
                 "quest": (0, 0), "quest_nearest": (0x800000 - 0x3504F3, 0)}[rule]  # fmt: skip
    byte = ((x.view(torch.int32).long() + add) >> 23) - less
    byte = torch.where(of == 0, 0, byte.clamp(0, 254))
    return torch.where(finite & of.isfinite(), byte, 255)


def scale_values(scales, dtype=torch.float32):
    return torch.where(
        scales == 255, torch.nan, torch.ldexp(torch.ones((), dtype=torch.float64), scales.double() - 127)
    ).to(dtype)


def random16(T, K, seed):
    """16 bits for each of [T, K], K a multiple of 32"""
    row, block = torch.meshgrid(torch.arange(T), torch.arange(K // 8), indexing="ij")
    tag = torch.full_like(row, MX << 16 | BITS16 << 22)
    words = torch.stack(philox4x32([block, row, torch.zeros_like(row), tag], int(seed)), -1)
    return torch.stack([words & 0xFFFF, words >> 16], -1).reshape(T, K)


def encode(y, bits=None):
    """codes of y [..., 32]: to the nearest with ties to even, or by 16 random bits"""
    a, values = y.abs(), torch.tensor(VALUES, dtype=y.dtype, device=y.device)
    if bits is None:
        middle = (values[1:] + values[:-1]) / 2
        even = (
            torch.arange(7, device=y.device) % 2 == 1
        )  # between 1 and 2, 3 and 4, 5 and 6 the upper code is the even one
        code = ((a[..., None] > middle) | ((a[..., None] == middle) & even)).sum(-1)
    else:
        low = (a[..., None] >= values[1:]).sum(-1)
        up = values[(low + 1).clamp_max(7)]
        part = (a - values[low]) / torch.where(low < 7, up - values[low], 1.0) * 65536
        code = low + ((low < 7) & (bits.view(low.shape).to(part.dtype) + 0.5 < part))
    return code | (torch.signbit(y).long() << 3)


def mx_quantize(x, rule="even", hadamard=False, signs=None, seed=None, gain=1.0, mask=False):
    """codes, scales and mask of blocks of 32"""
    v = blocks_of(x.float().cpu())
    if hadamard:
        v = transformed(v, None if signs is None else signs.cpu())
    scales = scale_bytes(v, rule)
    inverse = torch.where(scales == 255, 0, 1 / scale_values(scales.clamp_max(254), torch.float64))
    y = (v.double() * inverse[..., None]).float() * torch.tensor(gain, dtype=torch.float32)
    T, K = x.shape[:-1].numel(), v.shape[-2] * 32
    codes = encode(y.double(), None if seed is None else random16(T, K, seed))
    codes = torch.where((scales == 255)[..., None], 0, codes).flatten(-2)
    within = ((y.abs() < 6).long() << torch.arange(32)).sum(-1)
    within = torch.where(within >= 2**31, within - 2**32, within).int()
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed.to(x.device), scales.to(torch.uint8).to(x.device), within.to(x.device) if mask else None


def mx_dequantize(codes, scales, columns, dtype=torch.float32):
    """e2m1 times 2^(e8m0 - 127)"""
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64, device=codes.device)[code]
    scaled = (
        values.unflatten(-1, (scales.shape[-1], 32))
        * scale_values(scales.cpu(), torch.float64).to(codes.device)[..., None]
    )
    return scaled.flatten(-2)[..., :columns].to(dtype)


def mx_matmul(a_codes, a_scales, b_codes, b_scales, columns, dtype=torch.float32, alpha=1.0, bias=None, s=None, u=None):
    """y = alpha (A B^T + S U^T) + bias, B in MXFP4, A too or in MXFP8"""
    of_a = mx_dequantize if a_codes.dtype == torch.uint8 else mxfp8_dequantize
    a, b = of_a(a_codes, a_scales, columns, dtype), mx_dequantize(b_codes, b_scales, columns, dtype)
    y = a @ b.mT if s is None else torch.cat([a, s.to(dtype)], -1) @ torch.cat([b, u.to(dtype)], -1).mT
    return alpha * y if bias is None else alpha * y + bias.to(dtype)


def mxfp8_dequantize(codes, scales, columns, dtype):
    """e4m3 times 2^(e8m0 - 127)"""
    scale = scale_values(scales.cpu(), torch.float64).to(codes.device)[..., None]
    return (codes.double().unflatten(-1, (scales.shape[-1], 32)) * scale).flatten(-2)[..., :columns].to(dtype)


def mx_linear(x, codes, scales, bias=None, experts=None):
    """y = x W^T + bias, W in MXFP4, of one or of E experts"""
    w = mx_dequantize(codes, scales, x.shape[-1], x.dtype)
    if experts is None:
        return torch.nn.functional.linear(x, w, bias)
    return of_expert(x, w, experts) + (0 if bias is None else of_expert(None, bias, experts))


def mx_linear_expand(x, codes, scales, bias, s, b, experts=None):
    """y = x W^T + bias + S B^T, W in MXFP4, of one or of E experts"""
    b = b.to(s_dtype(b.dtype))
    s = s.to(b.dtype)
    return add(mx_linear(x, codes, scales, bias, experts), s @ b.mT if experts is None else of_expert(s, b, experts))


def of_expert(x, w, experts):
    """x [..., I] times w [E, O, I] of the row's expert, or that bias [E, O]; zeros where it has none"""
    y = w.new_zeros(*experts.shape, w.shape[1])
    for e in range(len(w)):
        y = torch.where((experts == e)[..., None], w[e] if x is None else x @ w[e].mT, y)
    return y


def nvfp4_quantize(x, amax=None, seed=None):
    """codes of x / (scale · global), scales of blocks of 16 in e4m3 and global = amax / (448 · 6)"""
    v = torch.nn.functional.pad(x.float().cpu(), (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
    amax = (v.abs().amax() if v.numel() else torch.zeros(())) if amax is None else amax.float().cpu()
    scale = torch.where(amax.isfinite(), (amax.reshape(1) / 2688).clamp_min(2.0**-120), torch.nan)
    m = v.abs().amax(-1)
    e4m3 = torch.where(m.isfinite(), (m / 6 / scale).clamp(2.0**-6, 448), torch.nan).to(torch.float8_e4m3fn)
    y = v * torch.where(e4m3.float().isfinite(), 1 / scale / e4m3.float(), 0)[..., None]
    y = torch.where(e4m3.float().isfinite()[..., None], y, 0).double()
    bits = None if seed is None else random16(x.shape[:-1].numel(), v.shape[-2] * 16, seed)
    codes = encode(y, bits).flatten(-2)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed.to(x.device), (e4m3.view(torch.uint8) & 0x7F).to(x.device), scale.to(x.device)


def nvfp4_dequantize(codes, scales, global_scale, columns, dtype=torch.float32):
    """e2m1 · (e4m3 · global)"""
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = torch.tensor([*VALUES, *(-v for v in VALUES)], device=codes.device)[code].unflatten(-1, (-1, 16))
    scale = global_scale.float() * scales.view(torch.float8_e4m3fn).float()
    return (values * scale[..., None]).flatten(-2)[..., :columns].to(dtype)


def quartet_linear(x, weight, dy, signs, seeds, rule="quest"):
    """y = X̂ Ŵᵀ, dx and dW of F.quartet_linear, beside the exact gradients of y: all in float64 of x [T, K], weight [O, K], dy [T, O]"""
    whole = lambda z, *how: (mx_dequantize(*(q := mx_quantize(z, *how))[:2], 32 * q[1].shape[-1], torch.float64), q[2])
    (X, x_mask), (W, w_mask) = (whole(t, rule, True, None, None, 1.0, True) for t in (x, weight))

    def back(g, mask):
        """(mask ⊙ g) Hᵀ, as H is symmetric"""
        bits = mask.long()[..., None] >> torch.arange(32) & 1
        return transformed(g.unflatten(-1, (-1, 32)) * bits).flatten(-2)[:, : x.shape[1]]

    def product(e, z, mask, sign, *seeds):
        """both rounded at random, under one H with signs"""
        a, b = (whole(t, "floor", True, sign, seed, 0.75)[0] for t, seed in zip((e, z.float()), seeds, strict=True))
        return back(16 / 9 * a @ b.mT, mask)

    dx = product(dy, W.mT, x_mask, signs[:1], seeds[0], seeds[1])
    dw = product(dy.mT, X.mT, w_mask, signs[1:], seeds[2], seeds[3])
    exact = back(dy.double() @ W, x_mask), back(dy.double().mT @ X, w_mask)
    return X @ W.mT, (dx, dw), exact


class Layer:
    """lead: leading dimensions of x. fp32: s and b, beside activations of any dtype. pitch: of x's rows; 0: contiguous. E: experts, of
    which the last has no row and some rows none."""

    def __init__(
        self,
        draw: Draw,
        lead,
        I,
        O,
        R=4,
        fp32=False,
        bias=True,
        pitch=0,
        rule="even",
        hadamard=False,
        seed=False,
        gain=1.0,
        mask=False,
        turned=False,
        E=0,
    ):
        self.draw, self.lead, self.I, self.O, self.R, self.pitch = draw, lead, I, O, R, pitch
        self.x, self.type = draw(*lead, I, pitch=pitch), torch.float32 if fp32 else draw.dtype
        self.each = (E,) if E else ()
        w = draw(*self.each, O, I, dtype=torch.float32, std=max(I, 1) ** -0.5)
        self.codes, self.scales, _ = mx_quantize(w, rule)
        self.bias = draw(*self.each, O) if bias else None
        drawn = torch.randint(-1, max(E - 1, 0), lead, generator=draw.generator, dtype=torch.int32) if E else None
        self.experts = drawn if drawn is None else drawn.to(draw.device)
        self.reads_back = "" if not E else "backward" if drawn.numel() <= 16 * E else "always"
        self.rule, self.hadamard, self.gain, self.mask, self.turned = rule, hadamard, gain, mask, turned
        self.seed = draw.seed() if seed else None
        signs = torch.randint(-(2**31), 2**31, (1,), generator=draw.generator).int().to(draw.device)
        self.signs = signs if hadamard else None


CASES = {
    "one_token": dict(lead=(1,), I=64, O=48),
    "odd": dict(lead=(7,), I=67, O=35, bias=False, rule="floor"),
    "few": dict(lead=(2, 3), I=544, O=33, R=16, rule="rceil", mask=True),
    "wide": dict(lead=(70,), I=1032, O=264, R=16, fp32=True, rule="ceil"),
    "pitched": dict(lead=(3, 5), I=96, O=60, pitch=107, rule="quest", mask=True),
    "turned": dict(lead=(19,), I=128, O=64, R=33, fp32=True, hadamard=True, rule="quest_nearest", turned=True),
    "stochastic": dict(lead=(5, 4), I=96, O=40, seed=True, gain=0.75, rule="floor", hadamard=True),
    "no_rank": dict(lead=(33,), I=40, O=72, R=0),
    "no_tokens": dict(lead=(0,), I=32, O=24),
    "no_tokens_3d": dict(lead=(2, 0), I=16, O=24, fp32=True, bias=False),
    "one_row": dict(lead=(), I=32, O=8),
    "experts": dict(lead=(3, 5), I=96, O=40, R=8, E=5),
    "experts_crowd": dict(lead=(60,), I=72, O=24, R=4, E=5, fp32=True, pitch=83),
    "experts_many": dict(lead=(70,), I=64, O=48, R=5, E=4, bias=False),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    return dict(lead=(T,), I=I, O=O, R=R, fp32=fp32)


FAMILY = Family(name="mx", layer=Layer, cases=CASES, large=large, seed=2100, direct_sample="wide")
register = partial(register, family=FAMILY)


@register(mx_quantize)
def quantize_samples(name: str, t: Layer) -> Iterator[Sample]:
    x = t.draw(t.I, t.x.shape[:-1].numel()).mT if t.turned else t.x
    yield Sample(name, (x, t.rule, t.hadamard, t.signs, t.seed, t.gain, t.mask))


@register(mx_dequantize)
def dequantize_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.codes, t.scales, t.I, t.draw.dtype))


@register(mx_matmul, products="TIO")
def matmul_samples(name: str, t: Layer) -> Iterator[Sample]:
    codes, scales, _ = mx_quantize(t.x, t.rule)
    b = t.codes.flatten(0, -2), t.scales.flatten(0, -2)
    yield Sample(name, (codes, scales, *b, t.I, t.draw.dtype, t.gain))
    O = len(b[0])
    beside = t.draw(O), t.draw(*t.lead, t.R), t.draw(O, t.R)
    yield Sample(f"{name}_low_rank", (codes, scales, *b, t.I, t.draw.dtype, t.gain, *beside))


@register(mx_linear, differentiable="x bias", casts="x bias", products="TIO")
def linear_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.codes, t.scales, t.bias, t.experts), reads_back=t.reads_back)


@register(mx_linear_expand, differentiable="x bias s b", casts="x bias s b", products="TIO TRO")
def linear_expand_samples(name: str, t: Layer) -> Iterator[Sample]:
    s = t.draw(*t.lead, t.R, dtype=s_dtype(t.type))
    args = t.x, t.codes, t.scales, t.bias, s, t.draw(*t.each, t.O, t.R, dtype=t.type), t.experts
    yield Sample(name, args, reads_back=t.reads_back)


@register(nvfp4_quantize)
def nvfp4_quantize_samples(name: str, t: Layer) -> Iterator[Sample]:
    x = t.draw(t.I, t.x.shape[:-1].numel()).mT if t.turned else t.x
    yield Sample(name, (x, t.draw(1, dtype=torch.float32).abs() + 3 if t.mask else None, t.seed))


@register(nvfp4_dequantize)
def nvfp4_dequantize_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (*nvfp4_quantize(t.x), t.I, t.draw.dtype))
