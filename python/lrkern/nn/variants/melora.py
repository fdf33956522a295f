# SPDX-License-Identifier: Apache-2.0
"""MELoRA: small LoRAs side by side, each from a part of the input to a part of the output."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ..linear import Method
from .rank import Variant, kaiming, trained

# Up to this rank one LoRA whose factors are zero outside the blocks is quicker than a LoRA a block, which copies y and the gradient of x.
DENSE = 32


class MELoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, A = blockdiag(A_1 .. A_n), B = blockdiag(B_1 .. B_n): MELoRA (Ren et al., arXiv
    2402.17263).

    lora_A [n, r, in / n] starts as kaiming_uniform of in / n, lora_B [n, out / n, r] as zero: the layer starts as the base layer. Both
    train. scaling = lora_alpha / r. ΔW has a rank of up to n · r with the parameters of a LoRA of rank r. The blocks of the authors' code
    may differ in rank and alpha, these are alike.

    Args:
        r: rank of a block. n: blocks, which must divide in and out, with n · r <= 512.
    """

    METHODS: ClassVar = {"melora": Method({}, "MELoRA, Ren et al., arXiv 2402.17263")}
    SETTINGS = ("r", "n", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        n: int = 2,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, self.MOST)
        self._whole("n", n, 1)
        for size in (base.in_features, base.out_features):
            must = f"divide in = {base.in_features} and out = {base.out_features}"
            self._fits("n", n, must, size % n == 0)
        self._fits("n", n, f"be at most {self.MOST} / r = {self.MOST // r}", n * r <= self.MOST)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.n = n
        rows = kaiming(n * r, base.in_features // n, **like)
        self.lora_A = nn.Parameter(rows.detach().view(n, r, -1))
        self.lora_B = trained(n, base.out_features // n, r, **like)

    @property
    def lora_rank(self) -> int:
        return self.n * self.r

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """The block diagonal A [n · r, in] and B [out, n · r]."""
        return torch.block_diag(*self.lora_A), torch.block_diag(*self.lora_B), self.scaling

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.lora_rank <= DENSE:
            return super()._adapted(x, weight, bias)
        return self._beside(nn.functional.linear(x, weight, bias), x)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        if self.lora_rank <= DENSE:
            return super()._beside(y, x)
        parts = zip(y.chunk(self.n, -1), x.chunk(self.n, -1), self.lora_A, self.lora_B, strict=True)
        return torch.cat([F.lora_add(*part, self.scaling, self.dropout, self.training) for part in parts], -1)
