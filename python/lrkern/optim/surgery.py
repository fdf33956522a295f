# SPDX-License-Identifier: Apache-2.0
"""What an optimizer knows of a parameter, when the parameter is replaced or begins anew."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Change(NamedTuple):
    """A parameter in the place of another, and what becomes of a tensor that has a number for each element of the old one."""

    new: nn.Parameter
    move: Callable[[Tensor], Tensor]


def bare(optimizer: Optimizer) -> Optimizer:
    """Without what accelerate and others wrap it in."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if isinstance(
        getattr(optimizer, "optim", None), Optimizer
    ):  # ZeroRedundancyOptimizer, whose own state and groups train nothing
        raise TypeError(f"{type(optimizer).__name__}: the optimizer must keep its state itself, got one that shards it")
    return optimizer


def groups_of(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict]:
    """The param_groups that train these."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for p in parameters:
        if p not in groups:
            must = f"must hold every parameter that trains in the layers, one of shape {list(p.shape)} is missing"
            raise ValueError(
                f"{type(optimizer).__name__}: the optimizer {must}; make it after load_state_dict of the rule"
            )
        found.append(groups[p])
    return found


def by_element(optimizer: Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for each element of p: Adam's moments, SGD's momentum, in any of their implementations. Numbers for p as a
    whole, as Adam's ``step``, are not among them. State of any other form (8-bit moments with their scales, factored moments) is refused,
    for nobody here knows what a part of p has of it."""
    found = {}
    for name, t in optimizer.state.get(p, {}).items():
        if isinstance(t, Tensor) and t.shape == p.shape and t.is_floating_point():
            found[name] = t
        elif not (t is None or isinstance(t, int | float) or (isinstance(t, Tensor) and t.dim() == 0)):
            got = f"{list(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            must = f"must keep floats of a parameter's shape {list(p.shape)} or single numbers"
            raise TypeError(
                f"{type(optimizer).__name__}: the state of a parameter that is to change {must}, got {name!r}: {got}"
            )
    return found


def check(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuses an optimizer whose state of these could not be moved, before anything changes."""
    parameters = [*parameters]
    groups_of(optimizer, parameters)
    for p in parameters:
        by_element(optimizer, p)


@torch.no_grad()
def replace(optimizer: Optimizer, changes: Mapping[nn.Parameter, Change]) -> None:
    """Trains the new parameters in the old ones' places: the same groups, and state moved along. Numbers for a parameter as a whole stay, so
    Adam's bias correction of a row that is new is that of the old rows."""
    check(optimizer, changes)
    for group, (old, (new, move)) in zip(groups_of(optimizer, changes), changes.items(), strict=True):
        params = group["params"]
        params[next(i for i, p in enumerate(params) if p is old)] = new
        moved = {name: move(t) for name, t in by_element(optimizer, old).items()}
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old) | moved


def corner(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """To ``shape``: rows and columns are appended, of zeros, or left out at the end."""

    def move(t: Tensor) -> Tensor:
        both = tuple(slice(min(a, b)) for a, b in zip(t.shape, shape, strict=True))
        out = t.new_zeros(shape)
        out[both] = t[both]
        return out

    return move


def rewrap(wrapper: DistributedDataParallel) -> None:
    """Lets it see parameters that are new in its module, in place: what reading its pickle does, and its communication hooks again. To be called
    alike in all processes, where they are the same."""
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    wrapper.__setstate__(wrapper.__getstate__())
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


@torch.no_grad()
def reset(optimizer: Optimizer, parameters: Iterable[nn.Parameter], keep: float = 0.0) -> None:
    """Forgets the state of these parameters, of any optimizer. keep > 0: the largest floor(keep · size) elements of each moment stay, the
    others are zero, and Adam's step count goes on."""
    parameters = [*parameters]
    if keep == 0.0:
        for p in parameters:
            optimizer.state.pop(p, None)
        return
    check(optimizer, parameters)
    for p in parameters:
        for t in by_element(optimizer, p).values():
            flat = t.flatten()
            index = flat.abs().topk(int(keep * len(flat) + 1e-9)).indices
            t.copy_(torch.zeros_like(flat).index_copy_(0, index, flat[index]).view_as(t))
