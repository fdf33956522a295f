# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import Layer, strided


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """A type and sizes that it takes, by argument name."""
    type, r = rng.choice((1, 2, 3, 4, 6)), rng.choice((2, 4, 10, 24)) if rng.random() < 0.5 else 2 * rng.randint(1, 40)
    m = strided(rng, [r, r], layer.factor, False)
    args: dict[str, Any] = layer.tensors(rng, schema)
    if "bias" in args and rng.random() < 0.5:
        args["bias"] = None
    n = rng.randint(0, 3) if type == 6 else 0
    kept = torch.Size(layer.lead).numel(), r
    return args | {
        "m": m, "type": type, "rank": r, "circular": rng.random() < 0.5, "chunks": n, "out_features": layer.O,
        "adjoint": rng.random() < 0.5, "h": strided(rng, [*layer.lead, *([max(n, 1), r] if type == 6 else [r])], layer.dtype, False)
        if "decompress" in schema.name else torch.randn(kept).to(torch.float32 if layer.factor == torch.float16 else layer.factor),
    }  # fmt: skip
