# SPDX-License-Identifier: Apache-2.0
"""LoRAPrune: LoRA that tells which rows of W to leave out, and leaves them out."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from ..plain import packed, plain_linear
from .rank import Variant, frozen, kaiming, trained
from .scores import row_blocks


class LoRAPruneLinear(Variant):
    """y = (x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ) ⊙ mask: LoRAPrune (Zhang et al., arXiv 2305.18403).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero, mask [out], of bool, as true: the layer starts as the base layer. A
    and B train. scaling = lora_alpha / r. As in the authors' code the mask takes the bias too: a masked feature is zero.

    ``scores`` estimates from the gradients of A and B how much each output or input feature matters, ``prune`` sets the mask, and
    ``sliced`` is the smaller layer without the features that are masked. Where one is masked the layer is no LoRA of W: that row of
    W + ΔW is zero. ``merge`` writes zeros there, into the bias too, without which the merged layer would compute something else, and
    keeps a copy of both for ``unmerge``.
    """

    METHODS: ClassVar = {"loraprune": Method({}, "LoRAPrune, Zhang et al., arXiv 2305.18403")}
    SETTINGS = ("r", "lora_alpha", "dropout")
    FULL = "masks rows of W, which no LoRA does"
    _SUM = "mask (W + scaling B A)"

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        self.mask = frozen(torch.ones(base.out_features, dtype=torch.bool, device=like["device"]))

    @property
    def low_rank(self) -> bool:
        return not self.mask.is_meta and bool(self.mask.all())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of the sum under the mask."""
        return self.lora_A, self.lora_B, self.scaling

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._masked(super()._adapted(x, weight, bias))

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return self._masked(super()._beside(y, x))

    def _masked(self, y: Tensor) -> Tensor:
        return y * self.mask.to(y.dtype)  # a quarter of masked_fill's time

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """mask ⊙ (W + scaling · B A) - W [out, in] in float32."""
        in_pack = packed(self.base_layer)
        self._refuse_if(in_pack and not self.low_rank, "delta_weight", "have a W of floats where a feature is masked")
        if in_pack:
            return super().delta_weight()
        w = self.base_layer.weight.float()
        if self.merged:
            return w - (self._as_merged or self)._unmerged_weight(w)
        return torch.where(self.mask[:, None], super().delta_weight(), -w)

    @torch.no_grad()
    def merge(self) -> None:
        """W = mask ⊙ (W + scaling · B A) and bias = mask ⊙ bias, else as ``AdapterLinear.merge``."""
        self._check_merge()
        weight, bias = self.base_layer.weight, self.base_layer.bias
        gone = weight[~self.mask].clone(), None if bias is None else bias.detach().clone()
        super().merge()
        self._as_merged.__dict__["_gone"] = gone
        if bias is not None:
            bias.masked_fill_(~self.mask, 0)

    @torch.no_grad()
    def unmerge(self) -> None:
        then, bias = self._as_merged, self.base_layer.bias
        super().unmerge()
        if then is not None and bias is not None:
            bias.copy_(then._gone[1])

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        w = w - super().delta_weight()
        w[~self.mask] = self._gone[0].to(w)
        return w

    @torch.no_grad()
    def scores(self, group: int = 1, side: str = "out") -> Tensor:
        """Σ |(gB A + B gA - gB gA) ⊙ (W + scaling · B A)| over groups of neighbouring output features (``side="in"``: input features), in
        float32 [out / group]: an estimate of what leaving them out does to the loss, from the gradients gA and gB of A and B alone.

        A group may be the head_dim rows of a head. Of a down-projection, whose inputs are pruned, ask for "in". Made in blocks of rows:
        no matrix of W's size is formed. The authors' code then divides by the 2-norm of the scores, adds up layers, and averages over steps.
        """
        size = self.out_features if side == "out" else self.in_features
        self._one_of("side", side, ("in", "out"))
        self._whole("group", group, 1)
        self._fits("group", group, f"divide {side} = {size}", size % group == 0)
        self._refuse_if(self.merged, "scores", "not be merged; unmerge() first")
        weight = plain_linear(self.base_layer)[0]
        self._refuse_if(
            weight is None, "scores", f"have a plain nn.Linear as base_layer, got {type(self.base_layer).__name__}"
        )
        lacks = self.lora_A.grad is None or self.lora_B.grad is None
        self._refuse_if(lacks, "scores", "have gradients of lora_A and lora_B; call it after backward()")
        a, b, da, db = (t.float() for t in (self.lora_A, self.lora_B, self.lora_A.grad, self.lora_B.grad))
        left, right = torch.cat([db, b - db], 1), torch.cat([a, da])  # left right = gB A + B gA - gB gA
        found = a.new_zeros(size)
        for rows in row_blocks(*weight.shape):
            w = torch.addmm(weight[rows].float(), b[rows], a, alpha=self.scaling)
            w.mul_(left[rows] @ right).abs_()
            if side == "out":
                found[rows] = w.sum(1)
            else:
                found += w.sum(0)
        return found.view(-1, group).sum(1)

    @torch.no_grad()
    def prune(self, groups: Sequence[int] | Tensor, group: int = 1) -> None:
        """Masks these groups of ``group`` neighbouring output features, and no others: what was masked before comes back."""
        self._whole("group", group, 1)
        self._fits("group", group, f"divide out = {self.out_features}", self.out_features % group == 0)
        index = torch.as_tensor(groups, dtype=torch.int64).flatten().tolist()
        count = self.out_features // group
        must = f"be in 0..{count - 1} and leave one"
        self._fits("groups", index, must, all(0 <= i < count for i in index) and len({*index}) < count)
        mask = torch.ones(count, group, dtype=torch.bool)
        mask[index] = False
        self.mask.copy_(mask.flatten())

    @torch.no_grad()
    def sliced(self, inputs: Tensor | None = None) -> "LoRAPruneLinear":
        """A smaller layer of copies, whose outputs are those that are not masked here; with ``inputs``, the mask [in] of bool of a layer
        before, it takes the inputs that are true there."""
        self._refuse_if(self.merged, "sliced", "not be merged; unmerge() first")
        weight, bias = plain_linear(self.base_layer)
        self._refuse_if(
            weight is None, "sliced", f"have a plain nn.Linear as base_layer, got {type(self.base_layer).__name__}"
        )
        a = self.lora_A
        if inputs is not None:
            fits = inputs.dtype == torch.bool and inputs.shape == (self.in_features,) and bool(inputs.any())
            got = f"{inputs.dtype} {list(inputs.shape)}"
            self._fits("inputs", got, f"be a mask [{self.in_features}] of bool with an input to keep", fits)
            inputs = inputs.to(weight.device)
            weight, a = weight[:, inputs], a[:, inputs]
        rows = self.mask
        base = nn.Linear(a.shape[1], int(rows.sum()), bias is not None, device=weight.device, dtype=weight.dtype)
        base.weight.copy_(weight[rows])
        if bias is not None:
            base.bias.copy_(bias[rows])
        small = type(self).from_linear(base, **self.settings, adapter_dtype=a.dtype)
        small.lora_A.copy_(a)
        small.lora_B.copy_(self.lora_B[rows])
        return small.train(self.training)
