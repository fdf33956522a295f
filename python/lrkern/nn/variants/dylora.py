# SPDX-License-Identifier: Apache-2.0
"""DyLoRA: LoRA whose every prefix of ranks is a LoRA of its own."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, kaiming, trained


class DyLoRALinear(Variant):
    """y = x Wᵀ + bias + lora_alpha / b · (dropout(x) A[:b]ᵀ) B[:, :b]ᵀ, b = active: DyLoRA (Valipour et al., arXiv 2210.07558).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero: the layer starts as the base layer. Of both the first b ranks train,
    or with ``frozen`` rank b alone, the ranks before it as constants; all others get a gradient of zero (an optimizer with momentum or
    weight decay moves them all the same). ``draw_rank`` draws b anew for a model before each step; b = r is LoRA.

    Args:
        active: b, 1 to r; 0 for r. What is saved, merged and exported is this prefix's adapter, files keep all ranks.
    """

    METHODS: ClassVar = {"dylora": Method({}, "DyLoRA, Valipour et al., arXiv 2210.07558")}
    SETTINGS = ("r", "active", "frozen", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        active: int = 0,
        frozen: bool = False,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, self.MOST)
        self._whole("active", active, 0, r)
        self._flag("frozen", frozen)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.active, self.frozen = active or r, frozen
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)

    @property
    def lora_rank(self) -> int:
        return self.active

    def set_active(self, b: int) -> None:
        self.active = self._whole("active", b, 1, self.r)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        b = self.active
        low, high = self.lora_A[:b], self.lora_B[:, :b]
        if self.frozen:
            low = torch.cat([low[:-1].detach(), low[-1:]])
            high = torch.cat([high[:, :-1].detach(), high[:, -1:]], 1)
        return low, high, self.lora_alpha / b


def draw_rank(
    modules: Iterable[nn.Module], low: int = 1, high: int = 0, generator: torch.Generator | None = None
) -> int:
    """Draws b uniformly from low..high (0: the smallest r) and makes it the active prefix of all DyLoRALinear in ``modules``
    (``model.modules()``): one for all, as in the authors' code. Call it before a step, with a generator in the same state in all processes.
    Returns b."""
    layers = [m for m in modules if isinstance(m, DyLoRALinear)]
    if not layers:
        raise ValueError("draw_rank: modules must have DyLoRALinear layers, got none")
    most = min(m.r for m in layers)
    high = high or most
    if not all(type(n) is int for n in (low, high)) or not 1 <= low <= high <= most:
        must = f"be whole numbers with 1 <= low <= high <= {most}, the smallest r"
        raise ValueError(f"draw_rank: low and high must {must}, got {low!r} and {high!r}")
    where = generator.device if generator is not None else "cpu"
    b = int(torch.randint(low, high + 1, (), generator=generator, device=where))
    for m in layers:
        m.set_active(b)
    return b
