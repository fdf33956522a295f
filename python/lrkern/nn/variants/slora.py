# SPDX-License-Identifier: Apache-2.0
"""SLoRA: LoRA with a trained middle matrix."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, kaiming, trained


class SLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) Nᵀ) Bᵀ: SLoRA of the NLoRA paper (Guo et al., arXiv 2502.14482).

    lora_A [r, in] and lora_N [r, r] start as kaiming_uniform, lora_B [out, r] as zero: the layer starts as the base layer. All three
    train. scaling = lora_alpha / r. N A [r, in] is made once a call, and the rest is LoRA of rank r.
    """

    METHODS: ClassVar = {"slora": Method({}, "SLoRA of NLoRA, Guo et al., arXiv 2502.14482")}
    SETTINGS = ("r", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.lora_A, self.lora_N = kaiming(r, base.in_features, **like), kaiming(r, r, **like)
        self.lora_B = trained(base.out_features, r, **like)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_N @ self.lora_A, self.lora_B, self.scaling
