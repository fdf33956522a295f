# SPDX-License-Identifier: Apache-2.0
"""PRILoRA: LoRA with more ranks in deeper layers and an A that is pruned by its inputs."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..linear import Method
from .rank import Variant, frozen, kaiming, trained
from .scores import largest_in_rows


class PRILoRALinear(Variant):
    """y = x Wᵀ + bias + scaling · (dropout(x) (A ⊙ mask_A)ᵀ) Bᵀ: PRILoRA (Benedek and Wolf, arXiv 2401.11316).

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero: the layer starts as the base layer. Both train. mask_A [r, in], of
    bool and all true at first, does not. scaling = lora_alpha / r.

    In a model the rank grows linearly with the depth, from r_start to r_end (``plan``). While a layer is watched (``watch``), it keeps
    an average of ‖column of x‖₂, by which ``prune`` weighs |A|. No code of the authors was found: when and how much they prune, the
    average's factor, the ranks 4 and 12, and what happens to the pruned weights afterwards are not verified. The average is not in files
    and state_dicts.

    Args:
        r: rank of this layer. r_start, r_end: of the first and the last layer of a model, for layers whose r is not given.
    """

    METHODS: ClassVar = {"prilora": Method({}, "PRILoRA, Benedek and Wolf, arXiv 2401.11316")}
    SETTINGS = ("r", "r_start", "r_end", "lora_alpha", "dropout")

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        r_start: int = 4,
        r_end: int = 12,
        lora_alpha: float = 16.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._whole("r_start", r_start, 1, self.MOST)
        self._whole("r_end", r_end, 1, self.MOST)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        self.r_start, self.r_end = r_start, r_end
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        self.mask_A = frozen(torch.ones_like(self.lora_A, dtype=torch.bool))
        self.register_buffer("x_norm", None, persistent=False)

    @classmethod
    def plan(cls, model, linears, settings):
        """r of a layer whose settings do not give it: r_start at the first depth to r_end at the last, rounded, halves up. Layers are of
        one depth where their names agree up to the first number ("model.layers.3"); a name without a number is a depth of its own."""
        depths = {depth: i for i, depth in enumerate(dict.fromkeys(map(_depth, settings)))}
        planned = {}
        for name, s in settings.items():
            first, last = s.get("r_start", 4), s.get("r_end", 12)
            if not all(type(n) is int for n in (first, last)):
                raise ValueError(f"{cls.__name__}: r_start and r_end must be whole numbers, got {first!r} and {last!r}")
            share = depths[_depth(name)] / max(len(depths) - 1, 1)
            planned[name] = {"r": int(first + (last - first) * share + 0.5)} | s
        return planned

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A * self.mask_A, self.lora_B, self.scaling

    def watch(self, beta: float = 0.9) -> RemovableHandle:
        """From now on a forward in training mode updates the average of ‖column of x‖₂, until ``remove`` of what this returns. A forward
        that checkpointing runs twice counts twice."""
        self._probability("beta", beta)
        return self.register_forward_pre_hook(_Observe(beta))

    @torch.no_grad()
    def observe(self, x: Tensor, beta: float = 0.9) -> None:
        """x_norm = beta · x_norm + (1 - beta) · ‖column of x‖₂ [in] in float32, from the first one on. x [..., in]."""
        now = torch.linalg.vector_norm(x.detach().reshape(-1, self.in_features), dim=0, dtype=torch.float32)
        self.x_norm = now if self.x_norm is None else self.x_norm.lerp(now, 1 - beta)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Leaves out of each row of A the weights of the least |A| ⊙ x_norm, so that floor((1 - share) · in) of them stay, at least one: they
        are zero now, and the mask keeps them so. Another call makes another mask."""
        self._probability("share", share)
        self._refuse_if(self.x_norm is None, "prune", "have observed its inputs; watch() it in training")
        self.mask_A.copy_(largest_in_rows(self.lora_A.float().abs() * self.x_norm, 1 - share))
        self.lora_A.masked_fill_(~self.mask_A, 0)


class _Observe:
    """A hook that can be pickled."""

    def __init__(self, beta: float):
        self.beta = beta

    def __call__(self, layer: PRILoRALinear, args: tuple) -> None:
        if layer.training:
            layer.observe(args[0], self.beta)


def _depth(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
