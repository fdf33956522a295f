# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from .lora import FusedLoRALinear
from .nola import NOLALinear
from .randlora import RandLoRALinear
from .vera import VeRALinear

__all__ = ["FusedLoRALinear", "NOLALinear", "RandLoRALinear", "VeRALinear"]
