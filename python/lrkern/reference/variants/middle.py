# SPDX-License-Identifier: Apache-2.0
"""A middle matrix between A and B."""

from .table import delta, scaling


@delta("lora_xs", "LoRAXSLinear", r=4, at_first="R is normal with a deviation of 1e-5")
def lora_xs(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_R"] @ c["lora_A"]


@delta("slora", "SLoRALinear", r=4)
def slora(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_N"] @ c["lora_A"]


@delta("lora_sb", "LoRASBLinear", r=4)
def lora_sb(c, s):
    return c["lora_B"] @ c["lora_R"] @ c["lora_A"]


@delta("nlora", "NLoRALinear", r=4, lora_alpha=4.0, at_first="the Nyström approximation of W")
@delta("nlora-slice", "NLoRALinear", r=4, lora_alpha=4.0, init="slice", at_first="slices of W, multiplied")
def nlora(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_N"] @ c["lora_A"]


@delta("nlora-subtract", "NLoRALinear", r=4, lora_alpha=4.0, subtract=True)
def nlora_subtract(c, s):
    return nlora(c, s) - scaling(s) * c["lora_B0"] @ c["lora_NA0"]


@delta("inttune", "IntTuneLinear", r=4, lora_alpha=4.0, at_first="the Nyström approximation of W")
@delta("inttune-slice", "IntTuneLinear", r=4, lora_alpha=4.0, init="slice", at_first="slices of W, multiplied")
def inttune(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_N"] @ c["lora_A"]


@delta("inttune-subtract", "IntTuneLinear", r=4, lora_alpha=4.0, subtract=True)
def inttune_subtract(c, s):
    return inttune(c, s) - scaling(s) * c["lora_B"] @ c["lora_N0"] @ c["lora_A"]


@delta("lora_mini", "LoRAMiniLinear", r=3, a=7, b=5)
def lora_mini(c, s):
    return scaling(s) * c["lora_B"] @ c["lora_B_train"] @ c["lora_A_train"] @ c["lora_A"]


@delta("lora2", "LoRA2Linear", r=6, k=4)
def lora2(c, s):
    scale = (s["lora_alpha"] or s["r"]) / (s["r"] + 1e-5)
    return scale * c["lora_bb"] @ c["lora_aa"] @ c["lora_E"][:, 0].diag() @ c["lora_B"] @ c["lora_A"]
