# SPDX-License-Identifier: Apache-2.0
"""Thousands of adapters behind one frozen model (S-LoRA, arXiv 2311.03285).

    pool = AdapterPool(model, budget=2 << 30, max_rank=64)
    pool.load("legal", "adapters/legal")                    # a PEFT folder
    served = MultiLoraModel(model, pool)
    served(input_ids, adapters=["legal", None, ["legal", "terse"]], scales=[1.0, 1.0, [1.0, 0.5]])
    served.generate(input_ids, adapters=["legal", None, "terse"], max_new_tokens=20)

Every linear of the model has a pair of pools in pages of 16 ranks (lrkern.ops.multi_lora_shrink); page p is the same rows in
all of them, so an adapter has one list of pages. The host has copies of all adapters, the device those that fit: it takes
memory as they need it, up to the budget; when pages run out, the least recently used adapter is evicted; it is uploaded again
when a batch asks for it.

VeRA adapters are vectors over a pair of projections, which all that have an equal one share: a page holds up to 16 of them.
The pair is there, beside the pages, until the last of them has left the pool. So are the bases of RandLoRA adapters, whose
lambda and gamma lie in pages. DoRA adapters and biases take two rows of pages more, for what they do to the base's y.

Every method may be called from any thread. A forward, or a whole ``generate``, leases its adapters: they stay as they were
when it began, whatever is replaced or removed meanwhile, and their pages get no new owner before it ends.
"""

from ..extras import extra

with extra("lrkern.serving"):
    import safetensors  # noqa: F401, first: without it PEFT fails in words of its own

    # isort: split
    import peft  # noqa: F401

from .kinds import FAMILIES, Factors, Shared, Vectors
from .memory import AdapterStatistics, Statistics
from .model import MultiLoraModel
from .pool import AdapterPool, PoolFull, UnknownAdapter

__all__ = [
    "FAMILIES", "AdapterPool", "AdapterStatistics", "Factors", "MultiLoraModel", "PoolFull", "Shared", "Statistics",
    "UnknownAdapter", "Vectors",
]  # fmt: skip
