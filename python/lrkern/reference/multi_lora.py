# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA. Pools, pages, ranks, plan, slots and slices: see ops/multi_lora.py. Here every (slot, adapter) is one small matmul."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .lora import add, s_dtype
from .registry import Family, Sample, register
from .rng import dropout


def multi_lora_plan(index, adapters):
    """rows sorted by adapter"""
    index = (index if index.dim() == 2 else index.unsqueeze(1)).long().clamp(-1)
    plans = []
    for group in (index + 1).unbind(1):  # 0: none, 1 + a: adapter a
        order = group.sort(stable=True).indices
        begin = torch.cat([group.new_zeros(1), torch.bincount(group, minlength=adapters + 2).cumsum(0)])
        tiles = [[g, t] for g in range(adapters + 1) for t in range(int(begin[g]), int(begin[g + 1]), 64)]
        spare = (len(group) + 63) // 64 + min(adapters + 2, len(group)) - len(tiles)
        plans.append(torch.cat([order, begin, torch.tensor(tiles + [[0, len(group)]] * spare).long().flatten()]))
    return torch.stack(plans).int() if plans else index.new_empty(0, 0).int()


def rows_of(plan, T):
    """(slot, adapter, its rows), in order, of all that have rows."""
    for k in range(plan.shape[0]):
        group = plan[k, T:]
        for a in range(10**9):
            if group[a + 1] == T:
                break
            if group[a + 1] < group[a + 2]:
                yield k, a, plan[k, group[a + 1] : group[a + 2]].long()


def pieces(t, rows):
    """t[r] of each r, by one indexing: its gradient is one tensor like t."""
    return t[torch.cat(rows)].split([len(r) for r in rows]) if rows else ()


def factors(pool, pages, ranks):
    """Of adapter a and slice l, at a L + l: its rows of the pool, in order."""
    rows = (16 * pages.long().unsqueeze(-1) + torch.arange(16, device=pages.device)).flatten(2)
    true = torch.arange(rows.shape[2], device=pages.device) < ranks.unsqueeze(-1)
    return pool[rows[true]].split(ranks.flatten().tolist())


