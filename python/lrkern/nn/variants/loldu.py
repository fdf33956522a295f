# SPDX-License-Identifier: Apache-2.0
"""LoLDU: the first pivots of W train."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method, constant
from .rank import MiddleLinear, frozen
from .spectrum import taken


def ldu(weight: Tensor, r: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """P L [out, r], d [r] and U [r, in] in float32 of W = P L diag(d) U: its first r columns, pivots and rows, L and U with ones on their
    diagonals. The first r columns of W give L, d and P's first r rows, and those rows U. A ValueError, which begins with ``what``, says
    what of the weight is in the way."""
    w = taken(weight, r, what)
    O, I = w.shape
    if w.is_meta:
        return w.new_empty(O, r), w.new_empty(r), w.new_empty(r, I)
    lu, swaps, _ = torch.linalg.lu_factor_ex(w[:, :r].double())
    d = lu.diagonal().clone()
    if not d.all():
        raise ValueError(f"{what} a W whose first r pivots are not zero, got zero at {int((d == 0).nonzero()[0])}")
    order = list(range(O))  # Pᵀ W = W[order]
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    lower = lu.tril(-1)
    lower.diagonal().fill_(1.0)
    u = torch.linalg.solve_triangular(lower[:r], w[order[:r]].double(), upper=False, unitriangular=True) / d[:, None]
    pl = torch.empty_like(lower)
    pl[order] = lower
    return pl.float(), d.float(), u.float()


class LoLDULinear(MiddleLinear):
    """y = x (W_res + s · P L_r diag(z) U_r)ᵀ + bias, W = P L diag(d) U and W_res = W - s · P L_r diag(d_r) U_r: LoLDU (Shi et al.,
    arXiv 2410.13618), as its code has it.

    vector_z [r] trains and starts as d_r, the first r pivots; lora_A = U_r [r, in], lora_B = P L_r [out, r] and ``start`` [r], what the
    middle was at first, are frozen. s = lora_alpha / r. W stays whole: y = x Wᵀ + bias + s · ((dropout(x) Aᵀ) ⊙ (z - d_r)) Bᵀ, the same,
    which starts as the base layer; dropout is on what was learned alone.

    train_scale: s is a parameter, scaling_factor [1], and trains too. The code has it as one, but leaves it out of what its optimizer
    is given.
    """

    METHODS: ClassVar = {"loldu": Method({}, "LoLDU, Shi et al., arXiv 2410.13618")}
    SETTINGS = ("r", "lora_alpha", "train_scale", "dropout")
    PACKED = False  # A and B are of W
    QUANTIZES = False

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 16.0,
        train_scale: bool = False,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._flag("train_scale", train_scale)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.train_scale = train_scale
        pl, d, u = ldu(base.weight, r, "LoLDULinear: it needs")
        self.lora_A, self.lora_B = frozen(u, **like), frozen(pl, **like)
        self.vector_z = frozen(d, **like).requires_grad_()
        if train_scale:
            self.scaling_factor, self.scaling = constant(self.scaling, 1, **like), 1.0
        self.start = frozen(self._scaled(), **like)

    def _scaled(self) -> Tensor:
        return self.scaling_factor * self.vector_z if self.train_scale else self.vector_z

    def middle(self) -> Tensor:
        return self._scaled() - self.start
