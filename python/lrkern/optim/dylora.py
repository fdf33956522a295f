# SPDX-License-Identifier: Apache-2.0
"""DyLoRA's sampling."""

from typing import Any, ClassVar

from torch import nn

from ..nn.variants import DyLoRALinear
from .rule import Generator, Rule


class DyLoRASampler(Rule):
    """Draws the active prefix b of all layers uniformly from low..high, one for the model, for the first step when it is made, then after
    each step for the next: DyLoRA (Valipour et al., arXiv 2210.07558).

    An evaluation in between is of the b that was drawn; set another with ``DyLoRALinear.set_active`` and back again, or after training.

    Args:
        low, high: 1 and the smallest r where 0. seed: of the draws.
    """

    LAYER = DyLoRALinear
    SETTINGS: ClassVar = ("low", "high")
    MOVES = ("active",)

    def __init__(self, model: nn.Module, low: int = 1, high: int = 0, seed: int = 0):
        super().__init__(model, low=low, high=high)
        most = min(m.r for m in self.layers.values())
        self._whole("low", 1)
        self._whole("high")
        self.high = high or most
        self._must("high", low <= self.high <= most, f"lie in low..{most}, the smallest r,")
        self.generator = Generator(seed)
        self._step(0, None)

    def _step(self, n, optimizer):
        b = self.generator.whole(self.low, self.high)
        for layer in self.layers.values():
            layer.set_active(b)

    def _state(self) -> dict[str, Any]:
        return {"generator": self.generator.state()}

    def _load(self, state: dict[str, Any]) -> None:
        self.generator.load(state["generator"])
