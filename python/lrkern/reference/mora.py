# SPDX-License-Identifier: Apache-2.0
"""MoRA: x times a matrix of zeros and ones, M, and the transpose of another such matrix. Types: see ops/mora.py."""

from collections.abc import Iterator
from functools import partial

import torch

from .lora import add, s_dtype
from .registry import Draw, Family, Sample, register


def mora_map(like, features, rank, type, circular, chunks, output):
    """F [features, slots] of like's dtype: which column goes to which slot of a side, those of padding once more"""
    slots, j = chunks * rank, torch.arange(features)
    if type in ((2, 4) if output else (2, 3)):
        q, rest = divmod(features, rank)
        slot = torch.where(j < rest * (q + 1), j // (q + 1), rest + (j - rest * (q + 1)) // max(q, 1))
    else:
        last = -(-features // rank) * rank if circular and not output else features
        last = min(last, slots) if type == 6 and not output else last if slots else 0
        slot, j = torch.arange(last) % max(slots, 1), torch.arange(last) % max(features, 1)
    f = torch.zeros(features, slots, dtype=like.dtype)
    return f.index_put_((j, slot), torch.ones((), dtype=like.dtype), accumulate=True).to(like.device)


def turned(h, back=False):
    """R h of h [..., n, r]: of chunk i the pairs (p, p + r / 2) by the angles i 10000^(-2 p / r)"""
    n, half = h.shape[-2], h.shape[-1] // 2
    theta = 10000.0 ** (torch.arange(half, dtype=torch.float64) / -half)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * theta * (-1 if back else 1)
    wide = torch.promote_types(h.dtype, torch.float32)
    c, s = (t.to(h.device, wide) for t in (angle.cos(), angle.sin()))
    a, b = h.to(wide).split(half, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(h.dtype)


def chunks_of(type, rank, *features):
    return min(-(-n // rank) for n in features) if type == 6 else 1


def fold(x, rank, type, circular, chunks, adjoint=False):
    """[..., n, r], n = 1 for types 1 to 4"""
    h = x @ mora_map(x, x.shape[-1], rank, type, circular, chunks, adjoint)
    h = h.unflatten(-1, (chunks, rank))
    return turned(h) if type == 6 and not adjoint else h


def mora_compress(x, rank, type=1, circular=True, chunks=0, adjoint=False):
    """h = R F x; F^T of the other side where adjoint"""
    x = x.to(s_dtype(x.dtype))
    h = fold(x, rank, type, circular, chunks or chunks_of(type, rank, x.shape[-1]), adjoint)
    return h if type == 6 else h.squeeze(-2)


def mora_decompress(h, out_features, type=1, circular=True, adjoint=False):
    """y = F h; F^T R^T h of the other side where adjoint"""
    h = h if type == 6 else h.unsqueeze(-2)
    f = mora_map(h, out_features, h.shape[-1], type, circular, h.shape[-2], not adjoint)
    return (turned(h, back=True) if type == 6 and adjoint else h).flatten(-2) @ f.mT


def mora_decompress_(y, h, type=1, circular=True, adjoint=False):
    """y += F h, or F^T R^T h, in place"""
    y.copy_(add(y, mora_decompress(h, y.shape[-1], type, circular, adjoint)))


def mora_add(y, x, m, type=1, circular=True):
    """y + decompress(M compress(x))"""
    m, r = m.to(s_dtype(m.dtype)), m.shape[0]
    h = fold(x.to(m.dtype), r, type, circular, chunks_of(type, r, x.shape[-1], y.shape[-1]))
    h = h @ m.mT
    return add(y, mora_decompress(h if type == 6 else h.squeeze(-2), y.shape[-1], type))


def mora_linear(x, weight, bias, m, type=1, circular=True):
    """y = x W^T + bias + decompress(M compress(x))"""
    return mora_add(torch.nn.functional.linear(x, weight, bias), x, m, type, circular)


class Layer:
    """lead: leading dimensions of x. fp32: M, over activations of any dtype. pitch: of x's rows; 0: contiguous."""

    def __init__(
        self, draw: Draw, type, lead, I, O, R, fp32=False, bias=True, pitch=0, circular=True, chunks=0, other_y=False
    ):
        self.draw, self.type, self.lead, self.I, self.O, self.R = draw, type, lead, I, O, R
        self.circular, self.chunks, self.other_y, self.pitch = circular, chunks, other_y, pitch
        self.x = draw(*lead, I, pitch=pitch)
        self.weight, self.bias = draw(O, I, std=max(I, 1) ** -0.5), draw(O) if bias else None
        self.m = draw(R, R, dtype=torch.float32 if fp32 else draw.dtype, std=max(I, 1) ** -0.5)

    @property
    def options(self):
        return {"type": self.type, "circular": self.circular}


CASES = {
    "one_token": dict(type=1, lead=(1,), I=64, O=48, R=16),
    "odd": dict(type=1, lead=(7,), I=67, O=35, R=6, bias=False),
    "zeros": dict(type=1, lead=(5,), I=67, O=96, R=24, circular=False),
    "narrow": dict(type=1, lead=(4,), I=8, O=12, R=20),
    "wide": dict(type=1, lead=(70,), I=1032, O=520, R=48, fp32=True, other_y=True),
    "blocks": dict(type=2, lead=(2, 9), I=67, O=40, R=12, fp32=True),
    "blocks_cycles": dict(type=3, lead=(11,), I=33, O=70, R=9, pitch=45),
    "cycles_blocks": dict(type=4, lead=(3, 5), I=50, O=90, R=16, fp32=True, bias=False),
    "blocks_narrow": dict(type=2, lead=(3,), I=5, O=6, R=9),
    "turned": dict(type=6, lead=(33,), I=128, O=128, R=32),
    "turned_dead": dict(type=6, lead=(9,), I=256, O=64, R=30, other_y=True, fp32=True),
    "turned_tiled": dict(type=6, lead=(2, 3, 5), I=64, O=200, R=24, fp32=True, pitch=72),
    "turned_padded": dict(type=6, lead=(6,), I=97, O=61, R=22, chunks=2),
    "turned_zeros": dict(type=6, lead=(6,), I=100, O=140, R=32, circular=False, bias=False),
    "turned_one": dict(type=6, lead=(4, 3), I=20, O=24, R=22),
    "no_tokens": dict(type=1, lead=(0,), I=16, O=24, R=4),
    "no_tokens_3d": dict(type=6, lead=(2, 0), I=16, O=24, R=4, fp32=True, bias=False),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    """Type 6 of as many parameters as LoRA of rank R."""
    return dict(type=6, lead=(T,), I=I, O=O, R=int(((I + O) * R) ** 0.5 + 0.5) // 2 * 2, fp32=fp32)


FAMILY = Family(name="mora", layer=Layer, cases=CASES, large=large, seed=1300, direct_sample="wide")
register = partial(register, family=FAMILY)


@register(mora_compress, differentiable="x", twice_differentiable=True)
def compress_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.R, t.type, t.circular, t.chunks))
    n = chunks_of(t.type, t.R, t.I, t.O) if t.type == 6 else 0
    yield Sample(f"{name}_adjoint", (t.draw(*t.lead, t.O), t.R, t.type, t.circular, n, True))


@register(mora_decompress, differentiable="h", twice_differentiable=True)
def decompress_samples(name: str, t: Layer) -> Iterator[Sample]:
    side = (chunks_of(t.type, t.R, t.I, t.O), t.R) if t.type == 6 else (t.R,)
    h = t.draw(*t.lead, *side)
    yield Sample(name, (h, t.O, t.type))
    yield Sample(f"{name}_adjoint", (h, t.I, t.type, t.circular, True))


@register(mora_decompress_, mutates="y")
def decompress_into_samples(name: str, t: Layer) -> Iterator[Sample]:
    side = (chunks_of(t.type, t.R, t.I, t.O), t.R) if t.type == 6 else (t.R,)
    y = t.draw(*t.lead, t.I, pitch=t.pitch)
    h = t.draw(*t.lead, *side, dtype=t.m.dtype)
    yield Sample(name, (y, h, t.type, t.circular, True))


@register(mora_linear, differentiable="x weight bias m", casts="x weight bias m", products="TIO")
def linear_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.weight, t.bias, t.m), t.options)


@register(mora_add, differentiable="y x m", casts="x")
def add_samples(name: str, t: Layer) -> Iterator[Sample]:
    pitch = t.O + 13 if t.pitch else 0
    yield Sample(name, (t.draw(*t.lead, t.O, pitch=pitch), t.x, t.m), t.options)
    if t.other_y:
        other = torch.float32 if t.draw.dtype == torch.bfloat16 else torch.bfloat16
        yield Sample(f"{name}_other_y", (t.draw(*t.lead, t.O, dtype=other), t.x, t.m), t.options)
