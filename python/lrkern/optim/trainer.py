# SPDX-License-Identifier: Apache-2.0
"""Rules in transformers' Trainer, and in TRL's trainers, which are its subclasses."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..extras import extra
from . import surgery
from .rule import Rule

with extra("lrkern.optim.StepCallback"):
    from transformers import TrainerCallback

FILE = "lrkern_steps.pt"


class StepCallback(TrainerCallback):
    """Calls ``step`` of rules after each step of the optimizer, and keeps their state in the Trainer's checkpoints:

        rule = lrkern.optim.AdaLoRABudget(model, target_r=4, total_steps=1000)
        callback = lrkern.optim.StepCallback(rule)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()

    To go on from a checkpoint, make model, rule and trainer as at the beginning, then:

        callback.resume(folder)  # first: it gives the layers the shapes that the checkpoint has
        trainer.train(resume_from_checkpoint=folder)

    A training that goes on without it, or from another step, is refused, and load_best_model_at_end beside rules that change shapes
    (``Rule.RESHAPES``), as the best model has other ones. In several processes such rules need DistributedDataParallel, which is made to
    see the new parameters.
    """

    def __init__(self, *rules: Rule):
        self.rules, self._at = rules, 0
        self._wrapper: DistributedDataParallel | None = None
        self._hook: Any = None

    def resume(self, folder: str | Path) -> None:
        state = torch.load(Path(folder) / FILE, map_location="cpu", weights_only=True)
        if len(state["rules"]) != len(self.rules):
            raise ValueError(f"StepCallback.resume: rules must be {len(state['rules'])}, got {len(self.rules)}")
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(saved)
        self._at = state["global_step"]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != self._at:
            must = f"go on from step {self._at}, where its rules are; call resume(checkpoint) before train(), got step"
            raise ValueError(f"StepCallback: training must {must} {state.global_step}")
        for rule in self.rules:
            kind = type(rule).__name__
            if args.load_best_model_at_end and rule.RESHAPES:
                raise ValueError(
                    f"StepCallback: {kind} must go without load_best_model_at_end, got True: shapes change"
                )

        self._unwatch()  # a training that raised has not said its end
        if args.world_size > 1 and any(rule.RESHAPES == "parameters" for rule in self.rules):
            self._hook = model.register_forward_pre_hook(self._look)

    def _look(self, module: Any, inputs: Any) -> None:
        """What wraps the model, which the Trainer tells no callback: within a forward torch knows it."""
        if self._wrapper is None:
            self._wrapper = DistributedDataParallel._get_active_ddp_module()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        skipped = getattr(optimizer, "step_was_skipped", False)
        for rule in self.rules:
            if self._hook is not None and self._wrapper is None and rule.RESHAPES == "parameters":
                must = f"must train in DistributedDataParallel where it has {args.world_size} processes, found no such wrapper"
                raise ValueError(f"StepCallback: {type(rule).__name__} {must}")
            new = rule.skip() if skipped else rule.step(optimizer)
            if new and self._wrapper is not None:
                surgery.rewrap(self._wrapper)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unwatch()

    def _unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._wrapper = self._hook = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            rules = [rule.state_dict() for rule in self.rules]
            torch.save({"global_step": state.global_step, "rules": rules}, folder / FILE)
