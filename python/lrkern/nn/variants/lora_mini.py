# SPDX-License-Identifier: Apache-2.0
"""LoRA-Mini: LoRA whose factors are small trained ones times large frozen ones."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...limits import MAX_RANK
from ..linear import Method
from .rank import MiddleLinear, kaiming, trained


class LoRAMiniLinear(MiddleLinear):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ Mᵀ) Bᵀ, M = B_train A_train: LoRA-Mini (Singh et al., arXiv 2411.15804).

    lora_A [a, in] and lora_B [out, b], the paper's auxiliary matrices, are random and frozen; lora_A_train [r, a] and lora_B_train [b, r]
    train, r (a + b) numbers a layer. scaling = lora_alpha / r. ΔW is a LoRA of rank r.

    Not verified, since no code was published: how the matrices start (here kaiming_uniform as LoRA's A, and B_train as zero: the layer
    starts as the base layer), the scaling, and the widths a and b.
    """

    METHODS: ClassVar = {"lora_mini": Method({}, "LoRA-Mini, Singh et al., arXiv 2411.15804")}
    SETTINGS = ("r", "a", "b", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        a: int = 64,
        b: int = 64,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.a, self.b = self._whole("a", a, r, MAX_RANK), self._whole("b", b, r, MAX_RANK)
        self.lora_A = kaiming(a, base.in_features, **like).requires_grad_(False)
        self.lora_B = kaiming(base.out_features, b, **like).requires_grad_(False)
        self.lora_A_train, self.lora_B_train = kaiming(r, a, **like), trained(b, r, **like)

    def middle(self) -> Tensor:
        return self.lora_B_train @ self.lora_A_train

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A_train A [r, in] and B B_train [out, r]."""
        return self.lora_A_train @ self.lora_A, self.lora_B @ self.lora_B_train, self.scaling

    @property
    def lora_rank(self) -> int:
        return self.r
