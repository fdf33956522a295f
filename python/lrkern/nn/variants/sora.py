# SPDX-License-Identifier: Apache-2.0
"""SoRA: LoRA with a gate that a proximal step makes sparse."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ..linear import Method
from .rank import Variant, kaiming, trained


class SoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ⊙ g) Bᵀ: SoRA (Ding et al., arXiv 2311.11696).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero, lora_gate [r] normal with a deviation of 1 as in the authors' code:
    the layer starts as the base layer. All three train, and ``shrink_gate`` after each step of the optimizer makes the gate sparse.
    scaling = lora_alpha / r. The authors' code keeps the gate as [1, r].
    """

    METHODS: ClassVar = {"sora": Method({}, "SoRA, Ding et al., arXiv 2311.11696")}
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
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        self.lora_gate = trained(r, std=1.0, **like)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_gate[:, None] * self.lora_A, self.lora_B, self.scaling

    @torch.no_grad()
    def shrink_gate(self, threshold: float) -> None:
        """g = sign(g) max(|g| - threshold, 0): the proximal step of threshold · ‖g‖₁, with a threshold of learning rate · λ. The authors'
        code takes λ itself, and sets to zero what lies up to 2 λ from it."""
        self._number("threshold", threshold, "be a finite number, not negative", 0.0, torch.finfo(torch.float32).max)
        self.lora_gate.copy_(nn.functional.softshrink(self.lora_gate, threshold))

    @torch.no_grad()
    def drop_ranks(self) -> int:
        """Leaves out for good the ranks whose gate is zero, all but one where all are: new, smaller parameters, for which an optimizer has
        to be made anew. lora_alpha follows, so that scaling and y stay. Returns the rank."""
        index = self.lora_gate.nonzero().flatten()
        if not len(index):
            index = torch.zeros(1, dtype=torch.int64, device=self.lora_gate.device)
        for name, dim in (("lora_A", 0), ("lora_B", 1), ("lora_gate", 0)):
            p = getattr(self, name)
            setattr(self, name, nn.Parameter(p.index_select(dim, index), p.requires_grad))
        self.lora_alpha, self.r = self.lora_alpha * len(index) / self.r, len(index)
        self.scaling = F.lora_scaling(self.lora_alpha, self.r)
        return self.r
