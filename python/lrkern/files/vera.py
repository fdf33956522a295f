# SPDX-License-Identifier: Apache-2.0
"""VeRA as PEFT's files have it: vera_A [r, In] and vera_B [Out, r], the largest sizes over the adapted linears."""

from pathlib import Path

import torch

from ..functional.projection import Projection
from .folder import WRITERS
from .projections import METHODS, Layers, Method, save_pair, uniform, write_layers


def save_vera(folder: str | Path, layers: Layers, A: Projection, B: Projection, dropout: float = 0.0) -> None:
    """Writes VeRA adapters as ``functional.vera_linear`` has them as a folder that stock PEFT loads, with the projections.

    layers: by name ([I, O], d [r], b [O]); A [r, >= In] and B [r, >= Out] shared by all of them, a ``Basis`` or tensors.
    """
    save_pair(folder, "VERA", layers, A, B, vera_dropout=dropout)


WRITERS["VERA"] = write_layers
METHODS["VERA"] = Method(
    own="vera",
    vectors=("lambda_d", "lambda_b"),
    pair=lambda r, i, o: ((r, i), (o, r)),
    trained=lambda r, I, O: ((r,), (O,)),
    draw=lambda config, a, b, generator, drawn_in: tuple(uniform(generator, s, 0, torch.float32) for s in (a, b)),
    options=lambda layer: {"vera_dropout": layer.dropout},
)
