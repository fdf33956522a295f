# SPDX-License-Identifier: Apache-2.0
"""Adapters over random bases as folders for stock PEFT: as plain LoRA, or as VeRA and RandLoRA with their projections."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from .nn import NOLALinear, RandLoRALinear, VeRALinear
from .nn.basis import BasisLinear

__all__ = ["to_lora", "to_peft"]

MAX_RANK = 512  # of lrkern's and vLLM's LoRA kernels


def _layers(who: str, model: nn.Module | Mapping[str, nn.Module], kinds: str):
    """All modules and the layers over random bases, by name."""
    named = dict(model if isinstance(model, Mapping) else model.named_modules())
    layers = {name: m for name, m in named.items() if isinstance(m, BasisLinear)}
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
    named, layers = _layers("to_lora", model, "NOLALinear or VeRALinear")
    for name, m in layers.items():
        if isinstance(m, RandLoRALinear):
            raise ValueError(
                f"lrkern.convert.to_lora: {name} must be NOLALinear or VeRALinear, got RandLoRALinear: its ΔW has full "
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
            tensors[f"base_model.model.{name}.{key}.weight"] = factor.cpu().contiguous()
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "adapter_model.safetensors.partial"  # a reader never meets half a file
    save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    partial.replace(folder / "adapter_model.safetensors")


def to_peft(model: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the VeRALinear or the RandLoRALinear layers of a model as a PEFT folder of that kind, with the generated
    projections in it (save_projection=True): stock PEFT computes the same up to rounding.

    All layers must share one pair, as PEFT's do: one seed, r and distribution, and for VeRA one max_in; for RandLoRA
    one randlora_alpha, and not paper_pairing. Refused with a ValueError before anything is written: what differs, NOLALinear,
    which PEFT does not have (``to_lora``), and coefficients that are not finite.
    """
    from .files.projections import save_randlora, save_vera  # peft, which to_lora does without

    _, layers = _layers("to_peft", model, "VeRALinear or RandLoRALinear")
    first = next(iter(layers.values()))
    same = (
        "r",
        "seed",
        "distribution",
        "dropout",
        *(("randlora_alpha",) if isinstance(first, RandLoRALinear) else ("max_in",)),
    )
    for name, m in layers.items():
        if isinstance(m, NOLALinear) or type(m) is not type(first):
            raise ValueError(
                f"lrkern.convert.to_peft: {name} must be VeRALinear, or RandLoRALinear as all others, got {type(m).__name__}"
            )
        for key in same:
            if getattr(m, key) != getattr(first, key):
                raise ValueError(
                    f"lrkern.convert.to_peft: {name}.{key} must be {getattr(first, key)}, as the first layer's, got "
                    f"{getattr(m, key)}: PEFT's layers share one pair"
                )
        if isinstance(m, RandLoRALinear) and m.paper_pairing:
            raise ValueError(f"lrkern.convert.to_peft: {name}.paper_pairing must be False, PEFT's pairing, got True")
        for key, c in m.named_parameters(recurse=False):
            if not c.isfinite().all():
                raise ValueError(f"lrkern.convert.to_peft: {name}.{key} must be finite, got inf or nan")
    sizes = {name: (m.in_features, m.out_features) for name, m in layers.items()}
    A, B = first.projections()  # any rows and columns of them: sizes follow from the layers
    if isinstance(first, VeRALinear):
        vectors = {name: (sizes[name], m.vera_lambda_d, m.vera_lambda_b) for name, m in layers.items()}
        save_vera(folder, vectors, A, B, first.dropout)
    else:
        vectors = {name: (sizes[name], m.randlora_lambda, m.randlora_gamma) for name, m in layers.items()}
        save_randlora(folder, vectors, A, B, first.randlora_alpha, first.dropout)
