# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a LoRA adapter whose low-rank part runs in lrkern's kernels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional as F
from ..caches import DoraNorm

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


class FusedLoRALinear(nn.Module):
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
        super().__init__()
        self._set_up(base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype)

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
        if not isinstance(linear, nn.Linear) or type(linear.weight.data) is not Tensor:
            raise TypeError(
                f"FusedLoRALinear.from_linear: linear must be an nn.Linear with a plain weight, got {linear}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_up(linear, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype)
        return self

    def _set_up(self, base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, init, adapter_dtype):
        if not 0 <= r <= 512:
            raise ValueError(f"FusedLoRALinear: r must lie in 0..512, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"FusedLoRALinear: lora_dropout must lie in [0, 1], got {lora_dropout}")
        if init not in INITS:
            raise ValueError(f"FusedLoRALinear: init must be one of {sorted(INITS)}, got {init!r}")
        if use_dora and not r:
            raise ValueError("FusedLoRALinear: use_dora needs r >= 1, got r=0")
        if train_bias and base.bias is None:
            raise ValueError("FusedLoRALinear: train_bias needs a layer with a bias, got bias=None")
        weight = base.weight
        dtype = adapter_dtype or (torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype)
        self.base_layer = base.requires_grad_(False)
        if train_bias:
            base.bias.requires_grad_()
        self.lora_A = Factor(r, base.in_features, dtype, weight.device)
        self.lora_B = Factor(base.out_features, r, dtype, weight.device)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.use_dora = use_dora
        self.scaling = F.lora_scaling(lora_alpha, r, use_rslora)
        self.enabled, self.merged = True, False
        if r:
            INITS[init](self)
        if use_dora:
            self.lora_magnitude_vector = Magnitude(self._norm().to(dtype))
            self._cached_norm = DoraNorm()

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged or not self.enabled or not self.r:
            return base(x)
        p, args = self.lora_dropout, (base.weight, base.bias, self.lora_A.weight, self.lora_B.weight)
        if not self.use_dora:
            return F.lora_linear(x, *args, self.scaling, p, self.training)
        norm = self._cached_norm(base.weight, *args[2:], self.scaling)
        return F.dora_linear(x, *args, self.lora_magnitude_vector.weight, self.scaling, p, self.training, norm)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What ``merge`` adds to W [out, in], in float32: scaling · B A, or for DoRA g ⊙ (W + scaling · B A) - W."""
        if not self.use_dora:
            return self._low_rank()
        w = self.base_layer.weight.float()
        return self._gain() * (w + self._low_rank()) - w

    def _low_rank(self) -> Tensor:
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def _norm(self) -> Tensor:
        return F.dora_norm(self.base_layer.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)

    def _gain(self) -> Tensor:
        return (self.lora_magnitude_vector.weight / self._norm())[:, None]

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight(), rounded once to W's dtype; forward is the base layer from then on. Refuses a non-finite
        result and leaves W as it was."""
        if self.r and not self.merged:
            gain = self._gain() if self.use_dora else 1.0
            self._write(gain * (self.base_layer.weight.float() + self._low_rank()))
            self._merged_gain = gain
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes from W what ``merge`` added: W up to the rounding of its dtype."""
        if self.r and self.merged:
            self._write(self.base_layer.weight.float() / self._merged_gain - self._low_rank())
        self.merged = False

    def _write(self, new: Tensor) -> None:
        w = self.base_layer.weight
        new = new.to(w.dtype)
        if not new.isfinite().all():
            raise ValueError("FusedLoRALinear.merge: W + scaling B A must be finite, got inf or nan; W is unchanged")
        w.copy_(new)

    def train(self, mode: bool = True) -> "FusedLoRALinear":
        if self.use_dora:
            self._cached_norm.clear()
        return super().train(mode)

    def enable_adapter(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def disable_adapter(self) -> None:
        self.enabled = False

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"
        text += f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        text += ", dora" if self.use_dora else ""
        return text + (", merged" if self.merged else "") + ("" if self.enabled else ", disabled")


def _kaiming(layer: FusedLoRALinear) -> None:
    nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))


def _gaussian(layer: FusedLoRALinear) -> None:
    nn.init.normal_(layer.lora_A.weight, std=1 / layer.r)


@torch.no_grad()
def _take_out(layer: FusedLoRALinear, a: Tensor, b: Tensor) -> None:
    """Sets the factors and subtracts what they add, so that the layer computes what it did before."""
    layer.lora_A.weight.copy_(a)
    layer.lora_B.weight.copy_(b)
    layer._write(layer.base_layer.weight.float() - layer._low_rank())


@torch.no_grad()
def _pissa(layer: FusedLoRALinear) -> None:
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.float(), full_matrices=False)
    root = (s[: layer.r] / layer.scaling).sqrt()
    _take_out(layer, root[:, None] * vh[: layer.r], u[:, : layer.r] * root)


@torch.no_grad()
def _olora(layer: FusedLoRALinear) -> None:
    q, r = torch.linalg.qr(layer.base_layer.weight.float())
    _take_out(layer, r[: layer.r], q[:, : layer.r])


INITS: dict[str, Init] = {"kaiming": _kaiming, "gaussian": _gaussian, "pissa": _pissa, "olora": _olora}
