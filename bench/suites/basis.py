# SPDX-License-Identifier: Apache-2.0
"""Suite `basis`: one linear layer with a NOLA, VeRA or RandLoRA adapter; W and the random bases frozen.

base        the linear layer alone
peft        stock PEFT's layer (VeRA, RandLoRA), bases stored in float32
published   NOLA's published way: seed torch's generator, draw k matrices, one einsum; forward and again in backward
stored      the bases as stored tensors in plain PyTorch
lrkern      vera, randlora: that PEFT layer after lrkern.peft.patch, over the same stored bases; vera_seed, randlora_seed:
            lrkern.nn's layer over a seed; vera_small: that with save_output=False; nola: functional.nola_linear

peft and lrkern are layers called as modules, each with all of its own Python, but for nola, whose peers are functions too.
basis MB is what stays in memory between calls. The adapter alone has the base GEMM replaced by a stored result.
"""

import math
from typing import Any
from unittest import mock

import suite
import torch
import torch.nn.functional as F
from peers.families import nola_delta
from peft import RandLoraConfig, VeraConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.randlora.layer import Linear as RandLoraLayer
from peft.tuners.vera.layer import Linear as VeraLayer
from stored import LayerSuite, StoredLinear, StoredOps, frozen
from suite import Call, Case
from torch import Tensor, nn

import lrkern.functional.base
import lrkern.peft
from lrkern.functional import Basis, nola_linear
from lrkern.nn import RandLoRALinear, VeRALinear
from lrkern.ops.dispatch import use_library
from lrkern.reference import Draw

SEED, SCALE = 1234567, 0.5
DISTRIBUTION = "uniform8"


