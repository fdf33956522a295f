# SPDX-License-Identifier: Apache-2.0
"""LoRA. fp32 factors over a 16-bit base: the low-rank part runs in fp32 and its result is rounded once, as PEFT does."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .registry import Family, Sample, register
from .rng import dropout


def s_dtype(factor):
    """Of S beside factors of a dtype: scale * S leaves the range of float16."""
    return torch.float32 if factor == torch.float16 else factor


def lora_shrink(x, a, scale=1.0, dropout_p=0.0, seed=None):
    """S = scale D(x) A^T"""
    a = a.to(s_dtype(a.dtype))
    return scale * (dropout(x.to(a.dtype), dropout_p, seed) @ a.mT)


def add(y, delta):
    return (y.to(delta.dtype) + delta).to(y.dtype)


def linear_expand(x, weight, bias, s, b, scale=1.0):
    """y = x W^T + bias + scale S B^T"""
    delta = scale * (s @ b.to(s.dtype).mT)
    if x is None:
        return delta.to(b.dtype) if bias is None else add(bias, delta)
    return add(torch.nn.functional.linear(x, weight, bias), delta)


def lora_linear(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None, base_scale=None):
    """y = c * (x W^T) + bias + scale (D(x) A^T) B^T"""
    s = lora_shrink(x, a, scale, dropout_p, seed)
    if base_scale is None:
        return linear_expand(x, weight, bias, s, b)
    y = torch.nn.functional.linear(x, weight).to(s.dtype) * base_scale.to(s.dtype) + s @ b.to(s.dtype).mT
    return (y if bias is None else y + bias.to(s.dtype)).to(x.dtype)


def lora_add(y, x, a, b, scale=1.0, dropout_p=0.0, seed=None):
    """y + scale (D(x) A^T) B^T"""
    s = lora_shrink(x, a, scale, dropout_p, seed)
    return add(y, s @ b.to(s.dtype).mT)


def lora_expand_(y, s, b, scale=1.0):
    """y += scale S B^T, in place"""
    y.copy_(add(y, scale * (s @ b.to(s.dtype).mT)))


class Layer:
    """lead: leading dimensions of x. fp32: factors, over activations of any dtype. pitch: of x's rows, and y has one; 0: contiguous.
    more: samples, of no_base, base_scale and other_y, a base layer that answers in a dtype of its own."""

    def __init__(self, draw, lead, I, O, R, fp32=False, bias=True, pitch=0, dropout_p=0.0, **more):
        self.draw, self.lead, self.O, self.R, self.pitch, self.more = draw, lead, O, R, pitch, more
        self.factor_dtype = f = torch.float32 if fp32 else draw.dtype
        self.x = draw(*lead, I, pitch=pitch)
        self.weight, self.bias = draw(O, I, std=I**-0.5), draw(O) if bias else None
        self.a, self.b = draw(R, I, dtype=f, std=I**-0.5), draw(O, R, dtype=f)
        self.scale, self.dropout_p = {"scale": 0.75}, dropout_p
        self.options = self.scale | {"dropout_p": dropout_p, "seed": draw.seed() if dropout_p else None}

    def s(self) -> Tensor:
        return self.draw(*self.lead, self.R, dtype=s_dtype(self.factor_dtype))

    def y(self) -> Tensor:
        return self.draw(*self.lead, self.O, pitch=self.O + 13 if self.pitch else 0)


CASES = {
    "one_token": dict(lead=(1,), I=64, O=48, R=4, base_scale=True),
    "odd": dict(lead=(7,), I=67, O=35, R=5, bias=False, no_base=True),
    "chunks": dict(lead=(70,), I=1031, O=520, R=16),
    "few_tokens": dict(lead=(5,), I=1288, O=72, R=8),
    "few_tokens_fp32": dict(lead=(3, 2), I=520, O=136, R=16, fp32=True, other_y=True),
    "few_tokens_dropout": dict(lead=(4,), I=530, O=40, R=12, dropout_p=0.25, base_scale=True),
    "segments": dict(lead=(3, 180), I=136, O=264, R=8, base_scale=True),
    "rank_1": dict(lead=(2, 3, 5), I=40, O=24, R=1, no_base=True),
    "rank_17_fp32": dict(lead=(33,), I=72, O=80, R=17, fp32=True),
    "rank_100": dict(lead=(9,), I=130, O=300, R=100, bias=False),
    "rank_512_fp32": dict(lead=(5,), I=96, O=88, R=512, fp32=True, bias=False),
    "fp32_factors": dict(lead=(130,), I=264, O=520, R=16, fp32=True, no_base=True, base_scale=True, other_y=True),
    "pitch": dict(lead=(4, 6), I=56, O=40, R=8, pitch=72),
    "odd_pitch": dict(lead=(11,), I=33, O=41, R=3, fp32=True, pitch=45, base_scale=True),
    "dropout": dict(lead=(65,), I=200, O=72, R=8, dropout_p=0.25, base_scale=True),
    "dropout_fp32_pitch": dict(
        lead=(3, 7), I=61, O=40, R=9, fp32=True, bias=False, pitch=64, dropout_p=0.5, other_y=True
    ),
    "dropout_all": dict(lead=(4,), I=32, O=16, R=4, dropout_p=1.0),
    "rank_0": dict(lead=(3, 2), I=16, O=24, R=0, base_scale=True),
    "no_tokens": dict(lead=(0,), I=16, O=24, R=4),
    "no_tokens_3d": dict(lead=(2, 0), I=16, O=24, R=4, fp32=True, bias=False, base_scale=True),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    return dict(lead=(T,), I=I, O=O, R=R, fp32=fp32)


FAMILY = Family(name="lora", layer=Layer, cases=CASES, large=large, seed=0, direct_sample="fp32_factors")
register = partial(register, family=FAMILY)


@register(lora_shrink, differentiable="x a", casts="x a", products="TIR")
def shrink_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.a), t.options)


# In float16; in bfloat16 autocast casts s too.
@register(linear_expand, differentiable="x weight bias s b", casts="x weight bias b", products="TIO TOR")
def linear_expand_samples(name: str, t: Layer) -> Iterator[Sample]:
    if t.dropout_p:
        return
    s = t.s()
    yield Sample(name, (t.x, t.weight, t.bias, s, t.b), t.scale)
    if t.more.get("no_base"):
        yield Sample(f"{name}_no_base", (None, None, t.bias, s, t.b), t.scale)


@register(lora_linear, differentiable="x weight bias a b base_scale", casts="x weight bias a b", products="TIO TIR TOR")
def lora_linear_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.weight, t.bias, t.a, t.b), t.options)
    if t.more.get("base_scale"):
        c = t.draw(t.O, dtype=t.a.dtype)
        yield Sample(f"{name}_base_scale", (t.x, t.weight, t.bias, t.a, t.b, *t.options.values(), c))


@register(lora_add, differentiable="y x a b", casts="x", products="TIR TOR")
def lora_add_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.y(), t.x, t.a, t.b), t.options)
    if t.more.get("other_y"):
        other = torch.float32 if t.draw.dtype == torch.bfloat16 else torch.bfloat16
        yield Sample(f"{name}_other_y", (t.draw(*t.lead, t.O, dtype=other), t.x, t.a, t.b), t.options)


@register(lora_expand_, mutates="y", products="TOR")
def lora_expand_samples(name: str, t: Layer) -> Iterator[Sample]:
    if t.dropout_p:
        return
    s = t.s()
    yield Sample(name, (t.y(), s, t.b), t.scale)
