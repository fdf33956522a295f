# SPDX-License-Identifier: Apache-2.0
"""The published variants of LoRA, one file each (docs/variants.md). ``lrkern.adapt`` puts any of them into a model."""

from .adalora import AdaLoRALinear as AdaLoRALinear
from .allora import ALLoRALinear as ALLoRALinear
from .beamlora import BeamLoRALinear as BeamLoRALinear
from .block_lora import BlockLoRALinear as BlockLoRALinear
from .cola import COLALinear as COLALinear
from .dylora import DyLoRALinear as DyLoRALinear
from .hydra import HydraLinear as HydraLinear
from .increlora import IncreLoRALinear as IncreLoRALinear
from .inttune import IntTuneLinear as IntTuneLinear
from .loldu import LoLDULinear as LoLDULinear
from .lora2 import LoRA2Linear as LoRA2Linear
from .lora_mini import LoRAMiniLinear as LoRAMiniLinear
from .lora_sb import LoRASBLinear as LoRASBLinear
from .lora_sb import lora_sb_init as lora_sb_init
from .lora_xs import LoRAXSLinear as LoRAXSLinear
from .loraprune import LoRAPruneLinear as LoRAPruneLinear
from .lorta import LoRTALinear as LoRTALinear
from .melora import MELoRALinear as MELoRALinear
from .nlora import NLoRALinear as NLoRALinear
from .prilora import PRILoRALinear as PRILoRALinear
from .reslora import ResLoRALinear as ResLoRALinear
from .roselora import RoseLoRALinear as RoseLoRALinear
from .slora import SLoRALinear as SLoRALinear
from .sora import SoRALinear as SoRALinear
from .svfit import SVFitLinear as SVFitLinear

__all__ = sorted(name for name, thing in vars().items() if getattr(thing, "__module__", "").startswith(__name__))
