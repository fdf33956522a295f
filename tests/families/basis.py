# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import FLOATS, SMALL, Layer, strided


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """A stream, its sizes, and tensors that go with them, by argument name."""
    lead, dtype = layer.lead, layer.dtype
    Q, C, R, transposed = layer.O, layer.I, rng.choice((1, 2, 7)), rng.random() < 0.5
    n, m = (C, Q) if transposed else (Q, C)
    segments = [(rng.choice(SMALL), rng.choice(SMALL), rng.choice((1.0, -0.5))) for _ in range(rng.choice((1, 2, 4)))]
    widths, counts, scales = map(list, zip(*segments, strict=True))
    vector = lambda size: torch.randn(size) if rng.random() < 0.5 else None
    fill = lambda *shape: torch.randn(shape)
    return {
        "like": fill(1).to(dtype), "seed": rng.getrandbits(63), "method": rng.randrange(64), "tensor": rng.getrandbits(31),
        "distribution": rng.randint(2, 7), "first": rng.choice((0, 3, 2**15)), "R": R, "Q": Q, "C": C, "q0": rng.randrange(99),
        "c0": rng.choice((0, 5, 2**30)), "transposed": transposed, "fp32": rng.random() < 0.5, "scale": 0.5,
        "widths": widths, "counts": counts, "scales": scales, "coef": fill(*lead, sum(counts)),
        "base": fill(R, sum(widths)) if rng.random() < 0.5 else None, "g": fill(*lead, R, sum(widths)),
        "x": strided(rng, [*lead, n], dtype, True), "y": fill(*lead, m).to(rng.choice(FLOATS)), "in_scale": vector(n),
        "out_scale": vector(m), "row_scale": vector(Q), "col_scale": vector(C),
    }  # fmt: skip
