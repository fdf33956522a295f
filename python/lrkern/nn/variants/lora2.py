# SPDX-License-Identifier: Apache-2.0
"""LoRA²: the product of two LoRAs with singular values between them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...limits import MAX_RANK
from ..linear import Method
from .rank import Variant, trained


class LoRA2Linear(Variant):
    """y = x Wᵀ + bias + scaling · dropout(x) (bb · aa · diag(E) · B · A)ᵀ: LoRA² (Zhang et al., arXiv 2408.06854), as its code has it.

    lora_A [k, in], lora_B [r, k], lora_aa [k, r] and lora_bb [out, k] start normal with a deviation of 0.02, lora_E [r, 1] as zero: the
    layer starts as the base layer. All five train, with ``orthogonality`` added to the loss. scaling = lora_alpha / (r + 1e-5), or
    r / (r + 1e-5) where lora_alpha is 0. An allocator prunes ranks by zeros in E.

    aa diag(E) B [k, k] is multiplied into A, and the kernels run at rank k. The code's own merge is not its forward; merge here is.
    """

    METHODS: ClassVar = {"lora2": Method({}, "LoRA², Zhang et al., arXiv 2408.06854")}
    SETTINGS = ("r", "k", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        k: int = 8,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._fits("lora_alpha", lora_alpha, "not be negative", not lora_alpha < 0)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.k = self._whole("k", k, 1, MAX_RANK)
        self.scaling = (lora_alpha or float(r)) / (r + 1e-5)
        self.lora_A, self.lora_B = trained(k, base.in_features, std=0.02, **like), trained(r, k, std=0.02, **like)
        self.lora_E = trained(r, 1, **like)
        self.lora_aa = trained(k, r, std=0.02, **like)
        self.lora_bb = trained(base.out_features, k, std=0.02, **like)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_aa @ (self.lora_E * self.lora_B) @ self.lora_A, self.lora_bb, self.scaling

    @property
    def lora_rank(self) -> int:
        return self.k

    def orthogonality(self) -> Tensor:
        """The mean of ‖A Aᵀ - I‖_F, ‖Bᵀ B - I‖_F, ‖aa aaᵀ - I‖_F and ‖bbᵀ bb - I‖_F, each of [k, k]: both planes' factors are to be
        orthonormal. The code counts the last one once more, for a term that its paper does not have so."""
        norms = []
        for p in (self.lora_A, self.lora_B.mT, self.lora_aa, self.lora_bb.mT):
            norms.append((p @ p.mT - torch.eye(self.k, dtype=p.dtype, device=p.device)).norm())
        return torch.stack(norms).mean()
