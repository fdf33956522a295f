# SPDX-License-Identifier: Apache-2.0
"""lrkern's adapters as folders for stock PEFT: as plain LoRA, or as PEFT's method of the same name."""

from .files.conversions import to_lora, to_peft

__all__ = ["to_lora", "to_peft"]
