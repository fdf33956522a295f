# SPDX-License-Identifier: Apache-2.0
"""Block-LoRA: LoRA whose blocks of ranks share one down-projection."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, kaiming, trained


class BlockLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) (Σ_k B_k)ᵀ: Block-LoRA of "One Head Eight Arms" (Zhou et al., arXiv 2501.16720).

    LoRA of rank r in n blocks of r / n ranks, ΔW = Σ_k B_k A_k, with one A for all: lora_A [r / n, in] starts as kaiming_uniform, lora_B
    [out, r], whose columns are the blocks, as zero: the layer starts as the base layer. Both train, and all blocks of B get the same
    gradient. scaling = lora_alpha / r. No code of the authors was found: shapes, start and scaling are not verified.

    Args:
        n: blocks, which must divide r.
    """

    METHODS: ClassVar = {"block_lora": Method({}, "Block-LoRA, Zhou et al., arXiv 2501.16720")}
    SETTINGS = ("r", "n", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        n: int = 2,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, self.MOST)
        self._whole("n", n, 1)
        self._fits("n", n, f"divide r = {r}", r % n == 0)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.n = n
        self.lora_A, self.lora_B = kaiming(r // n, base.in_features, **like), trained(base.out_features, r, **like)

    @property
    def lora_rank(self) -> int:
        return self.r // self.n

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B.unflatten(1, (self.n, -1)).sum(1), self.scaling
