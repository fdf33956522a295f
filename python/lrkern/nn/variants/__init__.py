# SPDX-License-Identifier: Apache-2.0
"""The published variants of LoRA, one file each (docs/variants.md). ``lrkern.adapt`` puts any of them into a model."""

from .adalora import AdaLoRALinear as AdaLoRALinear
from .lora_xs import LoRAXSLinear as LoRAXSLinear
from .slora import SLoRALinear as SLoRALinear

__all__ = sorted(name for name, thing in vars().items() if getattr(thing, "__module__", "").startswith(__name__))
