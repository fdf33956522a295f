# SPDX-License-Identifier: Apache-2.0
"""Suite `mxfp4`: one linear layer whose W is in MXFP4, frozen; for training x takes a gradient. method=quantize: W to MXFP4.

    fp32, bf16  F.linear over a dense W of that dtype, x in it too
    eager       the reference: W decoded whole by torch ops, then F.linear
    torchao     its MXTensor, decoded whole, then F.linear; of quantize its to_mx (make peers)
    lrkern      mx_linear; of method=lora mx_linear_expand of rank R; of quantize mx_quantize

x is in the case's dtype but for fp32 and bf16. Copies of W rotate over more than the last-level cache.
"""

import sys
from pathlib import Path

import suite
import torch
import torch.nn.functional as F
from suite import Call, Case
from torch import Tensor

from lrkern import ops
from lrkern.reference import Draw
from lrkern.reference import mx as reference

sys.path.append(str(Path(sys.prefix) / "peers"))


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        self.case, train = case, "bwd" in case.passes
        T, I, O, R = case.T, case.I, case.O, case.R
        dense = draw(O, I, std=I**-0.5, dtype=torch.float32)
        self.codes, self.scales, _ = ops.mx_quantize(dense)
        self.weight = ops.mx_dequantize(self.codes, self.scales, I)
        if case.method == "quantize":
            super().__init__({"x": dense})
            return
        inputs = {"x": draw(T, I).requires_grad_(train), "codes": self.codes, "scales": self.scales, "bias": draw(O)}
        truth = reference.mx_linear
        if case.method == "lora":
            inputs |= {"s": draw(T, R), "b": draw(O, R)}
            truth = reference.mx_linear_expand
        super().__init__(inputs, draw(T, O), truth)


class Suite(suite.Suite):
    data = Data
    against = "bf16"

    def cases(self, quick: bool) -> list[Case]:
        def case(method, T, passes, dtype, R=None):
            return Case(method=method, T=T, I=4096, O=4096, R=R, passes=passes, dtype=dtype)

        bf16, fp32 = torch.bfloat16, torch.float32
        aim = [
            case("linear", 1, "no_grad", bf16),
            case("linear", 512, "no_grad", bf16),
            case("lora", 1, "no_grad", bf16, 16),
        ]
        if quick:
            return aim
        return [
            *aim,
            case("lora", 512, "no_grad", bf16, 16),
            case("linear", 1, "no_grad", fp32),
            case("linear", 1, "fwd+bwd", bf16),
            case("linear", 512, "fwd+bwd", bf16),
            case("quantize", 1, "no_grad", fp32),
        ]

    def work(self, case: Case, d: Data) -> tuple[int, int] | None:
        if case.method == "quantize":
            return None
        times = 1 + ("bwd" in case.passes)
        low = case.T * case.O * (case.R or 0)
        moved = sum(t.nbytes for t in d.inputs.values()) + (d.dy.nbytes if times > 1 else case.T * case.O * 2)
        return 2 * times * (case.T * case.I * case.O + low), moved * times

    def _dense(self, d: Data, dtype: torch.dtype) -> Call | None:
        """Trained only in the case's own dtype."""
        if d.case.method == "quantize" or ("bwd" in d.case.passes and d.case.dtype != dtype):
            return None
        x = d.inputs["x"]
        x = x if x.dtype == dtype else x.detach().to(dtype)
        weight, bias = d.weight.to(dtype), d.inputs["bias"].to(dtype)
        low = (d.inputs["s"].to(dtype), d.inputs["b"].to(dtype)) if d.case.method == "lora" else None

        def run() -> Tensor:
            y = F.linear(x, weight, bias)
            return y if low is None else torch.addmm(y, low[0], low[1].mT)

        return Call(run, exact=d.case.dtype == dtype)

    def fp32(self, d: Data) -> Call | None:
        return self._dense(d, torch.float32)

    def bf16(self, d: Data) -> Call | None:
        return self._dense(d, torch.bfloat16)

    def eager(self, d: Data) -> Call | None:
        if d.case.method == "quantize":
            return Call(lambda: reference.mx_quantize(d.inputs["x"])[0])
        return Call(lambda: d.truth(**d.inputs))

    def torchao(self, d: Data) -> Call | None:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode, to_mx

        e2m1, even = torch.float4_e2m1fn_x2, ScaleCalculationMode.EVEN
        if d.case.method == "quantize":
            return Call(lambda: to_mx(d.inputs["x"], e2m1, 32, even)[1])
        if d.case.method == "lora":
            return None
        x, bias = d.inputs["x"], d.inputs["bias"]
        packed = MXTensor.to_mx(d.weight.to(torch.bfloat16), e2m1, 32, even)
        return Call(lambda: F.linear(x, packed.dequantize(x.dtype), bias))

    def lrkern(self, d: Data) -> Call:
        if d.case.method == "quantize":
            return Call(lambda: ops.mx_quantize(d.inputs["x"])[0])
        call = ops.mx_linear_expand if d.case.method == "lora" else ops.mx_linear
        return Call(lambda: call(*d.inputs.values()))
