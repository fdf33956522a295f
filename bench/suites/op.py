# SPDX-License-Identifier: Apache-2.0
"""Suite `op`: every op of the registry alone, at the sizes of a large layer.

base      the linear layer, for ops that hold one
eager     the registry's truth in the case's dtype
lrkern    the op
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import suite
import torch
import torch.nn.functional as F
from suite import Call
from torch import Tensor

from lrkern import ops
from lrkern.reference import OPS, Op

FROZEN = ("weight", "bias")
ONCE = ("y", "bias")  # backward does not read these again


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    ab: torch.dtype | None = None  # of factors over a 16-bit base


def compute(op: Op, function: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The result, or what a mutating op wrote."""
    out = function(**inputs)
    return inputs[op.mutates] if op.mutates else out


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        self.op = op = OPS[case.method]
        sizes = case.T, case.I, case.O, case.R, case.ab is not None
        inputs = op.named(op.large(*sizes, device=device, dtype=case.dtype, seed=seed))
        with torch.no_grad():
            out = inputs[op.mutates] if op.mutates else op.truth(**inputs)
        results = [t for t in out if t is not None] if isinstance(out, tuple) else [out]
        real = all(t.is_floating_point() for t in results)
        for name in op.differentiable if case.passes != "no_grad" else ():
            if name not in FROZEN and isinstance(inputs.get(name), Tensor):
                inputs[name].requires_grad_()
        dy = torch.randn_like(out) if real and not op.mutates else None
        super().__init__(inputs, dy, (lambda **wide: compute(op, op.truth, wide)) if real else None)
        self.result = sum(t.nbytes for t in results)


class Suite(suite.Suite):
    data = Data

    def __init__(self, names: list[str]):
        if unknown := [name for name in names if name not in OPS]:
            raise ValueError(f"suite op: {', '.join(unknown)} must be in the registry, which has {', '.join(OPS)}")
        self.names = names or list(OPS)

    def cases(self, quick: bool) -> list[Case]:
        f32, bf16 = torch.float32, torch.bfloat16
        trains = {name for name in self.names if set(OPS[name].differentiable) - set(FROZEN)}
        kinds = [(T, passes, dtype) for dtype in (f32, bf16) for T, passes in ((512, "no_grad"), (512, "fwd+bwd"))]
        kinds.append((1, "no_grad", f32))
        if quick:  # one of each of two dozen ops, with its backward where it has one
            kinds = [(64, "fwd+bwd", f32), (64, "no_grad", f32)]
        return [
            Case(method=name, T=T, I=2048, O=2048, R=16, ab=f32 if dtype == bf16 else None, passes=passes, dtype=dtype)
            for name in self.names
            for T, passes, dtype in kinds
            if not (quick and OPS[name].mutates)  # the twin of one that is there
            if (name in trains if passes != "no_grad" else not (quick and name in trains))
        ]

    def work(self, case: Case, data: Data) -> tuple[int, int]:
        """A product once forward, and backward once for each operand that takes a gradient; W takes none."""
        train = case.passes != "no_grad"
        flop = 0
        for product in data.op.products:
            each = 2 * math.prod(getattr(case, letter) for letter in product)
            flop += each if not train else 2 * each if product == "TIO" else 3 * each
        size = {name: t.nbytes for name, t in data.inputs.items() if isinstance(t, Tensor)}
        moved = sum(size.values()) + data.result
        if train:
            again = [name for name in size if name not in ONCE]
            moved += data.result + sum(size[name] * (1 + data.inputs[name].requires_grad) for name in again)
        return flop, moved

    def base(self, d: Data) -> Call | None:
        linear = lambda x, weight, bias, **_: F.linear(x, weight, bias)
        return Call(lambda: linear(**d.inputs), truth=linear) if "weight" in d.inputs else None

    def eager(self, d: Data) -> Call:
        return Call(lambda: compute(d.op, d.op.truth, d.inputs))

    def lrkern(self, d: Data) -> Call:
        return Call(lambda: compute(d.op, getattr(ops, d.op.name), d.inputs))
