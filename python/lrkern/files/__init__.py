# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: PEFT folders, and lrkern's own files of a few kilobytes.

``save`` and ``load`` are the one door; what a kind of file holds and refuses is said by the functions they call.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from . import conversions, lora, own
from .projections import draw_projections, store_projections

# isort: off
from .vera import save_vera  # the methods that share projections, in the order that messages name them
from .randlora import save_randlora
# isort: on

__all__ = ["draw_projections", "load", "save", "save_randlora", "save_vera", "store_projections"]


def save(model: nn.Module, path: str | Path, kind: str | None = None, bits: int | None = None) -> None:
    """Writes the adapters of a model's lrkern.nn layers.

    kind: "own", a file of lrkern's own (``own.save_adapter``, bits as there); "peft", a PEFT folder of the layers' own method;
        "lora", a plain PEFT LoRA folder made of them (``convert``). None: "peft" for FusedLoRALinear, "own" for all others.
    """
    mine = any(map(own.is_own, model.modules()))
    writers: dict[str, Callable[[nn.Module, str | Path], None]] = {
        "own": lambda model, path: own.save_adapter(model, path, bits),
        "peft": conversions.to_peft if mine else lora.save_adapter,
        "lora": conversions.to_lora if mine else lora.save_adapter,
    }
    kind = kind or ("own" if mine else "peft")
    if kind not in writers or (bits is not None and kind != "own"):
        raise ValueError(f"lrkern.files.save: kind must be one of {[*writers]}, with bits own, got {kind!r}, {bits=}")
    writers[kind](model, path)


def load(model: nn.Module, path: str | Path) -> None:
    """Loads a PEFT LoRA folder into a model's FusedLoRALinear layers (``lrkern.peft.load_adapter``), or puts the layers of a file
    of lrkern's own into the model (``own.load_adapter``)."""
    (lora if Path(path).is_dir() else own).load_adapter(model, path)
