# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: LoRA as a singular value decomposition, whose values are pruned while it trains."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, trained


class AdaLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ⊙ E) Bᵀ: AdaLoRA (Zhang et al., arXiv 2303.10512) as PEFT defines it.

    lora_A [r, in] and lora_B [out, r] start normal with a deviation of 0.02, lora_E [r, 1] as zero: the layer starts as the base layer.
    All three train, with ``orthogonality`` added to the loss. scaling = lora_alpha / (ranknum + 1e-5), with r for lora_alpha where that is
    0; ranknum is the rank that the layer began with (0 stands for r). Ranks go where an allocator sets rows of E to zero; ``keep`` leaves
    them out for good. Keys are PEFT's.
    """

    METHODS: ClassVar = {"adalora": Method({}, "AdaLoRA, Zhang et al., arXiv 2303.10512")}
    SETTINGS = ("r", "lora_alpha", "dropout", "ranknum")
    PEFT_TYPE = "ADALORA"
    PEFT_SHARES = ("lora_alpha", "dropout", "ranknum")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 12,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        ranknum: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._fits("lora_alpha", lora_alpha, "not be negative", not lora_alpha < 0)
        self._finite("ranknum", ranknum)
        self._fits("ranknum", ranknum, "not be negative", ranknum >= 0)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.ranknum = float(ranknum or r)
        self._scale()
        self.lora_A = trained(r, base.in_features, std=0.02, **like)
        self.lora_E = trained(r, 1, **like)
        self.lora_B = trained(base.out_features, r, std=0.02, **like)

    def _scale(self) -> None:
        self.scaling = (self.lora_alpha or float(self.r)) / (self.ranknum + 1e-5)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A * self.lora_E, self.lora_B, self.scaling

    @torch.no_grad()
    def keep(self, ranks: Tensor) -> None:
        """Leaves out the ranks where this mask [r] of bool is false: new, smaller parameters, for which an optimizer has to be made anew.
        ranknum stays what it was, so that y does, as PEFT has it where it reads such a folder."""
        if ranks.dtype != torch.bool or ranks.shape != (self.r,) or not ranks.any():
            must = f"be a mask [{self.r}] of bool with a rank to keep"
            raise ValueError(f"AdaLoRALinear.keep: ranks must {must}, got {ranks.dtype} {list(ranks.shape)}")
        index = ranks.nonzero().flatten().to(self.lora_A.device)
        for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            p = getattr(self, name)
            setattr(self, name, nn.Parameter(p.index_select(dim, index), p.requires_grad))
        self.r = len(index)
        self._scale()


def orthogonality(modules: Iterable[nn.Module]) -> Tensor:
    """The mean over lora_A and lora_B of all AdaLoRALinear in ``modules`` (``model.modules()``) of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F: add 0.5
    times this to the loss, as PEFT does."""
    norms = []
    for m in modules:
        if isinstance(m, AdaLoRALinear):
            for p in (m.lora_A, m.lora_B.mT):
                norms.append((p @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)).norm())
    if not norms:
        raise ValueError("orthogonality: modules must have AdaLoRALinear layers, got none")
    return torch.stack([n.to(norms[0].device) for n in norms]).mean()
