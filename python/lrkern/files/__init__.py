# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: PEFT folders, and lrkern's own files of a few kilobytes.

``save`` and ``load`` are the one door; what a kind of file holds and refuses is said by the functions they call.
"""

from pathlib import Path
from typing import Any

from torch import nn

from ..nn import FusedLoRALinear
from . import conversions, lora, own
from .check import refusal, require
from .folder import as_path
from .projections import draw_projections, store_projections

# isort: off
from .vera import save_vera  # the methods that share projections, in the order that messages name them
from .randlora import save_randlora
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
    """Loads a PEFT LoRA folder into a model's FusedLoRALinear layers (``lrkern.peft.load_adapter``), or puts the layers of a file
    of lrkern's own into the model (``own.load_adapter``)."""
    with refusal("lrkern.files.load: "):
        folder = as_path(path).is_dir()
    (lora if folder else own).load_adapter(model, path)
