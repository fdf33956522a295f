# SPDX-License-Identifier: Apache-2.0
"""What each op means, in plain PyTorch, and the samples every test and benchmark runs it on: the registry ``OPS``.

The truth is the function called on float64 tensors; called on the samples' own dtypes it is the same-dtype PyTorch
expression that the tolerance (testing.py) compares with. Letters as in ops.py.
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
