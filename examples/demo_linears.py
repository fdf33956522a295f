# SPDX-License-Identifier: Apache-2.0
"""The linear layers of `make demo ARGS=--quartet`: lrkern's Quartet, and what it stands beside."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd import Function

from lrkern.nn import QuartetLinear


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of float32, operands and result rounded to bfloat16. Many CPUs have no such products and take twenty times as long: there sums
    are those of float32, which a GEMM of bfloat16 has too."""
    low = [t.bfloat16() for t in (a, b)]
    y = low[0] @ low[1] if a.is_cuda else (low[0].float() @ low[1].float()).bfloat16()
    return y.float()


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x.bfloat16(), weight)
        return product(x, weight.mT)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return product(dy, weight), product(dy.flatten(0, -2).mT, x.flatten(0, -2).float())


class BF16Linear(nn.Linear):
    """nn.Linear with all three products in bfloat16 over master weights in float32."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BF16Linear:
        self = cls(linear.in_features, linear.out_features, False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


LINEARS = {"bf16": BF16Linear, "quartet": QuartetLinear}
