# SPDX-License-Identifier: Apache-2.0
"""What lies below a pool and a served model: a model's modules by name, where it is, its compiled parts, and copies of it."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layer import must

# ---- torch.compile


def plain(model: nn.Module) -> nn.Module:
    """What torch.compile wraps."""
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    return model


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the names that they have where nothing is compiled."""
    named = ((name.split("."), m) for name, m in model.named_modules() if plain(m) is m)
    return {".".join(part for part in parts if part != "_orig_mod"): m for parts, m in named}


class Eager:
    """In place of a compiled call: what is not compiled, while one of ``whens`` holds. Compiled code does not ask which hooks a
    module has: what was compiled before there were any runs without them."""

    def __init__(self, compiled: Callable, eager: Callable):
        self.compiled, self.eager, self.whens = compiled, eager, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.eager if any(when() for when in self.whens) else self.compiled)(*args, **kwargs)


def _compiled(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Callable]]:
    """Of these and their children the compiled ones: the attribute with the compiled call, and the call that is not."""
    for module in modules:
        for m in (module, *module._modules.values()):
            if m is None:
                continue
            if m._compiled_call_impl is not None:
                yield m, "_compiled_call_impl", m._call_impl
            if isinstance(inner := m._modules.get("_orig_mod"), nn.Module):
                yield m, "forward", inner.__call__


def keep_eager(modules: Iterable[nn.Module], when: Callable[[], bool]) -> None:
    for m, attribute, eager in _compiled(modules):
        call = getattr(m, attribute)
        if not isinstance(call, Eager):
            setattr(m, attribute, call := Eager(call, eager))
        if when not in call.whens:
            call.whens.append(when)


def give_back_compiled(modules: Iterable[nn.Module], when: Callable[[], bool]) -> None:
    for m, attribute, _ in _compiled(modules):
        call = getattr(m, attribute)
        if isinstance(call, Eager) and when in call.whens:
            call.whens.remove(when)
            if not call.whens:
                setattr(m, attribute, call.compiled)


# ---- where it is


def only_device(model: nn.Module) -> torch.device:
    """The one device on which the model's weights are when its forward runs, or a refusal that says what to do."""
    by_device: dict[str, str] = {}
    for name, p in model.named_parameters():
        by_device.setdefault(str(p.device), name)
    where = " and ".join(f"{name} on {device}" for device, name in sorted(by_device.items())) or "no weights"
    moved = next(_moved(model, by_device), None)
    what = 'be whole on one device: load it without offloading, with device_map={"": device}, or move it there'
    must(len(by_device) == 1 and "meta" not in by_device and moved is None, "model", what, moved or where)
    return torch.device(*by_device)


def _moved(model: nn.Module, by_device: Collection[str]) -> Iterator[str]:
    """Whose weights accelerate's hooks take elsewhere for a forward, in words."""
    hooks = [(name or "the model", m._hf_hook) for name, m in model.named_modules() if hasattr(m, "_hf_hook")]
    each = [(name, part) for name, hook in hooks for part in getattr(hook, "hooks", [hook])]
    yield from (f"{name} offloaded by accelerate" for name, hook in each if getattr(hook, "offload", False))
    for name, hook in each if len(by_device) == 1 else ():
        here, to = torch.device(*by_device), getattr(hook, "execution_device", None)
        if to is not None and not _same(torch.device(to), here):
            yield f"{name} on {here}, which accelerate runs on {torch.device(to)}"


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))


# ---- copies


def ours(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(__package__)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BESIDE = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)  # by a hook's number


def copies_are_plain(module: nn.Module) -> None:
    """Copies and pickles of a module leave our hooks out, which hold locks and threads' own state."""
    module.__dict__["__reduce_ex__"] = functools.partial(_reduce, module)


def copies_as_ever(module: nn.Module) -> None:
    if not any(ours(hook) for kind in _HOOKS for hook in vars(module)[kind].values()):
        module.__dict__.pop("__reduce_ex__", None)


def _reduce(module: nn.Module, protocol: int) -> Any:
    made = type(module).__reduce_ex__(module, protocol)
    if len(made) < 3 or not isinstance(made[2], dict):
        return made
    state = {key: value for key, value in made[2].items() if key != "__reduce_ex__"}
    own = {number for kind in _HOOKS for number, hook in vars(module)[kind].items() if ours(hook)}
    for kind in (*_HOOKS, *_BESIDE):
        state[kind] = type(state[kind])((number, each) for number, each in state[kind].items() if number not in own)
    return *made[:2], state, *made[3:]


def dtype_of(model: nn.Module) -> torch.dtype:
    """transformers' own answer, or that of the first weights that are floats."""
    said = getattr(model, "dtype", None)
    tensors: Iterator[Tensor] = (p for p in model.parameters() if p.is_floating_point())
    return said if isinstance(said, torch.dtype) else next(tensors).dtype
