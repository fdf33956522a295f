# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a NOLA adapter whose random bases are a seed."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ..limits import MAX_RANK
from .basis import BasisLinear
from .linear import LowRankLinear, Method, constant


class NOLALinear(BasisLinear, LowRankLinear):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, A = A₀ + c Σᵢ alphaᵢ Uᵢ, B = c' Σⱼ betaⱼ Vⱼ: NOLA (Koohpayegani et
    al., arXiv 2310.02556) as its GPT-2 and LLaMA code defines it; see ``functional.nola_factors`` for U, V, A₀ and c.

    Trained: nola_alpha [k] and nola_beta [l]. scaling = lora_alpha / r. The layer starts as the base layer: beta = 0, and
    alpha = 0 as the reference has it. Without frozen_a both at 0 would never move, so alpha starts at
    1 / sqrt(in), over sqrt(k) where not normalize, with which A has the variance of A₀.

    Args:
        r: rank, 1 to 512. The defaults of r, k, l and lora_alpha are those of the LLaMA scripts.
        k, l: how many bases make up A and B, 1 to 4096 each.
        lora_alpha: see scaling.
        normalize: c = 1 / sqrt(k) and c' = 1 / sqrt(l), else 1 (the reference's README).
        frozen_a: A₀ is random, kaiming_uniform(a=sqrt(5)) as LoRA's A starts, and takes no memory; else 0 (the paper).
        the rest: as BasisLinear.
    """

    METHODS: ClassVar = {"nola": Method({}, "NOLA, Koohpayegani et al., arXiv 2310.02556")}
    METHOD = "nola"
    SETTINGS = ("r", "k", "l", "lora_alpha", "normalize", "frozen_a", "dropout", "seed", "distribution")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        k: int = 512,
        l: int = 512,
        lora_alpha: float = 4.0,
        normalize: bool = True,
        frozen_a: bool = True,
        dropout: float = 0.0,
        seed: int | torch.Generator | None = None,
        distribution: str = "uniform8",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(
            base,
            r=r,
            k=k,
            l=l,
            lora_alpha=lora_alpha,
            normalize=normalize,
            frozen_a=frozen_a,
            dropout=dropout,
            seed=seed,
            distribution=distribution,
            adapter_dtype=adapter_dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 16,
        k: int = 512,
        l: int = 512,
        lora_alpha: float = 4.0,
        normalize: bool = True,
        frozen_a: bool = True,
        dropout: float = 0.0,
        seed: int | torch.Generator | None = None,
        distribution: str = "uniform8",
        adapter_dtype: torch.dtype | None = None,
    ) -> "NOLALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(
            linear,
            r=r,
            k=k,
            l=l,
            lora_alpha=lora_alpha,
            normalize=normalize,
            frozen_a=frozen_a,
            dropout=dropout,
            seed=seed,
            distribution=distribution,
            adapter_dtype=adapter_dtype,
        )

    def _set_up(self, base, r, k, l, lora_alpha, normalize, frozen_a, **common) -> None:
        for name, value, high in (("r", r, MAX_RANK), ("k", k, 4096), ("l", l, 4096)):
            self._whole(name, value, 1, high)
        self._finite("lora_alpha", lora_alpha)
        self._flag("normalize", normalize)
        self._flag("frozen_a", frozen_a)
        like = self._adopt(base, r, **common)
        self.k, self.l, self.lora_alpha, self.scaling = k, l, lora_alpha, F.lora_scaling(lora_alpha, r)
        self.normalize, self.frozen_a = normalize, frozen_a
        spread = (base.in_features * (1 if normalize else k)) ** -0.5 if base.in_features else 0.0
        self.nola_alpha = constant(0.0 if frozen_a else spread, k, **like)
        self.nola_beta = constant(0.0, l, **like)

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        coef, options = self._made_of()
        return F.nola_linear(x, weight, bias, *coef, self.scaling, *options, 0, self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        coef, options = self._made_of()
        a, b = F.nola_factors(*coef, self.in_features, self.out_features, *options)
        return F.lora_add(y, x, a, b, self.scaling, self.dropout, self.training)

    def _made_of(self) -> tuple[tuple, tuple]:
        return (self.nola_alpha, self.nola_beta, self.seed, self.r), (self.normalize, self.frozen_a, self.distribution)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in] and scaling · B [out, r] of the generated bases in float32: as a LoRA adapter of scaling 1."""
        coef, options = self._made_of()
        a, b = F.nola_factors(*coef, self.in_features, self.out_features, *options)
        return a, self.scaling * b, 1.0
