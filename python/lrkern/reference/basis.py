# SPDX-License-Identifier: Apache-2.0
"""Random bases. Arguments: see ops/basis.py; the stream: docs/rng.md."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .lora import add
from .registry import Family, Sample, register
from .rng import basis_elements


def basis_fill(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale=1.0):
    """row_scale * U[q0:, c0:] * col_scale"""
    u = scale * basis_elements(seed, method, distribution, tensor, first, R, q0, c0, Q, C).to(like)
    u = u if row_scale is None else u * row_scale.to(like)[:, None]
    return u if col_scale is None else u * col_scale.to(like)


def basis_combine(coef, base, seed, method, distribution, tensor, R, widths, counts, scales):
    """base + scale sum over k of coef[k] U_k"""
    parts = []
    for i, (c, width, scale) in enumerate(zip(coef.split(counts, -1), widths, scales, strict=True)):
        u = basis_elements(seed, method, distribution, tensor + i, 0, R, 0, 0, c.shape[-1] * R, width).to(coef)
        parts.append(torch.einsum("...k,krw->...rw", scale * c, u.reshape(c.shape[-1], R, width)))
    out = torch.cat(parts, -1)
    return out if base is None else out + base


def basis_dot(g, seed, method, distribution, tensor, widths, counts, scales):
    """scale <g, U_k>"""
    parts, R = [], g.shape[-2]
    for i, (part, count, scale) in enumerate(zip(g.split(widths, -1), counts, scales, strict=True)):
        u = basis_elements(seed, method, distribution, tensor + i, 0, max(R, 1), 0, 0, count * R, part.shape[-1]).to(g)
        parts.append(scale * torch.einsum("...rw,krw->...k", part, u.reshape(count, *part.shape[-2:])))
    return torch.cat(parts, -1)


def basis_matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32=False):
    """out_scale * ((in_scale * x) U), or U^T"""
    wide = torch.float32 if fp32 and x.dtype != torch.float64 else x.dtype
    u = basis_elements(seed, method, distribution, tensor, first, R, 0, 0, Q, C).to(x.device, wide)
    y = (x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)) @ (u.mT if transposed else u)
    return y if out_scale is None else y * out_scale.to(wide)


def basis_matmul_(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    """y += out_scale * ((in_scale * x) U), or U^T, in place"""
    spec = seed, method, distribution, tensor, first, R, Q, C, transposed
    y.copy_(add(y, basis_matmul(x, in_scale, out_scale, *spec, fp32=y.dtype != x.dtype)))


class Layer:
    """lead: leading dimensions of x, coef and g. far: a seed past 2^32. segments: widths, counts, scales. By its number a case
    differs from others in what its keywords do not say: offsets, segments, strides, dtypes."""

    def __init__(
        self, draw, distribution, method, R, Q, C, lead, first=0, scales=True, far=False, segments=None, number=0
    ):
        self.draw, self.lead, self.number, self.scales = draw, lead, number, scales
        self.R, self.Q, self.C, self.first = R, Q, C, first
        self.some_lead = lead if number % 4 else ()
        self.stream = int(draw.seed()) if far else 17 + number, method, distribution, 5 * number
        turns = ([C], [7], [0.5]), ([C, 33], [19, 40], [0.25, 2.0]), ([3, C, 8], [1, 0, 33], [1.0, 3.0, -1.0])
        self.segments = segments or turns[number % 3]

    def fp32(self, *shape: int) -> Tensor:
        return self.draw(*shape, dtype=torch.float32)

    def scale(self, n: int) -> Tensor | None:
        return self.fp32(n) if self.scales else None

    def directions(self, name: str) -> Iterator[tuple[str, bool, int, int]]:
        """(name, transposed, columns of x, columns of the result)"""
        yield name, False, self.Q, self.C
        yield f"{name}_transposed", True, self.C, self.Q


CASES = {
    "one_token": dict(distribution=2, method=3, R=8, Q=8, C=64, lead=(1,)),
    "odd": dict(distribution=2, method=2, first=3, R=5, Q=13, C=67, lead=(3,), far=True),
    "uniform16": dict(distribution=3, method=3, R=16, Q=16, C=270, lead=(2, 2)),
    "uniform32": dict(distribution=4, method=4, first=7, R=3, Q=31, C=130, lead=(4,), scales=False, far=True),
    "sign": dict(distribution=5, method=4, R=4, Q=20, C=2100, lead=(2,)),
    "ternary6": dict(distribution=6, method=4, first=65000, R=2, Q=9, C=300, lead=(5,), far=True),
    "ternary4": dict(distribution=7, method=4, first=1, R=1, Q=17, C=1030, lead=(7,), scales=False),
    "slices": dict(distribution=2, method=4, R=32, Q=600, C=40, lead=(3,)),
    "many_tokens": dict(distribution=2, method=3, R=64, Q=64, C=520, lead=(2, 20)),
    "many_tokens_sign": dict(distribution=5, method=4, R=8, Q=40, C=300, lead=(33,), scales=False, far=True),
    "no_tokens": dict(distribution=2, method=3, R=8, Q=8, C=16, lead=(0,)),
    "no_rows": dict(distribution=2, method=3, R=8, Q=0, C=16, lead=(2,)),
    "no_columns": dict(distribution=2, method=3, R=8, Q=8, C=0, lead=(2,)),
    "many_fp32": dict(distribution=2, method=3, R=24, Q=70, C=264, lead=(20,)),
    "many_bare": dict(distribution=2, method=3, R=256, Q=264, C=72, lead=(18,), scales=False),
    "many_uniform16": dict(distribution=3, method=4, R=5, Q=48, C=136, lead=(17,)),
}
CASES = {name: case | {"number": i} for i, (name, case) in enumerate(CASES.items())}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    """NOLA's A and B of 64 bases each, or one basis [R, I]."""
    segments = [I, O], [64, 64], [0.125, 0.125]
    return dict(distribution=2, method=2, R=R, Q=R, C=I, lead=(T,), scales=False, segments=segments)


