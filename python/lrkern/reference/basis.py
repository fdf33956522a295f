# SPDX-License-Identifier: Apache-2.0
"""Random bases. Arguments: see ops/basis.py; the stream: docs/rng.md."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .lora import add
from .registry import Draw, Family, Sample, register
from .rng import basis_elements


def basis_fill(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale=1.0):
    u = scale * basis_elements(seed, method, distribution, tensor, first, R, q0, c0, Q, C).to(like)
    u = u if row_scale is None else u * row_scale.to(like)[:, None]
    return u if col_scale is None else u * col_scale.to(like)


def basis_combine(coef, base, seed, method, distribution, tensor, R, widths, counts, scales):
    parts = []
    for i, (c, width, scale) in enumerate(zip(coef.split(counts, -1), widths, scales, strict=True)):
        u = basis_elements(seed, method, distribution, tensor + i, 0, R, 0, 0, c.shape[-1] * R, width).to(coef)
        parts.append(torch.einsum("...k,krw->...rw", scale * c, u.reshape(c.shape[-1], R, width)))
    out = torch.cat(parts, -1)
    return out if base is None else out + base


def basis_dot(g, seed, method, distribution, tensor, widths, counts, scales):
    parts, R = [], g.shape[-2]
    for i, (part, count, scale) in enumerate(zip(g.split(widths, -1), counts, scales, strict=True)):
        u = basis_elements(seed, method, distribution, tensor + i, 0, max(R, 1), 0, 0, count * R, part.shape[-1]).to(g)
        parts.append(scale * torch.einsum("...rw,krw->...k", part, u.reshape(count, *part.shape[-2:])))
    return torch.cat(parts, -1)


def basis_matmul(
    x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32=False
):  # fmt: skip
    wide = torch.float32 if fp32 and x.dtype != torch.float64 else x.dtype
    u = basis_elements(seed, method, distribution, tensor, first, R, 0, 0, Q, C).to(x.device, wide)
    y = (x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)) @ (u.mT if transposed else u)
    return y if out_scale is None else y * out_scale.to(wide)


def basis_matmul_(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    spec = seed, method, distribution, tensor, first, R, Q, C, transposed
    y.copy_(add(y, basis_matmul(x, in_scale, out_scale, *spec, fp32=y.dtype != x.dtype)))


@dataclass(frozen=True)
class Case:
    """By its number a case differs from others in what the fields do not say: offsets, segments, strides, dtypes."""

    name: str
    _: KW_ONLY
    distribution: int
    method: int
    R: int
    Q: int
    C: int
    lead: tuple[int, ...]  # leading dimensions of x, coef and g
    first: int = 0
    scales: bool = True
    far: bool = False  # a seed past 2^32
    segments: tuple[list[int], list[int], list[float]] | None = None  # widths, counts, scales
    number: int = 0


NUMBERED = (
    Case("one_token", distribution=2, method=3, R=8, Q=8, C=64, lead=(1,)),
    Case("odd", distribution=2, method=2, first=3, R=5, Q=13, C=67, lead=(3,), far=True),
    Case("uniform16", distribution=3, method=3, R=16, Q=16, C=270, lead=(2, 2)),
    Case("uniform32", distribution=4, method=4, first=7, R=3, Q=31, C=130, lead=(4,), scales=False, far=True),
    Case("sign", distribution=5, method=4, R=4, Q=20, C=2100, lead=(2,)),
    Case("ternary6", distribution=6, method=4, first=65000, R=2, Q=9, C=300, lead=(5,), far=True),
    Case("ternary4", distribution=7, method=4, first=1, R=1, Q=17, C=1030, lead=(7,), scales=False),
    Case("slices", distribution=2, method=4, R=32, Q=600, C=40, lead=(3,)),
    Case("many_tokens", distribution=2, method=3, R=64, Q=64, C=520, lead=(2, 20)),
    Case("many_tokens_sign", distribution=5, method=4, R=8, Q=40, C=300, lead=(33,), scales=False, far=True),
    Case("no_tokens", distribution=2, method=3, R=8, Q=8, C=16, lead=(0,)),
    Case("no_rows", distribution=2, method=3, R=8, Q=0, C=16, lead=(2,)),
    Case("no_columns", distribution=2, method=3, R=8, Q=8, C=0, lead=(2,)),
)
CASES = [replace(case, number=i) for i, case in enumerate(NUMBERED)]


def large(T: int, I: int, O: int, R: int, fp32: bool) -> Case:
    """NOLA's A and B of 64 bases each, or one basis [R, I]."""
    stream, segments = {"distribution": 2, "method": 2}, ([I, O], [64, 64], [0.125, 0.125])
    return Case("large", **stream, R=R, Q=R, C=I, lead=(T,), scales=False, segments=segments)


