# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear layers as PEFT folders."""

import math
from pathlib import Path

import torch
from torch import nn

from ..nn import FusedLoRALinear
from .check import check_finite, check_shape, named, refusal, require, shown
from .folder import LORA, PREFIX, check_config, peft_type, ranks_and_scalings, read_adapter, write_adapter


def _modules(model: nn.Module) -> dict[str, FusedLoRALinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    require(found, f"lrkern.peft: model must have FusedLoRALinear layers, got {type(model).__name__} with none")
    return found


def _in_file(modules: dict[str, FusedLoRALinear]) -> dict[str, nn.Parameter]:
    """The parameters by the keys that PEFT's files give them."""
    in_file = lambda key: key.replace("vector.weight", "vector")
    return {f"{PREFIX}{name}.{in_file(k)}": p for name, m in modules.items() for k, p in m.coefficients().items()}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the factors of a model's FusedLoRALinear layers as a PEFT folder that PeftModel.from_pretrained loads."""
    import peft

    modules = _modules(model)
    first = next(iter(modules.values()))
    for flag in ("use_rslora", "use_dora"):
        one = all(getattr(m, flag) == getattr(first, flag) for m in modules.values())
        require(one, f"lrkern.peft.save_adapter: one PEFT folder has one {flag} for all layers, got both")
    config = peft.LoraConfig(
        **first.settings,
        target_modules=sorted(modules),
        rank_pattern={name: m.r for name, m in modules.items() if m.r != first.r},
        alpha_pattern={name: m.lora_alpha for name, m in modules.items() if m.lora_alpha != first.lora_alpha},
        inference_mode=True,
    )
    write_adapter(folder, config, _in_file(modules))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Loads a PEFT LoRA folder into a model's FusedLoRALinear layers. The whole file is checked before anything changes:
    safetensors only, every layer present, nothing left over, shapes and scale equal, values finite."""
    modules = _modules(model)
    parameters = _in_file(modules)
    with refusal(f"lrkern.peft.load_adapter: {named(str(folder))}: ", "; the model is unchanged"):
        config, tensors = read_adapter(folder)
        check_config(config)
        kind, bias = peft_type(config), config.get("lora_bias")
        got = f"peft_type={shown(kind)}, lora_bias={shown(bias)}"
        require(kind == LORA and not bias, f"must be LoRA or DoRA, got {got}")
        per_layer = ranks_and_scalings(config, modules)
        if missing := sorted(parameters.keys() - tensors.keys()):
            raise ValueError(f"lacks {missing[0]} and {len(missing) - 1} more")
        if extra := sorted(tensors.keys() - parameters.keys()):
            raise ValueError(f"has {named(extra[0])} and {len(extra) - 1} more that the model does not")
        for name, m in modules.items():
            r, scaling = per_layer[name]
            same = r == m.r and math.isclose(scaling, m.scaling)
            require(same, f"{name} must have r={m.r}, scaling={m.scaling:g}, got r={r}, scaling={scaling:g}")
        for key, weight in parameters.items():
            check_shape(key, tensors[key], weight.shape)
            check_finite(key, tensors[key])
    with torch.no_grad():
        for key, weight in parameters.items():
            weight.copy_(tensors[key])
