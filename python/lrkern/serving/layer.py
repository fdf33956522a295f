# SPDX-License-Identifier: Apache-2.0
"""A linear's pools, and what all of lrkern.serving says where it refuses."""

from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..files.check import require
from ..files.folder import features_of
from ..limits import DTYPES


def must(holds: Any, argument: str, what: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"lrkern.serving: {argument} must {what}, got {got}")


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """[I, O] of what may have an adapter: a linear of any kind, or an embedding, whose I is the vocabulary."""
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim) if module.max_norm is None else None
    return features_of(module)


class Layer:
    """A linear's or embedding's pools: a page is 16 rows of both. Sharded by columns a linear has B's rows of this process, by
    rows A's columns."""

    def __init__(self, index: int, name: str, features: tuple[int, int], split: str | None, world: int):
        self.index, self.name, self.split = index, name, split
        self.embeds = False  # an embedding: its x are ids [..., 1]
        self.local = features
        self.whole = (features[0] * (world if split == "row" else 1), features[1] * (world if split == "column" else 1))
        self.module: nn.Module  # the linear
        self.max_rank: int  # of an adapter of factors
        self.a: Tensor  # [P, I]
        self.b: Tensor  # [P, O]

    def mine(self, t: Tensor, which: str, rank: int) -> Tensor:
        """This process's columns of something of A ("row") or Bᵀ ("column")."""
        n = self.local[which == "column"]
        return t[..., n * rank : n * (rank + 1)] if self.split == which else t[..., :n]

    def weight(self) -> Tensor:
        """W [O, I], dequantised where it must be, as PEFT's DoRA reads it; refuses where no process has its rows whole."""
        m = self.module
        require(self.split != "row", f"{self.name} must not be split by rows for DoRA, whose norm is of whole rows")
        stored = m.W_q if hasattr(m, "W_q") else getattr(m, "weight", None)
        known = isinstance(stored, Tensor) and hasattr(m, "bias")
        require(known, f"{self.name} must have a weight and a bias for DoRA, got {type(m).__name__}")
        w = dequantize_module_weight(m).detach()
        w = w.mT if type(m).__name__ == "Conv1D" else w
        fits = w.shape == self.local[::-1] and w.dtype in DTYPES and not w.is_meta
        got = f"{'meta' if w.is_meta else w.dtype} {list(w.shape)}"
        require(fits, f"{self.name} must have a weight {list(self.local[::-1])} in memory for DoRA, got {got}")
        return w
