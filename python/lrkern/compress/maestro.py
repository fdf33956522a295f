# SPDX-License-Identifier: Apache-2.0
"""Maestro on whole models: ranks in order of importance by drawn prefixes, and dropped where a group lasso has emptied them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import named, require
from ..nn import FactorizedLinear, MaestroLinear
from .model import Report, put, targets


def maestro(model: nn.Module, *, target_modules: Any = "all-linear", **rules: Any) -> Report:
    """Puts ``MaestroLinear`` of full rank, by SVD, in the place of a model's linears: the same function, up to rounding, with more
    parameters, to be trained (Horváth et al., arXiv 2308.14929). What else trains stays.

        maestro(model)
        for x, y in data:
            loss = criterion(model(x), y)               # and a pass at a drawn prefix
            with prefix(model):
                loss = loss + criterion(model(x), y)
                (loss + lam * group_lasso(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            ...                                         # each epoch: shrink(model, optimizer=optimizer)
        finish(model)

    target_modules, rules: as everywhere in ``lrkern.compress``, and so what is refused.
    """
    linears = targets("lrkern.compress.maestro", model, target_modules, rules)
    return put(model, linears, {name: MaestroLinear.from_linear(m) for name, m in linears.items()})


def _layers(who: str, model: nn.Module) -> dict[str, MaestroLinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, MaestroLinear)}
    require(found, f"lrkern.compress.{who}: model must have MaestroLinear layers, got none")
    return found


@contextmanager
def prefix(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[tuple[str, int]]:
    """Inside, one layer runs the first b of its ranks and the others all of theirs: of all pairs of a layer and b = 1..r one, each as
    likely, drawn from generator (a CPU's; torch's own where None). Yields the layer's name and b.

    The authors' code goes through all pairs in a random order before it draws one again. The processes of a DDP model must draw the
    same: give each a generator of the same seed. With activation checkpointing, backward belongs inside too.
    """
    layers = _layers("prefix", model)
    pairs = sum(m.r for m in layers.values())
    require(pairs, "lrkern.compress.prefix: model must have ranks left, got none")
    drawn = int(torch.randint(pairs, (), generator=generator))
    before = {m: m.active for m in layers.values()}
    for name, m in layers.items():  # noqa: B007
        if drawn < m.r:
            break
        drawn -= m.r
    try:
        for each in layers.values():
            each.active = None
        m.active = drawn + 1
        yield name, drawn + 1
    finally:
        for each, active in before.items():
            each.active = active


def group_lasso(model: nn.Module, hierarchical: bool = True) -> Tensor:
    """The sum of ``MaestroLinear.lasso`` over the model's layers: Σ_j (‖A[j:]‖ + ‖B[:, j:]‖), or of rank j alone."""
    each = [m.lasso(hierarchical) for m in _layers("group_lasso", model).values()]
    return torch.stack([loss.to(each[0].device) for loss in each]).sum()


def shrink(
    model: nn.Module,
    threshold: float = 1e-5,
    hierarchical: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """``MaestroLinear.shrink`` of all layers: drops the ranks with ‖A[j:]‖ · ‖B[:, j:]‖ below the threshold, and what ``optimizer``
    keeps of them. Returns the ranks that are left, by name. DDP must be made anew afterwards. A layer that refuses stops all."""
    layers = _layers("shrink", model)
    plans = {name: m._plan(threshold, hierarchical, optimizer) for name, m in layers.items()}
    return {name: layers[name]._drop(*plan) for name, plan in plans.items()}


def finish(model: nn.Module) -> Report:
    """Ends Maestro: its layers become nn.Linear where their factors are not smaller than W, else ``FactorizedLinear``. ``active``
    must be None. What the report calls before is the model as it was a moment ago."""
    layers = _layers("finish", model)
    for name, m in layers.items():
        require(m.active is None, f"lrkern.compress.finish: {named(name)}.active must be None, got {m.active}")
    ends = {}
    for name, m in layers.items():
        dense = m.r * (m.in_features + m.out_features) >= m.in_features * m.out_features
        ends[name] = m.to_linear() if dense else FactorizedLinear.from_factors(m.A, m.B, m.bias).train(m.training)
    return put(model, layers, ends)
