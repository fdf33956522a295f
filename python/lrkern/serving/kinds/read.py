# SPDX-License-Identifier: Apache-2.0
"""Of configs and tensors as PEFT's files have them, and of lrkern's own layers: what they say of a model's linears."""

import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from ...files.check import require
from ...files.folder import PREFIX, Config, Tensors, peft_type
from ...limits import DTYPES
from ...nn.linear import AdapterLinear
from .kind import FAMILIES, KINDS, Sizes


def of_folder(config: Config, tensors: Tensors, linears: Sizes) -> Any:
    """The parts of an adapter of PEFT's."""
    kind = peft_type(config)
    require(kind in FAMILIES, f"peft_type must be one of {sorted(FAMILIES)}, got {kind!r}")
    for key, tensor in tensors.items():
        known = tensor.dtype in (*DTYPES, torch.float64)
        require(known, f"{key} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    return FAMILIES[kind](config, tensors, linears)


def of_layers(layers: Mapping[str, AdapterLinear], linears: Sizes) -> Any:
    """The parts of the layers of a file of lrkern's own."""
    for name, layer in layers.items():
        require(name in linears, f"must be of this model's linears, got {name}")
        want, got = list(linears[name]), [layer.in_features, layer.out_features]
        require(got == want, f"{name} must be {want}, got {got}")
    return next(parts for kind in reversed(KINDS) if (parts := kind.of_layers(layers)) is not None)


def plain(config: Config, more: tuple[str, ...]) -> None:
    """Refuses what trains more than the adapter's own tensors."""
    for key in more:
        require(not config.get(key), f"{key} must be off, got {config.get(key)!r}")
    bias = config.get("bias", "none")
    require(bias == "none", f"bias must be 'none', got {bias!r}")


def by_linear(config: Config, tensors: Tensors, linears: Sizes, *keys: str) -> dict[str, list[Tensor]]:
    """By linear the tensors of these keys, all there, of the linears that the config names and no other."""
    what, key = " and ".join(keys), re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, keys))})")
    found: dict[str, dict[str, Tensor]] = {}
    for k, tensor in tensors.items():
        match = key.fullmatch(k)
        require(match, f"must hold {what} of linears, got {k}")
        found.setdefault(match[1], {})[match[2]] = tensor
    require(found, f"must hold {what} of linears, got none")
    if unknown := sorted(found.keys() - linears.keys()):
        raise ValueError(f"must be of this model's linears, got {unknown[0]}")
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = peft.LoraConfig(**{name: config.get(name) for name in names})
    lacking = [f"{name}.{k.removesuffix('.weight')}" for name in found for k in keys if k not in found[name]]
    if wanted.target_modules and wanted.target_modules != "all-linear":  # a file of PEFT's has their names
        named = {name for name in linears if check_target_module_exists(wanted, name)}
        lacking += sorted(named - found.keys())
        if extra := sorted(found.keys() - named):
            raise ValueError(f"must be target_modules', got {extra[0]}")
    if lacking:
        raise ValueError(f"lacks {lacking[0]} and {len(lacking) - 1} more")
    return {name: [parts[k] for k in keys] for name, parts in found.items()}
