# SPDX-License-Identifier: Apache-2.0
"""PRILoRA's pruning."""

from typing import ClassVar

import torch
from torch import nn

from ..nn.variants import PRILoRALinear
from .rule import Rule, distributed, over_processes


class PRILoRAPruning(Rule):
    """Watches the inputs of all layers, and every ``every`` steps, from ``start`` to ``end``, leaves out of each row of A the ``share`` of weights
    of the least |A| ⊙ x_norm: PRILoRA (Benedek and Wolf, arXiv 2401.11316).

    Each time anew: a weight that was left out may come back, from zero. How often, from when to when, the share and beta are not verified;
    no code of the authors was found. Batches in training mode count, all of them under gradient accumulation; over processes
    x_norm is averaged in every step.

    Args:
        end: the last step that prunes; 0 for none. beta: of x_norm's average (``PRILoRALinear.observe``).
    """

    LAYER = PRILoRALinear
    SETTINGS: ClassVar = ("share", "every", "start", "end", "beta")
    SEEN = ("x_norm",)

    def __init__(
        self, model: nn.Module, share: float = 0.5, every: int = 40, start: int = 0, end: int = 0, beta: float = 0.9
    ):
        super().__init__(model, share=share, every=every, start=start, end=end, beta=beta)
        for name in ("share", "beta"):
            self._share(name)
        self._whole("every", 1)
        for name in ("start", "end"):
            self._whole(name)
        self._hooks = [m.watch(beta) for m in self.layers.values()]

    def _step(self, n, optimizer):
        self._agree()
        if n < self.start or (self.end and n > self.end) or n % self.every:
            return
        for name, layer in self.layers.items():
            if layer.x_norm is None:
                raise RuntimeError(f"PRILoRAPruning.step: layers must have run in training mode, {name!r} has not")
        self._decidable(*(layer.x_norm for layer in self.layers.values()))
        for layer in self.layers.values():
            layer.prune(self.share)

    def _agree(self) -> None:
        """Averages x_norm over the processes in which a layer has run; all in one message."""
        if not distributed():
            return
        layers = [*self.layers.values()]
        where, sizes = layers[0].lora_A.device, [m.in_features for m in layers]
        seen = [torch.zeros(k) if m.x_norm is None else m.x_norm for m, k in zip(layers, sizes, strict=True)]
        ran = torch.tensor([float(m.x_norm is not None) for m in layers], device=where)
        both = over_processes(torch.cat([*(t.to(where) for t in seen), ran]))
        *norms, ran = both.split([*sizes, len(layers)])
        for layer, norm, share in zip(layers, norms, ran.tolist(), strict=True):
            layer.x_norm = (norm / share).to(layer.lora_A.device) if share else None

    def stop(self) -> None:
        """Watches no longer."""
        for hook in self._hooks:
            hook.remove()
