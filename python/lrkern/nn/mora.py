# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a MoRA adapter."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from .linear import AdapterLinear, Method
from .lora import Factor

TYPES = (1, 2, 3, 4, 6)
FEW = 32  # ranks


class MoRALinear(AdapterLinear):
    """y = x Wᵀ + bias + decompress(compress(dropout(x)) Mᵀ): MoRA (Jiang et al., arXiv 2405.12130) as its authors' code has it;
    ``functional.mora_linear``.

    Trained: M [r̂, r̂], which starts at 0, with as many parameters as LoRA of rank r. There is no alpha: the scaling is 1. Keys of the
    state_dict are the authors': base_layer.weight, base_layer.bias, lora_A.weight and lora_B.weight, both M. Loading takes
    lora_A with or without lora_B, and refuses two that differ.

    Types 1 to 4 are LoRA of rank r̂ (``factors``, ``convert.to_lora``), type 6 has full rank.

    Args:
        r: M is as large as LoRA's factors of this rank together.
        mora_type: 1, 2, 3, 4 or 6 (there is no 5), as in ``ops.mora``. None takes what the authors advise, 6 for small ranks and 1
            for large ones; the line between them is ours, r = 32.
        dropout: probability on the adapter's input.
        paper_rank: r̂ rounded down as in the paper; the authors' code rounds it to the nearest.
        adapter_dtype: of M; None means float32 over a 16-bit base, else the base's dtype.
    """

    METHODS: ClassVar = {"mora": Method({}, "MoRA, Jiang et al., arXiv 2405.12130")}
    SETTINGS = ("r", "mora_type", "dropout", "paper_rank")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        mora_type: int | None = None,
        dropout: float = 0.0,
        paper_rank: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(base, r=r, mora_type=mora_type, dropout=dropout, paper_rank=paper_rank, adapter_dtype=adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        mora_type: int | None = None,
        dropout: float = 0.0,
        paper_rank: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "MoRALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(
            linear, r=r, mora_type=mora_type, dropout=dropout, paper_rank=paper_rank, adapter_dtype=adapter_dtype
        )

    def _set_up(self, base, r, mora_type, dropout, paper_rank, adapter_dtype) -> None:
        self._whole("r", r, 1)
        mora_type = self._known(mora_type, (6 if r <= FEW else 1) if mora_type is None else mora_type)
        self._probability("dropout", dropout)
        self._flag("paper_rank", paper_rank)
        rank = F.mora_rank(base.in_features, base.out_features, r, mora_type, paper_rank)
        if rank < 1:
            sizes = f"in={base.in_features}, out={base.out_features}"
            raise ValueError(f"{type(self).__name__}: r must give M a row at least ({sizes}), got r={r}")
        like = self._adopt(base, r, adapter_dtype)
        self.mora_type, self.dropout, self.paper_rank, self.rank = mora_type, float(dropout), paper_rank, rank
        self.lora_A = Factor(rank, rank, **like)

    def _known(self, given: Any, value: Any) -> int:
        if type(value) is not int or value not in TYPES:
            must = "must be 1, 2, 3, 4 or 6 (there is no 5), or None"
            raise ValueError(f"{type(self).__name__}: mora_type {must}, got {given!r}")
        return value

    @property
    def low_rank(self) -> bool:
        return self.mora_type != 6

    @property
    def lora_rank(self) -> int:
        return self.rank

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.mora_linear(x, weight, bias, self.lora_A.weight, self.mora_type, self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.mora_add(y, x, self.lora_A.weight, self.mora_type, self.dropout, self.training)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        return F.mora_delta(self.lora_A.weight, self.in_features, self.out_features, self.mora_type)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r̂, in] and B [out, r̂] in float32, as a LoRA adapter of scaling 1; of types 1 to 4."""
        return *F.mora_factors(self.lora_A.weight, self.in_features, self.out_features, self.mora_type), 1.0

    @torch.no_grad()
    def restart(self, types: Sequence[int] | None = None) -> None:
        """ReMoRA: W += delta_weight() for good, and M starts again at 0, in place. ``types``: the cycle that the type takes its next
        step in, such as (1, 2, 3, 4); all must give M its present rank. What an optimizer keeps of M is its owner's to reset.
        Refused as ``merge`` is, W and M then as they were."""
        cycle = [self._known(t, t) for t in types or (self.mora_type,)]
        sizes = self.in_features, self.out_features, self.r
        fit = all(F.mora_rank(*sizes, t, self.paper_rank) == self.rank for t in cycle)
        self._refuse_if(not fit, "restart", f"keep the rank {self.rank} of M with every type of {cycle}")
        self.merge()
        self.__dict__.pop("_as_merged", None)
        self.merged = False
        self.lora_A.weight.zero_()
        at = cycle.index(self.mora_type) + 1 if self.mora_type in cycle else 0
        self.mora_type = cycle[at % len(cycle)]

    # The authors' layer has lora_B as another name of lora_A, and their files both.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        m = self.lora_A.weight
        destination[prefix + "lora_B.weight"] = m if keep_vars else m.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # An error that is raised, not collected: the base layer below would be loaded all the same.
        a, b = (state_dict.get(f"{prefix}{name}.weight") for name in ("lora_A", "lora_B"))
        if a is not None and b is not None and not (a.shape == b.shape and torch.equal(a, b)):
            must = f"{prefix}lora_B.weight must be lora_A.weight, which is M too, got another"
            raise RuntimeError(f"{type(self).__name__}: {must}; the layer is unchanged")
        rest = {key: t for key, t in state_dict.items() if key != f"{prefix}lora_B.weight"}
        super()._load_from_state_dict(rest, prefix, *args)
