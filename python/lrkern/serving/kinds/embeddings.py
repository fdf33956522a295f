# SPDX-License-Identifier: Apache-2.0
"""LoRA of embeddings: y[t] += scale · B A[:, id[t]], factors over one-hot rows."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ...files.check import check_shape, require
from ...files.folder import LORA, Config, Tensors, by_linear, check_plain, peft_type, ranks_and_scalings, targeted
from ...files.lora_config import MORE, check_base
from ..layer import sizes_of
from ..saved import inside
from .factors import Factors

KEYS = "lora_embedding_A", "lora_embedding_B"


def embeddings(
    config: Config, tensors: Tensors, model: nn.Module, but: Collection[str]
) -> tuple[dict[str, Factors], Tensors]:
    """The factors of the model's embeddings, but those in these modules, as PEFT writes them (A [r, V], B [D, r]); and the
    tensors that are left."""
    mine = {k: t for k, t in tensors.items() if k.endswith(KEYS)}
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) and not inside(name, but):
            places.setdefault(module, []).append(name)
    modules = {name: module for module, names in places.items() for name in names}
    if peft_type(config) != LORA or not (mine or targeted(config, modules)):
        return {}, tensors
    check_plain(config, ("use_dora", "ensure_weight_tying", *MORE))
    check_base(config)
    sizes = {name: sizes for name, module in modules.items() if (sizes := sizes_of(module))}
    found, result = by_linear(config, mine, sizes, *KEYS), {}
    for name, (r, scaling) in ranks_and_scalings(config, found).items():
        (a, b), (V, D), at = found[name], sizes[name], places[modules[name]]
        require(len(at) == 1, f"{name} must stand at one place of the model, got {' and '.join(at)}")
        check_shape(f"{name}.{KEYS[0]}", a, (r, V))
        check_shape(f"{name}.{KEYS[1]}", b, (D, r))
        result[name] = Factors(a, b, scaling * _own_scale(modules[name]))
    return result, {k: t for k, t in tensors.items() if k not in mine}


def _own_scale(module: nn.Embedding) -> float:
    """What the module multiplies its rows by, and PEFT the adapter's: a number as the weights' dtype has it."""
    own = getattr(module, "embed_scale", 1.0)
    return float(own if isinstance(own, Tensor) else torch.tensor(own, dtype=module.weight.dtype))
