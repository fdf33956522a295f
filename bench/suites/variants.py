# SPDX-License-Identifier: Apache-2.0
"""Suite `variants`: one linear layer with each published variant of LoRA (docs/variants.md); W frozen, x takes a gradient.

    base       the linear layer alone
    published  the method as its authors' code computes it, or where there is none as its paper writes it, in torch's operations
    peft       PEFT's layer, where PEFT has the method
    lora       lrkern's own LoRA of the same rank, called as a layer
    lrkern     lrkern.nn.variants' layer

Layers are called as modules. The adapter alone (adapter_ms) has the base GEMM replaced by a stored result, the same for all (stored.py). Factors
are float32 over a bfloat16 base. `factorized` is a layer without W: `published` is two F.linear there, and there is no base.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import suite
import torch
import torch.nn.functional as F
from peers.variants import PUBLISHED
from stored import LayerSuite, Stored, StoredLinear, StoredOps, Trained, frozen
from suite import Call
from torch import Tensor, nn

import lrkern.functional.base
from lrkern.nn import FactorizedLinear, FusedLoRALinear, variants
from lrkern.ops.dispatch import use_library
from lrkern.reference import Draw
from lrkern.reference.variants import VARIANTS
from lrkern.reference.variants.branches import reslora_update

# The settings of each method in a case: r, but where the rank is made of parts, so that the kernels have the case's.
SETTINGS: dict[str, Callable[[suite.Case], dict]] = {
    "block_lora": lambda case: {"r": case.R, "n": 4},
    "lora_mini": lambda case: {"r": case.R, "a": case.R, "b": case.R},
    "lorta": lambda case: {"r": case.R, "heads": 16, "layers": 12, "layer": 3, "projections": 4, "projection": 1},
    "melora": lambda case: {"r": case.R // 4, "n": 4},
    "prilora": lambda case: {"r": case.R},
    "reslora": lambda case: {"r": case.R, "before": 1},
}


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    ab: torch.dtype | None = None  # of what the adapter has, where it is not the base's


@lru_cache(maxsize=1)
def layers_of(case: Case, device: str) -> tuple[nn.Linear, nn.Module, nn.Module]:
    """The base layer, the method's over it and our LoRA's. Copies of a case are copies of these: some take an SVD of W."""
    draw, v = Draw(device, case.dtype), VARIANTS[case.method]
    linear = frozen(draw(case.O, case.I, std=case.I**-0.5), draw(case.O))
    torch.manual_seed(0)
    settings = SETTINGS.get(case.method, lambda case: {"r": case.R})(case)
    layer = getattr(variants, v.cls).from_linear(linear, **settings)
    if case.method == "reslora":  # a layer with one before it, in mode "bs": both act on its x
        before = type(layer).from_linear(linear, r=case.R)
        layer.connect({"layers.0.q_proj": before, "layers.1.q_proj": layer})
    lora = FusedLoRALinear.from_linear(linear, r=case.R)
    for p in (p for of in (layer, lora) for p in of.coefficients().values() if p.requires_grad):
        p.data += draw(*p.shape, dtype=p.dtype, std=0.02)
    return linear, layer, lora


def with_one_before(x, weight, bias, c, s) -> Tensor:
    a, b = ([c[f"before_{key}"], c[f"lora_{key}"]] for key in "AB")
    return F.linear(x, weight, bias) + reslora_update("bs", 1, [x, x], a, b, s["lora_alpha"] / s["r"])


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        x, dy = draw(case.T, case.I), draw(case.T, case.O)
        x.requires_grad_(case.passes != "no_grad")
        self.case, self.train = case, case.passes != "no_grad"
        self.linear, self.layer, self.lora = copy.deepcopy(layers_of(case, device))
        self.c: dict[str, Tensor] = dict(self.layer.coefficients())
        if case.method == "reslora":
            (before,) = self.layer._earlier
            self.c |= {"before_A": before.lora_A, "before_B": before.lora_B}
        inputs = {"x": x, "weight": self.linear.weight, "bias": self.linear.bias} | self.c
        formula = with_one_before if case.method == "reslora" else VARIANTS[case.method].forward
        truth = lambda x, weight, bias, **c: formula(x, weight, bias, c, self.layer.settings)
        super().__init__(inputs, dy, truth)
        with torch.no_grad():
            self.y, self.dx = self.linear(x), dy @ self.linear.weight


class Factors(suite.Data):
    """Of a layer without W."""

    def __init__(self, case: Case, device: str, seed: int):
        draw, ab = Draw(device, case.dtype, seed), case.dtype
        self.case, self.layer = case, FactorizedLinear(case.I, case.O, r=case.R, dtype=ab)
        x, dy = draw(case.T, case.I).requires_grad_(case.passes != "no_grad"), draw(case.T, case.O)
        truth = lambda x, A, B, bias: F.linear(F.linear(x, A), B, bias)
        super().__init__({"x": x, **dict(self.layer.named_parameters())}, dy, truth)


def without_its_gemm(d: Data) -> Callable:
    """lrkern's ops and functional forms where the base's y and dx are there already."""
    ops, forms = StoredOps(d.y.clone(), d.dx.clone()), lrkern.functional.base
    y, dx, real = d.y.clone(), d.dx.clone(), (forms.linear, forms.gradients)
    made = lambda *_: y.detach(), lambda *_: [dx.detach(), None, None]

    @contextmanager
    def around():  # twice a step: unittest.mock would take a quarter of a millisecond each time
        forms.linear, forms.gradients = made
        try:
            with use_library(ops):
                yield
        finally:
            forms.linear, forms.gradients = real

    return around


class Suite(LayerSuite):
    against = "published"
    devices = ("cpu",)

    @staticmethod
    def data(case: Case, device: str, seed: int) -> suite.Data:
        return (Factors if case.method == "factorized" else Data)(case, device, seed)

    def cases(self, quick: bool) -> list[Case]:
        def case(method: str, dtype=torch.float32) -> Case:
            ab = None if dtype == torch.float32 or method == "factorized" else torch.float32
            return Case(method=method, T=512, I=2048, O=2048, R=16, passes="fwd+bwd", dtype=dtype, ab=ab)

        methods = [*(name for name in sorted(VARIANTS) if name in PUBLISHED), "factorized"]
        if quick:
            methods = [name for name in methods if name in ("adalora", "lora_xs", "slora")]
        return [case(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in methods]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        """The base GEMM and its dx, and LoRA's products of this rank; every operand once a pass."""
        low, base = 2 * case.T * case.R * (case.I + case.O), 2 * case.T * case.I * case.O
        moved = sum(t.nbytes for t in d.inputs.values() if isinstance(t, Tensor)) + d.dy.nbytes
        return 3 * low + (0 if case.method == "factorized" else 2 * base), 2 * moved

    def base(self, d: Data) -> Call | None:
        return None if d.case.method == "factorized" else super().base(d)

    def published(self, d: Data) -> Call:
        if d.case.method == "factorized":
            return Call(lambda: d.truth(**d.inputs))
        x, base, y = d.inputs["x"], d.linear, d.y.clone()
        c, s = d.c, d.layer.settings
        run = PUBLISHED[d.case.method]
        return Call(
            lambda: run(lambda: base(x), base, x, c, s),
            Call(lambda: run(lambda: Stored.apply(x, y, d.dx), base, x, c, s)),
        )

    def peft(self, d: Data) -> Call | None:
        if d.case.method != "adalora":
            return None
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import SVDLinear

        def made(base: nn.Linear) -> SVDLinear:
            config = AdaLoraConfig(init_r=d.case.R, target_r=d.case.R, lora_alpha=32, total_step=10)
            layer = SVDLinear(base, "default", config, r=d.case.R, lora_alpha=32)
            for name, p in d.layer.coefficients().items():
                getattr(layer, name)["default"] = p
            return layer.train(d.train)

        x, whole, stored = d.inputs["x"], made(d.linear), made(StoredLinear(d.linear, d.y, d.dx))
        return Call(lambda: whole(x), Call(lambda: stored(x)))

    def of_layer(self, d: Data, layer: nn.Module, **facts) -> Call:
        x = d.inputs["x"]
        return Call(lambda: layer(x), Call(lambda: layer(x), around=without_its_gemm(d)), **facts)

    def lora(self, d: Data) -> Call | None:
        if d.case.method == "factorized":
            return None
        run = lambda x: Trained.apply(d.lora, d.lora, x)
        return self.of_layer(d, run, exact=False)

    def lrkern(self, d: Data) -> Call:
        if d.case.method == "factorized":
            return Call(lambda: d.layer(d.inputs["x"]))
        return self.of_layer(d, d.layer)
