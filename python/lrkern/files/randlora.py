# SPDX-License-Identifier: Apache-2.0
"""RandLoRA as PEFT's files have it: randlora_A [r, 1, Min] and randlora_B [Max, N, r], N = ceil(Min / r), where Min and Max
are the smaller and the larger of the largest input and output sizes over the adapted linears."""

import math
from pathlib import Path

import torch

from ..functional.projection import Projection
from .projections import Layers, Method, save_pair, uniform


class RandLora(Method):
    peft_type, own, vectors = "RANDLORA", "randlora", ("lambda", "gamma")

    @staticmethod
    def pair(r, i, o):
        return (r, 1, min(i, o)), (max(i, o), math.ceil(min(i, o) / r), r)

    @staticmethod
    def trained(r, I, O):
        n = math.ceil(min(I, O) / r)
        return (r, n), (n, min(I, O))

    @staticmethod
    def draw(config, a, b, generator, drawn_in):
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

    @staticmethod
    def save(folder, layers, A, B, first):
        save_randlora(folder, layers, A, B, first.randlora_alpha, first.dropout)


def save_randlora(
    folder: str | Path, layers: Layers, A: Projection, B: Projection, alpha: float, dropout: float = 0.0
) -> None:
    """The same for RandLoRA as ``functional.randlora_linear`` has it without paper_pairing, scale = alpha / r.

    layers: by name ([I, O], lam [r, n], gam [n, min(I, O)]); A [r, >= Min] and B [>= N r, >= Max] whose row is j r + k.
    """
    import peft

    save_pair(folder, RandLora, layers, A, B, peft.RandLoraConfig, randlora_alpha=alpha, randlora_dropout=dropout)
