# SPDX-License-Identifier: Apache-2.0
"""RandLoRA as PEFT's files have it: randlora_A [r, 1, Min] and randlora_B [Max, N, r], N = ceil(Min / r), where Min and Max
are the smaller and the larger of the largest input and output sizes over the adapted linears."""

import math
from pathlib import Path

import torch

from ..functional.projection import Projection
from .folder import WRITERS
from .projections import METHODS, Layers, Method, save_pair, uniform, write_layers


def _draw(config, a, b, generator, drawn_in):
    if config.get("sparse") or config.get("very_sparse"):
        s = math.sqrt(a[-1]) if config.get("very_sparse") else 3  # -1 and 1 with probability 1 / 2s each
        drawn = (torch.rand(shape, generator=generator) for shape in (a, b))
        pair = [(u > 1 - 1 / (2 * s)).float() - (u < 1 / (2 * s)).float() for u in drawn]
    else:
        (M, n, r), slope = b, math.sqrt(5)
        A = uniform(generator, a, slope, drawn_in)
        pair = [A, torch.cat([uniform(generator, (M, 1, r), slope, drawn_in) for _ in range(n)], 1)]
    A, B = (p / p.std() for p in pair)
    return A.float(), B.float()


def save_randlora(
    folder: str | Path, layers: Layers, A: Projection, B: Projection, alpha: float, dropout: float = 0.0
) -> None:
    """The same for RandLoRA as ``functional.randlora_linear`` has it without paper_pairing, scale = alpha / r.

    layers: by name ([I, O], lam [r, n], gam [n, min(I, O)]); A [r, >= Min] and B [>= N r, >= Max] whose row is j r + k.
    """
    save_pair(folder, "RANDLORA", layers, A, B, randlora_alpha=alpha, randlora_dropout=dropout)


WRITERS["RANDLORA"] = write_layers
METHODS["RANDLORA"] = Method(
    own="randlora",
    vectors=("lambda", "gamma"),
    pair=lambda r, i, o: ((r, 1, min(i, o)), (max(i, o), math.ceil(min(i, o) / r), r)),
    trained=lambda r, I, O: ((r, n := math.ceil(min(I, O) / r)), (n, min(I, O))),
    draw=_draw,
    options=lambda layer: {"randlora_alpha": layer.randlora_alpha, "randlora_dropout": layer.dropout},
)
