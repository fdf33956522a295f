# SPDX-License-Identifier: Apache-2.0
"""Parts of adapters: of configs and tensors as PEFT's files have them, and of lrkern's own layers."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...files.check import named, require, shown
from ...files.folder import PREFIX, READERS, Config, Tensors, check_config, inside, peft_type, saved_modules, targeted
from ...files.names import as_peft
from ...files.read import FLOAT8
from ...limits import DTYPES
from ...nn.linear import AdapterLinear
from ..saved import Saved, read_saved
from .embeddings import embeddings
from .kind import FAMILIES, Sizes

if TYPE_CHECKING:
    from .kind import Kind


def of_folder(
    config: Config, tensors: Tensors, linears: Sizes, kinds: Iterable["Kind"], model: nn.Module
) -> tuple[Any, dict[str, Saved]]:
    """The parts of an adapter of PEFT's, for one of these kinds: what a family makes of it, or those of the layers it holds. And
    the modules that it has copies of."""
    check_config(config)
    kind, known = peft_type(config), {*FAMILIES, *READERS}
    require(kind in known, f"peft_type must be one of {sorted(known)}, got {shown(kind)}")
    require(isinstance(tensors, Mapping), f"tensors must be tensors by key, got {type(tensors).__name__}")
    for key, tensor in tensors.items():
        require(
            isinstance(key, str) and isinstance(tensor, Tensor), f"tensors must be tensors by key, got {shown(key)}"
        )
        known = tensor.dtype in (*DTYPES, torch.float64, *FLOAT8)
        require(known, f"{named(key)} must be float64, float32, float16, bfloat16 or float8, got {tensor.dtype}")
        held = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
        got = "none" if tensor.is_meta else "sparse or nested ones"
        require(held, f"{named(key)} must hold all its values, got {got}")
    config, tensors = as_peft(config, tensors, model)
    modules = saved_modules(config, model)
    if modules and config.get("bias") == "all":  # PEFT writes those of the modules that the copies stand for too
        original = [f"{PREFIX}{name}.original_module" for name in modules]
        tensors = {key: t for key, t in tensors.items() if not inside(key, original)}
    saved = read_saved(config, tensors, modules, model)
    if modules:  # PEFT adapts nothing inside of them
        tensors = {k: t for k, t in tensors.items() if not inside(k.removeprefix(PREFIX), modules)}
        linears = {name: sizes for name, sizes in linears.items() if not inside(name, modules)}
        require(not config.get("ensure_weight_tying"), "ensure_weight_tying must be off, got True")
    config = {**config, "modules_to_save": None}
    factors, tensors = embeddings(config, tensors, model, modules)
    if factors and not tensors and not targeted(config, linears):
        return factors, saved
    if kind in FAMILIES:
        parts = FAMILIES[kind](config, tensors, linears)
    else:
        parts = of_layers(READERS[kind](config, tensors, linears), linears, kinds)
    if factors:
        parts.update(factors)
    return parts, saved


def of_layers(layers: Mapping[str, AdapterLinear], linears: Sizes, kinds: Iterable["Kind"]) -> Any:
    """The parts of lrkern's own layers, for one of these kinds."""
    for name, layer in layers.items():
        require(name in linears, f"must be of this model's linears, got {named(name)}")
        want, got = list(linears[name]), [layer.in_features, layer.out_features]
        require(got == want, f"{name} must be {want}, got {got}")
    return next(parts for kind in kinds if (parts := kind.of_layers(layers)) is not None)
