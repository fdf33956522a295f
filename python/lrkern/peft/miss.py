# SPDX-License-Identifier: Apache-2.0
"""PEFT's MiSS layers on lrkern: a fold and a product for every column, and "bat" without a second W.

Over a quantised base the first two go on top of what the base computes. "bat" asks PEFT's backend for the dequantised weight, as
PEFT does, and once more in backward: PEFT keeps a W' instead."""

import peft
from peft.tuners.miss.layer import MissLayer

from .. import functional as F
from ..limits import DTYPES
from .layer import PLAIN, Patched, dropout_p, hooked


class FusedMiss(Patched, layers=MissLayer):
    """miss_block [r, out], of "mini" [r, mini_r], of "bat" [out / r, r, r]. PEFT has one kind for all adapters of a layer."""

    _config = peft.MissConfig
    _method, _forwards = "MiSS", "peft.tuners.miss.layer"

    def _adapter(self, name):
        blocks = self._modules["miss_block"]
        if name not in blocks:
            return None
        block = blocks[name]
        if type(block) not in PLAIN:
            return f"a block of type {type(block).__name__}"
        if block.dtype not in DTYPES:
            return f"a block of dtype {block.dtype}"
        if self.miss_fn == "bat":
            r = block.shape[-1]
            fits = block.shape == (self.out_features // r, r, r) and self.in_features % r == self.out_features % r == 0
            return (block,) if fits else f"blocks {list(block.shape)} for [{self.out_features}, {self.in_features}]"
        columns = self.miss_mini_r[name] if self.miss_fn == "mini" else self.out_features
        if block.ndim != 2 or block.shape[1] != columns or self.out_features % columns:
            return f"a block {list(block.shape)} for {self.out_features} columns"
        dropout = self._modules["miss_dropout"]._modules[name]
        p = dropout_p(dropout)
        if isinstance(p, str):
            return p
        return "hooks on miss_dropout" if hooked(dropout) else (block, p)

    def _over(self, weight, bias, adapters):
        if self.miss_fn == "bat":
            backend = getattr(self, "quantization_backend", None)  # PEFT's way to a quantised weight, new in 0.21
            if weight is None and not (backend and backend.supports_merge):
                return "bat over a base layer that is no plain nn.Linear, nor gives its dequantised weight"
            if len(adapters) > 1:
                return "several bat adapters, one over the other"
            if weight is not None and weight.requires_grad:
                return "bat over a weight that trains"
        return super()._over(weight, bias, adapters)

    def _takes(self, plan, x):
        # PEFT casts x to the dtype of the block, unless that is turned off
        cast = x.dtype == plan.adapters[0][0].dtype or getattr(self, "cast_input_dtype_enabled", True)
        return x.ndim >= 2 and cast and super()._takes(plan, x)

    def _linear(self, x, weight, bias, adapter):
        if len(adapter) == 1:
            return F.bone_linear(x, weight, bias, *adapter)
        return F.miss_linear(x, weight, bias, *adapter)

    def _add(self, y, x, adapter):
        return F.miss_add(y, x, *adapter)

    def _run(self, plan, x):
        if (
            plan.weight is None and self.miss_fn == "bat"
        ):  # as PEFT, which asks for the weight and not for the base's forward
            return F.bone_linear(x, self.get_base_weight, self.get_base_layer().bias, *plan.adapters[0])
        y = super()._run(plan, x)
        return y if y.dtype == x.dtype else y.to(x.dtype)
