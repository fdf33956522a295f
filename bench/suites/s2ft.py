# SPDX-License-Identifier: Apache-2.0
"""Suite `s2ft`: R input features of a linear layer's W train (method=s2ft), or in a block of two layers and a GELU between them, I to O
to I features, R of its channels: rows of the first W and columns of the second (method=ffn). x takes a gradient; no optimizer.

    base        the layers, frozen
    peft        stock PEFT's LoRA layers of as many parameters
    published   S2FT's formulation: a parameter of the slice's shape that starts at zero, and its product beside the layer's, in torch ops
    full        fine-tuning: the layers with the gradients of W
    lrkern      lrkern.nn.S2FTLinear, called as modules

The slice is neighbours, as co-permutation makes it. The adapter alone has the base GEMM replaced by a stored result, the same for all;
for lrkern the ops around it are those that slice_linear is made of, called one by one, with their Python (StoredSlice).
"""

from types import SimpleNamespace
from typing import Any

import suite
import torch
import torch.nn.functional as F
from peers.families import Slice
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from stored import OPS, LayerSuite, StoredLinear, Trained, WithDw, frozen
from suite import Call, Case
from torch import Tensor, nn

from lrkern.nn import S2FTLinear
from lrkern.ops.dispatch import use_library
from lrkern.reference import Draw


