# SPDX-License-Identifier: Apache-2.0
"""Each variant of LoRA as its authors' code computes it, or where there is none as its paper writes it: PUBLISHED by method, a function
run(y0, base, x, c, s) of the base's product y0(), the base layer, x, the coefficients of lrkern's layer and its settings.

Written anew from formulas, in the order of products that such code has: each factor is a linear of its own, and what forms W' does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[[Callable[[], Tensor], nn.Linear, Tensor, dict[str, Tensor], dict[str, Any]], Tensor]
PUBLISHED: dict[str, Run] = {}


def published(*names: str):
    def register(run: Run) -> Run:
        PUBLISHED.update(dict.fromkeys(names, run))
        return run

    return register


def beside(*names: str):
    """Of an adapter that adds to y0: a function of x in the factors' dtype, the coefficients and the settings."""

    def register(delta: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(y0, base, x, c, s):
            wide = c[next(iter(c))].dtype
            y = y0()
            return y + delta(x.to(wide), c, s).to(y.dtype)

        published(*names)(run)
        return delta

    return register


def scaling(s: dict[str, Any]) -> float:
    return s["lora_alpha"] / s["r"]


def chain(x: Tensor, *factors: Tensor) -> Tensor:
    for f in factors:
        x = F.linear(x, f)
    return x


@beside("lora_xs")
def lora_xs(x, c, s):
    return chain(x, c["lora_A"], c["lora_R"], c["lora_B"]) * scaling(s)


@beside("slora", "nlora", "inttune")
def slora(x, c, s):
    return chain(x, c["lora_A"], c["lora_N"], c["lora_B"]) * scaling(s)


@beside("adalora")
def adalora(x, c, s):
    return (x @ (c["lora_A"] * c["lora_E"]).T @ c["lora_B"].T) * (s["lora_alpha"] / (s["r"] + 1e-5))


@beside("lora_sb")
def lora_sb(x, c, s):
    return chain(x, c["lora_A"], c["lora_R"], c["lora_B"])


@beside("lora_mini")
def lora_mini(x, c, s):
    return chain(x, c["lora_A"], c["lora_A_train"], c["lora_B_train"], c["lora_B"]) * scaling(s)


@beside("lora2")
def lora2(x, c, s):
    """The code forms the product of all five, [in, out], and multiplies x with it; the chain is far cheaper and stands here."""
    inner = chain(x, c["lora_A"], c["lora_B"]) * c["lora_E"].mT
    return chain(inner, c["lora_aa"], c["lora_bb"]) * (s["lora_alpha"] / (s["r"] + 1e-5))


@beside("increlora")
def increlora(x, c, s):
    e = torch.cat([c["lora_E"], c["lora_A"].new_full((s["reserve"], 1), 1e-5)])
    return (x @ (c["lora_A"] * e).T @ c["lora_B"].T) * (s["lora_alpha"] / (s["r"] + 1e-5))


@beside("sora")
def sora(x, c, s):
    return (x @ c["lora_A"].T).mul(c["lora_gate"]) @ c["lora_B"].T * scaling(s)


@beside("beamlora")
def beamlora(x, c, s):
    gate = torch.softmax(c["lora_gate"] / s["tau"], -1) * s["r"]
    return F.linear(F.linear(x, c["lora_A"]) * gate, c["lora_B"]) * scaling(s)


@beside("svfit")
def svfit(x, c, s):
    """Of the difference from the start, so that the base's product is the one of W for all."""
    return F.linear(F.linear(x, c["lora_A"]) * (c["sigma"] - c["sigma0"]), c["lora_B"])


@published("loldu")
def loldu(y0, base, x, c, s):
    """A parametrization of the weight, as the code has it: W' is formed in each call. P L is one matrix here and two there."""
    y = y0()
    delta = (c["lora_B"] * (c["vector_z"] - c["start"])) @ c["lora_A"] * scaling(s)
    return y + F.linear(x.to(delta.dtype), delta).to(y.dtype)


@beside("lorta")
def lorta(x, c, s):
    """lit_gpt's: the layer's matrix [in, out] is formed head by head, and x multiplied with it."""
    middle = c["lora_M"][s["projection"]] * c["lora_L"][s["layer"]]
    heads = [(c["lora_A"].T * (h * middle)) @ c["lora_B"].T for h in c["lora_H"]]
    return x @ torch.cat(heads, 1) * scaling(s)


@beside("dylora")
def dylora(x, c, s):
    b, root = s["active"], (s["r"] / s["active"]) ** 0.5
    return (x @ (c["lora_A"][:b] * root).T) @ (c["lora_B"][:, :b] * root).T * scaling(s)


@beside("melora")
def melora(x, c, s):
    parts = zip(x.chunk(s["n"], -1), c["lora_A"], c["lora_B"], strict=True)
    return torch.cat([chain(part, a, b) for part, a, b in parts], -1) * scaling(s)


@beside("block_lora")
def block_lora(x, c, s):
    """From the abstract: one down-projection, whose product meets each block of B."""
    h = F.linear(x, c["lora_A"])
    return sum(F.linear(h, block) for block in c["lora_B"].chunk(s["n"], 1)) * scaling(s)


@published("hydra")
def hydra(y0, base, x, c, s):
    y = y0()
    wide = c["parallel_A"].dtype
    beside = chain(x.to(wide), c["parallel_A"], c["parallel_B"]) * s["scaling"]
    behind = chain(y.to(wide), c["sequential_A"], c["sequential_B"]) * s["scaling"]
    return y + (beside + behind).to(y.dtype)


@beside("reslora")
def reslora(x, c, s):
    """Mode "bs", one layer before it but for the first."""
    y = chain(x, c["lora_A"], c["lora_B"])
    return (y + chain(x, c["before_A"], c["before_B"]) if "before_A" in c else y) * scaling(s)


@beside("cola", "roselora")
def cola(x, c, s):
    """LoRA between restarts and between prunings, which write zeros into A and B."""
    if "mask_A" in c:
        return chain(x, c["lora_A"] * c["mask_A"], c["lora_B"] * c["mask_B"]) * scaling(s)
    return chain(x, c["lora_A"], c["lora_B"]) * scaling(s)


@beside("prilora")
def prilora(x, c, s):
    return chain(x, c["lora_A"] * c["mask_A"], c["lora_B"]) * scaling(s)


@published("loraprune")
def loraprune(y0, base, x, c, s):
    y = y0()
    delta = chain(x.to(c["lora_A"].dtype), c["lora_A"], c["lora_B"]) * scaling(s)
    return (y + delta.to(y.dtype)) * c["mask"]


class _Rates(torch.autograd.Function):
    """ALLoRA's rule in torch's products: the rates belong to the gradients of A and B alone."""

    @staticmethod
    def forward(ctx, x, a, b, eta2):
        s = F.linear(x, a)
        ctx.save_for_backward(x, a, b, s)
        ctx.eta2 = eta2
        return F.linear(s, b)

    @staticmethod
    def backward(ctx, dy):
        x, a, b, s = ctx.saved_tensors
        norms = ((b @ (a @ a.T)) * b).sum(1).clamp_min(0).sqrt()
        rated = dy * (norms + 1 / ctx.eta2).rsqrt()
        return dy @ b @ a, (rated @ b).T @ x, rated.T @ s, None


@beside("allora")
def allora(x, c, s):
    y = _Rates.apply(x.flatten(0, -2), c["lora_A"], c["lora_B"], s["eta2"])
    return y.unflatten(0, x.shape[:-1])
