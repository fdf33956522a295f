# SPDX-License-Identifier: Apache-2.0
"""A linear's pools, and what all of lrkern.serving says where it refuses."""

from typing import Any

from torch import Tensor


def must(holds: Any, argument: str, what: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"lrkern.serving: {argument} must {what}, got {got}")


class Layer:
    """A linear's pools: a page is 16 rows of both. Sharded by columns it has B's rows of this process, by rows A's columns."""

    def __init__(self, index: int, name: str, features: tuple[int, int], split: str | None, world: int):
        self.index, self.name, self.split = index, name, split
        self.local = features
        self.whole = (features[0] * (world if split == "row" else 1), features[1] * (world if split == "column" else 1))
        self.max_rank: int  # of an adapter of factors
        self.a: Tensor  # [P, I]
        self.b: Tensor  # [P, O]

    def mine(self, t: Tensor, which: str, rank: int) -> Tensor:
        """This process's columns of something of A ("row") or Bᵀ ("column")."""
        n = self.local[which == "column"]
        return t[..., n * rank : n * (rank + 1)] if self.split == which else t[..., :n]
