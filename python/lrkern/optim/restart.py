# SPDX-License-Identifier: Apache-2.0
"""Restarts: COLA's and ReLoRA's."""

from typing import Any, ClassVar

from torch import nn

from ..limits import MAX_RANK
from ..nn.lora import INITS, FusedLoRALinear
from ..nn.variants import COLALinear
from . import surgery
from .rule import Generator, Rule


class Restart(Rule):
    """Every ``every`` steps, ``times`` times (0: without end), all layers put what they have trained aside and begin anew, drawn from a
    generator of ``seed``, and so does what the optimizer keeps of these parameters."""

    SETTINGS: ClassVar = ("every", "times")
    OPTIMIZER = True

    def __init__(self, model: nn.Module, every: int, times: int, seed: int, **settings: Any):
        super().__init__(model, every=every, times=times, **settings)
        self._whole("every", 1)
        self._whole("times")
        self.generator = Generator(seed)

    def _step(self, n, optimizer):
        if n % self.every or (self.times and n > self.times * self.every):
            return
        trained = [p for m in self.layers.values() for p in m.coefficients().values() if p.requires_grad]
        (surgery.check if self._keep else surgery.groups_of)(optimizer, trained)
        for name, layer in self.layers.items():
            self._check(name, layer)
        for layer in self.layers.values():
            with self.generator.as_torchs(layer.base_layer.weight.device):
                self._again(layer)
        surgery.reset(optimizer, trained, self._keep)

    _keep = 0.0  # share of the moments that stays

    def _check(self, name: str, layer) -> None:
        raise NotImplementedError

    def _again(self, layer) -> None:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        return {"generator": self.generator.state()}

    def _load(self, state: dict[str, Any]) -> None:
        self.generator.load(state["generator"])


class COLARestart(Restart):
    """Every ``every`` steps, ``times`` times (0: without end), a link more in the chains of all layers (``COLALinear.restart``), and the optimizer
    forgets what it kept of A and B: COLA (Xia et al., Chain of LoRA, arXiv 2401.04151). The paper's schedule is not verified.

    (links + 1) r is at most 512. A learning rate that has fallen by then and warms up anew is for a schedule of yours.

    Args:
        seed: of the new A.
    """

    LAYER = COLALinear
    MOVES = ("links",)
    RESHAPES = "frozen"

    def __init__(self, model: nn.Module, every: int, times: int = 0, seed: int = 0):
        super().__init__(model, every, times, seed)

    def _check(self, name, layer):
        ranks = (layer.links + 2) * layer.r
        if ranks > MAX_RANK:
            must = f"have ranks of at most {MAX_RANK} together, {name!r} would have {ranks}; give times"
            raise RuntimeError(f"COLARestart.step: layers must {must}")

    def _again(self, layer):
        layer.restart()


class ReLoRARestart(Restart):
    """Every ``every`` steps, ``times`` times (0: without end), W += scaling · B A for good, and A and B of FusedLoRALinear begin anew, as their
    init has it: ReLoRA (Lialin et al., arXiv 2307.05695).

    W is then another: only a checkpoint of the whole model has all that was trained, an adapter file has the last pair. W rounds what is added
    to its dtype, so that in 16 bits small updates are lost. The paper trains W itself for a while before. It begins the learning
    rate anew after each restart, from zero to where it was within 50 to 100 steps, and so should a schedule of yours: most of the moments
    are gone, and a first step of Adam is as large as its learning rate.

    Args:
        keep: share of each moment of A and B that stays in the optimizer, the largest by magnitude, with its step count: 0 forgets all
            of it. That the paper leaves out 99% is not verified.
        seed: of the new A.

    use_dora, the inits that change W, and a base layer that is no plain nn.Linear are refused.
    """

    LAYER = FusedLoRALinear
    SETTINGS: ClassVar = ("every", "times", "keep")

    def __init__(self, model: nn.Module, every: int, times: int = 0, keep: float = 0.01, seed: int = 0):
        super().__init__(model, every, times, seed, keep=keep)
        self._share("keep")
        for name, layer in self.layers.items():
            layer._check_merge()
            if layer.use_dora or layer.initial is not None:
                got = "use_dora" if layer.use_dora else f"init={layer.init!r}"
                raise ValueError(
                    f"ReLoRARestart: layers must be LoRA over a W that they did not change, got {got} as {name!r}"
                )

    @property
    def _keep(self):
        return self.keep

    def _check(self, name, layer):
        layer._check_merge()
        w = layer.base_layer.weight
        if not (w.float() + layer.delta_weight()).to(w.dtype).isfinite().all():
            raise ValueError(
                f"ReLoRARestart.step: W + scaling B A must be finite, got inf or nan in {name!r}; nothing is changed"
            )

    def _again(self, layer):
        if not layer.r:
            return
        w = layer.base_layer.weight
        w.copy_((w.float() + layer.delta_weight()).to(w.dtype))
        INITS[layer.init](layer)
        layer.lora_B.weight.zero_()