def multi_lora_shrink(x, a_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    """S[t, k] = scales[t, k] D(x[t]) A[index[t, k]]^T"""
    a_pool = a_pool.to(s_dtype(a_pool.dtype))
    flat, K, L, R = x.flatten(0, -2).to(a_pool.dtype), plan.shape[0], pages.shape[1], 16 * pages.shape[2]
    T, every = len(flat), factors(a_pool, pages, ranks)
    groups, dropped, at, parts = list(rows_of(plan, T)), {}, [], []
    for (k, a, rows), xs in zip(groups, pieces(flat, [rows for *_, rows in groups]), strict=True):
        if dropout_p is not None:
            if (p := float(dropout_p[a])) not in dropped:
                dropped[p] = dropout(flat.repeat_interleave(K, 0), p, seed)
            xs = dropped[p][rows * K + k]
        scale = 1.0 if scales is None else scales.reshape(T, K)[rows, k].unsqueeze(1)
        for l, f in enumerate(every[a * L : a * L + L]):
            at.append((rows * K + k) * L + l)
            parts.append(torch.nn.functional.pad((scale * (xs @ f.mT)).to(a_pool.dtype), (0, R - len(f))))
    s = a_pool.new_zeros(T * K * L, R)
    s = s.index_copy(0, torch.cat(at), torch.cat(parts)) if at else s
    return s.reshape(*x.shape[:-1], K, L, R)


def multi_lora_embedding(ids, a_pool, pages, ranks, plan, scales=None):
    """S[t, k] = scales[t, k] A[index[t, k]][:, ids[t]]"""
    x = torch.nn.functional.one_hot(ids, a_pool.shape[1]).to(a_pool.dtype)
    return multi_lora_shrink(x, a_pool, pages, ranks, plan, scales)


def multi_lora_expand(y, s, b_pool, pages, ranks, plan, slice=0):
    """y[t] + sum over k of S[t, k] B[index[t, k]]^T"""
    flat, L = y.flatten(0, -2), pages.shape[1]
    b_pool = b_pool.to(s.dtype)
    every, delta = factors(b_pool, pages, ranks), b_pool.new_zeros(flat.shape)
    groups, parts = list(rows_of(plan, len(flat))), []
    s = s.reshape(len(flat), *s.shape[-3:])[:, :, slice].flatten(0, 1)
    for (_, a, _), part in zip(groups, pieces(s, [rows * len(plan) + k for k, _, rows in groups]), strict=True):
        f = every[a * L + slice]
        parts.append(part[:, : len(f)] @ f)
    delta = delta.index_add(0, torch.cat([rows for *_, rows in groups]), torch.cat(parts)) if groups else delta
    return add(flat, delta).reshape(y.shape)


def multi_lora_expand_(y, s, b_pool, pages, ranks, plan, slice=0):
    """y[t] += sum over k of S[t, k] B[index[t, k]]^T, in place"""
    y.copy_(multi_lora_expand(y, s, b_pool, pages, ranks, plan, slice))


def multi_lora_linear(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    """x W^T + bias + sum over k of scales[t, k] (D(x[t]) A[index[t, k]]^T) B[index[t, k]]^T"""
    y = torch.nn.functional.linear(x, weight, bias)
    s = multi_lora_shrink(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)
    return multi_lora_expand(y, s, b_pool, pages, ranks, plan)


def adapter_index(how: str, T: int, A: int, generator: torch.Generator) -> Tensor:
    """int32 [T, K]: who has which adapter. every: any of them; mixed: any or none; slots: three of any or none; skewed: adapter 1
    but for row 0."""
    if how == "none":
        return torch.full((T, 1), -1, dtype=torch.int32)
    if how == "skewed":
        index = torch.ones(T, 1, dtype=torch.int32)
        index[:1] = 0
        return index
    low, slots = 0 if how == "every" else -1, 3 if how == "slots" else 1
    return torch.randint(low, A, (T, slots), generator=generator, dtype=torch.int32)


def pages_of(ranks: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """(pages int32 [A, L, M], rows of the pool): pages in any order, one more than are needed."""
    counts = (ranks + 15) // 16
    M, total = int(counts.max()) if counts.numel() else 1, int(counts.sum()) + 1
    pages, free = torch.full((*ranks.shape, M), -1, dtype=torch.int32), iter(torch.randperm(total, generator=generator))
    for at in torch.cartesian_prod(*map(torch.arange, ranks.shape)) if ranks.numel() else ():
        for m in range(int(counts[tuple(at)])):
            pages[(*at, m)] = next(free)
    return pages, 16 * total


class Layer:
    """lead: leading dimensions of x. ranks: [A][L]. index: [T][K], or how it is drawn (adapter_index). fp32: pools, over
    activations of any dtype. pitch: of x's rows, and y has one; 0: contiguous."""

    def __init__(self, draw, lead, I, O, ranks, index, fp32=False, scales=True, dropout_p=None, pitch=0):
        self.draw, self.lead, self.I, self.O, self.A, self.pitch = draw, lead, I, O, len(ranks), pitch
        f, T = torch.float32 if fp32 else draw.dtype, torch.Size(lead).numel()
        self.x, self.weight, self.bias = draw(*lead, I, pitch=pitch), draw(O, I, std=I**-0.5), draw(O)
        ranks = torch.tensor(ranks, dtype=torch.int32).reshape(self.A, -1 if ranks else 1)
        pages, P = pages_of(ranks, draw.generator)
        if isinstance(index, str):
            index = adapter_index(index, T, self.A, draw.generator)
        index = torch.as_tensor(index, dtype=torch.int32)
        self.a_pool, self.b_pool = draw(P, I, dtype=f, std=I**-0.5), draw(P, O, dtype=f)
        self.scales = draw(T, index.shape[1], dtype=torch.float32) if scales else None
        self.dropout = (torch.tensor(dropout_p, device=draw.device), draw.seed()) if dropout_p else (None, None)
        plan = multi_lora_plan(index, self.A)
        self.index, *self.table = (t.to(draw.device) for t in (index, pages, ranks, plan))


CASES = {
    "one_token": dict(lead=(1,), I=64, O=48, ranks=[[4]], index=[[0]]),
    "odd": dict(lead=(7,), I=67, O=35, ranks=[[5], [1], [3]], index=[[2], [0], [-1], [2], [1], [2], [0]]),
    "fp32_factors": dict(lead=(40,), I=264, O=520, ranks=[[16], [8]], index="mixed", fp32=True),
    "chunks": dict(lead=(70,), I=1031, O=520, ranks=[[16], [64], [0], [17]], index="mixed", scales=False),
    "tiles": dict(lead=(3, 60), I=136, O=264, ranks=[[8], [33]], index="skewed"),
    "rank_512_fp32": dict(lead=(5,), I=96, O=88, ranks=[[512], [2]], index="mixed", fp32=True),
    "parts": dict(lead=(530,), I=24, O=16, ranks=[[16], [3]], index=[[0]] * 515 + [[1]] * 15),
    "slots": dict(lead=(33,), I=72, O=80, ranks=[[8], [20], [0], [16]], index="slots"),
    "slots_fp32": dict(lead=(2, 9), I=40, O=24, ranks=[[3], [16]], index="slots", fp32=True),
    "slices": dict(lead=(19,), I=56, O=40, ranks=[[8, 0, 16], [4, 30, 1]], index="mixed", pitch=72),
    "dropout": dict(lead=(65,), I=200, O=72, ranks=[[8], [16], [4]], index="mixed", dropout_p=[0.25, 0.0, 1.0]),
    "dropout_slots_fp32_pitch": dict(
        lead=(3, 7), I=61, O=41, ranks=[[9], [5]], index="slots", fp32=True, dropout_p=[0.5, 0.1], pitch=64
    ),
    "odd_pitch": dict(lead=(11,), I=33, O=41, ranks=[[3], [2]], index="mixed", fp32=True, scales=False, pitch=45),
    "none": dict(lead=(6,), I=16, O=24, ranks=[[4]], index="none"),
    "rank_0": dict(lead=(3, 2), I=16, O=24, ranks=[[0], [0]], index="mixed"),
    "no_tokens": dict(lead=(0,), I=16, O=24, ranks=[[4]], index="mixed"),
    "no_adapters": dict(lead=(4,), I=16, O=24, ranks=[], index="none"),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    """16 adapters, one slot, rows in any order."""
    return dict(lead=(T,), I=I, O=O, ranks=[[R]] * 16, index="every", fp32=fp32, scales=False)


FAMILY = Family(name="multi_lora", layer=Layer, cases=CASES, large=large, seed=200, direct_sample="fp32_factors")
register = partial(register, family=FAMILY)


@register(multi_lora_plan)
def plan_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.index, t.A))


@register(multi_lora_shrink, differentiable="x a_pool", casts="x", products="TIR")
def shrink_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.a_pool, *t.table, t.scales, *t.dropout))


