# SPDX-License-Identifier: Apache-2.0
"""NOLA: LoRA whose factors are sums of random bases."""

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.basis import DISTRIBUTIONS, METHODS
from . import base
from .lora import lora_linear

__all__ = ["nola_factors", "nola_linear"]


def nola_factors(
    alpha: Tensor,
    beta: Tensor,
    seed: int,
    r: int,
    in_features: int,
    out_features: int,
    normalize: bool = True,
    frozen_a: bool = True,
    distribution: str = "uniform8",
    tensor: int = 0,
) -> tuple[Tensor, Tensor]:
    """A = A₀ + c Σᵢ alphaᵢ Uᵢ [..., r, in] and B = c' Σⱼ betaⱼ Vⱼ [..., out, r], float32: NOLA (arXiv 2310.02556).

    alpha [..., k] and beta [..., l] float32, with the layers that share the seed as leading dimensions. U_i [r, in] is basis i of
    ``tensor``, V_jᵀ [r, out] of tensor + 1; their elements lie in (-1, 1). c = 1/sqrt(k), c' = 1/sqrt(l) where ``normalize``
    (as NOLA's GPT-2 code; its README leaves them out), else 1. With ``frozen_a`` A₀ is basis k times 1/sqrt(in), which
    is kaiming_uniform(a=sqrt(5)) as NOLA's code draws it, and takes no memory either; without it A₀ = 0.
    """
    k, l = alpha.shape[-1], beta.shape[-1]
    c = [1 / math.sqrt(max(n, 1)) if normalize else 1.0 for n in (k, l)]
    frozen = [alpha.new_full((*alpha.shape[:-1], 1), in_features**-0.5 / c[0])] if frozen_a else []
    stream = (seed, METHODS["nola"], DISTRIBUTIONS[distribution], tensor)
    coef = torch.cat([alpha.float(), *frozen, beta.float()], -1)
    ab = ops.basis_combine(coef, None, *stream, r, [in_features, out_features], [k + len(frozen), l], c)
    a, b = ab.split([in_features, out_features], -1)
    return a, b.mT


def nola_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    seed: int,
    r: int,
    scale: float = 1.0,
    normalize: bool = True,
    frozen_a: bool = True,
    distribution: str = "uniform8",
    tensor: int = 0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ with A and B of ``nola_factors``; x [..., I], weight [O, I].

    Backward saves x, S [T, r], A and B of this layer, and regenerates the bases.
    """
    x, weight, bias = base.cast(x, weight, bias)
    O, I = weight.shape
    a, b = nola_factors(alpha, beta, seed, r, I, O, normalize, frozen_a, distribution, tensor)
    with torch.autocast(x.device.type, enabled=False):
        return lora_linear(x, weight, bias, a, b, scale, dropout_p, training)
