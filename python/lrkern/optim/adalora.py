# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's budget."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn.variants import AdaLoRALinear
from .rule import Averages, Rule
from .schedule import cubic


class AdaLoRABudget(Rule):
    """Sets to zero the E of all but the best ranks of all layers together: AdaLoRA (Zhang et al., arXiv 2303.10512) as PEFT does it.

    The score of a rank is s(E_j) + mean_k s(A_jk) + mean_k s(B_kj) with s = Ī Ū of I = |p ⊙ ∂L/∂p|: Ī = beta1 Ī + (1 - beta1) I and
    Ū = beta2 Ū + (1 - beta2) |I - Ī|, p as the optimizer left it. The budget is b₀, the ranks of all layers, up to step tinit;
    ⌊b_T + (b₀ - b_T) (1 - (t - tinit) / (total_steps - tfinal - tinit))³⌋ then, b_T = target_r · layers, with a mask every deltaT steps; and
    from step total_steps - tfinal on b_T, with the ranks of that step. Between two masks a rank that was zeroed may come back.

    Where ranks of the same score compete, PEFT zeroes all of them, here exactly the budget stays: the first in the model's order. A budget
    of all ranks zeroes none, where PEFT fails. Add ``nn.variants.adalora.orthogonality`` to the loss. ``AdaLoRALinear.keep`` makes what is
    left smaller once training has ended; ``ranks`` says what that is.

    Args:
        target_r: ranks a layer in the end, on average. total_steps: of the optimizer, in the whole training.
        tinit, tfinal, deltaT, beta1, beta2: as peft.AdaLoraConfig.
    """

    LAYER = AdaLoRALinear
    SETTINGS: ClassVar = ("target_r", "total_steps", "tinit", "tfinal", "deltaT", "beta1", "beta2")

    def __init__(
        self,
        model: nn.Module,
        target_r: int,
        total_steps: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ):
        super().__init__(
            model,
            target_r=target_r,
            total_steps=total_steps,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            beta1=beta1,
            beta2=beta2,
        )
        self.first = sum(m.r for m in self.layers.values())
        self.last = target_r * len(self.layers) if type(target_r) is int else 0
        for name in ("target_r", "total_steps", "deltaT"):
            self._whole(name, 1)
        for name in ("tinit", "tfinal"):
            self._whole(name)
        for name in ("beta1", "beta2"):
            self._share(name)
        self._must(
            "target_r", self.last <= self.first, f"give a budget of at most {self.first}, the ranks that there are,"
        )
        self._must("total_steps", total_steps > tinit + tfinal, f"be more than tinit + tfinal = {tinit + tfinal}")
        self.averages = Averages(beta1, beta2)
        self.ranks: dict[str, Tensor] = {}  # by layer the mask [r] of the ranks that stayed last time

    def budget(self, step: int) -> int:
        """Ranks of all layers together that stay at this step."""
        return int(cubic(step, self.tinit, self.total_steps - self.tfinal, self.first, self.last))

    def _step(self, n, optimizer):
        end = self.total_steps - self.tfinal
        if n < end:
            for key, (p, gradient) in self._gradients("lora_A", "lora_E", "lora_B").items():
                self.averages.update(key, (p * gradient).abs())
        if n == end or (self.tinit < n < end and n % self.deltaT == 0):
            self._choose(self.budget(n))
            if n == end:
                self.averages = Averages(self.beta1, self.beta2)
        elif n < end:
            return
        for name, layer in self.layers.items():
            layer.lora_E.masked_fill_(~self.ranks[name].to(layer.lora_E.device)[:, None], 0)

    def _choose(self, budget: int) -> None:
        scores = torch.cat([self._score(name).cpu() for name in self.layers])
        stay = torch.zeros(len(scores), dtype=torch.bool)
        stay[scores.sort(descending=True, stable=True).indices[:budget]] = True
        parts = stay.split([m.r for m in self.layers.values()])
        self.ranks = dict(zip(self.layers, (part.clone() for part in parts), strict=True))

    def _score(self, name: str) -> Tensor:
        """[r]"""
        a, e, b = (self.averages.product(f"{name}/{part}") for part in ("lora_A", "lora_E", "lora_B"))
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def _state(self) -> dict[str, Any]:
        return self.averages.state() | {"ranks": {**self.ranks}}

    def _load(self, state: dict[str, Any]) -> None:
        self.averages.load(state)
        self.ranks = {**state["ranks"]}
