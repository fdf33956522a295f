# SPDX-License-Identifier: Apache-2.0
"""Of configs and tensors as PEFT's files have them, and of lrkern's own layers: what they say of a model's linears."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files.check import named, require, shown
from ...files.folder import Config, Tensors, check_config, linear_of, peft_type, targeted
from ...limits import DTYPES
from ...nn.linear import AdapterLinear
from .kind import FAMILIES, Sizes

if TYPE_CHECKING:
    from .kind import Kind


def of_folder(config: Config, tensors: Tensors, linears: Sizes) -> Any:
    """The parts of an adapter of PEFT's."""
    check_config(config)
    kind = peft_type(config)
    require(kind in FAMILIES, f"peft_type must be one of {sorted(FAMILIES)}, got {shown(kind)}")
    require(isinstance(tensors, Mapping), f"tensors must be tensors by key, got {type(tensors).__name__}")
    for key, tensor in tensors.items():
        require(
            isinstance(key, str) and isinstance(tensor, Tensor), f"tensors must be tensors by key, got {shown(key)}"
        )
        known = tensor.dtype in (*DTYPES, torch.float64)
        require(known, f"{named(key)} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        held = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
        got = "none" if tensor.is_meta else "sparse or nested ones"
        require(held, f"{named(key)} must hold all its values, got {got}")
    return FAMILIES[kind](config, tensors, linears)


def of_layers(layers: Mapping[str, AdapterLinear], linears: Sizes, kinds: Iterable["Kind"]) -> Any:
    """The parts of the layers of a file of lrkern's own, for one of these kinds."""
    for name, layer in layers.items():
        require(name in linears, f"must be of this model's linears, got {named(name)}")
        want, got = list(linears[name]), [layer.in_features, layer.out_features]
        require(got == want, f"{name} must be {want}, got {got}")
    return next(parts for kind in kinds if (parts := kind.of_layers(layers)) is not None)


def plain(config: Config, more: tuple[str, ...]) -> None:
    """Refuses what trains more than the adapter's own tensors."""
    for key in more:
        require(not config.get(key), f"{key} must be off, got {shown(config.get(key))}")
    bias = config.get("bias", "none")
    require(bias == "none", f"bias must be 'none', got {shown(bias)}")


def by_linear(config: Config, tensors: Tensors, linears: Sizes, *keys: str) -> dict[str, list[Tensor]]:
    """By linear the tensors of these keys, all there, of the linears that the config names and no other."""
    what, ends = " and ".join(keys), tuple(f".{key}" for key in keys)
    found: dict[str, dict[str, Tensor]] = {}
    for k, tensor in tensors.items():
        name = linear_of(k, ends)
        require(name, f"must hold {what} of linears, got {named(k)}")
        found.setdefault(name, {})[next(key for key in keys if k.endswith(f".{key}"))] = tensor
    require(found, f"must hold {what} of linears, got none")
    if unknown := sorted(found.keys() - linears.keys()):
        raise ValueError(f"must be of this model's linears, got {named(unknown[0])}")
    lacking = [f"{name}.{k.removesuffix('.weight')}" for name in found for k in keys if k not in found[name]]
    if (wanted := targeted(config, linears)) is not None:
        lacking += sorted(wanted - found.keys())
        if extra := sorted(found.keys() - wanted):
            targets = shown(config.get("target_modules"))
            raise ValueError(f"must hold what target_modules={targets} names and no more, got {extra[0]}")
    if lacking:
        raise ValueError(f"lacks {lacking[0]} and {len(lacking) - 1} more")
    return {name: [parts[k] for k in keys] for name, parts in found.items()}
