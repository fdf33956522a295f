# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import Layer


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    letters = {"a": "RI", "b": "OR", "s": "TR", "ds": "TR", "base": "TO", "base_scale": "O"}
    args: dict[str, Any] = layer.tensors(rng, schema, "a b s ds base_scale", **letters)
    args |= {n: None for n in ("bias", "base_scale", "base") if n in args and rng.random() < 0.5}
    if schema.name == "lrkern::linear_expand" and rng.random() < 0.3:
        args["x"] = args["weight"] = None
    seed = torch.tensor([rng.getrandbits(63)]) if layer.p or rng.random() < 0.3 else None
    return args | {"dropout_p": layer.p, "seed": seed}
