# SPDX-License-Identifier: Apache-2.0
"""S2FT: a slice of activations or of W as an index into them. Index, ids and scales: see ops/s2ft.py."""

from collections.abc import Iterator
from functools import partial

import torch

from .lora import add, s_dtype
from .registry import Draw, Family, Sample, register


def in_slots(t):
    """[T, K] of ids or scales [T] or [T, K]"""
    t = t if t.is_floating_point() else t.long()
    return t if t.dim() == 2 else t.unsqueeze(1)


def one_hot(like, features, index, ids, scales, T):
    """[T, K, s, features] of like's dtype: which column each of a row's slots has, times the slot's scale"""
    index, ids = (index, in_slots(ids)) if ids is not None else (index[None], index.new_zeros(T, 1).long())
    columns = index.long()[ids.clamp_min(0)].masked_fill(ids.unsqueeze(-1) < 0, -1)  # [T, K, s]
    hot = columns.unsqueeze(-1) == torch.arange(features, device=like.device)
    return hot.to(like.dtype) * (1 if scales is None else in_slots(scales).to(like.dtype)[..., None, None])


def slice_gather(x, index, ids=None, scales=None):
    """h[t, k] = scales[t, k] x[t, index[ids[t, k]]]"""
    T, N = x.shape[:-1].numel(), x.shape[-1]
    h = torch.einsum("tksn,tn->tks", one_hot(x, N, index, ids, scales, T), x.reshape(T, N))
    return h.reshape(*x.shape[:-1], *(ids.shape[1:] if ids is not None else ()), index.shape[-1])


def scatter_add(y, h, index, ids=None, scales=None):
    """y[t, index[ids[t, k]]] += scales[t, k] h[t, k]"""
    T = y.shape[:-1].numel()
    hot = one_hot(h, y.shape[-1], index, ids, scales, T)
    return add(y, torch.einsum("tksn,tks->tn", hot, h.reshape(hot.shape[:-1])).view(y.shape))


def scatter_add_(y, h, index, ids=None, scales=None):
    """y[t, index[ids[t, k]]] += scales[t, k] h[t, k], in place"""
    y.copy_(scatter_add(y, h, index, ids, scales))


def gather_matmul(y, x, d, index, ids=None, scales=None):
    """y[t] + sum over k of scales[t, k] x[t, index[ids[t, k]]] d[ids[t, k]]"""
    d = d.to(s_dtype(d.dtype))
    h = slice_gather(x.to(d.dtype), index, ids, scales)
    if ids is None:
        return add(y, h @ d)
    ids, T = in_slots(ids), x.shape[:-1].numel()
    h = h.reshape(*ids.shape, d.shape[1])  # each adapter's product for every row, zeros but for its own
    mine = [(h * (ids == a).unsqueeze(-1)).sum(1) @ of for a, of in enumerate(d)]
    return add(y, sum(mine, d.new_zeros(T, d.shape[2])).view(y.shape))


def gather_matmul_(y, x, d, index, ids=None, scales=None):
    """y += the same, in place"""
    y.copy_(gather_matmul(y, x, d, index, ids, scales))


def slice_linear(x, weight, bias, slice, index, dim=1):
    """y = x W^T + bias, W = weight with slice in its columns (dim 1) or rows (dim 0)"""
    w = weight.index_copy(dim, index.long(), slice.to(weight.dtype))
    return torch.nn.functional.linear(x, w, bias)


class Layer:
    """lead: leading dimensions of x. R: columns of a slice. fp32: d and slice, beside activations of any dtype. slots: of a row, none
    where all rows have one slice. A: adapters, of 1 to R columns. run: columns are neighbours. pitch: of x's rows; 0: contiguous."""

    def __init__(
        self, draw: Draw, lead, I, O, R, fp32=False, bias=True, pitch=0, slots=0, A=3, run=False, scaled=False
    ):
        self.draw, self.lead, self.I, self.O, self.R, self.pitch = draw, lead, I, O, R, pitch
        self.x, self.type = draw(*lead, I, pitch=pitch), torch.float32 if fp32 else draw.dtype
        self.weight, self.bias = draw(O, I, std=max(I, 1) ** -0.5), draw(O) if bias else None
        self.T, self.slots, self.A, self.run = self.x.shape[:-1].numel(), slots, A, run
        self.ids = self.scales = None
        if slots:
            shape = (self.T,) if slots == 1 else (self.T, slots)
            made = torch.randint(-1, A, shape, generator=draw.generator)
            self.ids = made.int().to(draw.device)
            self.scales = draw(*shape, dtype=torch.float32) if scaled else None

    def index(self, features: int, one: bool = False):
        """Of one slice, or one of each adapter."""
        found = []
        for a in range(1 if one else self.A):
            s = self.R if one else self.R - a * self.R // self.A
            first = torch.randint(max(1, features - s + 1), (1,), generator=self.draw.generator)
            some = torch.randperm(features, generator=self.draw.generator)[:s].sort().values
            columns = (torch.arange(s) + first) if self.run else some
            found.append(torch.cat([columns, columns.new_full((self.R - s,), -1)]))
        index = torch.stack(found).int().to(self.draw.device)
        return index if self.slots and not one else index[0].clone()

    def factor(self, *shape, std=1.0):
        return self.draw(*(self.A,) * bool(self.slots), *shape, dtype=self.type, std=std)


