# SPDX-License-Identifier: Apache-2.0
"""ALLoRA: LoRA with a rate for each row of its product, and without dropout and scaling."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ..linear import Method
from .rank import Variant, kaiming, trained


class ALLoRALinear(Variant):
    """y = x Wᵀ + bias + (x Aᵀ) Bᵀ with a gradient rule: ALLoRA (Huang and Balestriero, arXiv 2410.09692).

    Row i of the gradient of B A counts c_i = 1 / sqrt(‖(B A)_i‖₂ + 1 / η²) times for A and B, and once for x: dA = ((c ⊙ dy) B)ᵀ x,
    dB = c ⊙ (dyᵀ x Aᵀ). lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero: the layer starts as the base layer, and
    where B is zero c = η. Both train, by any optimizer. No lora_alpha and no dropout, which the paper does without.

    eta2: η², 1, 2 or 4 in the paper. A rate that all rows share is invisible to Adam; how rates differ between rows is not. Merge,
    export and serving are LoRA's. From the paper's text: its authors' code was not found, so that nothing of it is compared with code.
    """

    METHODS: ClassVar = {"allora": Method({}, "ALLoRA, Huang and Balestriero, arXiv 2410.09692")}
    SETTINGS = ("r", "eta2")

    def _set_up(
        self, base: nn.Linear, r: int = 16, eta2: float = 1.0, adapter_dtype: torch.dtype | None = None
    ) -> None:
        self._finite("eta2", eta2)
        self._fits("eta2", eta2, "be positive", eta2 > 0)
        like = self._begin(base, r, r, 0.0, adapter_dtype)
        self.eta2 = float(eta2)
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B, 1.0

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.allora_linear(x, weight, bias, self.lora_A, self.lora_B, self.eta2)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.allora_add(y, x, self.lora_A, self.lora_B, self.eta2)
