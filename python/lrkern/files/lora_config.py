# SPDX-License-Identifier: Apache-2.0
"""What the words of PEFT's LoraConfig mean for whoever writes or reads a folder."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .check import require
from .folder import LORA, Config

# Of a LoraConfig, what makes an adapter more than A, B and a magnitude beside frozen weights.
MORE = (
    "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_NOT_PLAIN = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # of init_lora_weights: the first five change W


def check_base(config: Config) -> None:
    """Refuses factors that belong to other base weights than a model comes with."""
    init, convert = config.get("init_lora_weights", True), "path_initial_model_for_weight_conversion"
    require(
        not str(init).lower().startswith(_NOT_PLAIN),
        f"init_lora_weights must leave the base weights as they are, got {init!r} (PEFT converts such adapters: "
        f"save_pretrained({convert}=...))",
    )


def targets(layers: Iterable[str], every: Iterable[str] | None = None) -> list[str] | str:
    """target_modules that hit these layers and no other of a model's modules: their names, or where a name is the end of
    another module's too, or nobody knows the others, a regex. PEFT takes a name for the end of a longer one as well."""
    layers = sorted(layers)
    ends = tuple(f".{name}" for name in layers)
    others = None if every is None else set(every) - set(layers)
    if others is not None and not any(name.endswith(ends) for name in others):
        return layers
    return "|".join(map(re.escape, layers))


def lora_config(layers: Mapping[str, tuple[int, float]], every: Iterable[str] | None, **more: Any) -> dict[str, Any]:
    """A LoraConfig of these layers, rank and lora_alpha by name, among all modules of a model, where they are known. The largest rank is the rule,
    others are in rank_pattern and alpha_pattern, whose keys are regexes of the end of a name."""
    r, alpha = max(layers.values(), key=lambda layer: layer[0])
    config = {
        "peft_type": LORA,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": targets(layers, every),
        "rank_pattern": {f"^{re.escape(name)}": n for name, (n, _) in layers.items() if n != r},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, (_, a) in layers.items() if a != alpha},
    }
    return config | more
