# SPDX-License-Identifier: Apache-2.0
"""The table of variants: each is a function of what its layer trains and keeps, in plain PyTorch, and a small layer to test it on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Coefficients = dict[str, Tensor]  # by their key in the layer's state_dict
Settings = dict[str, Any]  # all of the layer's, defaults too


@dataclass(frozen=True, kw_only=True)
class Variant:
    """forward(x, W, bias, c, s): y [T, O] of x [T, I], W [O, I], bias [O] or None, in training where that differs and without dropout."""

    name: str  # as lrkern.adapt takes it, or with more of its settings
    cls: str  # of lrkern.nn.variants
    forward: Callable[[Tensor, Tensor, Tensor | None, Coefficients, Settings], Tensor]
    settings: Settings = field(default_factory=dict)
    delta: Callable[[Coefficients, Settings], Tensor] | None = None  # ΔW [O, I], where that is all there is to it
    at_first: str = ""  # what the layer adds before it is trained, where that is not nothing
    sizes: tuple[int, int] = (24, 16)  # I and O of a small layer
    change_by: float = 0.2  # what tests add to coefficients: normal with this deviation
    positive: tuple[str, ...] = ()  # coefficients that only mean something where they are positive

    @property
    def method(self) -> str:
        return self.name.partition("-")[0]


VARIANTS: dict[str, Variant] = {}


def forward(name: str, cls: str, **about: Any):
    """Registers y of a variant; about: fields of Variant, and settings by name."""
    known = {key: about.pop(key) for key in ("delta", "at_first", "sizes", "change_by", "positive") if key in about}

    def register(fn):
        VARIANTS[name] = Variant(name=name, cls=cls, forward=fn, settings=about, **known)
        return fn

    return register


def delta(name: str, cls: str, **about: Any):
    """Registers a variant by its ΔW [O, I], a function of the coefficients and the settings."""

    def register(fn):
        forward(name, cls, delta=fn, **about)(lambda x, w, bias, c, s: F.linear(x, w, bias) + F.linear(x, fn(c, s)))
        return fn

    return register


def scaling(s: Settings) -> float:
    return s["lora_alpha"] / s["r"]
