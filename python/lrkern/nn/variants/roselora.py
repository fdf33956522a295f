# SPDX-License-Identifier: Apache-2.0
"""RoseLoRA: LoRA with few weights in each row of A and each column of B."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, frozen, kaiming, trained
from .scores import largest_in_rows


class RoseLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · (dropout(x) (A ⊙ mask_A)ᵀ) (B ⊙ mask_B)ᵀ: RoseLoRA (Wang et al., arXiv 2406.10777).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero: the layer starts as the base layer. Both train. mask_A and mask_B,
    of bool and all true at first, do not. scaling = lora_alpha / r.

    After each backward ``observe`` updates the sensitivity of the weights, after the step ``prune`` sets all but the most sensitive to
    zero. They may come back from their gradients, until the masks are fixed. The authors published no code; what third parties wrote
    keeps ties too, and updates the sensitivity after the step. The paper's bound on the sparsity of B A is not verified. The
    sensitivity is not in files and state_dicts.
    """

    METHODS: ClassVar = {"roselora": Method({}, "RoseLoRA, Wang et al., arXiv 2406.10777")}
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
        for name, p in (("A", self.lora_A), ("B", self.lora_B)):
            setattr(self, f"mask_{name}", frozen(torch.ones_like(p, dtype=torch.bool)))
            self.register_buffer(f"sensitivity_{name}", None, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A * self.mask_A, self.lora_B * self.mask_B, self.scaling

    @torch.no_grad()
    def observe(self, beta: float = 0.8) -> None:
        """sensitivity = beta · sensitivity + (1 - beta) · |p ⊙ ∂L/∂p| of A and of B, in float32, from zero."""
        self._probability("beta", beta)
        pairs = {"A": self.lora_A, "B": self.lora_B}
        self._refuse_if(
            any(p.grad is None for p in pairs.values()), "observe", "have gradients; call it after backward()"
        )
        for name, p in pairs.items():
            before, now = getattr(self, f"sensitivity_{name}"), (p.float() * p.grad.float()).abs_()
            setattr(self, f"sensitivity_{name}", now.mul_(1 - beta) if before is None else before.lerp_(now, 1 - beta))

    @torch.no_grad()
    def prune(self, tau: float, fix: bool = False) -> None:
        """Keeps the floor(tau · in) most sensitive weights of each row of A and floor(tau · out) of each column of B, at least one, and
        sets the others to zero: for this step, or with ``fix`` for good, by the masks."""
        self._probability("tau", tau)
        self._refuse_if(
            self.sensitivity_A is None, "prune", "have observed its gradients; call observe() after backward()"
        )
        keep = {"A": largest_in_rows(self.sensitivity_A, tau), "B": largest_in_rows(self.sensitivity_B.mT, tau).mT}
        for name, p in (("A", self.lora_A), ("B", self.lora_B)):
            p.masked_fill_(~keep[name], 0)
            if fix:
                getattr(self, f"mask_{name}").copy_(keep[name])
