# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA as PEFT's files have it: lora_A, lora_E and lora_B of each linear, of as many ranks as are left.

PEFT divides by the rank that its layers began with, init_r, whatever is left of it: AdaLoRALinear's ``ranknum``. Its rank_pattern says
which of the first ranks are left, and means that many when a folder is read. What a folder does not have of layers is the schedule:
target_r, total_step and the rest of the config are PEFT's defaults, total_step 1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..extras import extra
from ..nn.linear import AdapterLinear
from ..nn.variants import AdaLoRALinear
from .check import check_shape, is_whole, named, require, shown
from .conversions import peft_layers
from .folder import PREFIX, READERS, WRITERS, by_linear, check_plain, write_adapter
from .lora_config import MORE, check_base, targets
from .own import as_layer

if TYPE_CHECKING:
    import peft

KEYS = "lora_A", "lora_E", "lora_B"
MOST = 1 << 16  # of init_r: a folder has a list as long for each layer


def _read(config, tensors, linears):
    check_plain(config, ("use_dora", "use_rslora", *MORE))  # PEFT's AdaLoRA has neither, and ignores a flag
    check_base(config)
    first, masks = config.get("init_r"), config.get("rank_pattern") or {}
    require(is_whole(first, 1, MOST), f"init_r must be a whole number in 1..{MOST}, got {shown(first)}")
    alpha = config.get("lora_alpha")
    require(alpha is not None, "lora_alpha must be a finite number, got None")
    same = {"lora_alpha": alpha if alpha > 0 else 0, "dropout": config.get("lora_dropout") or 0.0}
    layers = {}
    for name, abc in by_linear(config, tensors, linears, *KEYS).items():
        parts = dict(zip(KEYS, (t.float() for t in abc), strict=True))  # PEFT trains and runs them so
        r = parts["lora_E"].shape[0] if parts["lora_E"].dim() else 0
        check_shape(f"{name}.lora_E", parts["lora_E"], (r, 1))
        left = masks.get(f"{name}.lora_E")
        want = first if left is None else sum(left)
        require(r == want, f"{named(name)} must have {want} ranks, as init_r and rank_pattern say, got {r}")
        if r:  # PEFT's layers of no rank add nothing
            settings = {"r": r, "ranknum": float(first)} | same
            layers[name] = as_layer(name, AdaLoRALinear, linears[name], settings, parts)
    require(layers, "must have a rank in one linear at least, got none")
    return layers


def as_folder(
    who: str, model: nn.Module, modules_to_save: Sequence[str] | None = None
) -> tuple["peft.AdaLoraConfig", dict[str, Tensor]]:
    """Config and tensors of the folder of a model's layers; modules_to_save as the config is to name them."""
    every, layers = peft_layers(who, model)
    return _folder(who, layers, every, modules_to_save)


def _folder(who: str, layers: Mapping[str, AdapterLinear], every: Mapping[str, nn.Module], modules_to_save=None):
    with extra(who):
        from peft import AdaLoraConfig

    one = next(iter(layers.values()))
    first = one.ranknum
    for name, m in layers.items():
        whole = m.r <= first <= MOST and first == int(first)
        must = f"be whole and in {m.r}..{MOST}, as PEFT's init_r is, got {first:g}"
        require(whole, f"{who}: {name}.ranknum must {must}")
    left = {f"{name}.lora_E": [i < m.r for i in range(int(first))] for name, m in layers.items() if m.r < first}
    config = AdaLoraConfig(
        init_r=int(first),
        lora_alpha=one.lora_alpha,
        lora_dropout=one.dropout,
        rank_pattern=left or None,
        total_step=1,
        target_modules=targets(layers, every),
        modules_to_save=modules_to_save,
        inference_mode=True,
    )
    return config, {f"{PREFIX}{name}.{key}": m.get_parameter(key) for name, m in layers.items() for key in KEYS}


READERS["ADALORA"] = _read
WRITERS["ADALORA"] = lambda folder, layers, every: write_adapter(folder, *_folder("lrkern.files.save", layers, every))
