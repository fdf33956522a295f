# SPDX-License-Identifier: Apache-2.0
"""BeamLoRA's pruning and expansion."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn.variants import BeamLoRALinear
from . import surgery
from .rule import Generator, Rule
from .schedule import cosine


class BeamLoRABeam(Rule):
    """Every ``every`` steps weak ranks become copies of strong ones of their layer: BeamLoRA (Gu et al., arXiv 2502.13604).

    The ranks of all layers together, sorted by importance r · softmax(g / tau), are kept up to the first with which the sum reaches
    top-p of the whole; the others are weak. top-p = 1 - threshold · (1 + cos(π t / end)) / 2, and from step ``end`` on no rank is. A
    layer's n weak ranks take A's rows and B's columns of its n strongest in an order that is drawn, the gates of both become their
    mean, Adam's moments of A and B go along, those of the gates are zero (``BeamLoRALinear.replace``). n is at most r / 2: of more
    weak ranks those of the least importance are replaced.

    What is copied are the strong ranks as they were every / 2 steps before (a copy of A and B is kept from then on, in state_dict too), as
    in the authors' code: a rank and its copy with the same weights, gate and moments would get the same gradients for ever. ``present``
    copies them as they are all the same.

    In the authors' code the rank with which the sum reaches top-p is weak too, and the moments of A and B stay where they were. Whether the
    paper compares layers with one another is not verified.

    Args:
        every: 3000 in the authors' script. end: its --reset_end_step. threshold: 0.05 there.
    """

    LAYER = BeamLoRALinear
    SETTINGS: ClassVar = ("every", "end", "threshold", "present")
    OPTIMIZER = True

    def __init__(
        self,
        model: nn.Module,
        every: int,
        end: int,
        threshold: float = 0.05,
        present: bool = False,
        seed: int = 0,
    ):
        super().__init__(model, every=every, end=end, threshold=threshold, present=present)
        self._whole("every", 2)
        self._whole("end", 1)
        self._share("threshold")
        self._must("present", type(present) is bool, "be True or False")
        self.generator = Generator(seed)
        self.earlier: dict[str, dict[str, Tensor]] = {}  # A and B by layer, as they were

    def _step(self, n, optimizer):
        if n >= self.end:
            self.earlier = {}
            return
        if n % self.every == self.every // 2 and not self.present:
            parts = ("lora_A", "lora_B")
            self.earlier = {k: {p: m.get_parameter(p).detach().clone() for p in parts} for k, m in self.layers.items()}
        if n % self.every == 0:
            every = [p for m in self.layers.values() for p in (m.lora_A, m.lora_B, m.lora_gate)]
            surgery.check(optimizer, every)
            weak = self._weak(1 - cosine(n, self.end, self.threshold))
            for name, layer in self.layers.items():
                self._expand(name, layer, weak[name], optimizer)

    def _weak(self, top_p: float) -> dict[str, Tensor]:
        """By layer a mask [r]."""
        importance = torch.cat([m.importance().double().cpu() for m in self.layers.values()])
        self._decidable(importance)
        best = importance.sort(descending=True, stable=True)
        before = best.values.cumsum(0) - best.values  # what the ranks above it sum to
        mask = torch.zeros(len(importance), dtype=torch.bool)
        mask[best.indices[before >= top_p * importance.sum()]] = True
        return dict(zip(self.layers, mask.split([m.r for m in self.layers.values()]), strict=True))

    def _expand(self, name: str, layer: BeamLoRALinear, weak: Tensor, optimizer) -> None:
        order = layer.importance().cpu().sort(descending=True, stable=True).indices
        n = min(int(weak.sum()), layer.r // 2)
        if not n:
            return
        drawn = torch.randperm(n, generator=self.generator.own)
        earlier = {k: t.to(layer.lora_A.device) for k, t in self.earlier.get(name, {}).items()}
        layer.replace(order[-n:], order[:n][drawn], optimizer, earlier or None)

    def _state(self) -> dict[str, Any]:
        return {"generator": self.generator.state(), "earlier": {k: {**v} for k, v in self.earlier.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        self.generator.load(state["generator"])
        self.earlier = {k: {**v} for k, v in state["earlier"].items()}
