# SPDX-License-Identifier: Apache-2.0
"""What goes with a method beside its optimizer: budgets, masks, samplers and restarts, called after each step (``Rule``)."""

from typing import Any

from .adalora import AdaLoRABudget
from .beamlora import BeamLoRABeam
from .dylora import DyLoRASampler
from .increlora import IncreLoRAGrowth
from .loraprune import LoRAPrunePruning, PruneGroup, llama_groups
from .prilora import PRILoRAPruning
from .restart import COLARestart, ReLoRARestart
from .roselora import RoseLoRATopK
from .rule import Rule
from .sora import SoRAProx

__all__ = [
    "AdaLoRABudget",
    "BeamLoRABeam",
    "COLARestart",
    "DyLoRASampler",
    "IncreLoRAGrowth",
    "LoRAPrunePruning",
    "PRILoRAPruning",
    "PruneGroup",
    "ReLoRARestart",
    "RoseLoRATopK",
    "Rule",
    "SoRAProx",
    "StepCallback",
    "llama_groups",
]


def __getattr__(name: str) -> Any:
    """transformers, which takes seconds to import, comes when it is asked for."""
    if name == "StepCallback":
        from .trainer import StepCallback

        return StepCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
