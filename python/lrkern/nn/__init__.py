# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from .lora import FusedLoRALinear

__all__ = ["FusedLoRALinear"]