@register(multi_lora_embedding, differentiable="a_pool")
def embedding_samples(name: str, t: Layer) -> Iterator[Sample]:
    ids = torch.randint(t.I, t.lead, generator=t.draw.generator).to(t.draw.device)
    yield Sample(name, (ids, t.a_pool, *t.table, t.scales))


@register(multi_lora_expand, differentiable="y s b_pool", products="TOR")
@register(multi_lora_expand_, mutates="y", products="TOR")
def expand_samples(name: str, t: Layer) -> Iterator[Sample]:
    (_, L, M), K = t.table[0].shape, len(t.table[2])
    y = t.draw(*t.lead, t.O, pitch=t.O + 13 if t.pitch else 0)
    s = t.draw(*t.lead, K, L, 16 * M, dtype=s_dtype(t.b_pool.dtype))
    # Seen of dS: 1.3 ulps beyond 2 x, 512 sums of 88 terms of which MKL (AVX-512) has better ones.
    yield Sample(name, (y, s, t.b_pool, *t.table), {"slice": L - 1}, ulps=1.5 if name == "rank_512_fp32" else 1.0)


@register(
    multi_lora_linear, differentiable="x weight bias a_pool b_pool", casts="x weight bias", products="TIO TIR TOR"
)
def linear_samples(name: str, t: Layer) -> Iterator[Sample]:
    if t.table[0].shape[1] == 1:  # one slice
        yield Sample(name, (t.x, t.weight, t.bias, t.a_pool, t.b_pool, *t.table, t.scales, *t.dropout))
