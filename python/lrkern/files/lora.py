# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear layers as PEFT folders."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import FusedLoRALinear
from .folder import LORA, PREFIX, check_finite, check_shape, rank_and_scaling, read_adapter, write_adapter


def _modules(model: nn.Module) -> dict[str, FusedLoRALinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    if not found:
        raise ValueError(f"lrkern.peft: model must have FusedLoRALinear layers, got {type(model).__name__} with none")
    return found


def _in_file(modules: dict[str, FusedLoRALinear]) -> dict[str, nn.Parameter]:
    """The parameters by the keys that PEFT's files give them."""
    found = {}
    for name, m in modules.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = m.lora_A.weight
        found[f"{PREFIX}{name}.lora_B.weight"] = m.lora_B.weight
        if m.use_dora:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = m.lora_magnitude_vector.weight
    return found


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the factors of a model's FusedLoRALinear layers as a PEFT folder that PeftModel.from_pretrained loads."""
    import peft

    modules = _modules(model)
    first = next(iter(modules.values()))
    for flag in ("use_rslora", "use_dora"):
        if any(getattr(m, flag) != getattr(first, flag) for m in modules.values()):
            raise ValueError(f"lrkern.peft.save_adapter: one PEFT folder has one {flag} for all layers, got both")
    config = peft.LoraConfig(
        r=first.r,
        lora_alpha=first.lora_alpha,
        lora_dropout=first.lora_dropout,
        use_rslora=first.use_rslora,
        use_dora=first.use_dora,
        target_modules=sorted(modules),
        rank_pattern={name: m.r for name, m in modules.items() if m.r != first.r},
        alpha_pattern={name: m.lora_alpha for name, m in modules.items() if m.lora_alpha != first.lora_alpha},
        inference_mode=True,
    )
    write_adapter(folder, config, _in_file(modules))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Loads a PEFT LoRA folder into a model's FusedLoRALinear layers. The whole file is checked before anything changes:
    safetensors only, every layer present, nothing left over, shapes and scale equal, values finite."""
    folder, modules = Path(folder), _modules(model)
    parameters = _in_file(modules)
    try:
        config, tensors = read_adapter(folder)
        _check(config, tensors, modules, parameters)
    except ValueError as error:
        raise ValueError(f"lrkern.peft.load_adapter: {folder}: {error}; the model is unchanged") from error
    with torch.no_grad():
        for key, weight in parameters.items():
            weight.copy_(tensors[key])


def _check(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    modules: dict[str, FusedLoRALinear],
    parameters: dict[str, nn.Parameter],
) -> None:
    kind, bias = config.get("peft_type"), config.get("lora_bias")
    if kind != LORA or bias:
        raise ValueError(f"must be LoRA or DoRA, got peft_type={kind}, lora_bias={bias}")
    per_layer = {name: rank_and_scaling(config, name) for name in modules}
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise ValueError(f"lacks {missing[0]} and {len(missing) - 1} more")
    if extra := sorted(tensors.keys() - parameters.keys()):
        raise ValueError(f"has {extra[0]} and {len(extra) - 1} more that the model does not")
    for name, m in modules.items():
        r, scaling = per_layer[name]
        if r != m.r or not math.isclose(scaling, m.scaling):
            raise ValueError(f"{name} must have r={m.r}, scaling={m.scaling:g}, got r={r}, scaling={scaling:g}")
    for key, weight in parameters.items():
        check_shape(key, tensors[key], weight.shape)
        check_finite(key, tensors[key])
