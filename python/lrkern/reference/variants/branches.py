# SPDX-License-Identifier: Apache-2.0
"""More than a pair of factors: other gradients, other branches, other layers, other times."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import delta, forward, scaling


@forward("allora", "ALLoRALinear", r=4, eta2=2.0)
def allora(x, w, bias, c, s):
    """The rates c_i belong to the gradients of A and B alone: in front of a term that is zero."""
    a, b = c["lora_A"], c["lora_B"]
    rates = 1 / ((b @ a).detach().norm(dim=1) + 1 / s["eta2"]).sqrt()
    for_factors = rates * F.linear(x.detach(), b @ a)
    return F.linear(x, w, bias) + F.linear(x, (b @ a).detach()) + for_factors - for_factors.detach()


@forward("hydra", "HydraLinear", r=4, scaling=0.75)
@forward("hydra-biases", "HydraLinear", r=4, scaling=0.75, branch_bias=True)
def hydra(x, w, bias, c, s):
    def branch(name, u):
        a_bias, b_bias = c.get(f"{name}_A_bias"), c.get(f"{name}_B_bias")
        return F.linear(F.linear(u, c[f"{name}_A"], a_bias), c[f"{name}_B"], b_bias)

    y0 = F.linear(x, w, bias)
    return y0 + s["scaling"] * (branch("parallel", x) + branch("sequential", y0))


@delta("reslora", "ResLoRALinear", r=4)
@delta("reslora-is", "ResLoRALinear", r=4, mode="is")
@delta("reslora-ms", "ResLoRALinear", r=4, mode="ms")
def reslora(c, s):
    """Of a layer without earlier ones; of a chain: ``reslora_update``."""
    return scaling(s) * c["lora_B"] @ c["lora_A"]


def reslora_update(
    mode: str, before: int, xs: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> Tensor:
    """What the last of these layers adds to its y: xs their inputs [T, I], a [R, I] and b [O, R], of the chain's layers in order, before
    how many earlier layers it has."""
    last = len(xs) - 1
    seen = range(last - before, last + 1)
    if mode == "bs":
        return scale * sum(xs[last] @ a[j].mT @ b[j].mT for j in seen)
    if mode == "is":
        return scale * sum(xs[j] for j in seen) @ a[last].mT @ b[last].mT
    return scale * sum(xs[j] @ a[j].mT for j in seen) @ b[last].mT


@delta("cola", "COLALinear", r=4)
@delta("cola-links", "COLALinear", r=4, links=2)
def cola(c, s):
    total = c["lora_B"] @ c["lora_A"]
    for k in range(s["links"]):
        link = slice(k * s["r"], (k + 1) * s["r"])
        total = total + c["chain_B"][:, link] @ c["chain_A"][link]
    return scaling(s) * total


@delta("lorta", "LoRTALinear", r=4, heads=2, layers=3, projections=4, layer=1, projection=2)
@delta(
    "lorta-input",
    "LoRTALinear",
    r=4,
    heads=2,
    layers=3,
    projections=4,
    layer=1,
    projection=2,
    heads_on="input",
    init_scale=0.5,
)
def lorta(c, s):
    """The slice [l, m] of the CP tensor T[l, m, i, h, j], h and j beside one another."""
    a, b, h, m, l = (c[f"lora_{key}"] for key in "ABHML")
    tensor = torch.einsum("ai,ja,ha,ma,la->lmihj", a, b, h, m, l)
    of_layer = tensor[s["layer"], s["projection"]].flatten(1)
    return scaling(s) * (of_layer.mT if s["heads_on"] == "output" else of_layer)
