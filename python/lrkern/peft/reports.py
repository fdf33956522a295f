# SPDX-License-Identifier: Apache-2.0
"""What runs in a model's adapted layers."""

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import KINDS, Patched, cannot_patch


@dataclass
class Report:
    """Per adapted layer its name and None (fused) or the reason why PEFT's own code runs."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> int:
        return sum(why is None for why in self.layers.values())

    def __str__(self) -> str:
        lines = [f"lrkern: {self.fused} of {len(self.layers)} adapted layers fused"]
        return "\n".join(lines + [f"  {name}: PEFT's own code, {why}" for name, why in self.layers.items() if why])


def adapted_layers(model: nn.Module, who: str) -> dict[str, BaseTunerLayer]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, tuple(KINDS))}
    if not layers:
        first, *others = (kind._method for kind in KINDS.values())
        raise ValueError(
            f"lrkern.peft.{who}: model must have PEFT {first} layers (or {', '.join(others)}), got {type(model).__name__} "
            "with none"
        )
    return layers


def report(model: nn.Module) -> Report:
    """What each adapted layer of the model would do if it were called now. Changes nothing."""
    layers = adapted_layers(model, "report").items()
    return Report({n: m._why() if isinstance(m, Patched) else cannot_patch(m) or "not patched" for n, m in layers})
