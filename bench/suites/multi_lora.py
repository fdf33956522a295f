# SPDX-License-Identifier: Apache-2.0
"""Suite `multi_lora`: one linear layer, a batch whose rows use different adapters; W frozen.

    base      the linear layer alone
    peft      stock PEFT's layer with adapter_names=, a name per row; training: one step per adapter over its rows
    loop      per adapter: gather its rows, two products, add them back
    gather    one copy of A and B per row, two batched products
    vllm      vLLM's own ops (make peers), ranks padded to the highest: torch_ops on the CPU, its Triton pair on CUDA
    lrkern    multi_lora_plan (in a model made once for all layers, here timed at every call) and multi_lora_linear
    fused     on CUDA the same with LRKERN_FUSED=all

type is who has which adapter: distinct (in turn), identical, skewed (adapter 0 has one row, adapter 1 the rest) or zipf.
R=mixed: ranks 8, 16, 32, 64 and 0 in turn. method=train: A adapters with T / A consecutive rows each. The adapter alone has
the base GEMM replaced by a stored result.
"""

from dataclasses import dataclass, replace
from typing import Any

import suite
import torch
import torch.nn.functional as F
from peers.vllm import add_lora
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from stored import LayerSuite, Stored, StoredLinear, frozen
from suite import Call, by_path
from torch import Tensor, nn

from lrkern import ops, reference

SCALE = 2.0
MIXED = (8, 16, 32, 64, 0)


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    R: int | str | None = None


