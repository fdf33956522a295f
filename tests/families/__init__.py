# SPDX-License-Identifier: Apache-2.0
"""What shared tests need to know of a family. Each module draws good arguments for random calls:

draw(rng, schema, layer) -> dict     by name, of the ops of the family and of X_fwd and X_bwd; what it leaves out is a flag or scalar
"""

import importlib
import random
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

SMALL = (0, 1, 2, 3, 5, 8, 16, 17, 31, 64, 65)
LARGE = (127, 256, 257, 512, 513, 600)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load(family: str) -> ModuleType:
    return importlib.import_module(f"tests.families.{family}")


def strided(rng: random.Random, shape: list[int], dtype: torch.dtype, rows: bool) -> Tensor:
    """Random values under random strides; `rows`: its last dimension stays contiguous and its rows at one pitch."""
    fill = lambda *s: (torch.randn(s) if dtype.is_floating_point else torch.ones(s)).to(dtype)
    kind = rng.choice(("plain", "plain", "pitch", "offset") if rows else ("plain", "pitch", "offset", "turned", "wide"))
    if not shape or kind == "plain":
        return fill(*shape)
    if kind in ("pitch", "offset"):
        more = rng.randint(1, 9)
        t = fill(*shape[:-1], shape[-1] + more)
        return t[..., : shape[-1]] if kind == "pitch" else t[..., more:]
    if kind == "turned":
        return fill(*reversed(shape)).permute(*reversed(range(len(shape))))
    return fill(*[n if rng.random() < 0.5 else 1 for n in shape]).expand(shape)


@dataclass
class Layer:
    """Sizes and dtypes of a random layer; p of dropout."""

    lead: list[int]
    I: int
    O: int
    R: int
    dtype: torch.dtype
    factor: torch.dtype
    p: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Layer":
        size = lambda: rng.choice(LARGE if rng.random() < 0.04 else SMALL)
        lead = [size(), *rng.choices((0, 1, 2, 3), k=rng.choice((0, 0, 1, 2)))]
        I, O, R, dtype = size(), size(), rng.choice((0, 1, 2, 4, 8, 16, 17, 33, 70)), rng.choice(FLOATS)
        return cls(lead, I, O, R, dtype, rng.choice((dtype, torch.float32)), rng.choice((0.0, 0.0, 0.3, 1.0)))

    def tensors(self, rng: random.Random, schema, factors: str = "", **letters: str) -> dict[str, Tensor]:
        """Arguments of these names, and those of a base layer, in their shapes by letters."""
        letters = {"x": "TI", "weight": "OI", "bias": "O", "y": "TO", "dy": "TO"} | letters
        found = {}
        for a in schema.arguments:
            if a.name in letters:
                shape = [n for c in letters[a.name] for n in (self.lead if c == "T" else [getattr(self, c)])]
                dtype = self.factor if a.name in factors.split() else self.dtype
                found[a.name] = strided(rng, shape, dtype, a.alias_info is not None)
        return found
