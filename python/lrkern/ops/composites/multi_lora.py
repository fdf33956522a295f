# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA: the rows of each adapter by themselves, so that no row meets another's factors. The plan is read back from a GPU."""

import math
from itertools import chain

import torch
import torch.nn.functional as F

from ...limits import PAGE, PLAN_ROWS, plan_length
from .common import added, composite, dropped, lie, read, threshold, wide

TABLE = "pages:ALM:i32 ranks:AL:i32 plan:KZ:i32"


@composite("index::i32")
def multi_lora_plan(index, adapters):
    """Of each slot: rows by adapter, none first; where each adapter's begin; tiles of 64 rows as (adapter, first), and spare ones."""
    lie("adapters", adapters, 0, 2**30 + 1)
    if index.dim() not in (1, 2):
        raise ValueError(f"index must have shape [T] or [T, K], got {list(index.shape)}")
    T, plans = len(index), []
    for column in (index if index.dim() == 2 else index.unsqueeze(1)).long().clamp_min(-1).unbind(1):
        begin = [0, *read("index", torch.bincount(column + 1, minlength=adapters + 2).cumsum(0))]
        if begin[adapters + 1] != T:
            raise ValueError(f"index must lie below adapters = {adapters}, got {int(column.max())}")
        tiles = [[g, t] for g in range(adapters + 1) for t in range(begin[g], begin[g + 1], PLAN_ROWS)]
        spare = (plan_length(T, adapters) - T - len(begin)) // 2 - len(tiles)
        rest = torch.tensor([*begin, *chain(*tiles, *[[0, T]] * spare)], device=index.device)
        plans.append(torch.cat([column.sort(stable=True).indices, rest]))
    return torch.stack(plans).int() if plans else index.new_empty(0, 0)


def _groups(plan, T, A):
    """(slot, adapter, its rows) of all that have rows."""
    if plan.shape[1] < T + A + 2:
        raise ValueError(f"plan must be one of {T} rows and {A} adapters, got {list(plan.shape)}")
    for k, each in enumerate(plan):
        begin = read("plan", each[T : T + A + 2])
        if begin[0] or begin[-1] != T or begin != sorted(begin):
            raise ValueError(f"plan must be one of {T} rows and {A} adapters, slot {k} begins at {begin}")
        for a in range(A):
            if begin[a + 1] < begin[a + 2]:
                yield k, a, each[begin[a + 1] : begin[a + 2]].long()


