# SPDX-License-Identifier: Apache-2.0
"""BeamLoRA: LoRA whose ranks compete for a softmax, and whose weak ranks become copies of strong ones."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import Variant, kaiming, trained


class BeamLoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ⊙ r · softmax(g / tau)) Bᵀ: BeamLoRA (Gu et al., arXiv 2502.13604).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] and lora_gate [r] as zero: the layer starts as the base layer, and at g = 0
    it is LoRA. All three train; now and then ``replace`` overwrites ranks of low ``importance``. scaling = lora_alpha / r.

    tau: temperature of the softmax, 0.05 in the authors' code, whose comment advises 0.03 for learning rates below 1e-4.
    """

    METHODS: ClassVar = {"beamlora": Method({}, "BeamLoRA, Gu et al., arXiv 2502.13604")}
    SETTINGS = ("r", "lora_alpha", "tau", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32.0,
        tau: float = 0.05,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._number("tau", tau, "be a number in 1e-6..1e6", 1e-6, 1e6)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.tau = float(tau)
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        self.lora_gate = trained(r, **like)

    def _gate(self) -> Tensor:
        """[r] in float32, of mean 1."""
        return self.r * torch.softmax(self.lora_gate.float() / self.tau, 0)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self._gate().to(self.lora_A.dtype)[:, None] * self.lora_A, self.lora_B, self.scaling

    @torch.no_grad()
    def importance(self) -> Tensor:
        """r · softmax(g / tau) [r] in float32: what the method ranks by. The authors' code compares all layers of a model at once."""
        return self._gate()

    @torch.no_grad()
    def replace(
        self,
        weak: Sequence[int] | Tensor,
        strong: Sequence[int] | Tensor,
        optimizer: torch.optim.Optimizer | None = None,
        earlier: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Makes rank weak[i] a copy of rank strong[i]: its row of A, its column of B, and the mean of both gates for both. All these ranks
        must differ.

        optimizer: what it keeps of A and B by element (Adam's moments) is copied alike, and that of the two gates is set to zero. In the
            authors' code the moments of A and B stay where they are: it writes to a temporary tensor.
        earlier: lora_A and lora_B of an earlier step to copy from instead, as the authors' code has an option for.
        """
        weak, strong = (torch.as_tensor(t, dtype=torch.int64).cpu() for t in (weak, strong))
        both = torch.cat([weak.flatten(), strong.flatten()]).tolist()
        fits = weak.dim() == strong.dim() == 1 and len(weak) == len(strong) and len({*both}) == len(both)
        if not fits or not all(0 <= i < self.r for i in both):
            must = f"be as many ranks of 0..{self.r - 1}, all different"
            raise ValueError(
                f"BeamLoRALinear.replace: weak and strong must {must}, got {weak.tolist()} and {strong.tolist()}"
            )
        source = earlier or {"lora_A": self.lora_A, "lora_B": self.lora_B}
        for name in ("lora_A", "lora_B"):
            shape, got = list(getattr(self, name).shape), list(source[name].shape)
            if shape != got:
                raise ValueError(f"BeamLoRALinear.replace: earlier[{name!r}] must have shape {shape}, got {got}")
        weak, strong = weak.to(self.lora_A.device), strong.to(self.lora_A.device)
        for name, dim in (("lora_A", 0), ("lora_B", 1)):
            p = getattr(self, name)
            p.index_copy_(dim, weak, source[name].to(p).index_select(dim, strong))
            for kept in _by_element(optimizer, p):
                kept.index_copy_(dim, weak, kept.index_select(dim, strong))
        g = self.lora_gate
        mean = (g[weak] + g[strong]) / 2
        g[weak], g[strong] = mean, mean
        for kept in _by_element(optimizer, g):
            kept[weak], kept[strong] = 0, 0


def _by_element(optimizer: torch.optim.Optimizer | None, p: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps of each element of p."""
    state = optimizer.state.get(p, {}) if optimizer is not None else {}
    return [t for t in state.values() if isinstance(t, Tensor) and t.shape == p.shape]
