# SPDX-License-Identifier: Apache-2.0
"""Hydra: a low-rank branch beside the layer and one behind it."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ...limits import MAX_RANK
from ..linear import Method
from ..plain import plain_linear
from .merged import FixedWhenMerged
from .rank import Variant, trained


class HydraLinear(FixedWhenMerged, Variant):
    """y = y0 + scaling · ((x A_pᵀ) B_pᵀ + (y0 A_sᵀ) B_sᵀ), y0 = x Wᵀ + bias: Hydra (Kim et al., Hydra: Multi-head Low-rank
    Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922).

    parallel_A [r, in] and sequential_A [r, out] start as xavier_uniform, parallel_B and sequential_B [out, r] as zero: the layer starts
    as the base layer. All four train. scaling is a number of its own, 1 by default, and not divided by r. dropout is on the rank
    activations, as in the authors' code. That code's branches have biases, which are not here: files of it that trained them do not fit.

    merge writes W + scaling · (B_p A_p + B_s A_s W) and bias + scaling · B_s A_s bias, so that a layer is a LoRA, of rank 2 r with
    A = [A_p; A_s W], B = [B_p, B_s], only where it has no bias and its W is at hand. r <= 256.
    """

    METHODS: ClassVar = {"hydra": Method({}, "Hydra, Kim et al., arXiv 2309.06922")}
    SETTINGS = ("r", "scaling", "dropout")
    FULL = "adds to the bias too, or its W is not at hand"

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, MAX_RANK // 2)
        self._finite("scaling", scaling)
        like = self._begin(base, r, r, dropout, adapter_dtype)
        self.scaling = float(scaling)
        xavier = lambda n: nn.init.xavier_uniform_(trained(r, n, **like))
        self.parallel_A, self.parallel_B = xavier(base.in_features), trained(base.out_features, r, **like)
        self.sequential_A, self.sequential_B = xavier(base.out_features), trained(base.out_features, r, **like)

    def _operands(self) -> tuple:
        pair = self.parallel_A, self.parallel_B, self.sequential_A, self.sequential_B
        return *pair, self.scaling, self.dropout, self.training

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.hydra_linear(x, weight, bias, *self._operands())

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.hydra_add(y, x, *self._operands())

    @property
    def low_rank(self) -> bool:
        weight, bias = plain_linear(self.base_layer)
        return weight is not None and bias is None and not weight.is_meta

    @property
    def lora_rank(self) -> int:
        return 2 * self.r

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """[A_p; A_s W] [2 r, in] and [B_p, B_s] [out, 2 r]; of ΔW alone where there is a bias."""
        w = self.base_layer.weight.float()
        w = self._as_merged._unmerged_weight(w) if self.merged else w
        a = torch.cat([self.parallel_A.float(), self.sequential_A.float() @ w])
        return a, torch.cat([self.parallel_B, self.sequential_B], 1).float(), self.scaling

    @torch.no_grad()
    def delta_bias(self) -> Tensor:
        """What ``merge`` adds to the bias [out], in float32."""
        bias = self.base_layer.bias.float()
        bias = bias - self._as_merged.added_to_bias if self.merged else bias
        return self.scaling * (self.sequential_B.float() @ (self.sequential_A.float() @ bias))

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight() and bias += delta_bias(), each rounded once; as ``AdapterLinear.merge``."""
        self._check_merge()
        bias, added = self.base_layer.bias, None
        if bias is not None:
            added = self.delta_bias()
            new = (bias.float() + added).to(bias.dtype)
            if not new.isfinite().all():
                must = "bias + delta_bias() must be finite, got inf or nan; W and bias are unchanged"
                raise ValueError(f"HydraLinear.merge: {must}")
        super().merge()
        if added is not None:
            self._as_merged.register_buffer("added_to_bias", added)
            bias.copy_(new)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes from W and bias what ``merge`` added."""
        then, bias = self._as_merged, self.base_layer.bias
        super().unmerge()
        if then is not None and bias is not None:
            bias.copy_((bias.float() - then.added_to_bias.to(bias.device)).to(bias.dtype))
