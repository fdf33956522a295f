# SPDX-License-Identifier: Apache-2.0
"""Layers that are fused from the start: before PEFT makes them, somebody says that it is to be so."""

from typing import ClassVar

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import KINDS, Patched, Swapped, patch_layer, swap, swap_back


class Awaiting(Swapped):
    """A model that PEFT is to give layers. It writes its configs on the model once they are there: these are patched then, and the
    model's class is its own again."""

    _derived: ClassVar = {"_lrkern_awaits": list}  # PEFT's classes of layers

    def __setattr__(self, name, value):
        if name != "peft_config":
            return super().__setattr__(name, value)
        kinds = tuple(self._lrkern_awaits)
        swap_back(self)
        setattr(self, name, value)
        for m in self.modules():
            if isinstance(m, kinds):
                patch_layer(m)


def register(config: peft.PeftConfig, model: nn.Module) -> None:
    """Makes the layers that PEFT creates from this config in this model fused from the start, whatever their base layer:

        lrkern.peft.register(config, model); model = peft.get_peft_model(model, config)

    or PeftModel.from_pretrained(model, folder, config=config). PEFT does not write a registration to its files. A LoraConfig asks who
    makes its layers and is registered itself, for later adapters too; of AdaLoRA, VeRA, RandLoRA and MiSS the model is, until PEFT has put
    the first layers into it.
    """
    layers, kind = _made_from(config)
    kinds = {type(m) for m in model.modules() if not list(m.children()) and [*m.parameters(), *m.buffers()]}
    if any(isinstance(m, layers) for m in model.modules()) or not kinds:
        raise ValueError(
            f"lrkern.peft.register: model must be a model without {kind._method} layers yet (patch is for those), with layers "
            f"to adapt, got {type(model).__name__}"
        )
    if kind._registers(config, kinds):
        return
    if not isinstance(model, Awaiting):
        swap(Awaiting, model)
    model._lrkern_awaits.append(layers)


def _made_from(config: peft.PeftConfig) -> tuple[type[BaseTunerLayer], type[Patched]]:
    """PEFT's class of the layers, and ours."""
    kinds = {kind._config: (layers, kind) for layers, kind in KINDS.items()}
    of = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(config.peft_type) if isinstance(config, peft.PeftConfig) else None
    if of in kinds:
        return kinds[of]
    *names, last = (of.__name__ for of in kinds)
    must = f"config must be a peft.{', '.join(names)} or {last}"
    raise TypeError(f"lrkern.peft.register: {must}, got {type(config).__name__}")
