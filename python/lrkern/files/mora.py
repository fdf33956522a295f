# SPDX-License-Identifier: Apache-2.0
"""MoRA as its authors' fork of PEFT 0.9 writes it: a LoRA folder with use_mora and mora_type, whose lora_A and lora_B are both M.

lora_alpha and use_rslora mean nothing there. What no file tells: the type that ReMoRA has gone on to since, and the weights that it
has merged into.
"""

import torch

from ..nn import MoRALinear
from .check import named, require
from .folder import FORKS, READERS, by_linear, check_plain, ranks_and_scalings
from .lora_config import MORE, check_base
from .own import as_layer


def _read(config, tensors, linears):
    require(config.get("use_mora"), "use_mora must be true, as the authors' configs have it, got none")
    check_plain(config, ("use_dora", *MORE))
    check_base(config)
    both = {key.replace(".lora_A.", ".lora_B."): t for key, t in tensors.items()} | dict(tensors)  # one of them may do
    found = by_linear(config, both, linears, "lora_A.weight", "lora_B.weight")
    ranks = ranks_and_scalings({**config, "lora_alpha": 1, "alpha_pattern": None}, found)
    kind = config.get("mora_type")
    same = {"mora_type": 1 if kind is None else kind, "dropout": config.get("lora_dropout") or 0.0}
    layers = {}
    for name, (m, again) in found.items():
        settings = {"r": ranks[name][0]} | same
        layers[name] = as_layer(name, MoRALinear, linears[name], settings, {"lora_A.weight": m})
        equal = m.shape == again.shape and torch.equal(m, again)
        require(equal, f"{named(name)}.lora_B.weight must be lora_A.weight, which is M too, got another")
    return layers


FORKS["use_mora"], READERS["MORA"] = "MORA", _read
