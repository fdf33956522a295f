# SPDX-License-Identifier: Apache-2.0
"""Suite `rng`: random elements a second, made and used, on one CPU thread (LRKERN_CPU_ISA=avx2 or baseline for others).

eager     torch's generator for the same distribution, written to a piece of memory that stays in the cache, not used
lrkern    basis_combine: k bases generated, scaled and summed, each element made and used once

The roof is a multiply-add per element at the rate of the fp32 GEMM.
"""

import suite
import torch
from suite import Call, Case, Data

from lrkern import ops
from lrkern.ops.basis import DISTRIBUTIONS, METHODS

PIECE = 1 << 18  # elements of torch's at a time

DRAWN = {
    "uniform8": lambda t: t.uniform_(-1, 1),
    "uniform16": lambda t: t.uniform_(-1, 1),
    "uniform32": lambda t: t.uniform_(-1, 1),
    "sign": lambda t: t.bernoulli_(0.5).mul_(2).sub_(1),
    "ternary6": lambda t: t.random_(0, 6).sub_(2.5).mul_(0.4).trunc_(),
    "ternary4": lambda t: t.random_(0, 4).sub_(1.5).mul_(0.67).trunc_(),
}


class Suite(suite.Suite):
    cold = False

    def __init__(self, names: list[str]):
        super().__init__(names)
        torch.set_num_threads(1)

    def cases(self, quick: bool) -> list[Case]:
        k = 256 if quick else 1024
        return [Case(method=d, k=k, I=2048, R=8, passes="no_grad", dtype=torch.float32) for d in DISTRIBUTIONS]

    def data(self, case: Case, device: str, seed: int) -> Data:
        coef = torch.randn(case.k, generator=torch.Generator().manual_seed(seed)).to(device)
        return Data({"coef": coef, "case": case, "piece": torch.empty(PIECE, device=device)})

    def work(self, case: Case, data: Data) -> tuple[int, int]:
        return 2 * case.k * case.R * case.I, 4 * case.R * case.I

    def eager(self, d: Data) -> Call:
        case, piece = d.inputs["case"], d.inputs["piece"]
        count = case.k * case.R * case.I

        def run():
            for _ in range(count // PIECE):
                DRAWN[case.method](piece)
            return piece

        return Call(run, elements=count)

    def lrkern(self, d: Data) -> Call:
        case, coef = d.inputs["case"], d.inputs["coef"]
        spec = 7, METHODS["nola"], DISTRIBUTIONS[case.method], 0, case.R, [case.I], [case.k], [1.0]
        return Call(lambda: ops.basis_combine(coef, None, *spec), elements=case.k * case.R * case.I)
