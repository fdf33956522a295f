# SPDX-License-Identifier: Apache-2.0
"""A linear layer that trains with all of its products in FP4."""

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.quartet import RULES
from ..limits import DTYPES
from .plain import no_linear


class QuartetLinear(nn.Linear):
    """nn.Linear that trains with all of its products in FP4: Quartet (Castro et al., arXiv 2505.14669); ``functional.quartet_linear``.

    y = X̂ Ŵᵀ + bias of x and W rounded to MXFP4, dx and dW products of gradients rounded so too, stochastically. weight and bias are
    nn.Linear's, dense master weights in float32, bfloat16 or float16, and so is the state_dict: any optimizer trains it. What is kept for
    backward are codes, scales and masks, 5.25 bits an element of x and of W. Exact emulation where there are no FP4 units, and slower than
    nn.Linear there.

    Args:
        rule: of the scales of x and W, "quest" as published, or "quest_nearest", of less error (``ops.mx_quantize``).
        others: as nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rule: str = "quest",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"QuartetLinear: dtype must be float32, float16 or bfloat16, got {dtype!r}")
        if rule not in RULES:
            raise ValueError(f"QuartetLinear: rule must be one of {list(RULES)}, got {rule!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rule = rule

    @classmethod
    def from_linear(cls, linear: nn.Linear, rule: str = "quest") -> "QuartetLinear":
        """In place of an existing layer, whose parameters it has: they are not copied.

        Raises TypeError for what is no nn.Linear or has another kind of weight (quantised, sharded), ValueError for an unknown rule or a
        dtype that is none of the three.
        """
        if got := no_linear(linear):
            raise TypeError(f"{cls.__name__}.from_linear: linear must be an nn.Linear with a plain weight, got {got}")
        w = linear.weight
        self = cls(linear.in_features, linear.out_features, False, rule=rule, device="meta", dtype=w.dtype)
        self.weight, self.bias = w, linear.bias
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.quartet_linear(x, self.weight, self.bias, self.rule)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}"