register = partial(register, family=Family(name="basis", cases=CASES, large=large, seed=400, direct_sample="odd"))


def stream_of(case: Case, draw: Draw) -> tuple[int, int, int, int]:
    """seed, method, distribution, tensor"""
    return int(draw.seed()) if case.far else 17 + case.number, case.method, case.distribution, 5 * case.number


def segments_of(case: Case) -> tuple[list[int], list[int], list[float]]:
    """widths, counts, scales"""
    C = case.C
    turns = ([C], [7], [0.5]), ([C, 33], [19, 40], [0.25, 2.0]), ([3, C, 8], [1, 0, 33], [1.0, 3.0, -1.0])
    return case.segments or turns[case.number % 3]


def vector(case: Case, draw: Draw, n: int) -> Tensor | None:
    return draw(n, dtype=torch.float32) if case.scales else None


@register(basis_fill, formula="row_scale * U[q0:, c0:] * col_scale")
def fill_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    stream, like = stream_of(case, draw), draw(1)
    q0, c0 = (case.R + 1, 37) if case.number % 3 else (0, 0)
    scales = vector(case, draw, case.Q), vector(case, draw, case.C)
    yield Sample(case.name, (like, *scales, *stream, case.first, case.R, q0, c0, case.Q, case.C, 0.75))


@register(
    basis_combine,
    formula="base + scale sum over k of coef[k] U_k",
    differentiable="coef base",
    twice_differentiable=True,
)
def combine_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    stream, segments = stream_of(case, draw), segments_of(case)
    with_base = vector(case, draw, 1) is not None
    base = draw(case.R, sum(segments[0]), dtype=torch.float32) if with_base else None
    lead = case.lead if case.number % 4 else ()
    coef = draw(*lead, sum(segments[1]), dtype=torch.float32)
    yield Sample(case.name, (coef, base, *stream, case.R, *segments))


@register(basis_dot, formula="scale <g, U_k>", differentiable="g", twice_differentiable=True)
def dot_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    stream, segments = stream_of(case, draw), segments_of(case)
    lead = case.lead if case.number % 4 else ()
    yield Sample(case.name, (draw(*lead, case.R, sum(segments[0]), dtype=torch.float32), *stream, *segments))


def directions(case: Case) -> Iterator[tuple[str, bool, int, int]]:
    """(name, transposed, columns of x, columns of the result)"""
    yield case.name, False, case.Q, case.C
    yield f"{case.name}_transposed", True, case.C, case.Q


@register(
    basis_matmul,
    formula="out_scale * ((in_scale * x) U), or U^T",
    differentiable="x",
    twice_differentiable=True,
    products="TIR",
)
def matmul_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    stream = stream_of(case, draw)
    for name, transposed, n, m in directions(case):
        x = draw(*case.lead, n, pitch=n + 5 if case.number % 2 else 0, std=max(n, 1) ** -0.5)
        scales, sizes = (vector(case, draw, n), vector(case, draw, m)), (case.first, case.R, case.Q, case.C)
        yield Sample(name, (x, *scales, *stream, *sizes, transposed, case.number % 3 == 2))


@register(basis_matmul_, formula="y += out_scale * ((in_scale * x) U), or U^T, in place", mutates="y", products="TIR")
def matmul_into_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    stream = stream_of(case, draw)
    for name, transposed, n, m in directions(case):
        x = draw(*case.lead, n, dtype=torch.float32 if case.number % 2 else None, std=max(n, 1) ** -0.5)
        y, scales = draw(*case.lead, m), (vector(case, draw, n), vector(case, draw, m))
        yield Sample(name, (y, x, *scales, *stream, case.first, case.R, case.Q, case.C, transposed))
