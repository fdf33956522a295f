# SPDX-License-Identifier: Apache-2.0
"""Adapters over random bases as folders for stock PEFT: as plain LoRA, or as VeRA and RandLoRA with their projections."""

from .files.conversions import to_lora, to_peft

__all__ = ["to_lora", "to_peft"]
