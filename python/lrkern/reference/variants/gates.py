# SPDX-License-Identifier: Apache-2.0
"""A gate or a diagonal on the rank axis."""

from .table import delta


@delta("adalora", "AdaLoRALinear", r=4)
def adalora(c, s):
    return (s["lora_alpha"] or s["r"]) / (s["r"] + 1e-5) * c["lora_B"] @ (c["lora_A"] * c["lora_E"])
