# SPDX-License-Identifier: Apache-2.0
"""lrkern's adapters as folders for stock PEFT: as plain LoRA, or as PEFT's method of the same name."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..limits import MAX_RANK
from ..nn.linear import AdapterLinear
from .check import require
from .folder import PREFIX, WRITERS, write_adapter
from .lora_config import lora_config
from .own import check_places, classes, either, own_layers
from .plain import plainly


def _layers(who: str, model: nn.Module | Mapping[str, nn.Module], kinds: str):
    """All modules and those of an own file's classes, by name."""
    named = plainly(dict(model if isinstance(model, Mapping) else model.named_modules()))
    layers = own_layers(named.items())
    require(layers, f"{who}: model must have {kinds} layers, got none")
    if isinstance(model, nn.Module):
        check_places(who, model, classes())
    text = "model must hold its layers by name, got a layer; give {name: layer}"
    require("" not in layers, f"{who}: {text}")
    return named, layers


def to_lora(model: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the layers of a model whose ΔW is of low rank (NOLALinear, VeRALinear, MoRALinear, MissLinear, S2FTLinear, most of
    ``nn.variants``) as a plain PEFT LoRA folder, equal up to rounding: for stock PEFT, vLLM and others that serve LoRA.

    model: one that holds the layers, or the layers by the names the base model has for them. NOLA becomes its generated A
    and scaling · B, VeRA becomes diag(d) A and diag(b) B, MoRA of types 1 to 4 its maps with M in A, MiSS but
    "bat" its fold and its block, S2FT the features that are picked and their change, in float32 with lora_alpha = r, a scaling of 1. Ranks that differ go to rank_pattern and
    alpha_pattern; dropout is not kept. The folder has adapter_config.json and adapter_model.safetensors, a LoRA's size: 4 r
    (in + out) bytes a layer.

    Refused with a ValueError before anything is written: what has full rank (RandLoRALinear, MoRA of type 6, MiSS "bat"), a rank above 512,
    coefficients that are not finite, no layer at all, and a layer without a name.
    """
    kinds = either(cls for cls in classes() if cls.has_factors())
    named, layers = _layers("lrkern.convert.to_lora", model, kinds)
    for name, m in layers.items():
        where, full = f"lrkern.convert.to_lora: {name}", min(m.in_features, m.out_features)
        why = f"its ΔW has full rank, {full}, which no LoRA of a lower rank equals"
        got = type(m).__name__ + (m._settings_repr() if m.has_factors() else "")
        require(m.low_rank, f"{where} must be {kinds}, got {got}: {why}")
        most = f"{MAX_RANK}, the most that LoRA kernels take"
        require(m.lora_rank <= MAX_RANK, f"{where} must have a rank of at most {most}, got r={m.lora_rank}")
    tensors = {}
    for name, m in layers.items():
        a, b, scale = m.factors()
        for key, factor in (("lora_A", a), ("lora_B", scale * b)):
            finite = factor.isfinite().all()
            require(finite, f"lrkern.convert.to_lora: {name}.{key} must be finite, got inf or nan")
            tensors[f"{PREFIX}{name}.{key}.weight"] = factor
    config = lora_config({name: (m.lora_rank, m.lora_rank) for name, m in layers.items()}, named)
    write_adapter(folder, config, tensors)


def to_peft(model: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the VeRALinear, RandLoRALinear, MissLinear or AdaLoRALinear layers of a model as a PEFT folder of that kind: stock PEFT
    computes the same up to rounding. VeRA and RandLoRA with the generated projections in it (save_projection=True).

    All layers must be alike in what PEFT has once: of MiSS all settings; of AdaLoRA all but the rank; of the others one
    pair, which is one seed, r and distribution, and for VeRA one max_in; for RandLoRA one randlora_alpha, and not paper_pairing. Refused with a ValueError
    before anything is written: what differs, NOLALinear and MoRALinear, which PEFT does not have (``to_lora``), and coefficients
    that are not finite.
    """
    named, layers = peft_layers("lrkern.convert.to_peft", model)
    WRITERS[next(iter(layers.values())).PEFT_TYPE](folder, layers, named)


def peft_layers(who: str, model: nn.Module | Mapping[str, nn.Module]):
    """All modules and the layers by name, which are one adapter of a method of PEFT's."""
    kinds = [cls for kind in WRITERS for cls in AdapterLinear.KINDS.values() if kind == cls.PEFT_TYPE]
    named, layers = _layers(who, model, either(kinds))
    first = next(iter(layers.values()))
    for name, m in layers.items():
        where = f"{who}: {name}"
        alike = m.PEFT_TYPE in WRITERS and type(m) is type(first)
        require(alike, f"{where} must be {either(kinds, ', or ')} as all others, got {type(m).__name__}")
        for key in m.PEFT_SHARES:
            want, got = getattr(first, key), getattr(m, key)
            text = f"must be {want}, as the first layer's, got {got}: PEFT has one for all layers"
            require(got == want, f"{where}.{key} {text}")
        require(not m.not_peft(), f"{where}.{m.not_peft()}")
        for key, c in m.coefficients().items():
            require(c.isfinite().all(), f"{where}.{key} must be finite, got inf or nan")
    return named, layers
