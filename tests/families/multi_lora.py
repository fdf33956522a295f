# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

import lrkern.ops
from tests.families import Layer


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    """Adapters, pools and a plan that go together, by argument name."""
    lead, p = layer.lead, layer.p
    T, A, K = torch.Size(lead).numel(), rng.choice((0, 1, 2, 5)), rng.choice((1, 1, 2, 3))
    L, M = 1 if "linear" in schema.name else rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 5))
    fill = lambda *shape, dtype=layer.factor: torch.randn(shape).to(dtype)
    index = torch.tensor(rng.choices(range(-1, A), k=T * K), dtype=torch.int32).reshape(T, K)
    P = 16 * (A * L * M + rng.choice((0, 0, 1)))
    pages = torch.tensor(rng.sample(range(P // 16), A * L * M), dtype=torch.int32).reshape(A, L, M)
    ranks = torch.tensor(rng.choices(range(16 * M + 1), k=A * L), dtype=torch.int32).reshape(A, L)
    table = {"index": index, "adapters": A, "pages": pages, "ranks": ranks}
    I = max(1, layer.I) if "embedding" in schema.name else layer.I
    s, ids = fill(*lead, K, L, 16 * M), torch.randint(max(1, I), lead)
    args = layer.tensors(rng, schema)
    if "bias" in args and rng.random() < 0.5:
        args["bias"] = None
    return args | table | {
        "ids": ids,
        "plan": lrkern.ops.multi_lora_plan(index, A), "a_pool": fill(P, I), "b_pool": fill(P, layer.O), "s": s,
        "ds": s, "slice": rng.randrange(L), "scales": fill(T, K, dtype=torch.float32) if rng.random() < 0.7 else None,
        "dropout_p": torch.tensor(rng.choices((0.0, 0.3, 1.0), k=A)) if p else None,
        "seed": torch.tensor([rng.getrandbits(63)]) if p else None,
    }  # fmt: skip
