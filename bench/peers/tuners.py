# SPDX-License-Identifier: Apache-2.0
"""Stock PEFT's tuners that lrkern.peft.patch fuses, at the sizes of the demo: TUNERS by name."""

from collections.abc import Callable

import peft
import torch
from torch import nn

LORA = {"r": 16, "lora_alpha": 32}

# By name a function of the number of steps, which AdaLoRA's budget goes by.
TUNERS: dict[str, Callable[[int], peft.PeftConfig]] = {
    "lora": lambda steps: peft.LoraConfig(**LORA),
    "lora_dropout": lambda steps: peft.LoraConfig(**LORA, lora_dropout=0.1),
    "dora": lambda steps: peft.LoraConfig(**LORA, use_dora=True),
    "adalora": lambda steps: peft.AdaLoraConfig(
        init_r=16, target_r=8, tinit=steps // 8, tfinal=steps // 4, total_step=steps, lora_alpha=32
    ),
    "vera": lambda steps: peft.VeraConfig(r=256),
    "randlora": lambda steps: peft.RandLoraConfig(r=32),
    "miss": lambda steps: peft.MissConfig(r=32),
    "miss_mini": lambda steps: peft.MissConfig(r=32, mini_r=64, init_weights="mini"),
    "miss_bat": lambda steps: peft.MissConfig(r=32, init_weights="bat"),
}
# Learning rates, as `make demo ARGS="--method all"` found them (docs/methods.md); 2e-3 for others.
RATES = {"adalora": 8e-3, "vera": 3.2e-2, "miss": 5e-4, "miss_mini": 5e-4, "miss_bat": 5e-4}


def stock(model: nn.Module, tuner: str, target: str, steps: int, seed: int) -> peft.PeftModel:
    """The model with the tuner's layers on what target, a regular expression, names, and its head trained beside them."""
    config = TUNERS[tuner](steps)
    config.task_type, config.target_modules = peft.TaskType.SEQ_CLS, target
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)
