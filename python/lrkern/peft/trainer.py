# SPDX-License-Identifier: Apache-2.0
"""``patch`` for those who do not hold the model themselves: transformers' Trainer, and TRL's trainers, which are its subclasses."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from .summary import Report


class PatchCallback(TrainerCallback):
    """Patches the trainer's model when training starts, once everything that wraps it is there:

        Trainer(model, arguments, train_dataset=data, callbacks=[lrkern.peft.PatchCallback()])

    The main process prints the report; ``report`` keeps it. mixed_training: as ``patch`` takes it. The model stays patched when training
    ends. A model without PEFT layers is refused as ``patch`` does.
    """

    def __init__(self, mixed_training: bool = False):
        self.mixed_training = mixed_training
        self.report: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        from . import patch

        self.report = patch(model, self.mixed_training)
        if state.is_world_process_zero:
            print(self.report)
