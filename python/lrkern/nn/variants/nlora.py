# SPDX-License-Identifier: Apache-2.0
"""NLoRA: SLoRA that starts as a Nyström approximation of W."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...limits import MAX_RANK
from ..linear import Method
from .rank import Variant, frozen
from .spectrum import taken

INITS = ("pinv", "slice")


def nystrom(weight: Tensor, r: int, init: str, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, in], N [r, r] and B [out, r] in float32: the first r rows of W, the pseudo-inverse of their first r columns, and the first r
    columns of W, so that B N A is W where W has rank r and that block too. init="slice": N is the block itself."""
    w = taken(weight, r, what)
    n = w[:r, :r]
    if init == "pinv" and not w.is_meta:
        n = torch.linalg.pinv(n.double(), rtol=r * torch.finfo(torch.float32).eps).float()
    return w[:r], n, w[:, :r]


class NLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) Nᵀ) Bᵀ: NLoRA (Guo et al., arXiv 2502.14482).

    lora_A [r, in] starts as the first r rows of W, lora_B [out, r] as its first r columns and lora_N [r, r] as the pseudo-inverse of the
    block that they share: B N A is the Nyström approximation of W. All three train. scaling = lora_alpha / r. ``init="slice"`` starts N
    as the block itself, as the authors' code does.

    As published, the start is added to W: y begins as that of W + scaling · B N A, of which nothing bounds the size where the block is
    nearly singular. With ``subtract`` the start is taken out again, by
    scaling · (B N A - B₀ N₀ A₀), and the layer begins as the base layer; lora_NA0 [r, in] = N₀ A₀ and lora_B0 [out, r] are frozen. It is
    computed as (B - B₀) (N A) + B₀ (N A - N₀ A₀), whose terms are as small as what was learned, at rank 2r; r is at most 256 then, and
    dropout is on what was learned alone.
    """

    METHODS: ClassVar = {"nlora": Method({}, "NLoRA, Guo et al., arXiv 2502.14482")}
    SETTINGS = ("r", "lora_alpha", "init", "subtract", "dropout")
    PACKED = False  # it starts from W
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
        if subtract:
            self._whole("r with subtract", r, 1, MAX_RANK // 2)
        self.init, self.subtract = init, subtract
        start = nystrom(base.weight, r, init, "NLoRALinear: it needs")
        self.lora_A, self.lora_N, self.lora_B = (frozen(t, **like).requires_grad_() for t in start)
        if subtract:
            self.lora_NA0, self.lora_B0 = frozen(self._product(), **like), frozen(self.lora_B, **like)

    def _product(self) -> Tensor:
        """N A, which autocast would round: its terms may be much larger than their sum."""
        device = self.lora_A.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._product()
        return self.lora_N @ self.lora_A

    def factors(self) -> tuple[Tensor, Tensor, float]:
        na, b = self._product(), self.lora_B
        if not self.subtract:
            return na, b, self.scaling
        return torch.cat((na, na - self.lora_NA0)), torch.cat((b - self.lora_B0, self.lora_B0), 1), self.scaling

    @property
    def lora_rank(self) -> int:
        return 2 * self.r if self.subtract else self.r
