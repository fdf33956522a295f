# SPDX-License-Identifier: Apache-2.0
"""IncreLoRA: LoRA as a singular value decomposition whose rank grows where the loss asks for it."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...limits import MAX_RANK
from ..linear import Method
from .rank import Variant, trained
from .scores import row_blocks

RESERVE = 1e-5  # E of a rank that trains ahead of being granted


class IncreLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ⊙ E) Bᵀ: IncreLoRA (Zhang et al., arXiv 2308.12043).

    Of r granted ranks and ``reserve`` more that train ahead: lora_A [r + reserve, in] and lora_B [out, r + reserve] start normal with a
    deviation of 0.02 and train; lora_E [r, 1] starts as zero and trains; E of the reserve is 1e-5. So the layer starts as the base layer
    but for what the reserve adds, of the order of 1e-5. scaling = lora_alpha / (r + 1e-5), or r / (r + 1e-5) where lora_alpha is 0, as in
    the authors' code: the reserve does not count, and growing makes it smaller.

    An allocator compares the ``score`` of layers, lets some ``grow``, and lets all ``finish`` once the budget is spent. The authors' trainer
    adds the mean ``orthogonality`` of all layers to the loss, by a weight.
    """

    METHODS: ClassVar = {"increlora": Method({}, "IncreLoRA, Zhang et al., arXiv 2308.12043")}
    SETTINGS = ("r", "reserve", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 2,
        reserve: int = 1,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, MAX_RANK)
        self._whole("reserve", reserve, 0, MAX_RANK - r)
        self._fits("lora_alpha", lora_alpha, "not be negative", not lora_alpha < 0)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.reserve = reserve
        self.lora_A = trained(r + reserve, base.in_features, std=0.02, **like)
        self.lora_E = trained(r, 1, **like)
        self.lora_B = trained(base.out_features, r + reserve, std=0.02, **like)
        self._rescale()

    def _rescale(self) -> None:
        self.scaling = (self.lora_alpha or float(self.r)) / (self.r + 1e-5)

    @property
    def lora_rank(self) -> int:
        return self.r + self.reserve

    def factors(self) -> tuple[Tensor, Tensor, float]:
        e = self.lora_E
        if self.reserve:
            e = torch.cat([e, e.new_full((self.reserve, 1), RESERVE)])
        return self.lora_A * e, self.lora_B, self.scaling

    def orthogonality(self) -> Tensor:
        """The mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F, with the reserve: zero of orthonormal factors."""
        norms = [
            (p @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)).norm() for p in (self.lora_A, self.lora_B.mT)
        ]
        return torch.stack(norms).mean()

    @torch.no_grad()
    def score(self, x: Tensor, dy: Tensor) -> Tensor:
        """Σ |ΔW ⊙ ∂L/∂ΔW| in float32 of one backward: x [..., in] that the adapter got, dy [..., out] the gradient of y. ∂L/∂ΔW = dyᵀ x is
        made in blocks of rows, never as a whole. The paper has the mean, this over in · out; the authors' code divides by its root."""
        a, b, scale = self.factors()
        x, dy = x.reshape(-1, self.in_features).float(), dy.reshape(-1, self.out_features)
        a, b, total = a.float(), b.float(), x.new_zeros(())
        for rows in row_blocks(self.out_features, self.in_features):
            gradient = dy[:, rows].float().mT @ x
            total += gradient.mul_(b[rows] @ a).abs_().sum()
        return total * abs(scale)

    @torch.no_grad()
    def grow(self, n: int) -> None:
        """Grants the next n ranks, those of the reserve first, at E = 1e-5, and appends n new ones: new, larger parameters, for which an
        optimizer has to be made anew. But for scaling, ΔW changes by the order of 1e-5."""
        self._whole("n", n, 1, MAX_RANK - self.lora_rank)
        a, e, b = self.lora_A, self.lora_E, self.lora_B
        like = {"dtype": a.dtype, "device": a.device}
        more_a, more_b = trained(n, self.in_features, std=0.02, **like), trained(self.out_features, n, std=0.02, **like)
        granted = e.new_full((n, 1), RESERVE)
        for name, p, more, dim in (("lora_A", a, more_a, 0), ("lora_E", e, granted, 0), ("lora_B", b, more_b, 1)):
            setattr(self, name, nn.Parameter(torch.cat([p, more], dim), p.requires_grad))
        self.r += n
        self._rescale()

    @torch.no_grad()
    def finish(self) -> None:
        """Leaves out the reserve: new, smaller A and B, for which an optimizer has to be made anew."""
        self.lora_A = nn.Parameter(self.lora_A[: self.r].clone(), self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(self.lora_B[:, : self.r].contiguous(), self.lora_B.requires_grad)
        self.reserve = 0