class StoredSlice:
    """lrkern's ops with the GEMMs of y and dx left out of slice_linear. Never cheaper than the op without them: the slice is
    written, in forward and in backward, by calls of its own, for no rows."""

    def __init__(self, y: Tensor, dx: Tensor):
        self.y, self.dx = y, dx
        self.slice_linear = SimpleNamespace(default=lambda *args: self.forward(*args)[0])
        self.slice_linear_fwd = SimpleNamespace(default=self.forward)
        self.slice_linear_bwd = SimpleNamespace(default=self.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(OPS, name)

    def forward(self, x, weight, bias, slice, index, dim):
        OPS.slice_linear.default(x[:0], weight, bias, slice, index, dim)
        return self.y.detach(), OPS.slice_gather.default(x, index)

    def backward(self, dy, x, weight, slice, index, h, dim, *_):
        OPS.slice_linear_bwd.default(dy[:0], None, weight, slice, index, h[:0], dim, True, False, False)
        given = dy, x, weight, slice, index, h, dim
        return self.dx, None, OPS.slice_linear_bwd.default(*given, False, False, True)[2]


def sliced(w: Tensor, slice: Tensor, dim: int) -> Tensor:
    return w.index_copy(dim, torch.arange(slice.shape[dim], device=w.device), slice)


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = Draw(device, case.dtype, seed)
        self.case, self.train = case, "bwd" in case.passes
        T, I, O, R, block = case.T, case.I, case.O, case.R, case.method == "ffn"
        x = draw(T, I).requires_grad_(self.train)
        sizes = [(I, O, "output"), (O, I, "input")] if block else [(I, O, "input")]
        self.linears = [frozen(draw(o, i, std=i**-0.5), draw(o)) for i, o, _ in sizes]
        make = lambda m, side: S2FTLinear.from_linear(m, index=range(R), side=side, adapter_dtype=case.dtype)
        self.layers = [make(m, side) for m, (*_, side) in zip(self.linears, sizes, strict=True)]
        self.dims, inputs = [layer._dim for layer in self.layers], {"x": x}
        for n, layer in enumerate(self.layers):
            layer.slice.requires_grad_(self.train)
            inputs |= {
                f"weight{n}": layer.base_layer.weight,
                f"bias{n}": layer.base_layer.bias,
                f"slice{n}": layer.slice,
            }
        super().__init__(inputs, draw(T, I if block else O), self.truth_of)
        self.linear = self.linears[0]
        if not block:
            with torch.no_grad():
                self.y, self.dx = self.linear(x), self.dy @ self.linear.weight

    def truth_of(self, x, trains=True, **t):
        """slice stands for what W has there, where it trains; else nothing asks for its gradient."""
        weight = lambda n, dim: sliced(t[f"weight{n}"], t[f"slice{n}"], dim) if trains else t[f"weight{n}"]
        layers = [lambda x, n=n, dim=dim: F.linear(x, weight(n, dim), t[f"bias{n}"]) for n, dim in enumerate(self.dims)]
        return through(layers, x)

    def frozen_truth(self, **t):
        return self.truth_of(**t, trains=False)


def through(layers: Any, x: Tensor) -> Tensor:
    """One after the other, a GELU between them."""
    for n, layer in enumerate(layers):
        x = layer(F.gelu(x) if n else x)
    return x


class Suite(LayerSuite):
    data = Data
    against = "published"

    def cases(self, quick: bool) -> list[Case]:
        def case(method, R=64, T=512, I=2048, O=2048, passes="fwd+bwd", dtype=torch.float32):
            return Case(method=method, T=T, I=I, O=O, R=R, passes=passes, dtype=dtype)

        aim = [case("s2ft"), case("ffn", T=2048, I=768, O=3072)]
        return aim if quick else [*aim, case("s2ft", R=16), case("s2ft", R=256), case("s2ft", dtype=torch.bfloat16)]

    def work(self, case: Case, d: Data) -> tuple[int, int]:
        """Each layer's GEMM, in training dx and the slice of dW as well; every operand once a pass."""
        T, I, O, R = case.T, case.I, case.O, case.R
        gemm, thin = T * I * O, T * R * sum(s.numel() // R for s in (layer.slice for layer in d.layers))
        moved = sum(t.nbytes for t in d.inputs.values()) + d.dy.nbytes
        n = len(d.layers)
        return 2 * ((1 + d.train) * n * gemm + d.train * thin), moved * (1 + d.train)

    def base(self, d: Data) -> Call:
        return Call(lambda: through(d.linears, d.inputs["x"]), truth=d.frozen_truth)

    def peft(self, d: Data) -> Call:
        case, x = d.case, d.inputs["x"]
        r = max(1, sum(layer.slice.numel() for layer in d.layers) // (len(d.layers) * (case.I + case.O)))

        def layer(base):
            config = LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian")
            made = PeftLinear(base, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
            return made.to(case.dtype).train(d.train)

        whole = nn.ModuleList(layer(m) for m in d.linears)
        call = Call(lambda: Trained.apply(lambda x: through(whole, x), whole, x), exact=False)
        if case.method == "s2ft":
            stored = layer(StoredLinear(d.linear, d.y, d.dx))
            call.alone = Call(lambda: Trained.apply(stored, stored, x))
        return call

    def published(self, d: Data) -> Call:
        x = d.inputs["x"]
        make = lambda m, layer: Slice(m, layer.slice.shape, layer._dim).requires_grad_(d.train)
        whole = nn.ModuleList(make(m, layer) for m, layer in zip(d.linears, d.layers, strict=True))
        for m in whole:
            m.base.requires_grad_(False)
        call = Call(lambda: Trained.apply(lambda x: through(whole, x), whole, x), truth=d.frozen_truth)
        if d.case.method == "s2ft":
            stored = make(StoredLinear(d.linear, d.y, d.dx), d.layers[0])
            stored.base.requires_grad_(False)
            call.alone = Call(lambda: Trained.apply(stored, stored, x))
        return call

    def full(self, d: Data) -> Call:
        layers = [lambda x, m=m: WithDw.apply(x, m.weight, m.bias) for m in d.linears]
        return Call(lambda: through(layers, d.inputs["x"]), truth=d.frozen_truth)

    def lrkern(self, d: Data) -> Call:
        run = lambda: through(d.layers, d.inputs["x"])
        call = Call(run)
        if d.case.method == "s2ft":
            stored = StoredSlice(d.y, d.dx)
            call.alone = Call(run, around=lambda: use_library(stored))
        return call
