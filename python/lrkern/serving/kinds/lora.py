# SPDX-License-Identifier: Apache-2.0
"""LoRA, rsLoRA and DoRA as PEFT writes them, with their biases."""

from torch import Tensor

from ...files.check import check_shape, named, require, shown
from ...files.folder import PREFIX, Config, Sizes, Tensors, by_linear, ranks_and_scalings
from ...files.lora_config import MORE, check_base
from .factors import Factors
from .kind import FAMILIES


class Lora(dict[str, Factors]):
    """Factors by linear, and what took the place of the base's biases, by module."""

    biases: dict[str, Tensor]


def _lora(config: Config, tensors: Tensors, linears: Sizes) -> Lora:
    """LoRA, rsLoRA and DoRA (Hu et al., arXiv 2106.09685; arXiv 2312.03732; Liu et al., arXiv 2402.09353)."""
    for key in MORE:
        require(key == "lora_bias" or not config.get(key), f"{key} must be off, got {shown(config.get(key))}")
    check_base(config)
    bias, dora, of_b = (config.get(key) for key in ("bias", "use_dora", "lora_bias"))
    known = bias in (None, "none", "all", "lora_only")
    require(known, f"bias must be 'none', 'all' or 'lora_only', got {shown(bias)}")
    require(not (dora and of_b), "lora_bias must be off with use_dora, as in PEFT, got both")

    keys, biases, own = ["lora_A.weight", "lora_B.weight"], {}, {}
    keys += ["lora_B.bias"] if of_b else ["lora_magnitude_vector"] if dora else []
    for key, t in tensors.items():
        if bias not in (None, "none") and key.endswith(".bias") and not key.endswith(".lora_B.bias"):
            require(key.startswith(PREFIX), f"{named(key)} must begin with {PREFIX}")
            name = key.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
            require(name not in biases, f"must hold one bias of {named(name)}, got two")
            biases[name] = t
        else:  # PEFT itself leaves the ".weight" of a magnitude out, and reads both
            whole = key.removesuffix(".weight")
            own[whole if whole.endswith(".lora_magnitude_vector") else key] = t

    result = Lora()
    result.biases = biases
    found = by_linear(config, own, linears, *keys)
    scaled = ranks_and_scalings(config, found)
    for name, (a, b, *more) in found.items():
        (I, O), (r, scaling) = linears[name], scaled[name]
        shapes = dict(zip(keys, ((r, I), (O, r), (O,)), strict=False))
        for (key, shape), t in zip(shapes.items(), (a, b, *more), strict=True):
            check_shape(f"{name}.{key.removesuffix('.weight')}", t, shape)
        (vector,) = more or (None,)
        result[name] = Factors(a, b, scaling, *((None, vector) if dora else (vector, None)))
    return result


FAMILIES["LORA"] = _lora
