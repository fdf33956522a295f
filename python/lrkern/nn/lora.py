# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a LoRA adapter whose low-rank part runs in lrkern's kernels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional as F
from ..caches import DoraNorm
from ..limits import MAX_RANK
from .linear import LowRankLinear

Init = Callable[["FusedLoRALinear"], None]


class Factor(nn.Module):
    """Holds one factor, so that its key reads as PEFT's files have it: lora_A.weight, lora_B.weight."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, cols, dtype=dtype, device=device))


class Magnitude(nn.Module):
    """DoRA's magnitude [out], keyed as PEFT has it: lora_magnitude_vector.weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class FusedLoRALinear(LowRankLinear):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, LoRA (Hu et al., arXiv 2106.09685) as PEFT defines it.

    A [r, in], B [out, r]; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732). With
    use_dora ``functional.dora_linear`` (arXiv 2402.09353) and its magnitude [out], which starts as the row norms.
    W stays frozen; the rest trains. Keys of the state_dict: base_layer.weight, base_layer.bias, lora_A.weight,
    lora_B.weight, lora_magnitude_vector.weight.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        r: rank, 0 to 512; 0 is the base layer alone.
        lora_alpha, lora_dropout, use_rslora, use_dora: as peft.LoraConfig.
        train_bias: the base bias trains too (PEFT's bias="lora_only").
        init: "kaiming" (PEFT's default: A uniform, B zero), "gaussian" (A normal / r, B zero), "pissa" (arXiv
            2404.02948) or "olora" (arXiv 2406.01775); the last two take their factors out of W.
        adapter_dtype: of A and B; None means float32 over a 16-bit base as PEFT does, else the base's dtype.
    """

    SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    PEFT_TYPE = "LORA"
    _SUM = "W + scaling B A"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        train_bias: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        train_bias: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> "FusedLoRALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        settings = r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype
        return cls._wrap(linear, *settings)

    def _set_up(self, base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype):
        if not 0 <= r <= MAX_RANK:
            raise ValueError(f"FusedLoRALinear: r must lie in 0..{MAX_RANK}, got {r}")
        self._probability("lora_dropout", lora_dropout)
        if init not in INITS:
            raise ValueError(f"FusedLoRALinear: init must be one of {sorted(INITS)}, got {init!r}")
        if use_dora and not r:
            raise ValueError("FusedLoRALinear: use_dora needs r >= 1, got r=0")
        if train_bias and base.bias is None:
            raise ValueError("FusedLoRALinear: train_bias needs a layer with a bias, got bias=None")
        like = self._adopt(base, r, adapter_dtype)
        if train_bias:
            base.bias.requires_grad_()
        self.lora_A = Factor(r, base.in_features, **like)
        self.lora_B = Factor(base.out_features, r, **like)
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        self.use_dora, self.scaling = use_dora, F.lora_scaling(lora_alpha, r, use_rslora)
        if r:
            with torch.no_grad():
                INITS[init](self)
        if use_dora:
            self.lora_magnitude_vector = Magnitude(self._norm().to(like["dtype"]))
            self._cached_norm = DoraNorm()

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A.weight, self.lora_B.weight, self.scaling

    def _adapted(self, x: Tensor) -> Tensor:
        base, (a, b, scale), p = self.base_layer, self.factors(), self.lora_dropout
        if not self.use_dora:
            return F.lora_linear(x, base.weight, base.bias, a, b, scale, p, self.training)
        norm, magnitude = self._cached_norm(base.weight, a, b, scale, self.training), self.lora_magnitude_vector.weight
        return F.dora_linear(x, base.weight, base.bias, a, b, magnitude, scale, p, self.training, norm)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What ``merge`` adds to W [out, in], in float32: scaling · B A, or for DoRA g ⊙ (W + scaling · B A) - W."""
        w, low_rank = self.base_layer.weight.float(), super().delta_weight()
        return self._gain() * (w + low_rank) - w if self.use_dora else low_rank

    def _norm(self) -> Tensor:
        return F.dora_norm(self.base_layer.weight, *self.factors())

    def _gain(self) -> Tensor | float:
        return (self.lora_magnitude_vector.weight / self._norm())[:, None] if self.use_dora else 1.0

    def _merged_weight(self, w: Tensor) -> Tensor:
        self._merged_gain = self._gain()
        return self._merged_gain * (w + super().delta_weight())

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        return w / self._merged_gain - super().delta_weight()

    def train(self, mode: bool = True) -> "FusedLoRALinear":
        if self.use_dora:
            self._cached_norm.clear()
        return super().train(mode)

    def _settings_repr(self) -> str:
        text = f", r={self.r}, scaling={self.scaling:g}"
        text += f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return text + (", dora" if self.use_dora else "")


def _from_base(layer: FusedLoRALinear, a: Tensor, b: Tensor) -> None:
    """Sets the factors and takes what they add out of W, so that the layer computes what it did before."""
    layer.lora_A.weight.copy_(a)
    layer.lora_B.weight.copy_(b)
    layer._write(layer.base_layer.weight.float() - LowRankLinear.delta_weight(layer))


def _pissa(layer: FusedLoRALinear) -> None:
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.float(), full_matrices=False)
    root = (s[: layer.r] / layer.scaling).sqrt()
    _from_base(layer, root[:, None] * vh[: layer.r], u[:, : layer.r] * root)


def _olora(layer: FusedLoRALinear) -> None:
    q, r = torch.linalg.qr(layer.base_layer.weight.float())
    _from_base(layer, r[: layer.r], q[:, : layer.r])


INITS: dict[str, Init] = {
    "kaiming": lambda layer: nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5)),
    "gaussian": lambda layer: nn.init.normal_(layer.lora_A.weight, std=1 / layer.r),
    "pissa": _pissa,
    "olora": _olora,
}
