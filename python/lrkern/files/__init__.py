# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: PEFT folders, and lrkern's own files of a few kilobytes.

``save`` and ``load`` are the one door; what a kind of file holds and refuses is said by the functions they call.
"""

from pathlib import Path
from typing import Any

from torch import nn

from ..extras import extra

with extra("lrkern.files"):
    import safetensors  # noqa: F401

from ..nn import FusedLoRALinear
from . import conversions, lora, own
from .check import named, refusal, require
from .folder import READERS, as_path, check_config, peft_type, read_adapter, sizes_of
from .names import as_peft
from .projections import draw_projections, store_projections

# isort: off
from .vera import save_vera  # the methods that have folders, in the order that messages name them
from .randlora import save_randlora
from . import miss, mora, adalora  # noqa: F401
# isort: on

__all__ = ["draw_projections", "load", "save", "save_randlora", "save_vera", "store_projections"]


def save(model: nn.Module, path: str | Path, kind: str | None = None, **options: Any) -> None:
    """Writes the adapters of a model's lrkern.nn layers.

    kind: "own", a file of lrkern's own (``own.save_adapter``, which has options); "peft", a PEFT folder of the layers' own
        method; "lora", a plain PEFT LoRA folder made of them (``convert``). None: "peft" for FusedLoRALinear, else "own".

    No kind of file holds FusedLoRALinear and others: a model with both is refused.
    """
    mine = bool(own.own_layers(model.named_modules()))
    both = mine and any(isinstance(m, FusedLoRALinear) for m in model.modules())
    each = "write each with files.own.save_adapter and lrkern.peft.save_adapter"
    require(not both, f"lrkern.files.save: model must have FusedLoRALinear layers or others, got both; {each}")
    peft, plain = (conversions.to_peft, conversions.to_lora) if mine else (lora.save_adapter, lora.save_adapter)
    writers = {"own": own.save_adapter, "peft": peft, "lora": plain, None: own.save_adapter if mine else peft}
    if kind not in writers:
        raise ValueError(f"lrkern.files.save: kind must be own, peft, lora or None, got {kind!r}")
    writers[kind](model, path, **options)


def load(model: nn.Module, path: str | Path) -> None:
    """Loads a PEFT or diffusers LoRA folder into a model's FusedLoRALinear layers (``lrkern.peft.load_adapter``), or puts the
    layers of a file of lrkern's own, or those of a PEFT MiSS or AdaLoRA folder or of one that MoRA's authors' code wrote, into the model:
    an nn.Linear is replaced by its layer, and a layer that is there already, with the same settings, takes the coefficients
    (``own.load_adapter``). Keys may be named as other tools do (``names.as_peft``, docs/files.md)."""
    with refusal("lrkern.files.load: "):
        folder = as_path(path).is_dir()
    if not folder:
        return own.load_adapter(model, path)
    with refusal(f"lrkern.files.load: {named(str(path))}: ", "; the model is unchanged"):
        config, tensors = read_adapter(path)
        check_config(config)
        if read := READERS.get(peft_type(config)):
            return own.place(model, read(*as_peft(config, tensors, model), sizes_of(model)))
    lora.load_adapter(model, path)
