# SPDX-License-Identifier: Apache-2.0
"""The throwaway family: a gain for each column."""

from torch import Tensor

from .composites import throwaway as composites
from .dispatch import Op, like_contiguous

_gained = Op(
    "throwaway", composites.throwaway, results=lambda x, **_: like_contiguous(x), trains="x", refuses="gain", casts="x"
)


def throwaway(x: Tensor, gain: Tensor) -> Tensor:
    """y = g ⊙ x. x [..., N]; gain float32 [N], without a gradient. Differentiable in x."""
    return _gained(x, gain)
