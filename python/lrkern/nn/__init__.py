# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from . import variants as variants
from .factorized import FactorizedLinear as FactorizedLinear
from .lora import FusedLoRALinear as FusedLoRALinear
from .maestro import MaestroLinear as MaestroLinear
from .miss import MissLinear as MissLinear
from .mora import MoRALinear as MoRALinear
from .mx import MXFP4Experts as MXFP4Experts
from .mx import MXFP4Linear as MXFP4Linear
from .nola import NOLALinear as NOLALinear
from .quartet import QuartetLinear as QuartetLinear
from .randlora import RandLoRALinear as RandLoRALinear
from .s2ft import S2FTLinear as S2FTLinear
from .vera import VeRALinear as VeRALinear

__all__ = sorted(name for name, thing in vars().items() if getattr(thing, "__module__", "").startswith(__name__))
