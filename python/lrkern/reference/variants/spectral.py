# SPDX-License-Identifier: Apache-2.0
"""What trains is a diagonal of a decomposition of W: W' = W_res + B diag(d) A with W_res = W - B diag(d₀) A."""

from .table import delta, scaling


def product(c, d):
    return c["lora_B"] @ d.diag() @ c["lora_A"]


@delta("svfit", "SVFitLinear", r=4)
def svfit(c, s):
    return product(c, c["sigma"]) - product(c, c["sigma0"])


@delta("loldu", "LoLDULinear", r=4, lora_alpha=4.0)
def loldu(c, s):
    return scaling(s) * (product(c, c["vector_z"]) - product(c, c["start"]))


@delta("loldu-scale", "LoLDULinear", r=4, lora_alpha=6.0, train_scale=True)
def loldu_scale(c, s):
    return c["scaling_factor"] * product(c, c["vector_z"]) - product(c, c["start"])
