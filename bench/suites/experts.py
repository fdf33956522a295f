# SPDX-License-Identifier: Apache-2.0
"""Suite `experts`: gpt-oss' experts with W in MXFP4, T tokens of which each goes to k of E experts, some of them far more often.

    fp32, bf16  dense weights of that dtype, one linear after another for each expert that is asked for
    gnf4        grouped-nf4-gemm's C kernels for the CPU, from the same bytes (make peers)
    lrkern      nn.MXFP4Experts without adapters

I and O are hidden and intermediate size. x is in the case's dtype but for fp32 and bf16, and takes a gradient in training. Sorting the
tokens by expert is part of all of them. Copies of the data differ in where their tokens go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import suite
import torch
import torch.nn.functional as F
from suite import Call
from suites.mxfp4 import grouped_product, start_pool
from torch import Tensor

from lrkern import ops
from lrkern.nn import MXFP4Experts
from lrkern.reference import Draw

LAYERS = ("gate_up_proj", "down_proj")
Linear = Callable[[int, str, Tensor], Tensor]  # of an expert, a layer and its rows


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    E: int


@lru_cache(maxsize=1)
def experts_of(E: int, H: int, N: int, dtype: torch.dtype, device: str) -> MXFP4Experts:
    """Any codes; scales that make W's elements about H^-.5."""
    g = torch.Generator().manual_seed(0)
    experts = MXFP4Experts(E, H, N, 0, dtype=dtype)
    for name in LAYERS:
        blocks, scales = experts._bytes(name)
        blocks.random_(0, 256, generator=g)
        scales.random_(119, 121, generator=g)
        getattr(experts, f"{name}_bias").data.normal_(std=0.1, generator=g)
    return experts.to(device)


def decoded(experts: MXFP4Experts, e: int, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W and bias of one linear."""
    blocks, scales = (t[e] for t in experts._bytes(name))
    features = experts.hidden_size if name == LAYERS[0] else experts.intermediate_size
    w = ops.mx_dequantize(blocks.flatten(1), scales, features, torch.float32)
    return w.to(dtype), getattr(experts, f"{name}_bias")[e].detach().to(dtype)


@lru_cache(maxsize=2)
def dense_of(experts: MXFP4Experts, dtype: torch.dtype) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    return {(e, name): decoded(experts, e, name, dtype) for e in range(experts.num_experts) for name in LAYERS}


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        self.case, self.device, self.seed = case, device, seed
        self.experts = experts_of(case.E, case.I, case.O, case.dtype, device)
        draw = Draw(device, case.dtype, seed)
        often = -torch.arange(1, case.E + 1, dtype=torch.float32).log()  # an expert's share falls as 1 / its number
        logits = draw(case.T, case.E, dtype=torch.float32) + often[torch.randperm(case.E)].to(device)
        weights, indices = logits.topk(case.k)
        x = draw(case.T, case.I).requires_grad_("bwd" in case.passes)
        inputs = {"x": x, "indices": indices, "weights": weights.softmax(-1).to(case.dtype)}
        super().__init__(inputs, draw(case.T, case.I), self.truth_of)

    def truth_of(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        linear = lambda e, name, rows: F.linear(rows, *decoded(self.experts, e, name, rows.dtype))
        return self.layer(linear, x, indices, weights)

    def dense(self, dtype: torch.dtype) -> Linear:
        kept = dense_of(self.experts, dtype)
        return lambda e, name, x: F.linear(x, *kept[e, name])

    def sorted(self, indices: Tensor) -> tuple[Tensor, dict[int, int]]:
        """The order of the slots by expert, and how many each has."""
        experts = indices.flatten()
        counts = torch.bincount(experts, minlength=self.case.E).tolist()
        return experts.argsort(stable=True), {e: n for e, n in enumerate(counts) if n}

    def gated(self, both: Tensor) -> Tensor:
        alpha, limit = self.experts.alpha, self.experts.limit
        gate, up = both[..., ::2].clamp(max=limit), both[..., 1::2].clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    def gathered(self, run: Callable[[Tensor, dict[int, int]], Tensor], x: Tensor, indices: Tensor, weights: Tensor):
        order, counts = self.sorted(indices)
        y = run(x.index_select(0, order // self.case.k), counts)
        return (y.index_select(0, order.argsort()).view(*indices.shape, -1) * weights[..., None]).sum(1)

    def layer(self, linear: Linear, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        def run(rows: Tensor, counts: dict[int, int]) -> Tensor:
            parts = zip(counts, rows.split([*counts.values()]), strict=True)
            return torch.cat([linear(e, LAYERS[1], self.gated(linear(e, LAYERS[0], part))) for e, part in parts])

        return self.gathered(run, x, indices, weights)


class Suite(suite.Suite):
    data = Data
    against = "bf16"

    def cases(self, quick: bool) -> list[Case]:
        def case(T, passes, E):
            return Case(T=T, k=4, I=2880, O=2880, E=E, passes=passes, dtype=torch.bfloat16)

        if quick:
            return [case(1, "no_grad", 8)]
        return [case(1, "no_grad", 32), case(64, "no_grad", 32), case(64, "fwd+bwd", 32)]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        times, hit = 1 + (case.passes == "fwd+bwd"), len(d.sorted(d.inputs["indices"])[1])
        return 6 * times * case.T * case.k * case.I * case.O, times * hit * self._packed(d) // case.E

    def _packed(self, d: Data) -> int:
        return sum(t.nbytes for name in LAYERS for t in d.experts._bytes(name))

    def _reads(self, d: Data, bits: float) -> int:
        """Bytes of the experts that are asked for."""
        hit = len(d.sorted(d.inputs["indices"])[1])
        return int(hit * 3 * d.case.I * d.case.O * bits / 8)

    def _dense(self, d: Data, dtype: torch.dtype) -> Call | None:
        if "bwd" in d.case.passes and d.case.dtype != dtype:
            return None
        x, indices, weights = d.inputs.values()
        if x.dtype != dtype:
            x, weights = x.detach().to(dtype), weights.to(dtype)
        linear = d.dense(dtype)
        return Call(
            lambda: d.layer(linear, x, indices, weights),
            exact=d.case.dtype == dtype,
            reads=self._reads(d, 8 * dtype.itemsize),
        )

    def fp32(self, d: Data) -> Call | None:
        return self._dense(d, torch.float32)

    def bf16(self, d: Data) -> Call | None:
        return self._dense(d, torch.bfloat16)

    def gnf4(self, d: Data) -> Call | None:
        if d.device != "cpu":
            return None
        bytes_of = {name: (b.flatten(2), s) for name in LAYERS for b, s in [d.experts._bytes(name)]}

        def run(rows: Tensor, counts: dict[int, int]) -> Tensor:
            bias = lambda name: torch.repeat_interleave(
                getattr(d.experts, f"{name}_bias").detach()[[*counts]], torch.tensor([*counts.values()]), 0
            )
            linear = lambda name, x: grouped_product(x, *bytes_of[name], counts) + bias(name)
            return linear(LAYERS[1], d.gated(linear(LAYERS[0], rows)))

        start_pool()
        return Call(lambda: d.gathered(run, *d.inputs.values()), reads=self._reads(d, 4.25))

    def lrkern(self, d: Data) -> Call:
        return Call(lambda: d.experts(*d.inputs.values()), reads=self._reads(d, 4.25))
