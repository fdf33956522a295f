# SPDX-License-Identifier: Apache-2.0
"""What trains is a diagonal of a decomposition of W: W' = W_res + B diag(d) A with W_res = W - B diag(d₀) A."""

import torch.nn.functional as F

from .table import forward, scaling


def replaced(x, w, bias, c, new, old):
    """x W'ᵀ + bias."""
    res = w - c["lora_B"] @ old.diag() @ c["lora_A"]
    return F.linear(x, res + c["lora_B"] @ new.diag() @ c["lora_A"], bias)


@forward("svfit", "SVFitLinear", r=4)
def svfit(x, w, bias, c, s):
    return replaced(x, w, bias, c, c["sigma"], c["sigma0"])


@forward("loldu", "LoLDULinear", r=4)
def loldu(x, w, bias, c, s):
    return replaced(x, w, bias, c, scaling(s) * c["vector_z"], scaling(s) * c["start"])


@forward("loldu-scale", "LoLDULinear", r=4, lora_alpha=6.0, train_scale=True)
def loldu_scale(x, w, bias, c, s):
    return replaced(x, w, bias, c, c["scaling_factor"] * c["vector_z"], c["start"])
