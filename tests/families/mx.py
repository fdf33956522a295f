# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import FLOATS, Layer, strided

RULES = ("floor", "rceil", "ceil", "even", "quest", "quest_nearest")


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """Any codes beside scales of a weight's size, or what a quantiser takes, by argument name."""
    names = {a.name for a in schema.arguments}
    E = [rng.choice((0, 1, 2, 5))] if "experts" in names and (rng.random() < 0.4 or "expand_bwd" in schema.name) else []
    args: dict[str, Any] = layer.tensors(rng, schema)
    own = lambda *shape, dtype=layer.dtype: strided(rng, [*E, *shape], dtype, False)
    args |= {"bias": own(layer.O), "b": own(layer.O, layer.R, dtype=layer.factor)}
    index = torch.randint(-1, E[0], layer.lead, dtype=torch.int32) if E else None
    nv = "nvfp4" in schema.name
    if schema.name.endswith("_quantize"):
        args["x"] = strided(rng, [*layer.lead, layer.I], layer.dtype, False)
    if "bias" in args and rng.random() < 0.5:
        args["bias"] = None
    lead = layer.lead if schema.name.endswith("_dequantize") else [*E, layer.O]
    G, hadamard, some = -(-layer.I // (16 if nv else 32)), rng.random() < 0.5, rng.random() < 0.5
    bytes_of = lambda n, low, high: torch.randint(low, high, (*lead, n)).to(torch.uint8)
    s_dtype = torch.float32 if layer.factor == torch.float16 else layer.factor
    out, packed = rng.choice(FLOATS), {}
    if "a_codes" in names:  # what is added has the result's dtype; s and u come together or not at all
        few = lambda *shape: strided(rng, shape, out, False) if some else None
        packed = {"bias": few(layer.O), "s": few(*layer.lead, layer.R), "u": few(layer.O, layer.R)}
        a_codes = torch.randint(0, 256, (*layer.lead, 16 * G)).to(torch.uint8)
        if rng.random() < 0.3:  # MXFP8's
            a_codes = torch.randn(*layer.lead, 32 * G).to(torch.float8_e4m3fn)
        packed |= {"a_codes": a_codes, "a_scales": torch.randint(115, 128, (*layer.lead, G)).to(torch.uint8)}
    return args | {
        "codes": bytes_of((8 if nv else 16) * G, 0, 256), "scales": bytes_of(G, 8, 127) if nv else bytes_of(G, 115, 128),
        "global_scale": torch.rand(1), "amax": torch.rand(1) * 4 if some else None,
        "columns": layer.I, "dtype": out, "b_codes": bytes_of(16 * G, 0, 256), "b_scales": bytes_of(G, 115, 128),
        "alpha": rng.choice((1.0, 16 / 9)), "s": strided(rng, [*layer.lead, layer.R], s_dtype, False),
        "experts": index, "rule": rng.choice(RULES), "hadamard": hadamard, "gain": rng.choice((1.0, 0.75)),
        "signs": torch.randint(-(2**31), 2**31, (1,)).int() if hadamard and some else None,
        "seed": torch.tensor([rng.getrandbits(63)]) if rng.random() < 0.3 else None,
    } | packed  # fmt: skip
