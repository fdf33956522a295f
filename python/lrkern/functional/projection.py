# SPDX-License-Identifier: Apache-2.0
"""Frozen projections, stored or regenerated from a seed (docs/rng.md)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.basis import DISTRIBUTIONS, METHODS

__all__ = ["Basis"]


class Basis(NamedTuple):
    """A stack of random matrices scale · U [rows, cols] that is never stored: ``rows`` are those of bases of R rows each."""

    seed: int
    method: str
    rows: int
    cols: int
    R: int
    scale: float = 1.0
    distribution: str = "uniform8"
    tensor: int = 0

    @property
    def stream(self) -> tuple[int, int, int, int]:
        return self.seed, METHODS[self.method], DISTRIBUTIONS[self.distribution], self.tensor

    def fill(self, like: Tensor, q0: int = 0, Q: int | None = None) -> Tensor:
        """Rows q0 .. q0 + Q as a tensor of like's dtype and device."""
        Q = self.rows - q0 if Q is None else Q
        return ops.basis_fill(like, None, None, *self.stream, 0, self.R, q0, 0, Q, self.cols, self.scale)


Projection = Tensor | Basis  # stored, or generated


def rows_of(p: Projection) -> int:
    return p.shape[0] if isinstance(p, Tensor) else p.rows


def cols_of(p: Projection) -> int:
    return p.shape[1] if isinstance(p, Tensor) else p.cols


def matmul(x: Tensor, p: Projection, transposed: bool, in_scale=None, out_scale=None, into=None, wide=False) -> Tensor:
    """out_scale ⊙ ((in_scale ⊙ x) P), or Pᵀ, without the scale of a Basis; added into ``into`` where that is given."""
    if isinstance(p, Basis):
        args = (x, in_scale, out_scale, *p.stream, 0, p.R, p.rows, p.cols, transposed)
        if into is None:
            return ops.basis_matmul(*args, wide)
        ops.basis_matmul_(into, *args)
        return into
    dtype = p.dtype
    wide_type = torch.float32 if dtype == torch.float16 else dtype  # of what a scale is part of
    if in_scale is not None:
        x = _scaled(x, in_scale, wide_type)
    if x.dtype != dtype:
        x = x.to(dtype)
    y = torch.nn.functional.linear(x, p) if transposed else x @ p
    if into is not None:
        return add_(into, y, out_scale, wide_type)
    return y if out_scale is None else _scaled(y, out_scale, wide_type)


def add_(into: Tensor, y: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """into += scale ⊙ y, their product of that dtype."""
    if scale is None:
        return into.add_(y)
    if into.dtype == y.dtype == scale.dtype == dtype == torch.float32:
        return into.addcmul_(y, scale)  # one rounding less
    return into.add_(_scaled(y, scale, dtype))


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.dtype == scale.dtype == dtype:  # even a cast to the same dtype is a call, and few tokens feel it
        x, scale = x.to(dtype), scale.to(dtype)
    return x * scale


def project(x: Tensor, p: Projection, transposed: bool = False) -> Tensor:
    """x P, or x Pᵀ: float32 for a Basis, in p's dtype for a stored P. Without gradient."""
    return matmul(x, p, transposed, wide=True) * p.scale if isinstance(p, Basis) else matmul(x, p, transposed)


def scale_of(p: Projection) -> float:
    return p.scale if isinstance(p, Basis) else 1.0


def save(ctx, *operands: Projection | None) -> None:
    """Keeps them for backward."""
    ctx.bases = [p if isinstance(p, Basis) else None for p in operands]
    ctx.save_for_backward(*(None if isinstance(p, Basis) else p for p in operands))


def saved(ctx, tensors: Sequence[Tensor | None]) -> list:
    """What ``save`` kept, of ctx's saved tensors."""
    return [basis or t for basis, t in zip(ctx.bases, tensors, strict=True)]
