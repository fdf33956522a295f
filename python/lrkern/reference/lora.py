# SPDX-License-Identifier: Apache-2.0
"""LoRA. fp32 factors over a 16-bit base: the low-rank part runs in fp32 and its result is rounded once, as PEFT does."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch

from .registry import Draw, Family, Sample, register
from .rng import dropout


def lora_shrink(x, a, scale=1.0, dropout_p=0.0, seed=None):
    return scale * (dropout(x.to(a.dtype), dropout_p, seed) @ a.mT)


def add(y, delta):
    return (y.to(delta.dtype) + delta).to(y.dtype)


def linear_expand(x, weight, bias, s, b, scale=1.0):
    delta = scale * (s @ b.mT)
    if x is None:
        return delta if bias is None else add(bias, delta)
    return add(torch.nn.functional.linear(x, weight, bias), delta)


def lora_linear(x, weight, bias, a, b, scale=1.0, dropout_p=0.0, seed=None, base_scale=None):
    s = lora_shrink(x, a, scale, dropout_p, seed)
    if base_scale is None:
        return linear_expand(x, weight, bias, s, b)
    y = torch.nn.functional.linear(x, weight).to(s.dtype) * base_scale.to(s.dtype) + s @ b.mT
    return (y if bias is None else y + bias.to(s.dtype)).to(x.dtype)


def lora_add(y, x, a, b, scale=1.0, dropout_p=0.0, seed=None):
    return add(y, lora_shrink(x, a, scale, dropout_p, seed) @ b.mT)


def lora_expand_(y, s, b, scale=1.0):
    y.copy_(add(y, scale * (s @ b.mT)))


@dataclass(frozen=True)
class Case:
    name: str
    _: KW_ONLY
    lead: tuple[int, ...]  # leading dimensions of x
    I: int
    O: int
    R: int
    fp32: bool = False  # factors, over activations of any dtype
    bias: bool = True
    pitch: int = 0  # of x's rows, and y has one; 0: contiguous
    dropout_p: float = 0.0
    no_base: bool = False  # a sample without a base layer as well
    base_scale: bool = False  # one with base_scale as well
    other_y: bool = False  # one where the base layer answers in a dtype of its own as well


CASES = (
    Case("one_token", lead=(1,), I=64, O=48, R=4, base_scale=True),
    Case("odd", lead=(7,), I=67, O=35, R=5, bias=False, no_base=True),
    Case("chunks", lead=(70,), I=1031, O=520, R=16),
    Case("segments", lead=(3, 180), I=136, O=264, R=8, base_scale=True),
    Case("rank_1", lead=(2, 3, 5), I=40, O=24, R=1, no_base=True),
    Case("rank_17_fp32", lead=(33,), I=72, O=80, R=17, fp32=True),
    Case("rank_100", lead=(9,), I=130, O=300, R=100, bias=False),
    Case("rank_512_fp32", lead=(5,), I=96, O=88, R=512, fp32=True, bias=False),
    Case("fp32_factors", lead=(130,), I=264, O=520, R=16, fp32=True, no_base=True, base_scale=True, other_y=True),
    Case("pitch", lead=(4, 6), I=56, O=40, R=8, pitch=72),
    Case("odd_pitch", lead=(11,), I=33, O=41, R=3, fp32=True, pitch=45, base_scale=True),
    Case("dropout", lead=(65,), I=200, O=72, R=8, dropout_p=0.25, base_scale=True),
    Case(
        "dropout_fp32_pitch", lead=(3, 7), I=61, O=40, R=9, fp32=True, bias=False, pitch=64, dropout_p=0.5, other_y=True
    ),
    Case("dropout_all", lead=(4,), I=32, O=16, R=4, dropout_p=1.0),
    Case("rank_0", lead=(3, 2), I=16, O=24, R=0, base_scale=True),
    Case("no_tokens", lead=(0,), I=16, O=24, R=4),
    Case("no_tokens_3d", lead=(2, 0), I=16, O=24, R=4, fp32=True, bias=False, base_scale=True),
)


def large(T: int, I: int, O: int, R: int, fp32: bool) -> Case:
    return Case("large", lead=(T,), I=I, O=O, R=R, fp32=fp32)


register = partial(register, family=Family(name="lora", cases=CASES, large=large, seed=0, direct_sample="fp32_factors"))


class Tensors:
    def __init__(self, case: Case, draw: Draw):
        self.case, self.draw, self.factor_dtype = case, draw, torch.float32 if case.fp32 else draw.dtype
        self.x = draw(*case.lead, case.I, pitch=case.pitch)
        self.weight, self.bias = draw(case.O, case.I, std=case.I**-0.5), draw(case.O) if case.bias else None
        self.a = draw(case.R, case.I, dtype=self.factor_dtype, std=case.I**-0.5)
        self.b = draw(case.O, case.R, dtype=self.factor_dtype)
        self.options = {"scale": 0.75, "dropout_p": case.dropout_p, "seed": draw.seed() if case.dropout_p else None}
        self.scale = {"scale": 0.75}

    def s(self):
        return self.draw(*self.case.lead, self.case.R, dtype=self.factor_dtype)

    def y(self):
        return self.draw(*self.case.lead, self.case.O, pitch=self.case.O + 13 if self.case.pitch else 0)


@register(lora_shrink, formula="S = scale D(x) A^T", differentiable="x a", casts="x a", products="TIR")
def shrink_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    t = Tensors(case, draw)
    yield Sample(case.name, (t.x, t.a), t.options)


@register(
    linear_expand,
    formula="y = x W^T + bias + scale S B^T",
    differentiable="x weight bias s b",
    casts="x weight bias s b",
    products="TIO TOR",
)
def linear_expand_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    if case.dropout_p:
        return
    t = Tensors(case, draw)
    s = t.s()
    yield Sample(case.name, (t.x, t.weight, t.bias, s, t.b), t.scale)
    if case.no_base:
        yield Sample(f"{case.name}_no_base", (None, None, t.bias, s, t.b), t.scale)


@register(
    lora_linear,
    formula="y = c * (x W^T) + bias + scale (D(x) A^T) B^T",
    differentiable="x weight bias a b base_scale",
    casts="x weight bias a b",
    products="TIO TIR TOR",
)
def lora_linear_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    t = Tensors(case, draw)
    yield Sample(case.name, (t.x, t.weight, t.bias, t.a, t.b), t.options)
    if case.base_scale:
        c = draw(case.O, dtype=t.a.dtype)
        yield Sample(f"{case.name}_base_scale", (t.x, t.weight, t.bias, t.a, t.b, *t.options.values(), c))


@register(lora_add, formula="y + scale (D(x) A^T) B^T", differentiable="y x a b", casts="x", products="TIR TOR")
def lora_add_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    t = Tensors(case, draw)
    yield Sample(case.name, (t.y(), t.x, t.a, t.b), t.options)
    if case.other_y:
        other = torch.float32 if draw.dtype == torch.bfloat16 else torch.bfloat16
        yield Sample(f"{case.name}_other_y", (draw(*case.lead, case.O, dtype=other), t.x, t.a, t.b), t.options)


@register(lora_expand_, formula="y += scale S B^T, in place", mutates="y", products="TOR")
def lora_expand_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    if case.dropout_p:
        return
    t = Tensors(case, draw)
    s = t.s()
    yield Sample(case.name, (t.y(), s, t.b), t.scale)
