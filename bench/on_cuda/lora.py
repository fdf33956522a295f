# SPDX-License-Identifier: Apache-2.0
"""Suite `lora` on CUDA: the layers of large models in bfloat16, over the bare GEMM; "extra" is the percent beyond it.

    base        cuBLAS, the linear layer alone
    compile     PEFT's layer under torch.compile
    peft        PEFT's layer
    concat      cuBLAS over [x, S] and [W, B], backward over [dY, dS] and [W; A], each laid out once: what adapters cost
                where no kernel is written. Fp32 factors are rounded beforehand; with dropout torch's own passes are beside it
    addmm       y += S Bᵀ and dX += dS A by cuBLAS in place, as unsloth does it; fp32 factors are rounded in every call
    lrkern      the patched layer, its portable kernels beside cuBLAS
    fused       the same with LRKERN_FUSED=all

ab=fp32 is PEFT's default over a 16-bit base; without it the factors are in bfloat16. pass=no_grad decodes.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from suite import Call, by_path
from suites import lora
from suites.lora import SCALE, Case, Data
from torch import Tensor
from torch.autograd import Function

SIDES = ((4096, 4096), (5120, 5120), (8192, 8192), (4096, 14336), (14336, 4096))  # I, O
TOKENS, FEW = (2048, 4096, 8192, 16384), (1, 16, 64, 256)
RANKS = (8, 16, 64, 128)
FACTORS = (None, torch.float32)
DROPOUT = (None, 0.1)


def case(
    T: int, sides: tuple[int, int], R: int, passes: str, ab: torch.dtype | None = None, p: float | None = None
) -> Case:
    I, O = sides
    return Case(method="lora", T=T, I=I, O=O, R=R, passes=passes, dtype=torch.bfloat16, ab=ab, p=p)


def dropped(x: Tensor, p: float | None) -> tuple[Tensor, Tensor | None]:
    """D(x), and the mask."""
    return torch.native_dropout(x, p, True) if p else (x, None)


def undropped(dx: Tensor, mask: Tensor, p: float) -> Tensor:
    return torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - p))


class Joined:
    """What a producer would have written side by side, [x, S] with a row pitch of I + R, and the factors with the scale inside."""

    def __init__(self, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor):
        (R, I), O, like = a.shape, len(b), weight.dtype
        beside = lambda t: torch.cat([t, t.new_zeros(len(t), R)], 1)
        self.bias, self.weight = bias, weight
        self.xs, self.dys = beside(x), beside(dy)
        self.x, self.s, self.dy, self.ds = self.xs[:, :I], self.xs[:, I:], self.dys[:, :O], self.dys[:, O:]
        self.a, self.b = a.to(like), b.to(like)
        self.scaled_a, self.scaled_b = SCALE * self.a, SCALE * self.b
        self.wb, self.wa = torch.cat([weight, self.b], 1), torch.cat([weight, self.a])


class Concat(Function):
    """S = s D(x) Aᵀ and dS = s dY B are written into their columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, joined: Joined, p: float | None) -> Tensor:
        dropped_x, mask = dropped(joined.x, p)
        torch.mm(dropped_x, joined.scaled_a.mT, out=joined.s)
        ctx.save_for_backward(dropped_x, mask)
        ctx.joined, ctx.p, ctx.factors = joined, p, a.dtype
        return F.linear(joined.xs, joined.wb, joined.bias)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        (x, mask), joined = ctx.saved_tensors, ctx.joined
        torch.mm(joined.dy, joined.scaled_b, out=joined.ds)
        if mask is None:
            dx = torch.mm(joined.dys, joined.wa)
        else:
            dx = torch.mm(joined.dy, joined.weight).add_(undropped(joined.ds @ joined.a, mask, ctx.p))
        da, db = joined.ds.mT @ x, joined.dy.mT @ joined.s
        return dx, da.to(ctx.factors), db.to(ctx.factors), None, None


class Addmm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, p: float | None) -> Tensor:
        ctx.factors, ctx.p = a.dtype, p
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropped_x, mask = dropped(x, p)
        s = dropped_x @ a.mT
        ctx.save_for_backward(dropped_x, mask, weight, a, b, s)
        return F.linear(x, weight, bias).addmm_(s, b.mT, alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, a, b, s = ctx.saved_tensors
        ds = (dy @ b).mul_(SCALE)
        dx = dy @ weight
        dx = dx.addmm_(ds, a) if mask is None else dx.add_(undropped(ds @ a, mask, ctx.p))
        da, db = ds.mT @ x, (dy.mT @ s).mul_(SCALE)
        return dx, None, None, da.to(ctx.factors), db.to(ctx.factors), None


class Suite(lora.Suite):
    data = Data
    headline = "extra"

    @classmethod
    def name(cls) -> str:
        return lora.Suite.name()

    @classmethod
    def providers(cls) -> tuple[str, ...]:
        return tuple(name for name in super().providers() if name != "eager")

    def cases(self, quick: bool) -> list[Case]:
        if quick:
            return [
                *(case(8192, SIDES[0], 16, passes, ab, p)
                  for p in DROPOUT for ab in FACTORS for passes in ("fwd", "fwd+bwd")),
                case(8192, (4096, 14336), 16, "fwd+bwd"),
                *(case(T, SIDES[0], 16, "no_grad") for T in FEW),
            ]  # fmt: skip
        grid = lambda *axes: product(SIDES, RANKS, FACTORS, *axes)
        return [
            *(case(T, sides, R, passes, ab, p)
              for sides, R, ab, T, p, passes in grid(TOKENS, DROPOUT, ("fwd", "fwd+bwd"))),
            *(case(T, sides, R, "no_grad", ab) for sides, R, ab, T in grid(FEW)),
        ]  # fmt: skip

    def concat(self, d: Data) -> Call:
        x, weight, bias, a, b = (t.detach() for t in d.inputs.values())
        joined = Joined(x, d.dy, weight, bias, a, b)
        x, _, _, a, b = d.inputs.values()
        return Call(lambda: Concat.apply(x, a, b, joined, d.p))

    def addmm(self, d: Data) -> Call:
        return Call(lambda: Addmm.apply(*d.inputs.values(), d.p))

    def compile(self, d: Data) -> Call:
        layer = torch.compile(d.peft, dynamic=False)
        return Call(lambda: layer(d.inputs["x"]))

    def peft(self, d: Data) -> Call:
        return Call(lambda: d.peft(d.inputs["x"]))

    def lrkern(self, d: Data) -> Call:
        return by_path(Call(lambda: d.patched(d.inputs["x"])), False)

    def fused(self, d: Data) -> Call:
        return by_path(Call(lambda: d.patched(d.inputs["x"])), True)
