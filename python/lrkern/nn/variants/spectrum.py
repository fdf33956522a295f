# SPDX-License-Identifier: Apache-2.0
"""The largest singular values of a weight and their vectors, from which several methods begin."""

import torch
from torch import Tensor

EXACT = (
    1024  # up to this smaller side a full SVD; above it a randomised one, which takes seconds where that takes minutes
)
_OVER, _PASSES = 16, 10


def taken(weight: Tensor, r: int, what: str) -> Tensor:
    """W in float32, of which r singular values, rows or columns are to be taken. A ValueError, which begins with ``what``, says what is
    in the way."""
    if r > min(weight.shape):
        raise ValueError(f"{what} r <= min(in, out) = {min(weight.shape)}, got r={r}")
    w = weight.detach().float()
    if not w.is_meta and not w.isfinite().all():
        raise ValueError(f"{what} a W of finite numbers, got inf or nan")
    return w


def top(weight: Tensor, r: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, r], S [r], Vᵀ [r, I] in float32 with U S Vᵀ the best approximation of rank r, each pair of vectors turned so that the
    largest element of its u is positive. Of a weight on the meta device they are empty (meta) too.

    Above EXACT a randomised SVD (Halko et al., arXiv 0909.4061) with fixed draws: it does not touch torch's generator. A ValueError, which begins with
    ``what``, says what of the weight is in the way.
    """
    w = taken(weight, r, what)
    O, I = w.shape
    if w.is_meta:
        return w.new_empty(O, r), w.new_empty(r), w.new_empty(r, I)
    if min(O, I) <= EXACT or r + _OVER > min(O, I) // 2:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, vh = _randomised(w, r + _OVER)
    u, s, vh = u[:, :r], s[:r], vh[:r]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return u * sign, s, vh * sign[:, None]


def _randomised(w: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = w @ torch.randn(w.shape[1], q, generator=g).to(w)
    for _ in range(_PASSES):  # of power iteration, each made orthonormal
        y = w @ torch.linalg.qr(w.mT @ torch.linalg.qr(y)[0])[0]
    basis = torch.linalg.qr(y)[0]
    u, s, vh = torch.linalg.svd(basis.mT @ w, full_matrices=False)
    return basis @ u, s, vh
