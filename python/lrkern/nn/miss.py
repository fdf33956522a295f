# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a MiSS adapter."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from .linear import AdapterLinear, Method, constant

KINDS = ("balance", "mini", "bat")


class MissLinear(AdapterLinear):
    """y = x Wᵀ + bias + what shards of W share: MiSS (Kang et al., arXiv 2409.15371, Bone before) as PEFT defines it.

        balance     y = x Wᵀ + bias + fold(dropout(x)) D, with D [r, out]; fold adds up the columns of x that are r apart
        mini        the same with D [r, mini_r], whose columns are repeated to fill out
        bat         y = x W'ᵀ + bias, W' = W (I + D) + D by shards of r x r, with D [out / r, r, r]

    Trained: miss_block, which is D and starts at 0. There is no alpha. Keys of the state_dict are PEFT's: base_layer.weight,
    base_layer.bias and miss_block. ``functional.miss_linear`` and ``functional.bone_linear``.

    "balance" and "mini" are LoRA of rank r (``factors``, ``convert.to_lora``). The change of "bat" is of full rank and depends on W:
    ``unmerge`` solves for W, which is the more exact the nearer I + D is to I.

    Args:
        r: columns of a shard, at most in; for "bat" a divisor of in and out.
        kind: "balance", "mini" or "bat": PEFT's init_weights True, "mini" and "bat".
        mini_r: columns of D, a divisor of out; for "mini" alone, else 1.
        dropout: probability on the adapter's input; 0 for "bat", which has none in PEFT.
        adapter_dtype: of D; None means float32 over a 16-bit base, else the base's dtype.
    """

    METHODS: ClassVar = {
        "miss": Method({}, "MiSS, Kang et al., arXiv 2409.15371"),
        "bone": Method(
            {"kind": "bat", "mini_r": 1, "dropout": 0.0}, "Bone, Kang et al., arXiv 2409.15371 in its first versions"
        ),
    }
    PEFT_TYPE = "MISS"
    FULL = "has full rank and depends on W"
    PEFT_SHARES = ("r", "kind", "mini_r", "dropout")
    SETTINGS = ("r", "kind", "mini_r", "dropout")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        kind: str = "balance",
        mini_r: int = 1,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(base, r=r, kind=kind, mini_r=mini_r, dropout=dropout, adapter_dtype=adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        kind: str = "balance",
        mini_r: int = 1,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> "MissLinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(linear, r=r, kind=kind, mini_r=mini_r, dropout=dropout, adapter_dtype=adapter_dtype)

    def _set_up(self, base, r, kind, mini_r, dropout, adapter_dtype) -> None:
        self._whole("r", r, 1)
        self._one_of("kind", kind, KINDS)
        self._whole("mini_r", mini_r, 1)
        self._probability("dropout", dropout)
        I, O = base.in_features, base.out_features
        self._fits("r", r, f"be at most in = {I}", r <= I)
        if kind == "bat":
            self._fits("r", r, f'divide in = {I} and out = {O} for "bat"', I % r == O % r == 0)
            self._fits("dropout", dropout, 'be 0 for "bat", which has none', dropout == 0)
        if kind == "mini":
            self._fits("mini_r", mini_r, f"divide out = {O}", O % mini_r == 0)
        else:
            self._fits("mini_r", mini_r, f'be 1 for "{kind}", it is of "mini" alone', mini_r == 1)
        like = self._adopt(base, r, adapter_dtype)
        self.kind, self.mini_r, self.dropout = kind, mini_r, float(dropout)
        shape = {"balance": (r, O), "mini": (r, mini_r), "bat": (O // r, r, r)}[kind]
        self.miss_block = constant(0.0, *shape, **like)

    def _fits(self, name: str, value: object, must: str, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{type(self).__name__}: {name} must {must}, got {value!r}")

    @property
    def low_rank(self) -> bool:
        return self.kind != "bat"

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kind == "bat":
            return F.bone_linear(x, weight, bias, self.miss_block)
        return F.miss_linear(x, weight, bias, self.miss_block, self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        if self.kind == "bat":
            return F.bone_add(y, x, self.base_layer.weight, self.miss_block)
        return F.miss_add(y, x, self.miss_block, self.dropout, self.training)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        w = self.base_layer.weight
        if self.kind != "bat":
            return F.miss_delta(self.miss_block, self.in_features, self.out_features)
        if self.merged:
            return w.float() - (self._as_merged or self)._unmerged_weight(w.float())
        return F.bone_delta(w, self.miss_block)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in] and B [out, r] in float32, as a LoRA adapter of scaling 1; of "balance" and "mini"."""
        if not self.low_rank:
            raise ValueError("MissLinear.factors: kind must be balance or mini, got bat: its ΔW is of full rank")
        return *F.miss_factors(self.miss_block, self.in_features, self.out_features), 1.0

    def _merged_weight(self, w: Tensor) -> Tensor:
        if self.kind == "bat" and self.miss_block.isfinite().all():
            most, cond = 1 / torch.finfo(self.base_layer.weight.dtype).eps, torch.linalg.cond(self._times())
            if not (cond <= most).all():  # no unmerge would find W again
                must = f"I + miss_block must have a condition number of at most {most:g}"
                raise ValueError(f"MissLinear.merge: {must}, got {cond.max():g}; W is unchanged")
        return super()._merged_weight(w)

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        if self.kind != "bat":
            return super()._unmerged_weight(w)
        blocks = self.miss_block.double()
        p, r, _ = blocks.shape
        shards = w.double().reshape(p, r, -1, r) - blocks.unsqueeze(2)
        solved = torch.linalg.solve(self._times(), shards.reshape(p, -1, r), left=False)
        return solved.view_as(w).to(w.dtype)

    def _times(self) -> Tensor:
        """I + D of each block: what W is multiplied with."""
        return self.miss_block.double() + torch.eye(self.r, dtype=torch.float64, device=self.miss_block.device)
