# SPDX-License-Identifier: Apache-2.0
"""Modules of which an adapter has a whole copy of its own (PEFT's modules_to_save), such as the heads of classifiers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..files.check import check_shape, named, require, shown
from ..files.folder import PREFIX, Config, Tensors, inside
from .below import ours, plain, twin
from .layer import must
from .rows import Follow, Lost, tensors_in

if TYPE_CHECKING:
    from .kinds.kind import Rows

State = Mapping[str, Tensor]  # of a module by its keys, in the module's own dtypes


class Saved(NamedTuple):
    """One adapter's copy of a module."""

    state: State
    size: int | None  # features out where they are others than the model's, of a linear


def read_saved(config: Config, tensors: Tensors, modules: Sequence[str], model: nn.Module) -> dict[str, Saved]:
    """The copies of these modules of a model that a file holds, checked. A ValueError says what is wrong with one."""
    given = config.get("modules_to_save")
    require(modules or not given, f"modules_to_save must name modules of this model, got {shown(given)}")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False) if modules else ():
        places.setdefault(module, []).append(name)
    result = {}
    for name in modules:
        module, begin, at = model.get_submodule(name), f"{PREFIX}{name}.", places[model.get_submodule(name)]
        require(len(at) == 1, f"{name} of modules_to_save must stand at one place of the model, got {' and '.join(at)}")
        own, state = module.state_dict(), {k[len(begin) :]: t for k, t in tensors.items() if k.startswith(begin)}
        size = None
        if type(module) is nn.Linear and "weight" in state and state["weight"].ndim:
            size = len(state["weight"])
        for key, like in own.items():
            require(key in state, f"lacks {name}.{key}, which modules_to_save says it holds")
            floats = like.is_floating_point()
            require(floats, f"{name} of modules_to_save must be of floats in the model, got {key} of {like.dtype}")
            check_shape(begin + key, state[key], like.shape if size is None else (size, *like.shape[1:]))
            state[key] = state[key].detach().to("cpu", like.dtype, copy=True)
            finite = state[key].isfinite().all()
            require(finite, f"{named(begin + key)} must be finite in {like.dtype}, got inf or nan")
        extra = sorted(state.keys() - own.keys())
        require(not extra, f"{name} must hold {sorted(own)}, got {extra and named(extra[0])}")
        result[name] = Saved(state, None if size is None or size == len(own["weight"]) else size)
    return result


def copies(rows: "Rows", layers: Sequence[str]) -> dict[str, list[tuple[State, list[bool]]]]:
    """By module the copies on the device that adapters of these requests have, and whose requests' they are. Refuses requests
    for which there is no one copy, or of which the modules' results would have several shapes."""
    found: dict[str, dict] = {}
    for i, row in enumerate(rows):
        for adapter, _ in row:
            for name in adapter.saved:
                mine = found.setdefault(name, {}).setdefault(adapter, [False] * len(rows))
                others = [a for a, _ in row if a is not adapter]
                got = sum(name in a.saved for a in others)
                must(not got, "adapters", f"have one with a {name} of its own (modules_to_save) a request", got + 1)
                low_rank = next((layers[j] for a in others for j in a.host if inside(layers[j], [name])), None)
                one = f"not adapt what another of the same request has of its own, {name} (modules_to_save)"
                must(low_rank is None, "adapters", one, low_rank)
                mine[i] = True
    for name, each in found.items():
        sizes = {next((a.saved[name].size for a, mine in each.items() if mine[i]), None) for i in range(len(rows))}
        shown = [size or "the model's" for size in sizes]
        must(len(sizes) == 1, "adapters", f"give {name} one number of features for all requests of a call", shown)
    return {name: [(a.held[name], mine) for a, mine in each.items()] for name, each in found.items()}


def over(module: nn.Module, state: State, before: int, prefix: str = "") -> nn.Module:
    """A module like this one with these tensors, for one call from the forward hook of this id: what it calls before that one,
    it calls too. The module's own tensors, which other threads use, stay where they are."""
    new = twin(module)
    own, what = vars(new).get("forward"), f"have no forward of its own in {type(module).__name__}, of modules_to_save"
    must(own is None or getattr(own, "__self__", None) is new, "model", what, "one (offloaded, or compiled by itself?)")
    for kind in ("_parameters", "_buffers"):
        new.__dict__[kind] = {k: state.get(prefix + k, t) for k, t in vars(module)[kind].items()}
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        kept = lambda k, h, kind=kind: not ours(h) and (prefix or (k < before and kind == "_forward_hooks"))
        new.__dict__[kind] = {k: h for k, h in vars(module)[kind].items() if kept(k, h)}
    each = module._modules.items()
    new.__dict__["_modules"] = {k: m if m is None else over(plain(m), state, before, f"{prefix}{k}.") for k, m in each}
    return new


@contextmanager
def apart(follow: Follow) -> Iterator[None]:
    """Inside, rows into which those of other requests went are lost."""

    def mixes(name: str, dims: Any, args: tuple, kwargs: dict) -> bool:
        each = [(t.ndim, known) for t in tensors_in((*args, *kwargs.values())) if (known := follow.of(t))]
        if name in ("einsum", "multi_head_attention_forward"):
            return len(each) > 1
        if name == "batch_norm":
            return bool(kwargs.get("training") or args[5:6] == (True,))
        products = name in ("matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
        if products and any(d >= ndim - 2 for ndim, known in each[1:] for d in known):
            return True
        most = max((len(known) for _, known in each), default=0)
        return any(not isinstance(d, Lost) and len(d) < most for d in (dims if isinstance(dims, list) else [dims]))

    follow.also = mixes
    try:
        yield
    finally:
        follow.also = None
