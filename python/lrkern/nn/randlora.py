# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a RandLoRA adapter whose bases are a seed."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from .basis import BasisLinear, share_seed
from .linear import Method, constant


class RandLoRALinear(BasisLinear):
    """y = x Wᵀ + bias + scaling · dropout(x) ΔWᵀ, ΔW = Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ) over n = ceil(min(in, out) / r) bases,
    transposed where in > out: RandLoRA (Albert et al., arXiv 2502.00987) as PEFT defines it; ``functional.randlora_linear``.

    Trained: randlora_lambda [r, n], which starts at 0 so that the layer starts as the base layer, and randlora_gamma
    [n, min(in, out)], which starts at 1 / max(n, min(in, out)). scaling = randlora_alpha / r. Elements of A and B have
    variance 1: "uniform8" stands for the paper's dense bases, "ternary6" for its sparse ones. Layers with one seed
    and r share their bases.

    Args:
        r: rank of one basis, 1 or more.
        randlora_alpha: see scaling; PEFT's default is 640.
        paper_pairing: pair λ, γ and B as the paper's Eq. 4; the reference's code and PEFT pair them otherwise.
        save_output: where in > out, keep x Bᵀ [T, n r] for backward as PEFT does; False saves that memory for a GEMM more
            there.
        the rest: as BasisLinear.
    """

    METHODS: ClassVar = {"randlora": Method({}, "RandLoRA, Albert et al., arXiv 2502.00987")}
    METHOD = "randlora"
    PEFT_TYPE = "RANDLORA"
    PEFT_SHARES = ("r", "seed", "distribution", "dropout", "randlora_alpha")
    SETTINGS = ("r", "randlora_alpha", "paper_pairing", "save_output", "dropout", "seed", "distribution")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 32,
        randlora_alpha: float = 640.0,
        paper_pairing: bool = False,
        save_output: bool = True,
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
            randlora_alpha=randlora_alpha,
            paper_pairing=paper_pairing,
            save_output=save_output,
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
        r: int = 32,
        randlora_alpha: float = 640.0,
        paper_pairing: bool = False,
        save_output: bool = True,
        dropout: float = 0.0,
        seed: int | torch.Generator | None = None,
        distribution: str = "uniform8",
        adapter_dtype: torch.dtype | None = None,
    ) -> "RandLoRALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(
            linear,
            r=r,
            randlora_alpha=randlora_alpha,
            paper_pairing=paper_pairing,
            save_output=save_output,
            dropout=dropout,
            seed=seed,
            distribution=distribution,
            adapter_dtype=adapter_dtype,
        )

    def _set_up(self, base, r, randlora_alpha, paper_pairing, save_output, **common) -> None:
        self._whole("r", r, 1)
        narrow = min(base.in_features, base.out_features)
        self.n = -(-narrow // r)
        if self.n > 2**16:
            raise ValueError(f"RandLoRALinear: r must be at least min(in, out) / 65536 = {narrow / 2**16:g}, got r={r}")
        self._finite("randlora_alpha", randlora_alpha)
        self._flag("paper_pairing", paper_pairing)
        self._flag("save_output", save_output)
        like = self._adopt(base, r, **common)
        self.randlora_alpha, self.scaling = randlora_alpha, F.lora_scaling(randlora_alpha, r)
        self.paper_pairing, self.save_output = paper_pairing, save_output
        self.randlora_lambda = constant(0.0, r, self.n, **like)
        self.randlora_gamma = constant(1 / max(self.n, narrow, 1), self.n, narrow, **like)

    @classmethod
    def plan(cls, model, linears, settings):
        """One seed for all layers, whose bases are then prefixes of one another's, as PEFT's are."""
        return share_seed(settings)

    def not_peft(self) -> str | None:
        return "paper_pairing must be False, PEFT's pairing, got True" if self.paper_pairing else None

    def projections(self) -> tuple[F.Basis, F.Basis]:
        """A [r, min(in, out)] and the stack of the Bⱼᵀ [n r, max(in, out)]."""
        low, high = sorted((self.in_features, self.out_features))
        return self._basis(self.r, low, 1.0, 0), self._basis(self.n * self.r, high, 1.0, 1)

    def _operands(self) -> tuple:
        return self.randlora_lambda, self.randlora_gamma, *self.projections()

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.randlora_linear(x, weight, bias, *self._operands(), *self._act())

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.randlora_add(y, x, *self._operands(), *self._act())

    def _act(self) -> tuple:
        return self.scaling, self.dropout, self.training, self.paper_pairing, self.save_output

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ) [out, in] of the generated bases, transposed where in > out; float32."""
        sizes = self.in_features, self.out_features
        return F.randlora_delta(*self._operands(), *sizes, self.scaling, self.paper_pairing)
