# SPDX-License-Identifier: Apache-2.0
"""Suite `lora`: one linear layer with a LoRA or DoRA adapter; W frozen, x requires a gradient.

    base      the linear layer alone
    eager     the formula in PyTorch
    compile   the same under torch.compile
    peft      stock PEFT's layer
    lrkern    the same PEFT layer after lrkern.peft.patch: what users call, through the same Python entry

The adapter alone (adapter_ms) has the base GEMM replaced by a stored result, the same for all (stored.py). For peft it is
still PEFT's layer and for lrkern the patched one, each called as a module, with all of its own Python. DoRA's norm is computed
in every call; norm=kept is inside peft.helpers.DoraCaching, where PEFT keeps it and B A, and lrkern the norm.

On CUDA it asks something else: on_cuda/lora.py.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import suite
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.helpers import DoraCaching
from peft.tuners.lora.layer import Linear as PeftLinear
from stored import LayerSuite, Stored, StoredLinear, StoredOps, frozen
from suite import Call
from torch import Tensor

import lrkern.peft
from lrkern.ops.dispatch import use_library
from lrkern.reference import Draw, add

SCALE = 2.0  # lora_alpha / r


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    ab: torch.dtype | None = None  # of A and B where it is not the base's; fp32 over a 16-bit base is PEFT's default
    p: float | None = None  # dropout
    norm: str | None = None  # DoRA's, "kept" between calls


def case(method: str, sizes: tuple[int, int, int, int], passes: str, dtype=torch.float32, p=None, norm=None) -> Case:
    T, I, O, R = sizes
    ab = None if dtype == torch.float32 else torch.float32
    return Case(method=method, T=T, I=I, O=O, R=R, passes=passes, dtype=dtype, ab=ab, p=p, norm=norm)


# The formulas, over any base(x, weight, bias): F.linear, or one that finds its result stored.


def lora(base, x, weight, bias, a, b, p=None):
    delta = SCALE * (F.dropout(x.to(a.dtype), p or 0.0) @ a.mT) @ b.mT
    return add(base(x, weight, bias), delta)


def dora_gain(weight, a, b, magnitude):
    """g = magnitude / norm of each row of W + s B A, the norm detached as DoRA has it (arXiv 2402.09353, §4.3)."""
    with torch.no_grad():
        norm = (weight + SCALE * (b @ a)).norm(dim=1)
    return magnitude / norm


def dora(base, x, weight, bias, a, b, magnitude, p=None):
    y = dora_gain(weight, a, b, magnitude) * lora(base, x, weight, None, a, b, p)
    return y if bias is None else y + bias


def alone(formula: Callable[..., Tensor], y: Tensor, z: Tensor, dx: Tensor, **inputs) -> Tensor:
    return formula(lambda x, weight, bias: Stored.apply(x, z if bias is None else y, dx), **inputs)


@cache
def formula_of(method: str, p: float | None) -> Callable[..., Tensor]:
    return partial({"lora": lora, "dora": dora}[method], p=p)


@cache  # one for all copies of the data
def compiled(method: str, p: float | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    formula = formula_of(method, p)
    return tuple(torch.compile(f, fullgraph=True, dynamic=False) for f in (formula, partial(alone, formula)))


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw, ab = Draw(device, case.dtype, seed), case.ab or case.dtype
        x, dy = draw(case.T, case.I), draw(case.T, case.O)
        self.linear = frozen(draw(case.O, case.I, std=case.I**-0.5), draw(case.O))
        how = {"lora_dropout": case.p or 0.0, "use_dora": case.method == "dora", "init_lora_weights": "gaussian"}
        config = LoraConfig(r=case.R, lora_alpha=int(SCALE * case.R), **how)
        self.peft = PeftLinear(self.linear, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
        self.peft.to(device).train(case.passes != "no_grad")
        a, b = self.peft.lora_A["default"].weight, self.peft.lora_B["default"].weight
        a.data = draw(case.R, case.I, dtype=ab, std=case.I**-0.5)
        b.data = draw(case.O, case.R, dtype=ab, std=case.R**-0.5)
        x.requires_grad_(case.passes != "no_grad")
        inputs = {"x": x, "weight": self.linear.weight, "bias": self.linear.bias, "a": a, "b": b}
        if case.method == "dora":
            inputs["magnitude"] = self.peft.lora_magnitude_vector["default"].weight
        super().__init__(inputs, dy, partial(formula_of(case.method, None), F.linear))
        self.method, self.p = case.method, None if case.passes == "no_grad" else case.p
        self.formula = formula_of(self.method, self.p)
        self.around = partial(DoraCaching, case.norm == "kept")
        self.store(dora_gain(inputs["weight"], a, b, inputs["magnitude"]) if case.method == "dora" else None)

        self.patched = self.twin()
        if (report := lrkern.peft.patch(self.patched)).fused != 1:
            raise RuntimeError(f"lrkern.peft.patch left PEFT's own code in this layer: {report}")

    @torch.no_grad()
    def store(self, gain: Tensor | None) -> None:
        """What the base gives: y = x Wᵀ + bias, z = x Wᵀ and dx, the gradient of x through it."""
        x, weight, bias = (self.inputs[name] for name in ("x", "weight", "bias"))
        self.z, self.y = F.linear(x, weight), F.linear(x, weight, bias)
        self.dx = (self.dy if gain is None else gain * self.dy) @ weight
        self.stored = {"y": self.y, "z": self.z, "dx": self.dx}
        self.peft_alone = self.twin()
        self.peft_alone.base_layer = StoredLinear(self.linear, self.y, self.dx)
        scaled = self.y.clone() if gain is None else gain * self.z + bias
        self.lrkern_alone = StoredOps(scaled, self.dx.clone(), self.z)  # these two are written in place

    def twin(self) -> PeftLinear:
        """Another layer over the same parameters."""
        return copy.deepcopy(self.peft, {id(p): p for p in self.peft.parameters()})


class Suite(LayerSuite):
    data = Data

    def on(self, device: str) -> suite.Suite:
        from on_cuda.lora import Suite as Large  # which is made of this one

        return (Large([]) if device == "cuda" and not isinstance(self, Large) else super()).on(device)

    def cases(self, quick: bool) -> list[Case]:
        bf16 = torch.bfloat16
        large, small, tiny = (512, 2048, 2048, 16), (512, 1024, 1024, 16), (8, 64, 64, 8)
        few = lambda T: (T, 2048, 2048, 16)
        if quick:
            return [
                case("lora", large, "fwd+bwd"),
                case("lora", large, "fwd+bwd", bf16),
                *(case("lora", few(1), "no_grad", dtype) for dtype in (torch.float32, bf16)),
                *(case("dora", few(1), "no_grad", norm=norm) for norm in (None, "kept")),
            ]
        return [
            *(case("lora", large, passes) for passes in ("fwd+bwd", "fwd", "bwd")),
            case("lora", large, "fwd+bwd", p=0.1),
            case("lora", (512, 2048, 2048, 64), "fwd+bwd"),
            case("lora", large, "fwd+bwd", bf16),
            case("lora", small, "fwd+bwd", bf16),
            case("lora", small, "fwd+bwd", bf16, p=0.1),
            *(case("lora", few(T), "no_grad") for T in (1, 4, 16)),
            *(case("lora", tiny, passes) for passes in ("fwd+bwd", "no_grad")),
            case("dora", large, "fwd+bwd"),
            *(case("dora", few(1), "no_grad", norm=norm) for norm in (None, "kept")),
        ]

    def exact(self, case: Case) -> Case:
        return replace(case, p=None)

    def work(self, case: Case, data: Data) -> tuple[int, int]:
        """Each product once forward, and backward once for x and once for A and B; x, W and dY read, y and dx written."""
        size = {name: t.nbytes for name, t in data.inputs.items()}
        base, low = 2 * case.T * case.I * case.O, 2 * case.T * case.R * (case.I + case.O)
        factors, y = size["a"] + size["b"], data.dy.nbytes
        forward = base + low, size["weight"] + factors + size["x"] + y
        backward = base + 2 * low, size["weight"] + 2 * factors + 2 * size["x"] + y
        done = {"fwd+bwd": (forward, backward), "bwd": (backward,)}.get(case.passes, (forward,))
        return sum(flop for flop, _ in done), sum(moved for _, moved in done)

    def eager(self, d: Data) -> Call:
        stored = Call(lambda: alone(d.formula, **d.stored, **d.inputs))
        return Call(lambda: d.formula(F.linear, **d.inputs), stored)

    def compile(self, d: Data) -> Call:
        whole, beside = compiled(d.method, d.p)
        return Call(lambda: whole(F.linear, **d.inputs), Call(lambda: beside(**d.stored, **d.inputs)))

    def peft(self, d: Data) -> Call:
        alone = Call(lambda: d.peft_alone(d.inputs["x"]), around=d.around)
        return Call(lambda: d.peft(d.inputs["x"]), alone, around=d.around)

    def lrkern(self, d: Data) -> Call:
        layer = lambda: d.patched(d.inputs["x"])

        @contextmanager
        def stored():
            with d.around(), use_library(d.lrkern_alone):
                yield

        return Call(layer, Call(layer, around=stored), around=d.around)
