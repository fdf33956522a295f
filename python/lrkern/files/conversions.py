# SPDX-License-Identifier: Apache-2.0
"""lrkern's adapters as folders for stock PEFT: as plain LoRA, or as PEFT's method of the same name with its projections."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..limits import MAX_RANK
from ..nn.linear import AdapterLinear, LowRankLinear
from .folder import PREFIX, write_adapter
from .own import classes, either, is_own
from .projections import METHODS


def _layers(who: str, model: nn.Module | Mapping[str, nn.Module], kinds: str):
    """All modules and those of lrkern's own, by name."""
    named = dict(model if isinstance(model, Mapping) else model.named_modules())
    layers = {name: m for name, m in named.items() if is_own(m)}
    if not layers:
        raise ValueError(f"lrkern.convert.{who}: model must have {kinds} layers, got none")
    if "" in layers:
        raise ValueError(f"lrkern.convert.{who}: model must hold its layers by name, got a layer; give {{name: layer}}")
    return named, layers


def to_lora(model: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the NOLALinear and VeRALinear layers of a model as a plain PEFT LoRA folder, equal up to rounding: for stock
    PEFT, vLLM and others that serve LoRA.

    model: one that holds the layers, or the layers by the names the base model has for them. NOLA becomes its generated A
    and scaling · B, VeRA becomes diag(d) A and diag(b) B, in float32 with lora_alpha = r, a scaling of 1. Ranks that differ
    go to rank_pattern and alpha_pattern. The folder has adapter_config.json and adapter_model.safetensors, a LoRA's
    size: 4 r (in + out) bytes a layer.

    Refused with a ValueError before anything is written: RandLoRALinear, whose ΔW has full rank, a rank above 512,
    coefficients that are not finite, no layer at all, and a layer without a name.
    """
    kinds = either(cls for cls in classes() if issubclass(cls, LowRankLinear))
    named, layers = _layers("to_lora", model, kinds)
    for name, m in layers.items():
        if not isinstance(m, LowRankLinear):
            raise ValueError(
                f"lrkern.convert.to_lora: {name} must be {kinds}, got {type(m).__name__}: its ΔW has full "
                f"rank, {min(m.in_features, m.out_features)}, which no LoRA of a lower rank equals"
            )
        if m.r > MAX_RANK:
            raise ValueError(
                f"lrkern.convert.to_lora: {name} must have a rank of at most {MAX_RANK}, the most that LoRA kernels take, got "
                f"r={m.r}"
            )
    tensors = {}
    for name, m in layers.items():
        a, b, scale = m.factors()
        for key, factor in (("lora_A", a), ("lora_B", scale * b)):
            if not factor.isfinite().all():
                raise ValueError(f"lrkern.convert.to_lora: {name}.{key} must be finite, got inf or nan")
            tensors[f"{PREFIX}{name}.{key}.weight"] = factor
    r = max(m.r for m in layers.values())
    # Names in a list, and the regexes of the patterns, match the end of another layer's name too.
    ends = tuple(f".{name}" for name in layers)
    alone = not any(name.endswith(ends) for name in named.keys() - layers.keys())
    other = {f"^{re.escape(name)}": m.r for name, m in layers.items() if m.r != r}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted(layers) if alone else "|".join(map(re.escape, sorted(layers))),
        "rank_pattern": other,
        "alpha_pattern": other,
    }
    write_adapter(folder, config, tensors)


def to_peft(model: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the VeRALinear or the RandLoRALinear layers of a model as a PEFT folder of that kind, with the generated
    projections in it (save_projection=True): stock PEFT computes the same up to rounding.

    All layers must share one pair, as PEFT's do: one seed, r and distribution, and for VeRA one max_in; for RandLoRA
    one randlora_alpha, and not paper_pairing. Refused with a ValueError before anything is written: what differs, NOLALinear,
    which PEFT does not have (``to_lora``), and coefficients that are not finite.
    """
    kinds = [cls for kind in METHODS for cls in AdapterLinear.KINDS.values() if kind == cls.PEFT_TYPE]
    _, layers = _layers("to_peft", model, either(kinds))
    first = next(iter(layers.values()))
    for name, m in layers.items():
        where = f"lrkern.convert.to_peft: {name}"
        if m.PEFT_TYPE not in METHODS or type(m) is not type(first):
            raise ValueError(f"{where} must be {either(kinds, ', or ')} as all others, got {type(m).__name__}")
        for key in m.PEFT_SHARES:
            if getattr(m, key) != getattr(first, key):
                raise ValueError(
                    f"{where}.{key} must be {getattr(first, key)}, as the first layer's, got {getattr(m, key)}: PEFT's "
                    "layers share one pair"
                )
        if why := m.not_peft():
            raise ValueError(f"{where}.{why}")
        for key, c in m.coefficients().items():
            if not c.isfinite().all():
                raise ValueError(f"{where}.{key} must be finite, got inf or nan")
    vectors = {name: ((m.in_features, m.out_features), *m.coefficients().values()) for name, m in layers.items()}
    A, B = first.projections()  # any rows and columns of them: sizes follow from the layers
    METHODS[first.PEFT_TYPE].save(folder, vectors, A, B, first)
