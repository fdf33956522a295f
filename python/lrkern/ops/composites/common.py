# SPDX-License-Identifier: Apache-2.0
"""What composites share: their arguments, as each declares them, the random stream (docs/rng.md) and rows by their owner."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...limits import DTYPES, MAX_RANK

TYPES = {"": DTYPES, "f32": (torch.float32,), "i32": (torch.int32,), "i64": (torch.int64,), "u8": (torch.uint8,),
         "c8": (torch.uint8, torch.float8_e4m3fn)}  # fmt: skip
FINITE = ("scale", "gain", "alpha")


def composite(takes: str = "", again: Callable[..., Tensor] | None = None) -> Callable:
    """Of a function of an op's arguments in order, which gives what X_fwd gives, or X where there is none.

    takes: its tensors as "name:shape:dtype": a letter for each dimension, R a rank, * any leading ones, a digit a size, nothing any shape;
    the dtype one of ``TYPES``, =x that of x, ~x that of x or float32. again: the result as a function of the arguments by name and of h,
    which X_fwd kept in place of an x that X_bwd then lacks.
    """
    wanted = [(*each.split(":"), "")[:3] for each in takes.split()]

    def made(function: Callable) -> Callable:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]

        @wraps(function)
        def checked(*args: Any) -> Any:
            check(wanted, dict(zip(names, args, strict=True)))
            return function(*args)

        checked.again = again
        return checked

    return made


def check(wanted: list[tuple[str, str, str]], given: dict[str, Any]) -> None:
    """Refuses what ATen would broadcast or cast without a word."""
    sizes: dict[str, Any] = {}
    for name, letters, kind in wanted:
        if (t := given[name]) is None:
            continue
        beside = given.get(kind[1:]) if kind[:1] in ("=", "~") else None
        of = TYPES[kind if kind in TYPES else ""]
        if beside is not None:
            of = (beside.dtype, torch.float32) if kind[0] == "~" else (beside.dtype,)
        if t.dtype not in of:
            raise ValueError(f"{name} must be {said(of)}, got {said([t.dtype])}")
        if t.layout != torch.strided:
            raise ValueError(f"{name} must be a dense strided tensor, got {t.layout}")
        if letters:
            match(name, t, letters, sizes)
    if (rank := sizes.get("R", 0)) > MAX_RANK:
        raise ValueError(f"the rank must be at most {MAX_RANK}, got {rank}")
    for name in FINITE:
        number = isinstance(given.get(name), float | int)
        if number and not abs(given[name]) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be finite in float32, got {given[name]}")
    p = given.get("dropout_p")
    if isinstance(p, float | int) and not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {p}")
    if p is not None and given["seed"] is None and (isinstance(p, Tensor) or threshold(p)):
        raise ValueError("seed must be an int64 tensor of shape [1] where dropout_p > 0, got None")


def said(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def match(name: str, t: Tensor, letters: str, sizes: dict[str, Any]) -> None:
    """Its shape against the sizes that are known, which gain its own."""
    fixed = letters.removeprefix("*")
    lead = t.dim() - len(fixed)
    if lead == 0 or (lead > 0 and fixed != letters):
        parts = [*zip(fixed, t.shape[lead:], strict=True)] + [("*", t.shape[:lead])] * (fixed != letters)
        if all(sizes.setdefault(c, int(c) if c.isdigit() else n) == n for c, n in parts):
            return
    known = ", ".join(str(sizes.get(c, "*")) for c in fixed)
    if fixed != letters:
        known = ", ".join([*map(str, sizes.get("*", ["..."])), known])
    raise ValueError(
        f"{name} must have shape [{', '.join(letters).replace('*', '...')}] = [{known}], got {list(t.shape)}"
    )


def lie(name: str, value: Any, low: int, end: float) -> None:
    if not low <= value < end:
        raise ValueError(f"{name} must lie in [{low}, {end}), got {value}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums beside factors of a dtype, as ``s_dtype``: float16 has not the range."""
    return torch.float32 if dtype == torch.float16 else dtype


def added(y: Tensor, delta: Tensor) -> Tensor:
    return (y.to(delta.dtype) + delta).to(y.dtype)


# ---- rows that have an owner


def read(name: str, t: Tensor) -> list:
    """Its numbers, from a GPU too."""
    try:
        return t.tolist()
    except RuntimeError as error:
        raise ValueError(f"{name} must be the same for all samples of vmap, since its numbers are read") from error


def groups(owners: Tensor, count: int, name: str) -> Iterator[tuple[int, int, Tensor]]:
    """(slot, owner, its rows in order) of owners [T, K], all that have rows. Reads their numbers back from a GPU."""
    for k, column in enumerate(owners.long().clamp_min(-1).unbind(1)):
        counts = read(name, torch.bincount(column + 1))
        if len(counts) > count + 1:
            raise ValueError(f"{name} must lie below {count}, got {len(counts) - 2}")
        for owner, rows in enumerate(column.sort(stable=True).indices.split(counts), -1):
            if owner >= 0 and len(rows):
                yield k, owner, rows


# ---- the random stream


def product32(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of the product of a word, which int64 holds, and m."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & 0xFFFFFFFF


def philox(block: Tensor, row: Tensor, tensor: int, tag: Tensor | int, seed: Tensor | int) -> Tensor:
    """Words [..., 4] of the blocks at such counters, in int64."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    c0, c1, c2, c3 = block, row, torch.full_like(block, tensor), torch.zeros_like(block) + tag
    for _ in range(10):
        (h0, l0), (h1, l1) = product32(c0, 0xD2511F53), product32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack([c0, c1, c2, c3], -1)


def bits16(rows: Tensor, columns: int, method: int, seed: Tensor) -> Tensor:
    """16 random bits for each column of such rows, [..., columns]."""
    block = torch.arange(-(-columns // 8), device=rows.device).expand(*rows.shape, -1)
    words = philox(block, rows.unsqueeze(-1).expand_as(block), 0, method << 16 | 1 << 22, seed)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)[..., :columns]


def threshold(p: float) -> int:
    """Bits below it are dropped."""
    return int(p * 65536 + 0.5)


def dropped(x: Tensor, p: float, rows: Tensor, seed: Tensor) -> Tensor:
    """D(x) of rows x [T, I] with such numbers. A NaN that is dropped is gone."""
    keep = bits16(rows, x.shape[-1], 1, seed) >= threshold(p)
    return torch.where(keep, x * (65536 / max(65536 - threshold(p), 1)), 0.0)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not threshold(p):
        return x
    rows = torch.arange(math.prod(x.shape[:-1]), device=x.device)
    return dropped(x.reshape(len(rows), x.shape[-1]), p, rows, seed).view(x.shape)