def _factors(pool, pages, ranks, adapters, dtype):
    """(adapter, slice): its rows of the pool, in order, of these adapters. One indexing: its gradient is one tensor like the pool."""
    keys, rows, sizes, (_, L, M), P = [], [], [], pages.shape, len(pool)
    pages, ranks = read("pages", pages), read("ranks", ranks)
    for a in adapters:
        for l in range(L):
            lie("ranks", ranks[a][l], 0, PAGE * M + 1)
            of = pages[a][l][: -(-ranks[a][l] // PAGE)]
            for page in of:
                lie("pages", page, 0, P // PAGE)
            mine = [PAGE * page + i for page in of for i in range(PAGE)][: ranks[a][l]]
            keys.append((a, l)), rows.extend(mine), sizes.append(len(mine))
    found = pool[torch.tensor(rows, dtype=torch.long, device=pool.device)].to(dtype)
    return dict(zip(keys, found.split(sizes), strict=True))


def _of(t, groups):
    """t[rows] of each group, by one indexing"""
    return t[torch.cat([rows for *_, rows in groups])].split([len(rows) for *_, rows in groups]) if groups else ()


def _shrunk(lead, T, pool, pages, ranks, plan, scales, product):
    """S [..., K, L, R] of product(a group's place, its slot, its rows, a factor)"""
    K, (A, L, M), dtype = len(plan), pages.shape, wide(pool.dtype)
    groups = list(_groups(plan, T, A))
    factors, at, parts = _factors(pool, pages, ranks, sorted({a for _, a, _ in groups}), dtype), [], []
    if scales is not None and tuple(scales.shape) not in ((T, K), (T,) * (K == 1)):
        raise ValueError(f"scales must have shape [T, K] = {[T, K]}, got {list(scales.shape)}")
    for i, (k, a, rows) in enumerate(groups):
        scale = 1.0 if scales is None else scales.reshape(T, K)[rows, k].unsqueeze(1)
        for l in range(L):
            f = factors[a, l]
            at.append((rows * K + k) * L + l)
            parts.append(F.pad((scale * product(i, a, k, rows, f)).to(dtype), (0, PAGE * M - len(f))))
    s = pool.new_zeros(T * K * L, PAGE * M, dtype=dtype)
    s = s.index_copy(0, torch.cat(at), torch.cat(parts)) if at else s
    return s.reshape(*lead, K, L, PAGE * M)


def _s(x, a_pool, pages, ranks, plan, scales, dropout_p, seed):
    T, dtype = math.prod(x.shape[:-1]), wide(a_pool.dtype)
    flat = x.reshape(T, x.shape[-1]).to(dtype)
    taken = _of(flat, list(_groups(plan, T, len(pages))))
    drop = [0.0] * len(pages) if dropout_p is None else read("dropout_p", dropout_p)
    if not all(0.0 <= p <= 1.0 for p in drop):
        raise ValueError(f"dropout_p must lie in [0, 1], got {drop}")

    def product(i, a, k, rows, f):
        xs = dropped(taken[i], drop[a], rows * len(plan) + k, seed) if threshold(drop[a]) else taken[i]
        return xs @ f.mT

    return _shrunk(x.shape[:-1], T, a_pool, pages, ranks, plan, scales, product)


@composite(f"x:*I a_pool:PI:~x {TABLE} scales::f32 dropout_p:A:f32 seed:1:i64")
def multi_lora_shrink(x, a_pool, pages, ranks, plan, scales, dropout_p, seed):
    return _s(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)


@composite(f"ids:*:i64 a_pool:PV {TABLE} scales::f32")
def multi_lora_embedding(ids, a_pool, pages, ranks, plan, scales):
    flat = ids.reshape(-1)
    low, high = read("ids", torch.stack(flat.aminmax())) if len(flat) else (0, -1)
    if low < 0 or high >= a_pool.shape[1]:
        raise ValueError(f"ids must lie in [0, {a_pool.shape[1]}), got {low} to {high}")
    of = lambda i, a, k, rows, f: f.float()[:, flat[rows]].mT
    return _shrunk(ids.shape, len(flat), a_pool, pages, ranks, plan, scales, of)


def _expanded(y, s, b_pool, pages, ranks, plan, slice):
    T, K, (A, L, _), dtype = math.prod(y.shape[:-1]), len(plan), pages.shape, wide(b_pool.dtype)
    lie("slice", slice, 0, L)
    groups = list(_groups(plan, T, A))
    factors = _factors(b_pool, pages, ranks, sorted({a for _, a, _ in groups}), dtype)
    flat = s.to(dtype).reshape(T, *s.shape[-3:])[:, :, slice].flatten(0, 1)
    taken = _of(flat, [(k, a, rows * K + k) for k, a, rows in groups])
    delta = flat.new_zeros(T, y.shape[-1])
    for part, (_, a, rows) in zip(
        taken, groups, strict=True
    ):  # a slot has a row once: the order of sums is that of slots
        f = factors[a, slice]
        delta = delta.index_add(0, rows, part[:, : len(f)] @ f)
    return added(y, delta.view(y.shape))


@composite(f"y:*O s:*KLR b_pool:PO:~y {TABLE}")
def multi_lora_expand(y, s, b_pool, pages, ranks, plan, slice):
    return _expanded(y, s, b_pool, pages, ranks, plan, slice)


@composite(f"y:*O s:*KLR b_pool:PO:~y {TABLE}")
def multi_lora_expand_(y, s, b_pool, pages, ranks, plan, slice):
    y.copy_(_expanded(y, s, b_pool, pages, ranks, plan, slice))


@composite(f"x:*I weight:OI:=x bias:O:=x a_pool:PI:~x b_pool:PO:=a_pool {TABLE} scales::f32 dropout_p:A:f32 seed:1:i64")
def multi_lora_linear(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales, dropout_p, seed):
    if pages.shape[1] != 1:
        raise ValueError(f"pages must be of one slice, got {list(pages.shape)}")
    s = _s(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)
    return _expanded(F.linear(x, weight, bias), s, b_pool, pages, ranks, plan, 0), s
