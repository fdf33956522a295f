# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import Layer, strided


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """A type and sizes that it takes, by argument name."""
    kind, r = rng.choice((1, 2, 3, 4, 6)), 2 * rng.randint(1, 40)
    args: dict[str, Any] = layer.tensors(rng, schema)
    if "bias" in args and rng.random() < 0.5:
        args["bias"] = None
    n = rng.randint(0, 3) if kind == 6 else 0
    side, dtype = [*layer.lead, *([max(n, 1), r] if kind == 6 else [r])], layer.dtype
    if schema.name == "lrkern::mora_decompress_":
        dtype = layer.factor
    h = strided(rng, side, dtype, False)
    if "linear" in schema.name:
        kept = torch.float32 if layer.factor == torch.float16 else layer.factor
        h = torch.randn(torch.Size(layer.lead).numel(), r).to(kept)
    return args | {
        "m": strided(rng, [r, r], layer.factor, False), "type": kind, "rank": r, "circular": rng.random() < 0.5, "chunks": n,
        "out_features": layer.O, "adjoint": rng.random() < 0.5, "h": h,
    }  # fmt: skip
