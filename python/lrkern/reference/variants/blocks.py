# SPDX-License-Identifier: Apache-2.0
"""Factors in blocks."""

import torch
import torch.nn.functional as F

from .table import delta, forward, scaling


@forward("melora", "MELoRALinear", r=2, n=4)
@forward("melora-wide", "MELoRALinear", r=9, n=4)
def melora(x, w, bias, c, s):
    parts = x.chunk(s["n"], -1)
    small = [u @ a.mT @ b.mT for u, a, b in zip(parts, c["lora_A"], c["lora_B"], strict=True)]
    return F.linear(x, w, bias) + scaling(s) * torch.cat(small, -1)


@delta("block_lora", "BlockLoRALinear", r=6, n=3)
def block_lora(c, s):
    return scaling(s) * sum(block @ c["lora_A"] for block in c["lora_B"].chunk(s["n"], 1))
