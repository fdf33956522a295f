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
    activations, as in the authors' code. r <= 255.

    branch_bias: that code has biases in its branches, which start as zero and train: x A_pᵀ + parallel_A_bias [r],
    (...) B_pᵀ + parallel_B_bias [out], and as sequential_A_bias and sequential_B_bias. The paper's formula has none.

    merge writes W + scaling · (B_p A_p + B_s A_s W) and bias + scaling · (B_s A_s bias + what the branches' biases come to), so that a
    layer is a LoRA, of rank 2 r with A = [A_p; A_s W], B = [B_p, B_s], only where there are no biases and W is a plain nn.Linear's.
    """

    METHODS: ClassVar = {"hydra": Method({}, "Hydra, Kim et al., arXiv 2309.06922")}
    SETTINGS = ("r", "scaling", "dropout", "branch_bias")
    FULL = "adds to the bias too, or its W is not at hand"

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        branch_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r", r, 1, (MAX_RANK - 1) // 2)
        self._flag("branch_bias", branch_bias)
        self._finite("scaling", scaling)
        like = self._begin(base, r, r, dropout, adapter_dtype)
        self.scaling, self.branch_bias = float(scaling), branch_bias
        xavier = lambda n: nn.init.xavier_uniform_(trained(r, n, **like))
        self.parallel_A, self.parallel_B = xavier(base.in_features), trained(base.out_features, r, **like)
        self.sequential_A, self.sequential_B = xavier(base.out_features), trained(base.out_features, r, **like)
        for branch in ("parallel", "sequential") if branch_bias else ():
            setattr(self, f"{branch}_A_bias", trained(r, **like))
            setattr(self, f"{branch}_B_bias", trained(base.out_features, **like))

    def _operands(self) -> tuple:
        pairs = self.parallel_A, self.parallel_B, self.sequential_A, self.sequential_B
        return *pairs, self.scaling, self.dropout, self.training, *self._biases()

    def _biases(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """[2 r] before the expansion, [out] behind it."""
        if not self.branch_bias:
            return ()
        return torch.cat([self.parallel_A_bias, self.sequential_A_bias]), self.parallel_B_bias + self.sequential_B_bias

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.hydra_linear(x, weight, bias, *self._operands())

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.hydra_add(y, x, *self._operands())

    @property
    def low_rank(self) -> bool:
        weight, bias = plain_linear(self.base_layer)
        return weight is not None and bias is None and not self.branch_bias and not weight.is_meta

    @property
    def lora_rank(self) -> int:
        return 2 * self.r

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """[A_p; A_s W] [2 r, in] and [B_p, B_s] [out, 2 r]; of ΔW alone where there are biases."""
        w = self.base_layer.weight.float()
        w = self._as_merged._unmerged_weight(w) if self.merged else w
        a = torch.cat([self.parallel_A.float(), self.sequential_A.float() @ w])
        return a, torch.cat([self.parallel_B, self.sequential_B], 1).float(), self.scaling

    @torch.no_grad()
    def delta_bias(self) -> Tensor:
        """What ``merge`` adds to the bias [out], in float32."""
        bias = self.base_layer.bias.float()
        bias = bias - self._as_merged.added_to_bias if self.merged else bias
        added = self.sequential_B.float() @ (self.sequential_A.float() @ bias)
        if self.branch_bias:
            inner, outer = (t.float() for t in self._biases())
            added = added + torch.cat([self.parallel_B, self.sequential_B], 1).float() @ inner + outer
        return self.scaling * added

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight() and bias += delta_bias(), each rounded once; as ``AdapterLinear.merge``."""
        self._check_merge()
        bias, added = self.base_layer.bias, None
        self._refuse_if(self.branch_bias and bias is None, "merge", "have a bias, to which its branches' add")
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
