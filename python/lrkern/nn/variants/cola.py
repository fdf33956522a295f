# SPDX-License-Identifier: Apache-2.0
"""COLA: a chain of LoRA, each link trained after the one before."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ...limits import MAX_RANK
from ..linear import Method
from .rank import Variant, kaiming, trained


class COLALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) Bᵀ + (x Cᵀ) Dᵀ): COLA (Xia et al., Chain of LoRA, arXiv 2401.04151).

    lora_A [r, in] and lora_B [out, r] train as LoRA's, A from kaiming_uniform, B from zero: the layer starts as the base layer.
    ``restart`` puts them at the end of the chain, C = chain_A [links r, in] and D = chain_B [out, links r], which stay frozen, and
    begins the pair anew: y is the same before and after, up to rounding. The paper adds the old pair to W; here W stays as it
    was, so that files hold the adapter alone: the same y but for that rounding of W. Dropout acts on the pair that trains, as there.
    The rank of ΔW is at most (links + 1) r, which is <= 512.

    When to restart (its schedule is not verified) and what becomes of the optimizer's state (the paper begins it anew) are for who trains.
    """

    METHODS: ClassVar = {"cola": Method({}, "COLA, Xia et al., arXiv 2401.04151")}
    SETTINGS = ("r", "lora_alpha", "dropout", "links")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        links: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("links", links, 0)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self._fits("links", links, f"give (links + 1) * r <= {MAX_RANK} (r={r})", (links + 1) * r <= MAX_RANK)
        self.links = links
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        self.chain_A = self.chain_B = None
        if links:  # of a file, which has their values
            self._chain(*(torch.zeros_like(t) for t in (self.lora_A, self.lora_B) for _ in range(links)))

    def _chain(self, *parts: Tensor) -> None:
        """Parts of A, then as many of B."""
        n = len(parts) // 2
        self.chain_A = nn.Parameter(torch.cat(parts[:n]), requires_grad=False)
        self.chain_B = nn.Parameter(torch.cat(parts[n:], 1), requires_grad=False)

    @torch.no_grad()
    def restart(self) -> None:
        """Freezes the pair at the end of the chain and begins it anew, A drawn from torch's generator, in the same parameters."""
        self._refuse_if(self.merged, "restart", "not be merged; unmerge() first")
        ranks = (self.links + 2) * self.r
        self._refuse_if(
            ranks > MAX_RANK, "restart", f"have ranks of at most {MAX_RANK} together, got {ranks} with one link more"
        )
        a, b = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self._chain(*((self.chain_A, a, self.chain_B, b) if self.links else (a, b)))
        self.links += 1
        self.lora_A.copy_(kaiming(*self.lora_A.shape, dtype=self.lora_A.dtype, device=self.lora_A.device))
        self.lora_B.zero_()

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """[A; C] [(links + 1) r, in] and [B, D] [out, (links + 1) r]."""
        if not self.links:
            return self.lora_A, self.lora_B, self.scaling
        return torch.cat([self.lora_A, self.chain_A]), torch.cat([self.lora_B, self.chain_B], 1), self.scaling

    @property
    def lora_rank(self) -> int:
        return (self.links + 1) * self.r

    # The chain beside y has no gradient formed; cat's operands would have one of all (links + 1) r ranks.

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling, self.dropout, self.training)
        return self._with_chain(y, x)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return self._with_chain(
            F.lora_add(y, x, self.lora_A, self.lora_B, self.scaling, self.dropout, self.training), x
        )

    def _with_chain(self, y: Tensor, x: Tensor) -> Tensor:
        return F.lora_add(y, x, self.chain_A, self.chain_B, self.scaling) if self.links else y
