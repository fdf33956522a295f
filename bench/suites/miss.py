# SPDX-License-Identifier: Apache-2.0
"""Suite `miss`: one linear layer with PEFT's MiSS of its kinds (miss: balance, mini, bone: "bat"); W frozen, x takes a gradient.

    base      the linear layer alone
    peft      stock PEFT's layer
    lrkern    that layer after lrkern.peft.patch

Both are layers called as modules over the same block. The adapter alone has the base GEMM replaced by a stored result; "bat" has none, as
its W' is what the GEMM multiplies.
"""

import suite
import torch
import torch.nn.functional as F
from peft import MissConfig
from peft.tuners.miss.layer import MissLinear
from stored import LayerSuite, StoredLinear, frozen
from suite import Call, Case
from torch import Tensor, nn

import lrkern.peft
from lrkern.reference import Draw

KINDS = {"miss": True, "mini": "mini", "bone": "bat"}
COLUMNS = 256  # of mini


def miss(x: Tensor, weight: Tensor, bias: Tensor, block: Tensor) -> Tensor:
    r, O = block.shape[0], weight.shape[0]
    folded = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
    return F.linear(x, weight, bias) + (folded @ block).repeat(1, O // block.shape[1])


def bone(x: Tensor, weight: Tensor, bias: Tensor, block: Tensor) -> Tensor:
    n, r, _ = block.shape
    new = weight.view(n, r, -1, r) @ (torch.eye(r).to(block) + block)[:, None] + block[:, :, None]
    return F.linear(x, new.reshape(weight.shape), bias)


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        self.case, self.train = case, "bwd" in case.passes
        T, I, O, r = case.T, case.I, case.O, case.R
        x, weight, bias = draw(T, I), draw(O, I, std=I**-0.5), draw(O)
        self.linear = frozen(weight, bias)
        shape = {"miss": (r, O), "mini": (r, COLUMNS), "bone": (O // r, r, r)}[case.method]
        block = nn.Parameter(draw(*shape, std=0.05), self.train)
        x.requires_grad_(self.train)
        inputs = {"x": x, "weight": weight, "bias": bias, "block": block}
        super().__init__(inputs, draw(T, O), bone if case.method == "bone" else miss)
        with torch.no_grad():
            self.y, self.dx = self.linear(x), self.dy @ weight


class Suite(LayerSuite):
    data = Data

    def cases(self, quick: bool) -> list[Case]:
        def case(method, R=64, T=512, passes="fwd+bwd"):
            return Case(method=method, T=T, I=2048, O=2048, R=R, passes=passes, dtype=torch.float32)

        aim = [case(method) for method in KINDS]
        return aim if quick else [*aim, *(case(method, T=1, passes="no_grad") for method in KINDS)]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        """The base GEMM (with its dx, and for bone with dW'), and what a block is multiplied with; every operand once a pass."""
        T, I, O, r = case.T, case.I, case.O, case.R
        bone, train = case.method == "bone", d.train
        gemms = 1 + train * (2 if bone else 1)
        block = O * I * r if bone else T * d.inputs["block"].numel()
        moved = sum(t.nbytes for t in d.inputs.values()) + d.dy.nbytes
        return 2 * (gemms * T * I * O + (3 if train else 1) * block), moved * (1 + train)

    def layer(self, d: Data, base: nn.Linear) -> MissLinear:
        config = MissConfig(r=d.case.R, mini_r=COLUMNS, init_weights=KINDS[d.case.method])
        made = MissLinear(base, "default", config, r=d.case.R)
        made.miss_block["default"] = d.inputs["block"]
        return made.train(d.train)

    def call(self, d: Data, make) -> Call:
        x, whole = d.inputs["x"], make(self.layer(d, d.linear))
        if d.case.method == "bone":
            return Call(lambda: whole(x))
        stored = make(self.layer(d, StoredLinear(d.linear, d.y, d.dx)))
        return Call(lambda: whole(x), Call(lambda: stored(x)))

    def peft(self, d: Data) -> Call:
        return self.call(d, lambda layer: layer)

    def lrkern(self, d: Data) -> Call:
        def patched(layer):
            if (report := lrkern.peft.patch(layer)).fused != 1:
                raise RuntimeError(f"lrkern.peft.patch left PEFT's own code in this layer: {report}")
            return layer

        return self.call(d, patched)
