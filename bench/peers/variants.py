# SPDX-License-Identifier: Apache-2.0
"""Each variant of LoRA as its authors' code computes it, or where there is none as its paper writes it: PUBLISHED by method, a function
run(y0, base, x, c, s) of the base's product y0(), the base layer, x, the coefficients of lrkern's layer and its settings.

Written anew from formulas, in the order of products that such code has: each factor is a linear of its own, and what forms W' does.
"""

from collections.abc import Callable
from typing import Any

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


@beside("lora_xs", "lora_sb")
def lora_xs(x, c, s):
    return chain(x, c["lora_A"], c["lora_R"], c["lora_B"]) * scaling(s)


@beside("slora", "nlora", "inttune")
def slora(x, c, s):
    return chain(x, c["lora_A"], c["lora_N"], c["lora_B"]) * scaling(s)


@beside("adalora")
def adalora(x, c, s):
    return (x @ (c["lora_A"] * c["lora_E"]).T @ c["lora_B"].T) * (s["lora_alpha"] / (s["r"] + 1e-5))
