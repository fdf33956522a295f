# SPDX-License-Identifier: Apache-2.0
"""NOLA, MoRA and S2FT as their authors' code computes them, in torch's operations: FORWARDS by method, a function of a layer of
lrkern.nn that gives its published forward(x), over the layer's base, parameters and settings. Written anew from formulas."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

Forward = Callable[[Tensor], Tensor]


class Drawn(Function):
    """Σ coef[i] U_i / sqrt(k), U_i drawn by torch's generator from a seed, in forward and again in backward."""

    @staticmethod
    def draw(seed: int, k: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        torch.manual_seed(seed)
        return torch.zeros(k, *shape, device=device).uniform_(-1, 1) / math.sqrt(k)

    @staticmethod
    def forward(ctx, coef, seed, shape):
        ctx.spec = seed, len(coef), shape, coef.device
        return torch.einsum("k,krc->rc", coef, Drawn.draw(*ctx.spec))

    @staticmethod
    def backward(ctx, g):
        return torch.einsum("rc,krc->k", g, Drawn.draw(*ctx.spec)), None, None


def nola_delta(x: Tensor, a0: Tensor, alpha: Tensor, beta: Tensor, seed: int, features: int, scale: float) -> Tensor:
    """scale · x Aᵀ Bᵀ of A = a0 [R, I] + Σ alpha U, B [features, R] = Σ beta V."""
    a = a0 + Drawn.apply(alpha, seed, tuple(a0.shape))
    b = Drawn.apply(beta, seed + 1, (features, len(a0)))
    return scale * (x @ a.mT) @ b.mT


def mora_turn(r: int, in_features: int, like: Tensor) -> list[Tensor]:
    """cos and sin [chunks, r] of type 6's rotation, which the code keeps."""
    angle = torch.arange(-(-in_features // r))[:, None] * 10000.0 ** (-2 * torch.arange(r // 2) / r)
    return [torch.cat([t, t], -1).to(like) for t in (angle.cos(), angle.sin())]


def mora_delta(x: Tensor, m: Tensor, features: int, kind: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Pads, views, sums and concatenations around x Mᵀ of each chunk."""
    r = m.shape[0]
    if x.shape[-1] % r:
        x = torch.cat([x, x[..., : r - x.shape[-1] % r]], -1)
    x = x.view(*x.shape[:-1], -1, r)
    if kind == 6:
        half = torch.cat([-x[..., r // 2 :], x[..., : r // 2]], -1)
        y = F.linear(x * cos + half * sin, m).flatten(-2)
    else:
        y = F.linear(x.sum(-2), m)
    if y.shape[-1] < features:
        y = torch.cat([y] * -(-features // y.shape[-1]), -1)
    return y[..., :features]


class Slice(nn.Module):
    """S2FT's: a parameter of the slice's shape that starts at zero, and its product beside the layer's."""

    def __init__(self, base: nn.Module, shape: tuple[int, ...], dim: int):
        super().__init__()
        self.base, self.dim, self.s2 = base, dim, nn.Parameter(base.weight.new_zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        y, s = self.base(x), self.s2.shape[self.dim]
        if self.dim == 1:
            return y + F.linear(x[..., :s], self.s2)
        return torch.cat([y[..., :s] + F.linear(x, self.s2), y[..., s:]], -1)


# ---- by method


def nola(layer: nn.Module) -> Forward:
    base, s = layer.base_layer, layer.settings
    a0 = torch.empty(s["r"], base.in_features, device=layer.nola_alpha.device).uniform_(-1, 1) * base.in_features**-0.5
    coefficients, scale = (layer.nola_alpha, layer.nola_beta), s["lora_alpha"] / s["r"]
    return lambda x: base(x) + nola_delta(x, a0, *coefficients, s["seed"] % 2**31, base.out_features, scale)


def mora(layer: nn.Module) -> Forward:
    base, m, kind = layer.base_layer, layer.lora_A.weight, layer.settings["mora_type"]
    turn = mora_turn(len(m), base.in_features, m)
    return lambda x: base(x) + mora_delta(x, m, base.out_features, kind, *turn)


def s2ft(layer: nn.Module) -> Forward:
    """Of the first features or channels, which the slice's index has here."""
    layer.published = Slice(layer.base_layer, layer.slice.shape, layer._dim)
    return lambda x: layer.published(x)


FORWARDS: dict[str, Callable[[nn.Module], Forward]] = {"nola": nola, "mora": mora, "s2ft": s2ft}
