# SPDX-License-Identifier: Apache-2.0
"""The kinds of lrkern.nn's layers for tests that are about all of them, and what a layer computes in plain torch."""

import pytest
import torch

from lrkern.nn import FusedLoRALinear, MissLinear, MoRALinear, NOLALinear, RandLoRALinear, VeRALinear, variants
from lrkern.reference.variants import VARIANTS

KINDS = {
    "lora": (FusedLoRALinear, {"r": 4}),
    "dora": (FusedLoRALinear, {"r": 4, "use_dora": True}),
    "miss": (MissLinear, {"r": 4}),
    "miss_mini": (MissLinear, {"r": 4, "kind": "mini", "mini_r": 4}),
    "miss_bat": (MissLinear, {"r": 4, "kind": "bat"}),
    "mora": (MoRALinear, {"r": 4, "mora_type": 1}),
    "mora_turned": (MoRALinear, {"r": 4, "mora_type": 6}),
    "nola": (NOLALinear, {"r": 4, "k": 6, "l": 7}),
    "vera": (VeRALinear, {"r": 8}),
    "randlora": (RandLoRALinear, {"r": 6}),
}
OF_DELTA = {name: v for name, v in sorted(VARIANTS.items()) if v.delta}
KINDS |= {name: (getattr(variants, v.cls), v.settings) for name, v in OF_DELTA.items()}
EACH = pytest.mark.parametrize(("cls", "settings"), KINDS.values(), ids=KINDS)


def starts_as_base(cls, settings):
    return not any(v.at_first for v in OF_DELTA.values() if (v.cls, v.settings) == (cls.__name__, settings))


def drop(cls, settings, p):
    """The setting that drops with probability p; none for a kind that has no dropout."""
    return {} if settings.get("kind") == "bat" else {"dropout": p}


@torch.no_grad()
def shake(layer, seed=5, by=0.2):
    """Coefficients that act. RandLoRA's are smaller, its scaling is a hundred; and gates, BeamLoRA's temperature is 0.05."""
    g = torch.Generator().manual_seed(seed)
    for name, p in layer.coefficients().items():
        if not p.requires_grad:  # what a slice of W was
            continue
        small = "randlora" in name or "gate" in name
        p.add_(torch.randn(p.shape, generator=g).to(p), alpha=by * (0.05 if small else 1))
    return layer


def beside(layer, y, x):
    """What a layer makes of its base layer's y, where it is no dropout."""
    if not getattr(layer, "use_dora", False):
        return y + (x.float() @ layer.delta_weight().T).to(y.dtype)
    base, low = layer.base_layer, layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    g = layer.lora_magnitude_vector.weight / (base.weight + low).norm(dim=1).detach()
    return y + (g - 1) * (y - base.bias) + g * (x @ low.T)
