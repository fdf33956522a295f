# SPDX-License-Identifier: Apache-2.0
"""IncreLoRA's growth."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.variants import IncreLoRALinear
from . import surgery
from .rule import Averages, Generator, Rule, over_processes


class IncreLoRAGrowth(Rule):
    """Grants ranks to the layers whose ΔW matters most: IncreLoRA (Zhang et al., arXiv 2308.12043).

    The score of a layer is Ī Ū of I = Σ |ΔW ⊙ ∂L/∂ΔW| / (in · out) (``IncreLoRALinear.score``), averaged as AdaLoRA does, or with ``root``
    I = Σ / sqrt(in · out) as the authors' code has it. After step ``warmup``, every ``every`` steps, the ``top_h`` layers of the highest
    score grow by ``add`` ranks each, until all have target_r · layers together: exactly, by fewer ranks at last, where the
    code's total may pass its target. Then all finish: what is in reserve goes.

    A layer sees x before dropout, and the gradient of its y: hooks on the layers form I in backward, until they finish, which costs what a
    gradient of W would. Scores, not gradients, of a step's batches are added up, and averaged over processes. A layer that had no backward in
    training mode since the last step is refused. Under a GradScaler gradients have its scale, and so have scores: within a step all have
    the same, but an average over steps is of several scales.

    The moments of a rank that is new are zero, and Adam's bias correction is that of the ranks before, so that its first steps are up
    to (1 - β₁) / sqrt(1 - β₂), about 3 learning rates long; the authors give new ranks a param_group of their own, where they begin
    with one. Layers are best made with reserve = add.

    Args:
        target_r: ranks a layer in the end, on average. add: 0 for max(1, target_r // 2), the authors' choice for 2 to 8.
        seed: of the new ranks.
    """

    LAYER = IncreLoRALinear
    SETTINGS: ClassVar = ("target_r", "every", "warmup", "top_h", "add", "beta1", "beta2", "root")
    MOVES = ("r", "reserve", "scaling")
    OPTIMIZER = True
    RESHAPES = "parameters"

    def __init__(
        self,
        model: nn.Module,
        target_r: int,
        every: int,
        warmup: int = 0,
        top_h: int = 1,
        add: int = 0,
        beta1: float = 0.85,
        beta2: float = 0.85,
        root: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            model,
            target_r=target_r,
            every=every,
            warmup=warmup,
            top_h=top_h,
            add=add,
            beta1=beta1,
            beta2=beta2,
            root=root,
        )
        for name in ("target_r", "every", "top_h"):
            self._whole(name, 1)
        for name in ("warmup", "add"):
            self._whole(name)
        for name in ("beta1", "beta2"):
            self._share(name)
        self._must("root", type(root) is bool, "be True or False")
        self.add = add or max(1, target_r // 2)
        self.target = target_r * len(self.layers)
        self._must("target_r", self.target >= self.total, f"give at least {self.total} ranks, which there are,")
        self.averages, self.generator = Averages(beta1, beta2), Generator(seed)
        self._seen: dict[str, Tensor] = {}
        self._hooks = [m.register_forward_hook(_Watch(self._seen, name)) for name, m in self.layers.items()]

    @property
    def total(self) -> int:
        """Ranks that all layers have been granted together."""
        return sum(m.r for m in self.layers.values())

    def _step(self, n, optimizer):
        trained = [p for m in self.layers.values() for p in m.coefficients().values() if p.requires_grad]
        surgery.groups_of(optimizer, trained)  # an optimizer made before load_state_dict would train none of them
        if not self._hooks:
            return False
        grows = n > self.warmup and n % self.every == 0 and self.total < self.target
        if grows or self.total == self.target:
            surgery.check(optimizer, trained)
        self._average()
        if grows:
            left = self.target - self.total
            for name in self._highest(-(-left // self.add)):
                layer, more = self.layers[name], min(self.add, self.target - self.total)
                with self.generator.as_torchs(layer.lora_A.device):
                    self._remake(layer, partial(layer.grow, more), optimizer)
        ends = self.total == self.target
        if ends:
            for layer in self.layers.values():
                self._remake(layer, layer.finish, optimizer)
            self._release()
        return grows or ends

    def skip(self) -> None:
        self._seen.clear()

    def _average(self) -> None:
        if missing := sorted(self.layers.keys() - self._seen.keys()):
            must = f"must have run in training mode and backward, {missing[0]!r} has not"
            raise RuntimeError(f"IncreLoRAGrowth.step: layers {must}")
        where = next(iter(self._seen.values())).device
        scores = over_processes(torch.stack([self._seen[name].to(where) for name in self.layers])).cpu()
        self._seen.clear()
        self._decidable(scores)
        for (name, layer), score in zip(self.layers.items(), scores, strict=True):
            size = layer.in_features * layer.out_features
            self.averages.update(name, score / (size**0.5 if self.root else size))

    def _highest(self, most: int) -> list[str]:
        scores = torch.stack([self.averages.product(name) for name in self.layers])
        order = scores.sort(descending=True, stable=True).indices[: min(self.top_h, most)].tolist()
        return [[*self.layers][i] for i in order]

    @staticmethod
    def _remake(layer: IncreLoRALinear, change: Callable[[], None], optimizer: Optimizer) -> None:
        before = {**layer._parameters}
        change()
        pairs = ((p, layer._parameters[n]) for n, p in before.items() if layer._parameters[n] is not p)
        surgery.replace(optimizer, {old: surgery.Change(new, surgery.corner(new.shape)) for old, new in pairs})

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.averages = [], Averages(self.beta1, self.beta2)
        self._seen.clear()

    def _state(self) -> dict[str, Any]:
        return self.averages.state() | {"generator": self.generator.state(), "finished": not self._hooks}

    def _load(self, state: dict[str, Any]) -> None:
        self.averages.load(state)
        self.generator.load(state["generator"])
        if state["finished"]:
            self._release()


class _Watch:
    """A forward hook that can be pickled: adds up what a layer scores in backward."""

    def __init__(self, seen: dict[str, Tensor], name: str):
        self.seen, self.name = seen, name

    def __call__(self, layer: IncreLoRALinear, args: tuple, y: Tensor) -> None:
        if not (layer.training and y.requires_grad):
            return
        x = args[0].detach()

        def add(dy: Tensor) -> None:
            self.seen[self.name] = self.seen.get(self.name, 0) + layer.score(x, dy)

        y.register_hook(add)
