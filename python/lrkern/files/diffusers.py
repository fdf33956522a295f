# SPDX-License-Identifier: Apache-2.0
"""LoRA as diffusers writes it: pytorch_lora_weights.safetensors, whose keys begin with a part of the pipeline (unet, transformer,
text_encoder, ...), without a config. Written by hand after the layout of its save_lora_weights, not tested against diffusers.

Ranks are those of the tensors, scaling is alpha / rank by each linear's ``.alpha``, or 1 where there is none; or all of it stands as
a LoraConfig of each part in the header's lora_adapter_metadata.
"""

import math
import re
from typing import Any

from torch import Tensor, nn

from .check import named, require, shown
from .folder import LORA, METADATA, PREFIX, Config, Tensors, features_of
from .lora_config import lora_config

_SIDES = {"down": "A", "up": "B", "A": "A", "B": "B"}
_FORMS = (  # whose, then which
    r"(.*)\.lora_([AB])\.(weight|bias)",
    r"(.*)\.lora\.(down|up)\.(weight)",
    r"(.*)\.lora_linear_layer\.(down|up)\.(weight)",
    r"(.*\.to_(?:q|k|v|out))_lora\.(down|up)\.(weight)",  # before 0.22, of attention processors
)
_FACTOR = [re.compile(form, re.DOTALL) for form in _FORMS]
_ALPHA = re.compile(r"(.*?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha", re.DOTALL)
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector(?:\.weight)?", re.DOTALL)
# What a processor's tensors are called in the model: of a unet, of a text encoder.
_PROCESSED = {"to_q": ("q_proj",), "to_k": ("k_proj",), "to_v": ("v_proj",), "to_out": ("to_out.0", "out_proj")}


def component(config: Config, tensors: Tensors, model: nn.Module) -> tuple[Config, Tensors]:
    """PEFT's config and tensors of the part that is this model: the one whose linears, by name and shape, are its."""
    about = config[METADATA]
    require(isinstance(about, dict), f"{METADATA} must be an object, got {type(about).__name__}")
    parsed = [(key, *_parsed(key), tensor) for key, tensor in tensors.items()]
    modules = {name.replace("_orig_mod.", ""): name for name, m in model.named_modules() if features_of(m)}
    sizes = {name: features_of(model.get_submodule(full)) for name, full in modules.items()}
    parts = dict.fromkeys(stem.partition(".")[0] for _, stem, _, _ in parsed)
    fitting, odd = {}, {}
    for part in ("", *parts):  # "": a model that holds the parts by these names, or names without a part
        begin = f"{part}." if part else ""
        mine = [
            (key, _place(stem.removeprefix(begin), sizes), end, t)
            for key, stem, end, t in parsed
            if stem.startswith(begin)
        ]
        if wrong := next((key for key, name, end, t in mine if not _fits(sizes.get(name), end, t)), None):
            odd[part] = wrong
        else:
            fitting[part] = mine
    if not fitting:
        got = " and ".join(f"{named(key)}" for part, key in odd.items() if part) or "none"
        raise ValueError(
            f"must have a part whose linears are all this model's (of {[*map(named, parts)][:8]}), got {got}"
        )
    if len(fitting) > 1:
        which = "write the one that is meant into a file of its own (its keys, without the others)"
        raise ValueError(
            f"must have one part that is this model, got {' and '.join(map(named, list(fitting)[:2]))}: {which}"
        )
    ((part, mine),) = fitting.items()
    found = {f"{PREFIX}{modules[name]}.{end}": t for _, name, end, t in mine if end != "alpha"}
    require(
        len(found) == sum(end != "alpha" for _, _, end, _ in mine),
        "must have each tensor once, got one under two names",
    )
    alphas = {name: (key, t) for key, name, end, t in mine if end == "alpha"}
    ranks = {name: t.shape[0] for _, name, end, t in mine if end == "lora_A.weight"}
    settings = {k.removeprefix(f"{part}."): v for k, v in about.items() if part and k.startswith(f"{part}.")}
    require(
        settings or not about or part, f"{METADATA} must be of one part, got a model of several: serve each by itself"
    )
    if settings:
        require(not alphas, f"must have {METADATA} or keys .alpha, got both")
        return {**settings, "peft_type": LORA}, found
    layers = {modules[name]: (r, a) for name, (r, a) in _scaled(ranks, alphas).items()}
    require(layers, f"must hold lora_A and lora_B of linears, got none of {named(part)}")
    more = {"use_dora": any(end == "lora_magnitude_vector" for _, _, end, _ in mine)}
    more["lora_bias"] = any(end == "lora_B.bias" for _, _, end, _ in mine)
    return lora_config(layers, modules.values(), **more), found


def _parsed(key: str) -> tuple[str, str]:
    """Name of the linear, its part in front, and PEFT's end of the key, or "alpha"."""
    text = key.replace("_orig_mod.", "").replace(".processor.", ".")
    if hit := next((hit for form in _FACTOR if (hit := form.fullmatch(text))), None):
        return hit[1], f"lora_{_SIDES[hit[2]]}.{hit[3]}"
    if hit := _MAGNITUDE.fullmatch(text):
        return hit[1], "lora_magnitude_vector"
    if hit := _ALPHA.fullmatch(text):
        return hit[1], "alpha"
    keys = "lora_A.weight, lora_B.weight, lora.down.weight, lora.up.weight or alpha"
    way = "what others wrote (lora_unet_..., lora_te_...), diffusers' load_lora_weights and save_lora_weights convert"
    raise ValueError(f"must have keys of {keys} of a part's linears, got {named(key)}: {way}")


def _place(name: str, sizes: dict[str, Any]) -> str:
    parent, _, last = name.rpartition(".")
    others = [f"{parent}.{other}" for other in _PROCESSED.get(last, ())]
    return next((each for each in (name, *others) if each in sizes), name)


def _fits(size: tuple[int, int] | None, end: str, t: Tensor) -> bool:
    if size is None or end == "alpha":
        return size is not None
    I, O = size
    if end == "lora_A.weight":
        return t.ndim == 2 and t.shape[1] == I
    return t.ndim == (2 if end == "lora_B.weight" else 1) and t.shape[0] == O


def _scaled(ranks: dict[str, int], alphas: dict[str, tuple[str, Tensor]]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each linear."""
    for name, (key, alpha) in alphas.items():
        number = alpha.numel() == 1 and alpha.is_floating_point() and math.isfinite(alpha.item())
        require(number, f"{named(key)} must be a finite number, got shape {list(alpha.shape)} of {alpha.dtype}")
        require(name in ranks, f"lacks lora_A of {named(name)}, which has {named(key)}")
    if not alphas:
        different = sorted(set(ranks.values()))
        got = f"{shown(different)}: put a LoraConfig into the header as {METADATA}, or .alpha beside each"
        require(len(different) < 2, f"ranks must be equal where no alpha is said, got {got}")
        return {name: (r, float(r)) for name, r in ranks.items()}
    if lacking := next((name for name in ranks if name not in alphas), None):
        raise ValueError(f"must have .alpha of all linears or of none, got none of {named(lacking)}")
    return {name: (r, alphas[name][1].item()) for name, r in ranks.items()}
