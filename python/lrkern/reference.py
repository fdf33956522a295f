# SPDX-License-Identifier: Apache-2.0
"""What each op means, in plain PyTorch, and the samples every test and benchmark runs it on: the registry ``OPS``.

The truth is the function called on float64 tensors; called on the samples' own dtypes it is the same-dtype PyTorch
expression that the tolerance (testing.py) compares with. Letters as in ops.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------ Philox4x32-10 and dropout

MASK32 = 0xFFFFFFFF


def mul32(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of the 64-bit product of uint32 values held in int64."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


def philox4x32(counter: list[Tensor], key: int, rounds: int = 10) -> list[Tensor]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words are int64 tensors below 2^32."""
    c, k0, k1 = counter, key & MASK32, key >> 32
    for _ in range(rounds):
        (h0, l0), (h1, l1) = mul32(c[0], 0xD2511F53), mul32(c[2], 0xCD9E8D57)
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def dropout_multiplier(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """[rows, cols] float64: 0, or 1 / (keep probability). 16 bits an element, 8 columns a block (csrc/rng.h)."""
    blocks = (cols + 7) // 8
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tag = torch.full_like(row, 1 << 16 | 1 << 22)  # method dropout, distribution 16 bits
    words = torch.stack(philox4x32([block, row, torch.zeros_like(row), tag], int(seed)), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).reshape(rows, blocks * 8)[:, :cols]
    threshold = int(p * 65536 + 0.5)
    return (bits >= threshold).double() * (65536 / max(65536 - threshold, 1))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if int(p * 65536 + 0.5) == 0:
        return x
    m = dropout_multiplier(x.shape[:-1].numel(), x.shape[-1], p, seed.cpu()).to(x.device)
    m = m.to(x.dtype).reshape(x.shape)
    return torch.where(m != 0, x * m, 0.0)  # a dropped nan is dropped


# ---------------------------------------------------------------------------------------------------- LoRA
# fp32 factors over a 16-bit base: the low-rank part runs in fp32 and its result is rounded once, as PEFT does.


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


# ---------------------------------------------------------------------------------------------------- multi-LoRA
# Pools, pages, ranks, plan, slots and slices: see ops/multi_lora.py. Here every (slot, adapter) is one small matmul.


def multi_lora_plan(index, adapters):
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


def factor(pool, pages, ranks, a, l):
    rank = int(ranks[a, l])
    rows = (16 * pages[a, l].long().unsqueeze(1) + torch.arange(16, device=pages.device)).flatten()
    return pool[rows[:rank]], rank


def multi_lora_shrink(x, a_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    flat, K = x.flatten(0, -2).to(a_pool.dtype), plan.shape[0]
    T = len(flat)
    s = a_pool.new_zeros(T, K, pages.shape[1], 16 * pages.shape[2])
    for k, a, rows in rows_of(plan, T):
        xs = flat[rows]
        if dropout_p is not None:
            xs = dropout(flat.repeat_interleave(K, 0), float(dropout_p[a]), seed)[rows * K + k]
        scale = 1.0 if scales is None else scales.reshape(T, K)[rows, k].unsqueeze(1)
        for l in range(pages.shape[1]):
            f, rank = factor(a_pool, pages, ranks, a, l)
            s[rows, k, l, :rank] = (scale * (xs @ f.mT)).to(s.dtype)
    return s.reshape(*x.shape[:-1], *s.shape[1:])


def multi_lora_embedding(ids, a_pool, pages, ranks, plan, scales=None):
    x = torch.nn.functional.one_hot(ids, a_pool.shape[1]).to(a_pool.dtype)
    return multi_lora_shrink(x, a_pool, pages, ranks, plan, scales)


def multi_lora_expand(y, s, b_pool, pages, ranks, plan, slice=0):
    flat = y.flatten(0, -2)
    s, delta = s.reshape(len(flat), *s.shape[-3:]), b_pool.new_zeros(flat.shape)
    for k, a, rows in rows_of(plan, len(flat)):
        f, rank = factor(b_pool, pages, ranks, a, slice)
        delta = delta.index_add(0, rows, s[rows, k, slice, :rank] @ f)
    return add(flat, delta).reshape(y.shape)


def multi_lora_expand_(y, s, b_pool, pages, ranks, plan, slice=0):
    y.copy_(multi_lora_expand(y, s, b_pool, pages, ranks, plan, slice))


def multi_lora_linear(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales=None, dropout_p=None, seed=None):
    y = torch.nn.functional.linear(x, weight, bias)
    s = multi_lora_shrink(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)
    return multi_lora_expand(y, s, b_pool, pages, ranks, plan)


# ---------------------------------------------------------------------------------------------------- random bases
# Arguments: see ops/basis.py; the stream: docs/rng.md.

BITS = {2: 8, 3: 16, 4: 32, 5: 1, 6: 16, 7: 2}  # of an element, by distribution


def basis_value(h: Tensor, distribution: int) -> Tensor:
    if distribution == 5:
        return 1.0 - 2.0 * h
    if distribution == 6:
        return (h >= 54613).double() - (h < 10923).double()
    if distribution == 7:
        return (h & 1).double() - (h >> 1).double()
    h, b = (h >> 8, 24) if distribution == 4 else (h, BITS[distribution])
    return (2 * h + 1).double() / 2**b - 1


def basis(seed, method, distribution, tensor, first, R, q0, c0, Q, C) -> Tensor:
    """U[q0 : q0 + Q, c0 : c0 + C] of the stack, float64 [Q, C]."""
    b = BITS[distribution]
    E, lead = 128 // b, c0 % (128 // b)
    q, block = torch.meshgrid(q0 + torch.arange(Q), c0 // E + torch.arange((lead + C + E - 1) // E), indexing="ij")
    tag = first + q // R | method << 16 | distribution << 22
    words = torch.stack(philox4x32([block, q % R, torch.full_like(q, tensor), tag], seed), -1)
    bits = words.unsqueeze(-1) >> torch.arange(0, 32, b) & (1 << b) - 1  # [Q, blocks, 4, 32 / b]
    return basis_value(bits.reshape(Q, bits.shape[1] * E)[:, lead : lead + C], distribution)


def basis_fill(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale=1.0):
    u = scale * basis(seed, method, distribution, tensor, first, R, q0, c0, Q, C).to(like)
    u = u if row_scale is None else u * row_scale.to(like)[:, None]
    return u if col_scale is None else u * col_scale.to(like)


def basis_combine(coef, base, seed, method, distribution, tensor, R, widths, counts, scales):
    parts = []
    for i, (c, width, scale) in enumerate(zip(coef.split(counts, -1), widths, scales, strict=True)):
        u = basis(seed, method, distribution, tensor + i, 0, R, 0, 0, c.shape[-1] * R, width).to(coef)
        parts.append(torch.einsum("...k,krw->...rw", scale * c, u.reshape(c.shape[-1], R, width)))
    out = torch.cat(parts, -1)
    return out if base is None else out + base


def basis_dot(g, seed, method, distribution, tensor, widths, counts, scales):
    parts, R = [], g.shape[-2]
    for i, (part, count, scale) in enumerate(zip(g.split(widths, -1), counts, scales, strict=True)):
        u = basis(seed, method, distribution, tensor + i, 0, max(R, 1), 0, 0, count * R, part.shape[-1]).to(g)
        parts.append(scale * torch.einsum("...rw,krw->...k", part, u.reshape(count, *part.shape[-2:])))
    return torch.cat(parts, -1)


def basis_matmul(
    x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32=False
):  # fmt: skip
    wide = torch.float32 if fp32 and x.dtype != torch.float64 else x.dtype
    u = basis(seed, method, distribution, tensor, first, R, 0, 0, Q, C).to(x.device, wide)
    y = (x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)) @ (u.mT if transposed else u)
    return y if out_scale is None else y * out_scale.to(wide)


def basis_matmul_(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    spec = seed, method, distribution, tensor, first, R, Q, C, transposed
    y.copy_(add(y, basis_matmul(x, in_scale, out_scale, *spec, fp32=y.dtype != x.dtype)))


# ---------------------------------------------------------------------------------------------------- the registry


@dataclass
class Sample:
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Op:
    name: str
    truth: Callable[..., Any]
    samples: Callable[[str | torch.device, torch.dtype], Iterator[Sample]]
    formula: str
    differentiable: tuple[str, ...] = ()  # argument names with a gradient
    mutates: str | None = None


OPS: dict[str, Op] = {}


def register(truth: Callable[..., Any], formula: str, differentiable: tuple[str, ...] = (), mutates: str | None = None):
    def add_samples(samples):
        name = truth.__name__
        OPS[name] = Op(name, truth, samples, formula, differentiable, mutates)
        return samples

    return add_samples


class Draw:
    """Tensors drawn on the CPU in fp32 from one seed, then moved: every device and dtype sees the same numbers."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, pitch: int = 0, std: float = 1.0) -> Tensor:
        """pitch > 0: a view of rows that many elements apart, NaN between them, off 16-byte alignment when odd."""
        t = torch.randn(*shape, generator=self.generator) * std
        t = t.to(self.device, dtype or self.dtype)
        if not pitch:
            return t
        wide = torch.full((*shape[:-1], pitch), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., : shape[-1]] = t
        return wide[..., : shape[-1]]

    def seed(self) -> Tensor:
        return torch.randint(2**63 - 1, (1,), generator=self.generator).to(self.device)


# name, leading dimensions, I, O, R, fp32 factors, bias, row pitch of x over I (0: contiguous), dropout_p
LORA_CASES = [
    ("one_token", (1,), 64, 48, 4, False, True, 0, 0.0),
    ("odd", (7,), 67, 35, 5, False, False, 0, 0.0),
    ("chunks", (70,), 1031, 520, 16, False, True, 0, 0.0),
    ("segments", (3, 180), 136, 264, 8, False, True, 0, 0.0),
    ("rank_1", (2, 3, 5), 40, 24, 1, False, True, 0, 0.0),
    ("rank_17_fp32", (33,), 72, 80, 17, True, True, 0, 0.0),
    ("rank_100", (9,), 130, 300, 100, False, False, 0, 0.0),
    ("rank_512_fp32", (5,), 96, 88, 512, True, False, 0, 0.0),
    ("fp32_factors", (130,), 264, 520, 16, True, True, 0, 0.0),
    ("pitch", (4, 6), 56, 40, 8, False, True, 72, 0.0),
    ("odd_pitch", (11,), 33, 41, 3, True, True, 45, 0.0),
    ("dropout", (65,), 200, 72, 8, False, True, 0, 0.25),
    ("dropout_fp32_pitch", (3, 7), 61, 40, 9, True, False, 64, 0.5),
    ("dropout_all", (4,), 32, 16, 4, False, True, 0, 1.0),
    ("rank_0", (3, 2), 16, 24, 0, False, True, 0, 0.0),
    ("no_tokens", (0,), 16, 24, 4, False, True, 0, 0.0),
    ("no_tokens_3d", (2, 0), 16, 24, 4, True, False, 0, 0.0),
]


def _lora_tensors(device, dtype):
    for i, (name, lead, I, O, R, fp32, bias, pitch, p) in enumerate(LORA_CASES):
        draw = Draw(device, dtype, seed=i)
        f = torch.float32 if fp32 else dtype
        x = draw(*lead, I, pitch=pitch)
        w, bias = draw(O, I, std=I**-0.5), draw(O) if bias else None
        a, b = draw(R, I, dtype=f, std=I**-0.5), draw(O, R, dtype=f)
        yield name, draw, x, w, bias, a, b, {"scale": 0.75, "dropout_p": p, "seed": draw.seed() if p else None}


@register(lora_shrink, "S = scale D(x) A^T", ("x", "a"))
def _(device, dtype):
    for name, _, x, _, _, a, _, kw in _lora_tensors(device, dtype):
        yield Sample(name, (x, a), kw)


@register(linear_expand, "y = x W^T + bias + scale S B^T", ("x", "weight", "bias", "s", "b"))
def _(device, dtype):
    for name, draw, x, w, bias, a, b, kw in _lora_tensors(device, dtype):
        if kw["dropout_p"]:
            continue
        s = draw(*x.shape[:-1], a.shape[0], dtype=a.dtype)
        yield Sample(name, (x, w, bias, s, b), {"scale": kw["scale"]})
        if name in ("odd", "fp32_factors", "rank_1"):
            yield Sample(f"{name}_no_base", (None, None, bias, s, b), {"scale": kw["scale"]})


@register(lora_linear, "y = c * (x W^T) + bias + scale (D(x) A^T) B^T", ("x", "weight", "bias", "a", "b", "base_scale"))
def _(device, dtype):
    for name, draw, x, w, bias, a, b, kw in _lora_tensors(device, dtype):
        yield Sample(name, (x, w, bias, a, b), kw)
        if name not in ("one_token", "segments", "fp32_factors", "odd_pitch", "dropout", "rank_0", "no_tokens_3d"):
            continue
        c = draw(w.shape[0], dtype=a.dtype)
        yield Sample(f"{name}_base_scale", (x, w, bias, a, b, *kw.values(), c))


@register(lora_add, "y + scale (D(x) A^T) B^T", ("y", "x", "a", "b"))
def _(device, dtype):
    for name, draw, x, w, _, a, b, kw in _lora_tensors(device, dtype):
        pitch = w.shape[0] + 13 if "pitch" in name else 0
        yield Sample(name, (draw(*x.shape[:-1], w.shape[0], pitch=pitch), x, a, b), kw)
        if name in ("fp32_factors", "dropout_fp32_pitch"):  # a base layer may answer in a dtype of its own
            other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
            yield Sample(f"{name}_other_y", (draw(*x.shape[:-1], w.shape[0], dtype=other), x, a, b), kw)


@register(lora_expand_, "y += scale S B^T, in place", mutates="y")
def _(device, dtype):
    for name, draw, x, w, _, a, b, kw in _lora_tensors(device, dtype):
        if kw["dropout_p"]:
            continue
        s = draw(*x.shape[:-1], a.shape[0], dtype=a.dtype)
        pitch = w.shape[0] + 13 if "pitch" in name else 0
        yield Sample(name, (draw(*x.shape[:-1], w.shape[0], pitch=pitch), s, b), {"scale": kw["scale"]})


# name, leading dimensions, I, O, ranks [A][L], index: K columns or a callable of T, fp32 factors, scales, dropout_p, pitch of x over I
MULTI_CASES = [
    ("one_token", (1,), 64, 48, [[4]], [[0]], False, True, None, 0),
    ("odd", (7,), 67, 35, [[5], [1], [3]], [[2], [0], [-1], [2], [1], [2], [0]], False, True, None, 0),
    ("fp32_factors", (40,), 264, 520, [[16], [8]], "mixed", True, True, None, 0),
    ("chunks", (70,), 1031, 520, [[16], [64], [0], [17]], "mixed", False, False, None, 0),
    ("tiles", (3, 60), 136, 264, [[8], [33]], "skewed", False, True, None, 0),
    ("rank_512_fp32", (5,), 96, 88, [[512], [2]], "mixed", True, True, None, 0),
    ("slots", (33,), 72, 80, [[8], [20], [0], [16]], "slots", False, True, None, 0),
    ("slots_fp32", (2, 9), 40, 24, [[3], [16]], "slots", True, True, None, 0),
    ("slices", (19,), 56, 40, [[8, 0, 16], [4, 30, 1]], "mixed", False, True, None, 72),
    ("dropout", (65,), 200, 72, [[8], [16], [4]], "mixed", False, True, [0.25, 0.0, 1.0], 0),
    ("dropout_slots_fp32_pitch", (3, 7), 61, 41, [[9], [5]], "slots", True, True, [0.5, 0.1], 64),
    ("odd_pitch", (11,), 33, 41, [[3], [2]], "mixed", True, False, None, 45),
    ("none", (6,), 16, 24, [[4]], "none", False, True, None, 0),
    ("rank_0", (3, 2), 16, 24, [[0], [0]], "mixed", False, True, None, 0),
    ("no_tokens", (0,), 16, 24, [[4]], "mixed", False, True, None, 0),
    ("no_adapters", (4,), 16, 24, [], "none", False, True, None, 0),
]  # fmt: skip


def adapter_index(how: str, T: int, A: int, generator: torch.Generator) -> Tensor:
    """int32 [T, K]: who has which adapter. mixed: any or none; skewed: adapter 1 but for row 0; slots: three of any or none."""
    if how == "none":
        return torch.full((T, 1), -1, dtype=torch.int32)
    if how == "skewed":
        index = torch.ones(T, 1, dtype=torch.int32)
        index[:1] = 0
        return index
    return torch.randint(-1, A, (T, 3 if how == "slots" else 1), generator=generator, dtype=torch.int32)


def pages_of(ranks: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """(pages int32 [A, L, M], rows of the pool): pages in any order, one more than are needed."""
    counts = (ranks + 15) // 16
    M, total = int(counts.max()) if counts.numel() else 1, int(counts.sum()) + 1
    pages, free = torch.full((*ranks.shape, M), -1, dtype=torch.int32), iter(torch.randperm(total, generator=generator))
    for at in torch.cartesian_prod(*map(torch.arange, ranks.shape)) if ranks.numel() else ():
        for m in range(int(counts[tuple(at)])):
            pages[(*at, m)] = next(free)
    return pages, 16 * total


def _multi_tensors(device, dtype):
    for i, (name, lead, I, O, ranks, how, fp32, scaled, dropout_p, pitch) in enumerate(MULTI_CASES):
        draw = Draw(device, dtype, seed=200 + i)
        f, T = torch.float32 if fp32 else dtype, torch.Size(lead).numel()
        x, w, bias = draw(*lead, I, pitch=pitch), draw(O, I, std=I**-0.5), draw(O)
        ranks = torch.tensor(ranks, dtype=torch.int32).reshape(len(ranks), -1 if ranks else 1)
        pages, P = pages_of(ranks, draw.generator)
        index = torch.tensor(how, dtype=torch.int32) if isinstance(how, list) else None
        index = adapter_index(how, T, len(ranks), draw.generator) if index is None else index
        a_pool, b_pool = draw(P, I, dtype=f, std=I**-0.5), draw(P, O, dtype=f)
        scales = draw(T, index.shape[1], dtype=torch.float32) if scaled else None
        plan = multi_lora_plan(index, len(ranks))
        p = None if dropout_p is None else torch.tensor(dropout_p, device=device)
        table = tuple(t.to(device) for t in (pages, ranks, plan))
        yield name, draw, x, w, bias, a_pool, b_pool, table, (scales, p, draw.seed() if dropout_p else None), index


@register(multi_lora_plan, "rows sorted by adapter")
def _(device, dtype):
    for name, *_, table, _, index in _multi_tensors(device, dtype):
        yield Sample(name, (index.to(device), len(table[0])))


@register(multi_lora_shrink, "S[t, k] = scales[t, k] D(x[t]) A[index[t, k]]^T", ("x", "a_pool"))
def _(device, dtype):
    for name, _, x, _, _, a_pool, _, table, rest, _ in _multi_tensors(device, dtype):
        yield Sample(name, (x, a_pool, *table, *rest))


@register(multi_lora_embedding, "S[t, k] = scales[t, k] A[index[t, k]][:, ids[t]]", ("a_pool",))
def _(device, dtype):
    for name, draw, x, _, _, a_pool, _, table, rest, _ in _multi_tensors(device, dtype):
        ids = torch.randint(a_pool.shape[1], x.shape[:-1], generator=draw.generator)
        yield Sample(name, (ids.to(device), a_pool, *table, rest[0]))


def _expand_samples(device, dtype):
    for name, draw, x, w, _, _, b_pool, table, _, _ in _multi_tensors(device, dtype):
        y = draw(*x.shape[:-1], w.shape[0], pitch=w.shape[0] + 13 if "pitch" in name else 0)
        s = draw(*x.shape[:-1], len(table[2]), table[0].shape[1], 16 * table[0].shape[2], dtype=b_pool.dtype)
        yield Sample(name, (y, s, b_pool, *table), {"slice": table[0].shape[1] - 1})


EXPAND = "y[t] + sum over k of S[t, k] B[index[t, k]]^T"
register(multi_lora_expand, EXPAND, ("y", "s", "b_pool"))(_expand_samples)
register(multi_lora_expand_, f"{EXPAND}, in place", mutates="y")(_expand_samples)


@register(
    multi_lora_linear,
    "x W^T + bias + sum over k of scales[t, k] (D(x[t]) A[index[t, k]]^T) B[index[t, k]]^T",
    ("x", "weight", "bias", "a_pool", "b_pool"),
)
def _(device, dtype):
    for name, _, x, w, bias, a_pool, b_pool, table, rest, _ in _multi_tensors(device, dtype):
        if table[0].shape[1] == 1:
            yield Sample(name, (x, w, bias, a_pool, b_pool, *table, *rest))


# name, distribution, method, first basis, R, Q, C, leading dimensions of x, scales, seed past 2^32
BASIS_CASES = [
    ("one_token", 2, 3, 0, 8, 8, 64, (1,), True, False),
    ("odd", 2, 2, 3, 5, 13, 67, (3,), True, True),
    ("uniform16", 3, 3, 0, 16, 16, 270, (2, 2), True, False),
    ("uniform32", 4, 4, 7, 3, 31, 130, (4,), False, True),
    ("sign", 5, 4, 0, 4, 20, 2100, (2,), True, False),
    ("ternary6", 6, 4, 65000, 2, 9, 300, (5,), True, True),
    ("ternary4", 7, 4, 1, 1, 17, 1030, (7,), False, False),
    ("slices", 2, 4, 0, 32, 600, 40, (3,), True, False),
    ("many_tokens", 2, 3, 0, 64, 64, 520, (2, 20), True, False),
    ("many_tokens_sign", 5, 4, 0, 8, 40, 300, (33,), False, True),
    ("no_tokens", 2, 3, 0, 8, 8, 16, (0,), True, False),
    ("no_rows", 2, 3, 0, 8, 0, 16, (2,), True, False),
    ("no_columns", 2, 3, 0, 8, 8, 0, (2,), True, False),
]


def _basis_tensors(device, dtype):
    for i, (name, d, method, first, R, Q, C, lead, scaled, far) in enumerate(BASIS_CASES):
        draw = Draw(device, dtype, seed=400 + i)
        stream = (int(draw.seed()) if far else 17 + i, method, d, 5 * i, first)
        scale = lambda n, draw=draw, scaled=scaled: draw(n, dtype=torch.float32) if scaled else None
        yield name, draw, stream, R, Q, C, lead, scale


@register(basis_fill, "row_scale * U[q0:, c0:] * col_scale")
def _(device, dtype):
    for i, (name, draw, stream, R, Q, C, _, scale) in enumerate(_basis_tensors(device, dtype)):
        q0, c0 = (0, 0) if i % 3 == 0 else (R + 1, 37)
        yield Sample(name, (draw(1), scale(Q), scale(C), *stream, R, q0, c0, Q, C, 0.75))


def _segments(i: int, R: int, C: int) -> tuple[list, list, list]:
    return [([C], [7], [0.5]), ([C, 33], [19, 40], [0.25, 2.0]), ([3, C, 8], [1, 0, 33], [1.0, 3.0, -1.0])][i % 3]


@register(basis_combine, "base + scale sum over k of coef[k] U_k", ("coef", "base"))
def _(device, dtype):
    for i, (name, draw, stream, R, _, C, lead, scale) in enumerate(_basis_tensors(device, torch.float32)):
        segments = _segments(i, R, C)
        base = draw(R, sum(segments[0])) if scale(1) is not None else None
        coef = draw(*lead, sum(segments[1])) if i % 4 else draw(sum(segments[1]))
        yield Sample(name, (coef, base, *stream[:4], R, *segments))


@register(basis_dot, "scale <g, U_k>", ("g",))
def _(device, dtype):
    for i, (name, draw, stream, R, _, C, lead, _) in enumerate(_basis_tensors(device, torch.float32)):
        segments = _segments(i, R, C)
        shape = (R, sum(segments[0]))
        yield Sample(name, (draw(*lead, *shape) if i % 4 else draw(*shape), *stream[:4], *segments))


@register(basis_matmul, "out_scale * ((in_scale * x) U), or U^T", ("x",))
def _(device, dtype):
    for i, (name, draw, stream, R, Q, C, lead, scale) in enumerate(_basis_tensors(device, dtype)):
        for transposed in (False, True):
            n, m = (C, Q) if transposed else (Q, C)
            x = draw(*lead, n, pitch=n + 5 if i % 2 else 0, std=max(n, 1) ** -0.5)
            tail = (*stream, R, Q, C, transposed, i % 3 == 2)
            yield Sample(f"{name}_transposed" if transposed else name, (x, scale(n), scale(m), *tail))


@register(basis_matmul_, "y += out_scale * ((in_scale * x) U), or U^T, in place", mutates="y")
def _(device, dtype):
    for i, (name, draw, stream, R, Q, C, lead, scale) in enumerate(_basis_tensors(device, dtype)):
        for transposed in (False, True):
            n, m = (C, Q) if transposed else (Q, C)
            x = draw(*lead, n, dtype=torch.float32 if i % 2 else None, std=max(n, 1) ** -0.5)
            tail = (*stream, R, Q, C, transposed)
            yield Sample(f"{name}_transposed" if transposed else name, (draw(*lead, m), x, scale(n), scale(m), *tail))
