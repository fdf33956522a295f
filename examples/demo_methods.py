# SPDX-License-Identifier: Apache-2.0
"""The methods of `make demo ARGS="--method ..."`: each puts layers of lrkern.nn in place of the encoder's linears.

This is the part to copy for them: a layer stands where nn.Linear stood, trains as any module, and its file is lrkern.files'.
Sizes are near the parameters of LoRA of rank 16, but for those that need none of them (nola, vera, randlora).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrkern

HEAD = "head.safetensors"
FILE = "adapter.safetensors"


def replace(model: nn.Module, cls: type[nn.Module], **settings: Any) -> None:
    """A layer of this class for every linear of the encoder."""
    for name, linear in [(n, m) for n, m in model.bert.named_modules() if type(m) is nn.Linear]:
        parent, _, child = name.rpartition(".")
        setattr(model.bert.get_submodule(parent), child, cls.from_linear(linear, **settings))


def s2ft(model: nn.Module) -> None:
    """A head of each attention in o and 5 % of the channels of each feed-forward block in down, at random."""
    lrkern.s2ft.prepare(model.bert, o=1 / 12, down=0.05, copermute=False, generator=0)


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "mora": lambda model: replace(model, lrkern.nn.MoRALinear, r=16),
    "miss": lambda model: replace(model, lrkern.nn.MissLinear, r=32),
    "bone": lambda model: replace(model, lrkern.nn.MissLinear, r=32, kind="bat"),
    "s2ft": s2ft,
    "nola": lambda model: replace(model, lrkern.nn.NOLALinear, r=16, k=256, l=256),
    "vera": lambda model: replace(model, lrkern.nn.VeRALinear, r=256),
    "randlora": lambda model: replace(model, lrkern.nn.RandLoRALinear, r=32),
}


def adapt(model: nn.Module, method: str, seed: int) -> nn.Module:
    """The model with this method's layers, and a trainable head."""
    torch.manual_seed(seed)
    METHODS[method](model)
    model.score.requires_grad_(True)
    return model


def save(model: nn.Module, folder: Path) -> None:
    lrkern.files.save(model, folder / FILE, kind="own")
    save_file({key: t.detach().cpu().contiguous() for key, t in model.score.state_dict().items()}, folder / HEAD)


def load(base: nn.Module, folder: Path) -> nn.Module:
    """What `save` wrote, into a base model that has none of it."""
    lrkern.files.load(base, folder / FILE)
    base.score.load_state_dict(load_file(folder / HEAD))
    return base.eval()
