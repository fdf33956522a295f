# SPDX-License-Identifier: Apache-2.0
"""RoseLoRA's row- and column-wise sparsity."""

from typing import ClassVar

from torch import nn

from ..nn.variants import RoseLoRALinear
from .rule import Rule
from .schedule import cubic


class RoseLoRATopK(Rule):
    """After each step keeps the share tau(t) of the most sensitive weights in each row of A and each column of B: RoseLoRA (Wang et al.,
    arXiv 2406.10777).

    tau(t) = 1 up to start · total_steps, tau from end · total_steps on, tau + (1 - tau) (1 - (t - t_i) / (t_f - t_i))³ between them. Sensitivity is
    the average of |p ⊙ ∂L/∂p| (``RoseLoRALinear.observe``), p as the optimizer left it, as in third parties' code; the paper's p is that of
    the gradient. Weights come back from their gradients until step total_steps, which fixes the masks.

    Args:
        tau: share that stays in the end. start, end, beta: as in third parties' code; the authors published none.
    """

    LAYER = RoseLoRALinear
    SETTINGS: ClassVar = ("total_steps", "tau", "start", "end", "beta")
    SEEN = ("sensitivity_A", "sensitivity_B")

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        tau: float = 0.1,
        start: float = 0.1,
        end: float = 0.8,
        beta: float = 0.8,
    ):
        super().__init__(model, total_steps=total_steps, tau=tau, start=start, end=end, beta=beta)
        self._whole("total_steps", 1)
        for name in ("tau", "start", "end", "beta"):
            self._share(name)
        self._must("end", start < end, f"be more than start = {start}")

    def share(self, step: int) -> float:
        """tau(step)."""
        return cubic(step, int(self.start * self.total_steps), int(self.end * self.total_steps), 1.0, self.tau)

    def _step(self, n, optimizer):
        self._gradients("lora_A", "lora_B")
        share = self.share(n)
        for layer in self.layers.values():
            layer.observe(self.beta)
            if share < 1:
                layer.prune(share, fix=n == self.total_steps)