class Data(suite.Data):
    """By method: the trained tensors, and what the providers hold beside them."""

    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, torch.float32, seed)
        self.case, self.train = case, "bwd" in case.passes
        I, O, R, least = case.I, case.O, case.R, min(case.I, case.O)
        x, weight, bias = (t.to(case.dtype) for t in (draw(case.T, I), draw(O, I, std=I**-0.5), draw(O)))
        inputs: dict[str, Any] = {"x": x, "weight": weight, "bias": bias}
        n = -(-least // R)
        if case.method == "nola":
            trained = {"alpha": draw(case.k), "beta": draw(case.k)}
        elif case.method.startswith("randlora"):
            trained = {"lam": draw(R, n), "gam": draw(n, least, std=1 / max(n, least))}
            self.a = Basis(SEED, "randlora", R, least, R, math.sqrt(3), DISTRIBUTION)
            self.b = Basis(SEED, "randlora", n * R, max(I, O), R, math.sqrt(3), DISTRIBUTION, tensor=1)
        else:
            trained = {"d": draw(R), "b": draw(O)}
            self.a = Basis(SEED, "vera", R, I, R, math.sqrt(6 / I), DISTRIBUTION)
            self.b = Basis(SEED, "vera", R, O, R, math.sqrt(6 / R), DISTRIBUTION, tensor=1)
        self.trained = list(trained.values())
        inputs |= trained
        if self.train:
            for t in (x, *self.trained):
                t.requires_grad_()
        self.bases: dict[str, Tensor] = {}
        truth = lambda x, weight, bias, **trained: F.linear(x, weight, bias) + self.explicit(x, *trained.values())
        super().__init__(inputs, draw(case.T, O).to(case.dtype), truth)
        self.linear = frozen(weight, bias)
        with torch.no_grad():
            self.y, self.dx = self.linear(x), draw(case.T, I).to(case.dtype)

    def stack(self, which: str) -> Tensor:
        """A basis as float32, made at the first use."""
        if which not in self.bases:
            like = self.trained[0].detach().float()
            if self.case.method == "nola":
                k, R, cols = self.case.k, self.case.R, self.case.I if which == "a" else self.case.O
                more = which == "a"  # A0, one basis more
                basis = Basis(SEED, "nola", (k + more) * R, cols, R, 1.0, DISTRIBUTION, tensor=int(which == "b"))
            else:
                basis = getattr(self, which)
            self.bases[which] = basis.fill(like)
        return self.bases[which]

    def explicit(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The adapter's part over stored bases, in the dtype of its coefficients."""
        case, a, b = self.case, self.stack("a").to(first.dtype), self.stack("b").to(first.dtype)
        x = x.to(first.dtype)
        if case.method == "nola":
            shape = -1, case.R
            a, b = a.view(*shape, case.I), b.view(*shape, case.O)
            down = case.I**-0.5 * a[-1] + torch.einsum("k,krc->rc", first, a[:-1]) / math.sqrt(case.k)
            return SCALE * (x @ down.mT) @ (torch.einsum("k,krc->rc", second, b) / math.sqrt(case.k))
        if case.method.startswith("randlora"):
            u = (first[:, :, None] * a[:, None] * second).flatten(0, 1)
            return SCALE * ((x @ u.mT) @ b if case.I <= case.O else (x @ b.mT) @ u)
        return second * ((first * (x @ a.mT)) @ b)


class Suite(LayerSuite):
    data = Data

    def cases(self, quick: bool) -> list[Case]:
        both = [(512, "fwd+bwd"), (1, "no_grad")]

        def case(method, T, passes, k=None, R=8, I=2048, O=2048, dtype=torch.float32):
            return Case(method=method, T=T, k=k, R=R, I=I, O=O, passes=passes, dtype=dtype)

        aim = [
            *(case("nola", T, passes, k=1024) for T, passes in both),
            *(case("vera", T, passes, R=256) for T, passes in both),
            *(case("vera_seed", T, passes, R=256) for T, passes in both),
            *(case("randlora", T, passes, R=32) for T, passes in both),
            case("randlora_seed", 1, "no_grad", R=32),
        ]
        if quick:
            return aim
        return [
            *aim,
            case("vera_small", 512, "fwd+bwd", R=256),
            case("randlora_seed", 512, "fwd+bwd", R=32),
            case("nola", 512, "fwd+bwd", k=64, R=16),
            case("vera", 16, "no_grad", R=256),
            case("vera_seed", 512, "fwd+bwd", R=256, dtype=torch.bfloat16),
            case("vera", 512, "fwd+bwd", R=256, I=2048, O=4096),
            *(case(method, 512, "fwd+bwd", R=32, I=2048, O=1024) for method in ("randlora", "randlora_seed")),
            case("randlora", 2048, "fwd+bwd", R=32, I=1024, O=1024),
        ]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        """The base GEMM (twice with its dx), the adapter's products, a multiply-add for each element of a basis that is
        summed; W, x, y and the trained tensors once, in backward dy and dx too."""
        I, O, R, T = case.I, case.O, case.R, case.T
        rank = min(I, O) if case.method.startswith("randlora") else R
        low = 2 * T * rank * (I + O) * (3 if d.train else 1)
        summed = 2 * case.k * R * (I + O) * (2 if d.train else 1) if case.method == "nola" else 0
        size = d.linear.weight.element_size()
        moved = size * (I * O + T * (I + O)) + sum(t.nbytes for t in d.trained)
        return 2 * T * I * O * (2 if d.train else 1) + low + summed, moved * (2 if d.train else 1)

    @staticmethod
    def layer(d: Data) -> nn.Module:
        """PEFT's, over stored bases and the very tensors that train, so that gradients meet."""
        case, (first, second) = d.case, d.trained
        buffer = lambda t: BufferDict({"default": t})
        if case.method.startswith("randlora"):
            n = first.shape[1]
            a, b = d.stack("a")[:, None], d.stack("b").view(n, case.R, -1).permute(2, 0, 1).contiguous()
            config = RandLoraConfig(r=case.R, randlora_alpha=SCALE * case.R)
            layer = RandLoraLayer(d.linear, buffer(a), buffer(b), "default", config, r=case.R)
            layer.randlora_lambda["default"], layer.randlora_gamma["default"] = map(nn.Parameter, (first, second))
            names = "randlora_lambda", "randlora_gamma"
        else:
            a, b = d.stack("a"), d.stack("b").mT.contiguous()
            layer = VeraLayer(d.linear, buffer(a), buffer(b), "default", VeraConfig(r=case.R), r=case.R)
            names = "vera_lambda_d", "vera_lambda_b"
        for name, t in zip(names, d.trained, strict=True):
            holder = getattr(layer, name)
            holder._parameters["default"] = nn.Parameter(t.data, t.requires_grad) if not d.train else t
        return layer.train(d.train)

    def peft(self, d: Data) -> Call | None:
        if d.case.method == "nola" or d.case.dtype != torch.float32:  # PEFT would take bases of its own dtype
            return None
        layer, stored = self.layer(d), self.layer(d)
        stored.base_layer = StoredLinear(d.linear, d.y, d.dx)
        x, held = d.inputs["x"], d.stack("a").nbytes + d.stack("b").nbytes
        return Call(lambda: layer(x), Call(lambda: stored(x)), basis_bytes=held)

    def published(self, d: Data) -> Call | None:
        case = d.case
        if case.method != "nola" or d.y.is_cuda:
            return None
        a0 = torch.empty(case.R, case.I).uniform_(-1, 1) * case.I**-0.5

        def run(base):
            return base + nola_delta(d.inputs["x"], a0, *d.trained, SEED, case.O, SCALE)

        return self.beside(d, run, exact=False)

    def stored(self, d: Data) -> Call:
        run = lambda base: (base + d.explicit(d.inputs["x"], *d.trained)).to(base.dtype)
        return self.beside(d, run, basis_bytes=d.stack("a").nbytes + d.stack("b").nbytes)

    def lrkern(self, d: Data) -> Call:
        case, x, held = d.case, d.inputs["x"], 0
        around = lambda: without_base(d.y, d.dx)
        if case.method == "nola":
            run = lambda: nola_linear(
                x, d.inputs["weight"], d.inputs["bias"], *d.trained, SEED, case.R, SCALE, distribution=DISTRIBUTION
            )
            around = lambda: use_library(StoredOps(d.y, d.dx))
        elif case.method in ("vera", "randlora"):
            layer, held = self.layer(d), d.stack("a").nbytes + d.stack("b").nbytes
            if (report := lrkern.peft.patch(layer)).fused != 1:
                raise RuntimeError(f"lrkern.peft.patch left PEFT's own code in this layer: {report}")
            run = lambda: layer(x)
        else:
            settings = {"r": case.R, "seed": SEED, "distribution": DISTRIBUTION, "adapter_dtype": torch.float32}
            if case.method == "randlora_seed":
                layer = RandLoRALinear.from_linear(d.linear, randlora_alpha=SCALE * case.R, **settings)
            else:
                layer = VeRALinear.from_linear(d.linear, save_output=case.method == "vera_seed", **settings)
            own = [name for name in layer._parameters if layer._parameters[name] is not None]
            for name, t in zip(own, d.trained, strict=True):
                layer._parameters[name] = t if d.train else nn.Parameter(t.data, False)
            run = lambda: layer(x)
        return Call(run, Call(run, around=around), basis_bytes=held)


def without_base(y: Tensor, dx: Tensor):
    """Inside, lrkern.functional's VeRA and RandLoRA find the base GEMM's y and dx made, and add into them in place as
    they add into what it makes."""
    made = {"linear": lambda *_: y.detach(), "gradients": lambda *_: [dx.detach(), None, None]}
    return mock.patch.multiple(lrkern.functional.base, **made)
