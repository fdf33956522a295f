# SPDX-License-Identifier: Apache-2.0
"""LoRA as diffusers writes it: pytorch_lora_weights.safetensors, whose keys begin with a part of the pipeline (unet,
transformer, text_encoder, ...), without a config. After the layout of its save_lora_weights, not tested against diffusers.

Ranks are those of the tensors, scaling is alpha / rank by each linear's ``.alpha``, or 1 where there is none; or all of it
stands as a LoraConfig of each part in the header's lora_adapter_metadata.
"""

import math
import re
from typing import Any, NamedTuple

from torch import Tensor, nn

from .check import named, require, shown
from .folder import LORA, METADATA, PREFIX, Config, Tensors, features_of
from .lora_config import lora_config
from .plain import plain

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


class _Key(NamedTuple):
    key: str  # in the file
    name: str  # of the linear, in its part
    end: str  # PEFT's, or "alpha"
    tensor: Tensor


def component(config: Config, tensors: Tensors, model: nn.Module) -> tuple[Config, Tensors]:
    """PEFT's config and tensors of the part that is this model: the one whose linears, by name and shape, are its."""
    about = config[METADATA]
    require(isinstance(about, dict), f"{METADATA} must be an object, got {type(about).__name__}")
    linears = {plain(name): (name, features_of(m)) for name, m in model.named_modules() if features_of(m)}
    part, keys = _part_of(linears, tensors)
    by: dict[str, dict[str, _Key]] = {}  # by end, by name
    for each in keys:
        if (first := by.setdefault(each.end, {}).setdefault(each.name, each)) is not each:
            both = f"{named(first.key)} and {named(each.key)} are both {each.end} of {named(each.name)}"
            raise ValueError(f"{both}: keep the one that is meant")
    alphas, ranks = (
        by.pop("alpha", {}),
        {name: each.tensor.shape[0] for name, each in by.get("lora_A.weight", {}).items()},
    )
    found = {f"{PREFIX}{linears[name][0]}.{end}": each.tensor for end in by for name, each in by[end].items()}
    settings = {k.removeprefix(f"{part}."): v for k, v in about.items() if part and k.startswith(f"{part}.")}
    one = part or not about
    require(one, f"{METADATA} must be of one part, got a model that holds several: give each part by itself")
    if settings:
        require(not alphas, f"must have {METADATA} or keys .alpha, got both")
        return {**settings, "peft_type": LORA}, found
    require(ranks, f"must hold lora_A and lora_B of linears, got none of {named(part)}")
    layers = {linears[name][0]: scaled for name, scaled in _scaled(ranks, alphas).items()}
    more = {"use_dora": "lora_magnitude_vector" in by, "lora_bias": "lora_B.bias" in by}
    return lora_config(layers, [name for name, _ in linears.values()], **more), found


def _part_of(linears: dict[str, Any], tensors: Tensors) -> tuple[str, list[_Key]]:
    """Which part of the pipeline is the model, and its keys."""
    whole = [_Key(key, *_parsed(key), tensor) for key, tensor in tensors.items()]
    parts: dict[str, list[_Key]] = {"": whole}  # names without a part, or a model that holds the parts by theirs
    for each in whole:
        part, _, name = each.name.partition(".")
        if part:
            parts.setdefault(part, []).append(each._replace(name=name))
    fitting, odd = {}, {}
    for part, keys in parts.items():
        placed = [each._replace(name=_place(each.name, linears)) for each in keys]
        wrong = next((each.key for each in placed if not _fits(linears.get(each.name, (None, None))[1], each)), None)
        if wrong is None:
            fitting[part] = placed
        else:
            odd[part] = wrong
    must = "must have one part whose linears are all this model's, by name and shape"
    got = ", ".join(f"{named(part)} with {named(key)}" for part, key in list(odd.items())[1:5])
    require(fitting, f"{must}, got {got or 'none'}")
    which = "write the keys of the one that is meant into a file of their own"
    require(len(fitting) == 1, f"{must}, got {' and '.join([named(part) or 'all' for part in fitting][:2])}: {which}")
    return next(iter(fitting.items()))


def _parsed(key: str) -> tuple[str, str]:
    """Name of the linear, its part in front, and PEFT's end of the key, or "alpha"."""
    text = plain(key).replace(".processor.", ".")
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


def _fits(size: tuple[int, int] | None, key: _Key) -> bool:
    if size is None or key.end == "alpha":
        return size is not None
    (I, O), t = size, key.tensor
    if key.end == "lora_A.weight":
        return t.ndim == 2 and t.shape[1] == I
    return t.ndim == (2 if key.end == "lora_B.weight" else 1) and t.shape[0] == O


def _scaled(ranks: dict[str, int], alphas: dict[str, _Key]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each linear."""
    for name, (key, _, _, alpha) in alphas.items():
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
    return {name: (r, alphas[name].tensor.item()) for name, r in ranks.items()}
