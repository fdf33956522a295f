# SPDX-License-Identifier: Apache-2.0
"""Modules of a model that train whole beside its adapters: PEFT's modules_to_save.

Such a module stays where it is and gets parameters and buffers of its own, copies that train. What it had before is kept beside it,
frozen and out of its state_dict: ``disable`` puts it back for a while, and a weight that was tied to another module's stays that
module's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..files.check import check_finite, check_shape, named, require
from ..files.folder import features_of
from ..files.plain import plainly
from ..nn.plain import PLAIN, packed

_KEPT = "_lrkern_before"  # attribute of the module: what it had, and whether that stands in it now


class Before:
    """tensors: of the module by name, those that do not stand in it now; back: whether those from before do."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.back = tensors, False


def saved_in(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that train whole, by name."""
    return plainly({name: m for name, m in model.named_modules() if _KEPT in m.__dict__})


def are_back(modules: Mapping[str, nn.Module]) -> bool:
    """Whether what these had before stands in them: inside ``disable``."""
    return any(m.__dict__[_KEPT].back for m in modules.values())


def _places(module: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Name, the module that holds it, its key there: of each parameter and buffer. To be set as attributes, which an nn.LSTM notices."""
    return [
        (f"{prefix}.{key}".lstrip("."), m, key, t)
        for prefix, m in module.named_modules()
        for key, t in (*m._parameters.items(), *m._buffers.items())
        if t is not None
    ]


def check_may_train(name: str, module: nn.Module) -> None:
    """Refuses a module that is no more than its name, or whose weights cannot train."""
    require(name, "modules_to_save must be modules of the model, got all of it")
    kind = type(module).__name__
    require(next(module.parameters(), None) is not None, f"{name} of modules_to_save must have parameters, got {kind}")
    inner = next((n for n, m in module.named_modules() if features_of(m) and packed(m)), None)
    require(inner is None, f"{name} of modules_to_save must keep its weights as floats, got a {kind} that does not")
    for key, _, _, t in _places(module):
        trains = type(t) in PLAIN and (t.is_floating_point() or not isinstance(t, nn.Parameter))
        require(trains, f"{name}.{key} must be a tensor of floats to train, got {type(t).__name__} of {t.dtype}")


def train_whole(module: nn.Module) -> None:
    """Its parameters and buffers are copies from now on, and the parameters train."""
    before, copies = {}, {}
    for name, owner, key, t in _places(module):
        if id(t) not in copies:
            new = t.detach().clone()
            copies[id(t)] = nn.Parameter(new) if isinstance(t, nn.Parameter) else new
        before[name] = t.requires_grad_(False)
        setattr(owner, key, copies[id(t)])
    module.__dict__[_KEPT] = Before(before)


def give_up(module: nn.Module) -> None:
    """As if it had never trained: what it had before, for good."""
    if not module.__dict__[_KEPT].back:
        swap(module)
    del module.__dict__[_KEPT]


@torch.no_grad()
def swap(module: nn.Module) -> None:
    """What it had before stands in it again, or what trains."""
    kept: Before = module.__dict__[_KEPT]
    for name, owner, key, now in _places(module):
        then = kept.tensors[name]
        there = then.to(now.device, now.dtype if then.is_floating_point() else None)  # the model may have moved since
        if there is not then and isinstance(then, nn.Parameter):
            there = nn.Parameter(there, then.requires_grad)
        kept.tensors[name] = now
        setattr(owner, key, there)
    kept.back = not kept.back


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What files hold of the modules that train whole, by key in the model's state_dict: copies."""
    found = {
        f"{name}.{key}": t.detach().cpu().clone() for name, m in saved_in(model).items() for key, t in _state(m).items()
    }
    for key, t in found.items():
        if t.is_floating_point():
            check_finite(key, t)
    return found


def split(tensors: Mapping[str, Tensor], names: list[str], prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """By module of these names what is its own among tensors by key, and under "" the rest."""
    found: dict[str, dict[str, Tensor]] = {"": {}} | {name: {} for name in names}
    for key, t in tensors.items():
        owner = next((name for name in names if key.startswith(f"{prefix}{name}.")), "")
        found[owner][key.removeprefix(f"{prefix}{owner}.") if owner else key] = t
    return found


def check_values(name: str, module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Refuses what is not this module's: keys, shapes, and what is not finite in its dtype."""
    state = _state(module)
    if lacking := sorted(state.keys() - values.keys()):
        raise ValueError(f"lacks {name}.{lacking[0]} of modules_to_save and {len(lacking) - 1} more")
    if more := sorted(values.keys() - state.keys()):
        raise ValueError(f"has {named(f'{name}.{more[0]}')} of modules_to_save, which the model does not")
    for key, t in values.items():
        check_shape(f"{name}.{key}", t, state[key].shape)
        same = t.is_floating_point() == state[key].is_floating_point()
        require(same, f"{name}.{key} must be of {state[key].dtype}, got {t.dtype}")
        if t.is_floating_point():
            check_finite(f"{name}.{key}", t)
            check_finite(f"{name}.{key} in {state[key].dtype}", t.to(state[key].dtype))


@torch.no_grad()
def put_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for key, t in _state(module).items():
        t.copy_(values[key])