CASES = {
    "one_column": dict(lead=(5,), I=33, O=24, R=1),
    "odd": dict(lead=(7,), I=67, O=35, R=15, bias=False),
    "neighbours": dict(lead=(2, 9), I=64, O=48, R=16, run=True, fp32=True),
    "wide": dict(lead=(70,), I=520, O=264, R=64, fp32=True),
    "pitched": dict(lead=(3, 5), I=100, O=60, R=33, pitch=107),
    "all": dict(lead=(4,), I=24, O=24, R=24),
    "none": dict(lead=(4,), I=24, O=16, R=0),
    "mixed": dict(lead=(37,), I=72, O=40, R=16, slots=1, scaled=True),
    "mixed_odd": dict(lead=(2, 11), I=50, O=33, R=21, slots=1, fp32=True),
    "mixed_slots": dict(lead=(9,), I=96, O=64, R=24, slots=2, scaled=True, run=True),
    "mixed_wide": dict(lead=(130,), I=256, O=136, R=48, slots=3, A=5, fp32=True, scaled=True),
    "no_tokens": dict(lead=(0,), I=16, O=24, R=4, slots=1),
    "no_tokens_3d": dict(lead=(2, 0), I=16, O=24, R=4),
    "one_token": dict(lead=(), I=40, O=32, R=8),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    return dict(lead=(T,), I=I, O=O, R=R, fp32=fp32)


FAMILY = Family(name="s2ft", layer=Layer, cases=CASES, large=large, seed=1700, direct_sample="wide")
register = partial(register, family=FAMILY)


@register(slice_gather, differentiable="x", twice_differentiable=True)
def gather_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.index(t.I), t.ids, t.scales))


def _scattered(t: Layer):
    features = t.draw(*t.lead, t.I, pitch=t.pitch)
    slots = t.ids.shape[1:] if t.slots else ()
    return features, t.draw(*t.lead, *slots, t.R, dtype=t.type), t.index(t.I), t.ids, t.scales


@register(scatter_add, differentiable="y h", twice_differentiable=True)
def scatter_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, _scattered(t))


@register(scatter_add_, mutates="y")
def scatter_into_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, _scattered(t))


@register(gather_matmul, differentiable="y x d", casts="y x d")
def matmul_samples(name: str, t: Layer) -> Iterator[Sample]:
    y, d = t.draw(*t.lead, t.O), t.factor(t.R, t.O, std=max(t.R, 1) ** -0.5)
    yield Sample(name, (y, t.x, d, t.index(t.I), t.ids, t.scales))


@register(gather_matmul_, mutates="y")
def matmul_into_samples(name: str, t: Layer) -> Iterator[Sample]:
    y, d = t.draw(*t.lead, t.O, pitch=t.O + 13 if t.pitch else 0), t.factor(t.R, t.O, std=max(t.R, 1) ** -0.5)
    yield Sample(name, (y, t.x, d, t.index(t.I), t.ids, t.scales))


@register(slice_linear, differentiable="x bias slice", casts="x weight bias", products="TIO")
def linear_samples(name: str, t: Layer) -> Iterator[Sample]:
    for dim, which in ((1, ""), (0, "_rows")):
        if t.weight.shape[dim] >= t.R:
            index = t.index(t.weight.shape[dim], one=True)
            slice = t.weight.index_select(dim, index.long()).to(t.type)
            weight = t.weight.index_copy(dim, index.long(), slice.to(t.weight.dtype))
            yield Sample(f"{name}{which}", (t.x, weight, t.bias, slice, index, dim))
