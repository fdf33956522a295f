# SPDX-License-Identifier: Apache-2.0
"""IntTune: NLoRA of which only the middle matrix trains."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .nlora import INITS, nystrom
from .rank import MiddleLinear, frozen


class IntTuneLinear(MiddleLinear):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) Nᵀ) Bᵀ: IntTune of the NLoRA paper (Guo et al., arXiv 2502.14482).

    lora_A [r, in], lora_N [r, r] and lora_B [out, r] start as in NLoRALinear, by ``init``; only N trains. As published, y begins as that
    of W + scaling · B N A. With ``subtract`` the middle is N - lora_N0 [r, r], what N was at first, and the layer begins as the base
    layer; dropout is on what was learned alone then. scaling = lora_alpha / r.
    """

    METHODS: ClassVar = {"inttune": Method({}, "IntTune of NLoRA, Guo et al., arXiv 2502.14482")}
    SETTINGS = ("r", "lora_alpha", "init", "subtract", "dropout")
    PACKED = False  # A and B are of W
    QUANTIZES = False

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 16.0,
        init: str = "pinv",
        subtract: bool = False,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._one_of("init", init, INITS)
        self._flag("subtract", subtract)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.init, self.subtract = init, subtract
        a, n, b = nystrom(base.weight, r, init, "IntTuneLinear: it needs")
        self.lora_A, self.lora_B = frozen(a, **like), frozen(b, **like)
        self.lora_N = frozen(n, **like).requires_grad_()
        if subtract:
            self.lora_N0 = frozen(n, **like)

    def middle(self) -> Tensor:
        return self.lora_N - self.lora_N0 if self.subtract else self.lora_N