def assigned(case: Case, generator: torch.Generator) -> Tensor:
    if case.method == "train":
        return torch.arange(case.T) // (case.T // case.A)
    if case.type == "zipf":
        return torch.multinomial(torch.arange(1, case.A + 1) ** -1.5, case.T, True, generator=generator)
    rows = torch.arange(case.T)
    return {"distinct": rows % case.A, "identical": rows * 0, "skewed": (rows > 0).long() % case.A}[case.type]


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = reference.Draw(device, case.dtype, seed)
        self.case, self.train = case, case.method == "train"
        A, rank = case.A, lambda i: MIXED[i % len(MIXED)] if case.R == "mixed" else case.R
        ranks = torch.tensor([[rank(i)] for i in range(A)], dtype=torch.int32)
        pages, P = reference.pages_of(ranks, draw.generator)
        names = assigned(case, draw.generator)
        self.index = names.int().unsqueeze(1).to(device)
        self.table = pages.to(device), ranks.to(device)
        self.scales = torch.full((case.T, 1), SCALE, device=device)
        x, weight, bias = draw(case.T, case.I), draw(case.O, case.I, std=case.I**-0.5), draw(case.O)
        inputs: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "a_pool": draw(P, case.I, std=case.I**-0.5),
                                  "b_pool": draw(P, case.O, std=0.25)}  # fmt: skip
        table = (*self.table, reference.multi_lora_plan(self.index.cpu(), A).to(device), self.scales)
        truth = lambda **wide: reference.multi_lora_linear(*wide.values(), *table)
        factors = (reference.factors(inputs[pool], *self.table) for pool in ("a_pool", "b_pool"))
        self.adapters = {i: (a.clone(), b.clone()) for i, (a, b) in enumerate(zip(*factors, strict=True))}
        self.linear = frozen(weight, bias)
        self.rows = {i: (names == i).nonzero().flatten().to(device) for i in names.unique().tolist()}
        self.names = [f"a{i}" if ranks[i] else "__base__" for i in names.tolist()]
        self.layer = self.peft_layer(ranks)
        dy = draw(case.T, case.O)
        if self.train:
            trained = [x, inputs["a_pool"], inputs["b_pool"]]
            for i in self.adapters:  # leaves of their own for those who keep adapters apart
                self.adapters[i] = self.layer.lora_A[f"a{i}"].weight, self.layer.lora_B[f"a{i}"].weight
                inputs |= {f"a{i}": self.adapters[i][0], f"b{i}": self.adapters[i][1]}
                trained += self.adapters[i]
            for t in trained:
                t.requires_grad_()
            dy = dy.split(case.T // A)
        super().__init__(inputs, dy, None if self.train else truth)
        with torch.no_grad():
            self.y, self.dx = self.linear(x), draw(case.T, case.I)
        self.mine = self.y.clone()  # written in place

    def peft_layer(self, ranks: Tensor) -> PeftLinear:
        layer = None
        for i, (a, b) in self.adapters.items():
            if not (r := int(ranks[i, 0])):
                continue
            config = LoraConfig(r=r, lora_alpha=int(SCALE * r))
            if layer is None:
                layer = PeftLinear(self.linear, f"a{i}", config=config, r=r, lora_alpha=config.lora_alpha)
            else:
                layer.update_layer(f"a{i}", r=r, lora_alpha=config.lora_alpha, config=config)
            layer.lora_A[f"a{i}"].weight.data, layer.lora_B[f"a{i}"].weight.data = a.clone(), b.mT.contiguous()
        layer.to(self.linear.weight.device).train(self.train)
        return layer


class Suite(LayerSuite):
    data = Data

    def cases(self, quick: bool) -> list[Case]:
        f32, bf16 = torch.float32, torch.bfloat16

        def case(T, A, R=16, I=2048, O=2048, type="distinct", dtype=f32, passes="no_grad", method=None) -> Case:
            return Case(method=method, type=type, T=T, A=A, R=R, I=I, O=O, dtype=dtype, passes=passes)

        train = [case(T, 4, type=None, passes="fwd+bwd", method="train") for T in (64, 512)]
        aim = [case(64, 16), case(64, 16, dtype=bf16), *train]
        if quick:
            return aim
        return [
            *aim,
            *(case(T, A) for T, A in ((1, 1), (16, 16), (64, 1), (64, 8), (64, 64), (256, 16))),
            *(case(64, 16, type=type) for type in ("identical", "skewed", "zipf")),
            *(case(64, 16, R=R) for R in (8, 64, "mixed")),
            case(64, 16, I=4096, O=4096),
            case(64, 16, I=4096, O=14336, dtype=bf16),
        ]

    def work(self, case: Case, data: Data) -> tuple[int, int]:
        """The base GEMM and every row's own products; W, the adapters in use, x and y once; backward as in suite lora."""
        size = {name: t.nbytes for name, t in data.inputs.items() if name in ("x", "weight")}
        ranks = data.table[1].flatten().tolist()
        low = sum(2 * len(rows) * ranks[i] * (case.I + case.O) for i, rows in data.rows.items())
        used = sum(ranks[i] for i in data.rows) * (case.I + case.O) * data.linear.weight.element_size()
        base, y = 2 * case.T * case.I * case.O, data.y.nbytes
        forward = base + low, size["weight"] + used + size["x"] + y
        if not data.train:
            return forward
        return 2 * base + 3 * low, sum(forward[1:]) + size["weight"] + 2 * used + 2 * size["x"] + y

    def base(self, d: Data) -> Call:
        return Call(lambda: d.linear(d.inputs["x"]).split(d.case.T // d.case.A)) if d.train else super().base(d)

    def peft(self, d: Data) -> Call:
        """Training: a step per adapter, each over its own rows."""

        def run(base: nn.Module):
            d.layer.base_layer = base
            x = d.inputs["x"]
            if not d.train:
                return d.layer(x, adapter_names=d.names)
            results = []
            for i, part in enumerate(x.split(d.case.T // d.case.A)):
                if isinstance(base, StoredLinear):
                    rows = slice(i * len(part), (i + 1) * len(part))
                    d.layer.base_layer = StoredLinear(d.linear, d.y[rows], d.dx[rows])
                d.layer._active_adapter = f"a{i}"
                results.append(d.layer(part))
            return tuple(results)

        stored = StoredLinear(d.linear, d.y, d.dx)
        return Call(lambda: run(d.linear), Call(lambda: run(stored)))

    def loop(self, d: Data) -> Call | None:
        def run(y):
            for i, rows in d.rows.items():
                a, b = d.adapters[i]
                y.index_add_(0, rows, (d.inputs["x"][rows] @ a.mT) @ b, alpha=SCALE)
            return y

        return None if d.train else self.beside(d, run)

    def gather(self, d: Data) -> Call | None:
        if d.train or d.case.R == "mixed" or d.case.R % 16:
            return None
        a, b = (torch.stack([pair[i] for pair in d.adapters.values()]) for i in (0, 1))
        index = d.index.flatten().long()

        def run(y):
            s = torch.einsum("ti,tri->tr", d.inputs["x"], a[index])
            return y.add_(torch.einsum("tr,tro->to", s, b[index]), alpha=SCALE)

        return self.beside(d, run)

    def vllm(self, d: Data) -> Call | None:
        if d.train or (d.case.dtype == torch.float32 and d.y.is_cuda):  # the Triton kernels take 16 bits
            return None
        R = max(len(a) for a, _ in d.adapters.values())
        padded = lambda t: F.pad(t, (0, 0, 0, R - len(t)))
        a = torch.stack([padded(a) for a, _ in d.adapters.values()])
        b = torch.stack([padded(b).mT.contiguous() for _, b in d.adapters.values()])
        return self.beside(d, add_lora(d.inputs["x"], a, b, d.index.flatten().long(), SCALE))

    def lrkern(self, d: Data) -> Call:
        def split(y):
            return y.split(d.case.T // d.case.A) if d.train else y

        def whole():
            x, weight, bias, a, b = list(d.inputs.values())[:5]
            plan = ops.multi_lora_plan(d.index, d.case.A)
            return split(ops.multi_lora_linear(x, weight, bias, a, b, *d.table, plan, d.scales))

        def alone():
            x, a, b = (d.inputs[name] for name in ("x", "a_pool", "b_pool"))
            plan = ops.multi_lora_plan(d.index, d.case.A)
            s = ops.multi_lora_shrink(x, a, *d.table, plan, d.scales)
            if d.train:
                return split(ops.multi_lora_expand(Stored.apply(x, d.y, d.dx), s, b, *d.table, plan))
            ops.multi_lora_expand_(d.mine, s, b, *d.table, plan)
            return d.mine

        return by_path(Call(whole, Call(alone)), False)

    def fused(self, d: Data) -> Call | None:
        """Without the base there is nothing to fuse: not alone."""
        return by_path(replace(self.lrkern(d), alone=None), True) if self.device == "cuda" else None
