# SPDX-License-Identifier: Apache-2.0
"""A middle matrix between A and B."""

from .table import delta, scaling


@delta("lora_xs", "LoRAXSLinear", r=4, at_first="R is normal with a deviation of 1e-5")
def lora_xs(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_R"] @ c["lora_A"]


@delta("slora", "SLoRALinear", r=4)
def slora(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_N"] @ c["lora_A"]