FAMILY = Family(name="basis", layer=Layer, cases=CASES, large=large, seed=400, direct_sample="odd")
register = partial(register, family=FAMILY)


@register(basis_fill)
def fill_samples(name: str, t: Layer) -> Iterator[Sample]:
    like, q0, c0 = t.draw(1), *((t.R + 1, 37) if t.number % 3 else (0, 0))
    yield Sample(name, (like, t.scale(t.Q), t.scale(t.C), *t.stream, t.first, t.R, q0, c0, t.Q, t.C, 0.75))


@register(basis_combine, differentiable="coef base", twice_differentiable=True)
def combine_samples(name: str, t: Layer) -> Iterator[Sample]:
    base = t.fp32(t.R, sum(t.segments[0])) if t.scale(1) is not None else None
    yield Sample(name, (t.fp32(*t.some_lead, sum(t.segments[1])), base, *t.stream, t.R, *t.segments))


@register(basis_dot, differentiable="g", twice_differentiable=True)
def dot_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.fp32(*t.some_lead, t.R, sum(t.segments[0])), *t.stream, *t.segments))


@register(basis_matmul, differentiable="x", twice_differentiable=True, products="TIR")
def matmul_samples(name: str, t: Layer) -> Iterator[Sample]:
    for each, transposed, n, m in t.directions(name):
        x = t.draw(*t.lead, n, pitch=n + 5 if t.number % 2 else 0, std=max(n, 1) ** -0.5)
        sizes = t.first, t.R, t.Q, t.C, transposed
        yield Sample(each, (x, t.scale(n), t.scale(m), *t.stream, *sizes, t.number % 3 == 2))


@register(basis_matmul_, mutates="y", products="TIR")
def matmul_into_samples(name: str, t: Layer) -> Iterator[Sample]:
    for each, transposed, n, m in t.directions(name):
        x = t.draw(*t.lead, n, dtype=torch.float32 if t.number % 2 else None, std=max(n, 1) ** -0.5)
        sizes = t.first, t.R, t.Q, t.C, transposed
        yield Sample(each, (t.draw(*t.lead, m), x, t.scale(n), t.scale(m), *t.stream, *sizes))
