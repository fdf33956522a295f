# SPDX-License-Identifier: Apache-2.0
"""Layers of lrkern.nn.variants for tests, and what they compute by the registry of formulas."""

import torch
from torch import Tensor

from lrkern.nn import variants
from lrkern.reference.variants import VARIANTS, Variant


def make(v: Variant, dtype=torch.float32, seed: int = 3, **more):
    """A small layer of a variant, from torch's seed."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(*v.sizes, dtype=dtype)
    return getattr(variants, v.cls).from_linear(base, **{**v.settings, **more})


@torch.no_grad()
def change(layer, v: Variant, seed: int = 5):
    """What trains is changed, as training would; masks are drawn, and what is frozen and still zero: COLA's chain."""
    g = torch.Generator().manual_seed(seed)
    for name, p in layer.coefficients().items():
        if p.dtype == torch.bool:
            p.copy_(torch.rand(p.shape, generator=g) < 0.7)
        elif p.requires_grad or not p.any():
            p.add_((torch.randn(p.shape, generator=g) * v.change_by).to(p))
            if name in v.positive:
                p.abs_()
    return layer


def formula(layer, v: Variant, x: Tensor, as_type) -> tuple[Tensor, dict[str, Tensor]]:
    """y by the registry's formula, all operands through ``as_type``, and its leaves by name: x and what trains."""
    c = {name: as_type(p.detach()) for name, p in layer.coefficients().items()}
    leaves = {n: t.requires_grad_() for n, t in c.items() if layer.get_parameter(n).requires_grad}
    leaves["x"] = as_type(x.detach()).requires_grad_()
    base = layer.base_layer
    w, bias = as_type(base.weight.detach()), None if base.bias is None else as_type(base.bias.detach())
    return v.forward(leaves["x"], w, bias, c, layer.settings), leaves


EACH = {name: VARIANTS[name] for name in sorted(VARIANTS)}
