# SPDX-License-Identifier: Apache-2.0
"""TRP: dense weights that training keeps near low rank, and their factors at the end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import is_finite, is_whole, named, require
from ..nn import FactorizedLinear
from ..nn.factorized import split, wide
from .model import Report, put, targets

WHO = "lrkern.compress.TRP"


class TRP:
    """Trained rank pruning (Xu et al., arXiv 2004.14566) of a model's linears.

    At every ``period``-th step W ← T = U_k S_k V_kᵀ, k the smallest that keeps ``energy`` of Σ σ². Forward and backward of that step
    run on T, and λ U_k V_kᵀ, a subgradient of the nuclear norm, is added to its gradient. W stays dense and trains, as all else
    does; ``factorize`` puts factors in its place at the end.

        trp = TRP(model, optimizer, nuclear=3e-4)
        for x, y in data:
            trp.step()                      # before the forward: the first one projects
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()                # the subgradient is added here: after unscaling, clipping and DDP's sums
        trp.factorize()

    Linears only; the authors also unfold convolutions in three ways.

    Args:
        optimizer: the one that trains the weights, a hook of which adds the subgradient.
        period: steps between projections, counted from the first. energy: above 0, at most 1. nuclear: λ, 0 for none.
        target_modules, rules: as everywhere in ``lrkern.compress``.

    Also refused: other numbers, a targeted weight that does not train in ``optimizer``; in ``step`` and ``factorize`` a weight with inf
    or nan, all weights as they were; with λ a closure for ``optimizer.step``, whose gradients would come after the subgradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        period: int = 1,
        energy: float = 0.9,
        nuclear: float = 0.0,
        *,
        target_modules: Any = "all-linear",
        **rules: Any,
    ):
        require(is_whole(period, 1, 2**63 - 1), f"{WHO}: period must be a whole number >= 1, got {period!r}")
        require(is_finite(energy) and 0 < energy <= 1, f"{WHO}: energy must be above 0, at most 1, got {energy!r}")
        require(is_finite(nuclear) and nuclear >= 0, f"{WHO}: nuclear must be a finite number >= 0, got {nuclear!r}")
        linears = targets(WHO, model, target_modules, rules)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        for name, m in linears.items():
            must = f"{WHO}: weight of {named(name)} must train in optimizer, got one that does not; see exclude_modules"
            require(id(m.weight) in trained, must)
        self.model, self.linears, self.steps = model, linears, 0
        self.period, self.energy, self.nuclear = period, float(energy), float(nuclear)
        self.ranks: dict[str, int] = {}  # of the last projection
        self._subgradients: dict[str, tuple[Tensor, Tensor]] = {}  # U_k [out, k] and V_kᵀ [k, in] of this step's
        self._hook = optimizer.register_step_pre_hook(self._add)

    def step(self) -> bool:
        """Before the forward of a training step. Returns whether it projected."""
        require(self.linears, f"{WHO}.step: must come before factorize, got a call after it")
        self._subgradients = {}
        projects = self.steps % self.period == 0
        if projects:
            found = dict(self._decomposed())
            for name, (u, s, vh) in found.items():
                with torch.no_grad():
                    self.linears[name].weight.copy_((u * s) @ vh)
            self.ranks = {name: len(s) for name, (_, s, _) in found.items()}
            if self.nuclear:
                self._subgradients = {name: (u, vh) for name, (u, _, vh) in found.items()}
        self.steps += 1
        return projects

    @torch.no_grad()
    def _decomposed(self) -> Iterable[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
        """U_k, S_k and V_kᵀ of every W."""
        for name, m in self.linears.items():
            w = m.weight
            require(w.isfinite().all(), f"{WHO}: weight of {named(name)} must be finite, got inf or nan")
            u, s, vh = torch.linalg.svd(w.to(wide(w.dtype)), full_matrices=False)
            k = kept(s, self.energy)
            yield name, (u[:, :k].contiguous(), s[:k], vh[:k].contiguous())

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's hook; once a projection, whatever the micro-batches were."""
        closure = any(each is not None for each in (*args[1:], *kwargs.values()))
        must = f"{WHO}: {type(optimizer).__name__}.step must have no closure, whose gradients would come after the subgradient"
        require(not (closure and self._subgradients), must)
        for name, (u, vh) in self._subgradients.items():
            if (grad := self.linears[name].weight.grad) is not None:
                grad.add_((u @ vh).to(grad.dtype), alpha=self.nuclear)
        self._subgradients = {}

    def factorize(self) -> Report:
        """FactorizedLinear of the k that keeps ``energy``, √S with U and V each, in the place of every linear of which that is smaller
        than W; the others stay dense. The optimizer is then of parameters that are gone, and this object has no more to do."""
        layers = {}
        for name, (u, s, vh) in self._decomposed():
            m = self.linears[name]
            if len(s) * (m.in_features + m.out_features) < m.in_features * m.out_features:
                a, b = split(u, s, vh)
                layers[name] = FactorizedLinear.from_factors(a, b, m.bias, m.weight.dtype).train(m.training)
        self.remove()
        linears, self.linears = self.linears, {}
        return put(self.model, linears, layers)

    def remove(self) -> None:
        """Takes the hook from the optimizer."""
        self._hook.remove()
        self._subgradients = {}

    def state_dict(self) -> dict[str, int]:
        """How many steps there were; to be saved between steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def kept(s: Tensor, energy: float) -> int:
    """The smallest k with Σ_{j<k} σ_j² >= energy · Σ σ_j²; 0 for zeros alone."""
    sums = s.double().square().cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0
