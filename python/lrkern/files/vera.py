# SPDX-License-Identifier: Apache-2.0
"""VeRA as PEFT's files have it: vera_A [r, In] and vera_B [Out, r], the largest sizes over the adapted linears."""

from pathlib import Path

import torch

from ..functional.projection import Projection
from .projections import Layers, Method, save_pair, uniform


class Vera(Method):
    peft_type, own, vectors = "VERA", "vera", ("lambda_d", "lambda_b")

    @staticmethod
    def pair(r, i, o):
        return (r, i), (o, r)

    @staticmethod
    def trained(r, I, O):
        return (r,), (O,)

    @staticmethod
    def draw(config, a, b, generator, drawn_in):
        return uniform(generator, a, 0, torch.float32), uniform(generator, b, 0, torch.float32)

    @staticmethod
    def save(folder, layers, A, B, first):
        save_vera(folder, layers, A, B, first.dropout)


def save_vera(folder: str | Path, layers: Layers, A: Projection, B: Projection, dropout: float = 0.0) -> None:
    """Writes VeRA adapters as ``functional.vera_linear`` has them as a folder that stock PEFT loads, with the projections.

    layers: by name ([I, O], d [r], b [O]); A [r, >= In] and B [r, >= Out] shared by all of them, a ``Basis`` or tensors.
    """
    import peft

    save_pair(folder, Vera, layers, A, B, peft.VeraConfig, vera_dropout=dropout)
