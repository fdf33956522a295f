# SPDX-License-Identifier: Apache-2.0
"""A gate or a diagonal on the rank axis."""

import torch

from .table import delta, scaling


@delta("adalora-pruned", "AdaLoRALinear", r=3, ranknum=5.0)
@delta("adalora", "AdaLoRALinear", r=4)
def adalora(c, s):
    return (s["lora_alpha"] or s["r"]) / (s["ranknum"] + 1e-5) * c["lora_B"] @ (c["lora_A"] * c["lora_E"])


@delta("sora", "SoRALinear", r=4)
def sora(c, s):
    return scaling(s) * c["lora_B"] @ torch.diag(c["lora_gate"]) @ c["lora_A"]


@delta("beamlora", "BeamLoRALinear", r=4, change_by=0.05)
@delta("beamlora-tau", "BeamLoRALinear", r=4, tau=0.4)
def beamlora(c, s):
    gate = torch.exp(c["lora_gate"] / s["tau"])
    return scaling(s) * s["r"] * c["lora_B"] @ torch.diag(gate / gate.sum()) @ c["lora_A"]


@delta("increlora", "IncreLoRALinear", r=4, reserve=2, at_first="E of the reserve is 1e-5")
@delta("increlora-no_reserve", "IncreLoRALinear", r=4, reserve=0)
def increlora(c, s):
    e = torch.cat([c["lora_E"][:, 0], torch.full_like(c["lora_A"][s["r"] :, 0], 1e-5)])
    return s["lora_alpha"] / (s["r"] + 1e-5) * c["lora_B"] @ torch.diag(e) @ c["lora_A"]


@delta("dylora", "DyLoRALinear", r=4)
@delta("dylora-prefix", "DyLoRALinear", r=5, active=3)
def dylora(c, s):
    b = s["active"]
    return s["lora_alpha"] / b * sum(torch.outer(c["lora_B"][:, k], c["lora_A"][k]) for k in range(b))


@delta("dylora-frozen", "DyLoRALinear", r=5, active=3, frozen=True)
def dylora_frozen(c, s):
    b = s["active"]
    before = {name: c[name].detach() for name in c}
    last = torch.outer(c["lora_B"][:, b - 1], c["lora_A"][b - 1])
    return s["lora_alpha"] / b * (before["lora_B"][:, : b - 1] @ before["lora_A"][: b - 1] + last)
