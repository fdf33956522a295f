# SPDX-License-Identifier: Apache-2.0
"""PEFT's AdaLoRA layers on lrkern: LoRA whose A carries the singular values and the scale."""

from typing import NamedTuple

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer, SVDConv2d
from torch import Tensor

from .. import functional as F
from ..limits import DTYPES, MAX_RANK
from .layer import PLAIN, Patched, Plan, dropout_p, hooked


class _Adapter(NamedTuple):
    a: Tensor  # [R, I]
    e: Tensor  # [R, 1]
    b: Tensor  # [O, R]
    ranknum: Tensor  # [1], kept as a tensor: reading it would wait for the GPU
    scale: float
    dropout_p: float

    def factors(self) -> tuple[Tensor, Tensor, float, float]:
        """What lora_linear takes after bias: E and scale / ranknum are in A, for R · I products."""
        gain = self.e.float() * (self.scale / (self.ranknum.float() + 1e-5))
        return self.a * gain.to(self.a.dtype), self.b, 1.0, self.dropout_p


class FusedAdaLora(Patched, layers=AdaLoraLayer):
    """PEFT's allocator finds its parameters and their gradients where they were."""

    _config = peft.AdaLoraConfig
    _method, _forwards = "AdaLoRA", "peft.tuners.adalora."
    _no_linear = (SVDConv2d,)

    def _adapter(self, name: str) -> _Adapter | str | None:
        a_of, e_of, b_of, ranks = (self._modules[key] for key in ("lora_A", "lora_E", "lora_B", "ranknum"))
        if name not in a_of:
            return None
        tensors = a, e, b, _ = a_of[name], e_of[name], b_of[name], ranks[name]
        if any(type(t) not in PLAIN for t in tensors):
            return f"factors of type {', '.join(sorted({type(t).__name__ for t in tensors}))}"
        if a.dtype not in DTYPES or not a.dtype == e.dtype == b.dtype:
            return f"factors of dtype {a.dtype}, {e.dtype} and {b.dtype}"
        r = a.shape[0]
        if a.ndim != 2 or e.shape != (r, 1) or b.shape != (self.out_features, r):
            return f"factors {list(a.shape)}, {list(e.shape)} and {list(b.shape)}"
        if r > MAX_RANK:
            return f"rank {r}, fused up to {MAX_RANK}"
        dropout = self._modules["lora_dropout"]._modules[name]
        p = dropout_p(dropout)
        if isinstance(p, str):
            return p
        return "hooks on lora_dropout" if hooked(dropout) else _Adapter(*tensors, float(self.scaling[name]), p)

    def _over(self, weight: Tensor | None, bias: Tensor | None, adapters: list[_Adapter]) -> Plan | str:
        plan = super()._over(weight, bias, adapters)
        if isinstance(plan, str) or weight is None or adapters[0].a.dtype in (weight.dtype, torch.float32):
            return plan
        return Plan(None, None, adapters)

    def _takes(self, plan: Plan, x: Tensor) -> bool:
        # PEFT casts x to the dtype of the factors, unless that is turned off
        cast = x.dtype == plan.adapters[0].a.dtype or getattr(self, "cast_input_dtype_enabled", True)
        return cast and super()._takes(plan, x)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, f: _Adapter) -> Tensor:
        return F.lora_linear(x, weight, bias, *f.factors())

    def _add(self, y: Tensor, x: Tensor, f: _Adapter) -> Tensor:
        return F.lora_add(y, x, *f.factors())
