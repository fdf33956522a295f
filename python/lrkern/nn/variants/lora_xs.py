# SPDX-License-Identifier: Apache-2.0
"""LoRA-XS: r² numbers between frozen singular vectors."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import MiddleLinear, frozen, trained
from .spectrum import top


class LoRAXSLinear(MiddleLinear):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) Rᵀ) Bᵀ: LoRA-XS (Bałazy et al., arXiv 2405.17604).

    W = U Σ Vᵀ; lora_A = Σ_r V_rᵀ [r, in] and lora_B = U_r [out, r], frozen, of its r largest singular values; lora_R [r, r] trains and
    starts normal with a deviation of 1e-5, so that the layer starts as the base layer but for that. scaling = lora_alpha / r. The
    authors' code takes the SVD of Wᵀ by sklearn's TruncatedSVD: the same factors up to signs, which R takes up.

    A and B are in files and state_dicts: an SVD of another machine may turn them.
    """

    METHODS: ClassVar = {"lora_xs": Method({}, "LoRA-XS, Bałazy et al., arXiv 2405.17604")}
    SETTINGS = ("r", "lora_alpha", "dropout")
    PACKED = False  # A and B are of W
    QUANTIZES = False

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        u, s, vh = top(base.weight, r, "LoRAXSLinear: it needs")
        self.lora_A, self.lora_B = frozen(s[:, None] * vh, **like), frozen(u, **like)
        self.lora_R = trained(r, r, std=1e-5, **like)

    def middle(self) -> Tensor:
        return self.lora_R
