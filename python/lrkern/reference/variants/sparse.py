# SPDX-License-Identifier: Apache-2.0
"""Factors and outputs under masks."""

import torch.nn.functional as F

from .table import delta, forward, scaling


@delta("roselora", "RoseLoRALinear", r=4)
def roselora(c, s):
    return scaling(s) * (c["lora_B"] * c["mask_B"]) @ (c["lora_A"] * c["mask_A"])


@delta("prilora", "PRILoRALinear", r=4, r_start=2, r_end=6)
def prilora(c, s):
    return scaling(s) * c["lora_B"] @ (c["lora_A"] * c["mask_A"])


@forward("loraprune", "LoRAPruneLinear", r=4)
def loraprune(x, w, bias, c, s):
    return c["mask"] * (F.linear(x, w, bias) + scaling(s) * F.linear(F.linear(x, c["lora_A"]), c["lora_B"]))
