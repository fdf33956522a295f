# SPDX-License-Identifier: Apache-2.0
"""Drop-in for Hugging Face PEFT.

``lrkern.peft.patch(model)`` makes an existing PEFT model run on lrkern, in place; ``register(config, model)`` makes the
layers that PEFT creates from a config fused from the start; ``report(model)`` says what runs, ``unpatch(model)`` undoes it.
``patch`` also takes VeRA and RandLoRA layers, with the projections that PEFT stores.

A LoRA layer over an exact nn.Linear runs as one op. Over any other base layer (bitsandbytes, GPTQ, AWQ, torchao, ...) the
base runs untouched and lrkern adds the low-rank part. DoRA is fused over both. What a layer does is decided in every call
from the layer as it then is (``layer.Patched``); what is not fused runs PEFT's own forward. Only a layer's class changes:
parameters, state_dict, configs and files stay PEFT's, and nothing in PEFT is monkeypatched.

Adapter files of lrkern's own modules: ``save_adapter`` and ``load_adapter`` write and read PEFT's format (safetensors
only).
"""

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..files.folder import rank_and_scaling, read_adapter, write_adapter  # noqa: F401
from ..files.lora import load_adapter, save_adapter
from .layer import KINDS, Patched, cannot_patch, patch_layer

# isort: off
from .lora import FusedLora as _Fused, _create, register  # noqa: F401, the first two for pickles of 0.1
from .vera import FusedVera  # noqa: F401, the kinds of layers in the order that messages name them
from .randlora import FusedRandLora  # noqa: F401
# isort: on

__all__ = ["Report", "load_adapter", "patch", "register", "report", "save_adapter", "unpatch"]


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


def _layers(model: nn.Module, who: str) -> dict[str, BaseTunerLayer]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, tuple(KINDS))}
    if not layers:
        first, *others = (kind._method for kind in KINDS.values())
        raise ValueError(
            f"lrkern.peft.{who}: model must have PEFT {first} layers (or {', '.join(others)}), got {type(model).__name__} "
            "with none"
        )
    return layers


def patch(model: nn.Module) -> Report:
    """Makes the LoRA, VeRA and RandLoRA linears of a PEFT model run on lrkern, in place, and reports per layer."""
    return Report({name: patch_layer(layer) for name, layer in _layers(model, "patch").items()})


def report(model: nn.Module) -> Report:
    """What each adapted layer of the model would do if it were called now. Changes nothing."""
    layers = _layers(model, "report").items()
    return Report({n: m._why() if isinstance(m, Patched) else cannot_patch(m) or "not patched" for n, m in layers})


def unpatch(model: nn.Module) -> None:
    """Gives every layer that ``patch`` or ``register`` took its PEFT class back."""
    patched = [m for m in model.modules() if isinstance(m, Patched)]
    for m in patched:
        if "_lrkern_base" not in type(m).__dict__:  # such as FSDP2's own subclass of a layer
            raise RuntimeError(f"lrkern.peft.unpatch: {type(m).__name__} was made of a patched layer, undo that first")
    for m in patched:
        derived = type(m)._lrkern_mixin._derived
        m.__class__ = type(m)._lrkern_base
        for key in derived:
            m.__dict__.pop(key, None)
