# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import Layer, strided


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """Columns of one slice or of several adapters, by argument name."""
    args: dict[str, Any] = layer.tensors(rng, schema)
    if "bias" in args and rng.random() < 0.5:
        args["bias"] = None
    T, dim, name = torch.Size(layer.lead).numel(), rng.choice((0, 1)), schema.name
    features = layer.I
    if "scatter" in name or ("linear" in name and dim == 0):
        features = layer.O
    s, A, slots = rng.randint(0, min(features, 90)), rng.randint(1, 4), rng.choice((0, 0, 1, 2, 3))
    mixed = slots and "linear" not in name
    columns = lambda: torch.tensor(sorted(rng.sample(range(features), s)), dtype=torch.int32)
    ended = lambda c: c if not s else torch.cat([c[: rng.randint(0, s)], c.new_full((s,), -1)])[:s]
    index = torch.stack([ended(columns()) for _ in range(A)]) if mixed else columns()
    shape = [T] if slots == 1 else [T, slots]
    ids = torch.randint(-1, A, shape).int() if mixed else None
    lead = [*layer.lead, slots] if mixed and slots > 1 else [*layer.lead]
    return args | {
        "index": index, "ids": ids, "scales": torch.randn(shape) if mixed and rng.random() < 0.5 else None, "dim": dim,
        "h": torch.randn(T, s).to(layer.dtype) if "linear" in name else strided(rng, [*lead, s], layer.factor, False),
        "d": strided(rng, [A, s, layer.O] if mixed else [s, layer.O], layer.factor, False),
        "slice": strided(rng, [s, layer.I] if dim == 0 else [layer.O, s], layer.factor, False),
    }  # fmt: skip
