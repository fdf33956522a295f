# SPDX-License-Identifier: Apache-2.0
"""SoRA's proximal step."""

from typing import ClassVar

from torch import nn

from ..nn.variants import SoRALinear
from . import surgery
from .rule import Rule


class SoRAProx(Rule):
    """g = sign(g) max(|g| - lr · lam, 0) after each step, lr the present learning rate of the gate's param_group: the proximal step of
    lam · ‖g‖₁, SoRA (Ding et al., arXiv 2311.11696). It is that of plain gradient descent, whatever optimizer moved the gate.

    as_code: as the authors' optimizer does it. The threshold is lam itself, without the learning rate, and what subtracting left
    below lam becomes zero too: all |g| < 2 lam. They train the gate without weight decay, with a learning rate of its own: give it a
    param_group. ``SoRALinear.drop_ranks`` leaves out the zeros once training has ended.
    """

    LAYER = SoRALinear
    SETTINGS: ClassVar = ("lam", "as_code")
    OPTIMIZER = True

    def __init__(self, model: nn.Module, lam: float, as_code: bool = False):
        super().__init__(model, lam=lam, as_code=as_code)
        number = isinstance(lam, int | float) and not isinstance(lam, bool)
        self._must("lam", number and 0 <= lam < float("inf"), "be a finite number, not negative")
        self._must("as_code", type(as_code) is bool, "be True or False")

    def _step(self, n, optimizer):
        groups = surgery.groups_of(optimizer, [m.lora_gate for m in self.layers.values()])
        for layer, group in zip(self.layers.values(), groups, strict=True):
            if self.as_code:
                layer.shrink_gate(self.lam)
                layer.lora_gate.masked_fill_(layer.lora_gate.abs() < self.lam, 0)
            else:
                layer.shrink_gate(float(group["lr"]) * self.lam)
