# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model an adapter goes into, by PEFT's rules, and which models take none."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..files.check import require, shown
from ..files.folder import features_of, inside, saved_modules, targeted
from ..files.patterns import first_keys
from ..files.plain import wraps
from ..nn.linear import AdapterLinear

ALL = "all-linear"
_HEADS = ("classifier", "score")  # of transformers' models without output embeddings, as PEFT knows them
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def check_bare(model: nn.Module) -> None:
    """Refuses a model that is adapted already, or wrapped by what has looked at its modules and parameters."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # no model is PEFT's where PEFT was not imported
    theirs = (tuners.BaseTuner, tuners.BaseTunerLayer) if tuners else ()
    for name, m in model.named_modules():
        where, kind = f"{name} is" if name else "it is", type(m).__name__
        ours = isinstance(m, AdapterLinear)
        require(not ours, f"model must not be adapted already, got one with a {kind} at {name or 'its top'}")
        peft = isinstance(m, theirs) or type(m).__module__.startswith("peft.")
        require(not peft, f"model must not be PEFT's (lrkern.peft.patch makes that fast), got one: {where} a {kind}")
        compiled = wraps(m) or getattr(m, "_compiled_call_impl", None) is not None
        require(not compiled, f"model must not be compiled yet, got one: {where} compiled; adapt, then compile")
        must = f"model must not be wrapped yet, got one: {where} a {kind}; adapt what is in it, then wrap"
        require(kind not in _WRAPPERS, must)


def chosen(model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """By name the linears that target_modules, exclude_modules, layers_to_transform and layers_pattern of a config mean, and the modules
    that modules_to_save does, in which no linear is chosen."""
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = _saved(model, config, modules)
    may = [name for name in modules if name and not inside(name, saved)]
    linears, target = [name for name in may if features_of(modules[name])], config.get("target_modules")
    require(target, f"target_modules must be names, a regex or {ALL!r}, got {shown(target)}")
    if isinstance(target, str) and target.lower() == ALL:
        targeted(config, ())  # what does not go with a string
        heads = _heads(model)
        linears = [name for name in linears if not any(modules[name] is head for head in heads)]
        found = targeted({**config, "target_modules": linears}, linears) if linears else set()
    else:
        found = targeted(config, may)
        other = [name for name in may if name in found and name not in set(linears)]
        got = other and f"{type(modules[other[0]]).__name__} at {other[0]}"
        require(not other, f"target_modules must mean linears, got {shown(target)}, which means {got}")
    got = f"{shown(target)}, which means none of {len(linears)}"
    require(found, f"target_modules must mean a linear of the model that is not excluded or saved whole, got {got}")
    layers = {name: modules[name] for name in may if name in found}
    _check_once(modules, layers)
    return layers, {name: modules[name] for name in saved}


def _saved(model: nn.Module, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    given = config.get("modules_to_save") or []
    for end in [given] if isinstance(given, str) else given:
        hits = any(name.endswith(end) for name in modules) and end
        require(hits, f"modules_to_save must be ends of names of modules of the model, got {shown(end)}")
    found = saved_modules(config, model)
    _check_once(modules, {name: modules[name] for name in found})
    return found


def _check_once(modules: Mapping[str, nn.Module], of: Mapping[str, nn.Module]) -> None:
    """A module at two places would be adapted at one of them."""
    wanted, first = {id(m) for m in of.values()}, {}
    for name, m in modules.items():
        if id(m) in wanted and (other := first.setdefault(id(m), name)) != name:
            raise ValueError(f"{other} must stand at one place of the model, got {name} too")


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output head of a transformers model."""
    embeddings = getattr(model, "get_output_embeddings", None)
    if embeddings is None:
        return []
    found = embeddings()
    heads = [found] if found is not None else [getattr(model, name, None) for name in _HEADS]
    return [m for head in heads if head is not None for m in head.modules()]


def by_pattern(key: str, patterns: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """By name what rank_pattern or alpha_pattern says of it, as PEFT reads them. A pattern that is of no layer is refused."""
    keys, names = [*(patterns or ())], list(names)
    found = {name: i for name, i in zip(names, first_keys(key, keys, names), strict=True) if i is not None}
    if idle := [k for i, k in enumerate(keys) if i not in found.values()]:
        raise ValueError(f"{key} must be of layers that are adapted, got {shown(idle[0])}, which is of none")
    return {name: patterns[keys[i]] for name, i in found.items()}
