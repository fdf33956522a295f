# SPDX-License-Identifier: Apache-2.0
"""SVFit: the largest singular values of W train."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import MiddleLinear, frozen
from .spectrum import top


class SVFitLinear(MiddleLinear):
    """y = x (W_res + U_r diag(σ) V_rᵀ)ᵀ + bias, W = U Σ Vᵀ and W_res = W - U_r Σ_r V_rᵀ: SVFit (Sun et al., arXiv 2409.05926).

    sigma [r] trains and starts as the r largest singular values; lora_A = V_rᵀ [r, in], lora_B = U_r [out, r] and sigma0 [r], what sigma
    was at first, are frozen. W stays whole: y = x Wᵀ + bias + ((dropout(x) Aᵀ) ⊙ (σ - σ₀)) Bᵀ, the same, which starts as the base
    layer; dropout is on what was learned alone. There is no scaling. Not verified: no code was published.
    """

    METHODS: ClassVar = {"svfit": Method({}, "SVFit, Sun et al., arXiv 2409.05926")}
    SETTINGS = ("r", "dropout")
    PACKED = False  # A and B are of W
    QUANTIZES = False

    def _set_up(
        self, base: nn.Linear, r: int = 16, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None
    ) -> None:
        like = self._begin(base, r, r, dropout, adapter_dtype)
        u, s, vh = top(base.weight, r, "SVFitLinear: it needs")
        self.lora_A, self.lora_B = frozen(vh, **like), frozen(u, **like)
        self.sigma, self.sigma0 = frozen(s, **like).requires_grad_(), frozen(s, **like)

    def middle(self) -> Tensor:
        return self.sigma - self.sigma0
