# SPDX-License-Identifier: Apache-2.0
"""What lies below a pool and a served model: a model's modules by name, where it is, its compiled parts, and copies of it."""

import functools
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layer import must

# ---- torch.compile


def plain(model: nn.Module) -> nn.Module:
    """What torch.compile wraps: all that its wrapper has."""
    while model._modules.keys() == {"_orig_mod"} and isinstance(inner := model._modules["_orig_mod"], nn.Module):
        model = inner
    return model


def unwrapped(model: nn.Module, _made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The model to be read: itself, or where parts of it are wrapped one of the same modules without the wrappers, whose names
    and state_dict are as where nothing is compiled."""
    made, model = {} if _made is None else _made, plain(model)
    if model not in made:
        each = {k: m if m is None else unwrapped(m, made) for k, m in model._modules.items()}
        made[model] = model
        if any(m is not each[k] for k, m in model._modules.items()):
            made[model] = twin(model)
            vars(made[model])["_modules"] = each
    return made[model]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the names that they have where nothing is compiled."""
    named = ((name.split("."), m) for name, m in model.named_modules() if plain(m) is m)
    return {".".join(part for part in parts if part != "_orig_mod"): m for parts, m in named}


class Eager:
    """In place of a compiled call: what is not compiled, while one of ``whens`` holds. Compiled code does not ask which hooks a
    module has: what was compiled before there were any runs without them."""

    def __init__(self, compiled: Callable, eager: Callable, own: bool):
        self.compiled, self.eager, self.own = compiled, eager, own  # own: the module's, not its class's
        self.whens: list[Callable[[], bool]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.eager if any(when() for when in self.whens) else self.compiled)(*args, **kwargs)


_LOCK = threading.Lock()


def twin(module: nn.Module) -> nn.Module:
    """A module with all that this one has, of which nothing is compiled: what was is this one's, bound to it."""
    new = type(module).__new__(type(module))
    eager = lambda v: isinstance(v, Eager) and getattr(v.eager, "__self__", None) is module
    own = {k: types.MethodType(v.eager.__func__, new) if eager(v) else v for k, v in vars(module).items()}
    new.__dict__ = own | {"_compiled_call_impl": None}
    return new


def keep_eager(modules: Iterable[nn.Module], when: Callable[[], bool]) -> None:
    """All that torch.compile made of these and their children, and of what their own attributes and classes have, is Eager
    from now on."""
    of_class: dict[type, dict[str, Callable]] = {}
    for m in _family(modules):
        for name, call in list(vars(m).items()):
            _replace(m, name, call, True, when)
        if type(m) not in of_class:
            methods = {name: call for cls in reversed(type(m).__mro__) for name, call in vars(cls).items()}
            of_class[type(m)] = {name: call for name, call in methods.items() if _not_compiled(call) is not None}
        for name, call in of_class[type(m)].items():
            if name not in vars(m):
                _replace(m, name, call, False, when)


def keep_eager_again(modules: Iterable[nn.Module], when: Callable[[], bool]) -> None:
    """The same where it was done before, before every call: of what compiles a module or puts a compiled one in its place."""
    for m in modules:
        own = m.__dict__
        for name in ("_compiled_call_impl", "forward"):
            if name in own:
                _replace(m, name, own[name], True, when)
        for child in own["_modules"].values():
            if child is not None and "_orig_mod" in child.__dict__["_modules"]:
                _replace(child, "forward", child.__dict__["forward"], True, when)


def _family(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """With children that came in place of others."""
    for module in modules:
        yield module
        yield from (child for child in module._modules.values() if child is not None)


def _not_compiled(call: Any) -> Callable | None:
    """What torch.compile made this of; of a wrapper that has only taken over its attributes, or of something else, None."""
    function = call.__func__ if isinstance(call, types.MethodType) else call
    if not isinstance(function, types.FunctionType) or hasattr(function, "_torchdynamo_disable"):
        return None
    eager = vars(function).get("_torchdynamo_orig_callable")
    if vars(function).get("_torchdynamo_wrapper_id", id(function)) != id(function):
        return None
    return types.MethodType(eager, call.__self__) if eager is not None and function is not call else eager


def _replace(m: nn.Module, name: str, call: Any, own: bool, when: Callable[[], bool]) -> None:
    if isinstance(call, Eager):
        with _LOCK:
            if when not in call.whens:
                call.whens.append(when)
    elif (eager := _not_compiled(call)) is not None:
        with _LOCK:
            if isinstance(now := vars(m).get(name), Eager):  # another thread's, of just now
                now.whens.append(when)
                return
            bound = (call, eager) if own else (types.MethodType(f, m) for f in (call, eager))
            vars(m)[name] = new = Eager(*bound, own)
            new.whens.append(when)
        copies_are_plain(m)


def give_back_compiled(modules: Iterable[nn.Module], when: Callable[[], bool]) -> None:
    for m in _family(modules):
        for name, call in [(name, call) for name, call in vars(m).items() if isinstance(call, Eager)]:
            with _LOCK:
                call.whens = [each for each in call.whens if each != when]
                if not call.whens:
                    vars(m).update({name: call.compiled} if call.own else {})
                    if not call.own:
                        del vars(m)[name]
        copies_as_ever(m)


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
    return (getattr(hook, "__module__", None) or "").startswith(__package__)  # None: of functions in C


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BESIDE = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)  # by a hook's number


def copies_are_plain(module: nn.Module) -> None:
    """Copies and pickles of a module leave our hooks out, which hold locks and threads' own state."""
    vars(module)["__reduce_ex__"] = functools.partial(_reduce, module)


def copies_as_ever(module: nn.Module) -> None:
    hooked = any(ours(hook) for kind in _HOOKS for hook in vars(module)[kind].values())
    if not hooked and not any(isinstance(value, Eager) for value in vars(module).values()):
        vars(module).pop("__reduce_ex__", None)


def _reduce(module: nn.Module, protocol: int) -> Any:
    made = type(module).__reduce_ex__(module, protocol)
    if len(made) < 3 or not isinstance(made[2], dict):
        return made
    state = {key: value.compiled if isinstance(value, Eager) else value for key, value in made[2].items()}
    for key in [key for key, value in made[2].items() if isinstance(value, Eager) and not value.own] + [
        "__reduce_ex__"
    ]:
        state.pop(key, None)
    own = {number for kind in _HOOKS for number, hook in vars(module)[kind].items() if ours(hook)}
    for kind in {*_HOOKS, *_BESIDE} & state.keys():
        state[kind] = type(state[kind])((number, each) for number, each in state[kind].items() if number not in own)
    return *made[:2], state, *made[3:]


def dtype_of(model: nn.Module) -> torch.dtype:
    """transformers' own answer, or that of the first weights that are floats."""
    said = getattr(model, "dtype", None)
    tensors: Iterator[Tensor] = (p for p in model.parameters() if p.is_floating_point())
    return said if isinstance(said, torch.dtype) else next(tensors).dtype
