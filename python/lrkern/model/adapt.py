# SPDX-License-Identifier: Apache-2.0
"""Any method of this library put into a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..files.check import refusal, require, shown
from ..files.folder import check_config
from ..files.own import connect
from ..nn.linear import AdapterLinear
from ..nn.plain import as_linear
from .methods import About, methods
from .report import Report
from .saved import check_may_train, give_up, train_whole
from .targets import ALL, by_pattern, check_bare, chosen

WHO = "lrkern.adapt"


def adapt(
    model: nn.Module,
    method: str,
    target_modules: str | Sequence[str] = ALL,
    *,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: str | Sequence[str] | None = None,
    **settings: Any,
) -> Report:
    """Puts a method into a model, in place: each linear that is meant becomes the method's layer over it, and all else is frozen.

    method: a name of ``lrkern.methods()``, which shows the settings of each. Layers that share something (the pair of a VeRA) share it
        over the model as PEFT's do (``plan`` and ``connect`` of the class).
    target_modules, exclude_modules, layers_to_transform, layers_pattern: as PEFT reads them: ends of names, or a regex of whole ones.
        "all-linear" is every nn.Linear, Conv1D and quantised linear but the output head: get_output_embeddings(), or ``score`` or
        ``classifier`` of a transformers model that has none, which stays frozen unless modules_to_save names it.
    rank_pattern, alpha_pattern: settings ``r`` and ``lora_alpha`` (or the method's alpha) by regex of names or their ends; the first
        that fits counts. One that is of no layer is refused.
    modules_to_save: ends of names, as in PEFT: modules that train whole and are saved too. They stay where they are and get copies of
        their parameters and buffers, in the dtypes that they have; what they had before is kept, is what ``disable`` gives back, and
        stays the other module's where a weight was tied. ``disable`` has no part in what train_bias trains.
    settings: of the method, for all layers; adapter_dtype too.

    Transformers' Conv1D becomes a layer over an nn.Linear whose weight is a view of it. Quantised linears are taken by methods that do
    not need W. Refused, with the model as it was: one that is adapted already, PEFT's, compiled or wrapped (DDP); a name or pattern that
    means no linear, or something else; a linear at two places; settings that a layer does not fit. TypeError for settings that the
    method does not have.
    """
    require_model(WHO, model)
    about = _about(method)
    known = about.settings
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"{WHO}: settings of {method!r} must be of {', '.join(sorted(known))}, got {unknown[0]!r}")
    config = {
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": modules_to_save,
    }
    with refusal(f"{WHO}: ", "; the model is unchanged"):
        check_config(config)
        check_bare(model)
        linears, saved = chosen(model, config)
        for name, m in saved.items():
            check_may_train(name, m)
        each = _each(about, method, config, [*linears], settings)
        with as_before(model):
            layers = make(model, about.layer, linears, each)
            put_in(model, layers, saved)
    return Report.of(model, method, layers)


def require_model(who: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {shown(model)}")


def _about(method: Any) -> About:
    known = methods()
    if not isinstance(method, str) or method not in known:
        raise ValueError(f"{WHO}: method must be one of {', '.join(known)}, got {shown(method)}")
    return known[method]


def _each(
    about: About, method: str, config: Mapping[str, Any], names: list[str], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The settings of each layer, before the class has planned them."""
    alpha = next((name for name in about.settings if name.endswith("_alpha")), None)
    found: dict[str, dict[str, Any]] = {name: {**settings, **about.fixed} for name in names}
    for key, setting in (("rank_pattern", "r" if "r" in about.settings else None), ("alpha_pattern", alpha)):
        patterns = config[key]
        require(setting or not patterns, f"{key} must be left out for {method!r}, which has no such setting")
        for name, value in by_pattern(key, patterns, names).items():
            found[name][setting] = value
    return found


def make(
    model: nn.Module,
    cls: type[AdapterLinear],
    linears: Mapping[str, nn.Module],
    settings: dict[str, dict[str, Any]],
) -> dict[str, AdapterLinear]:
    """Layers of a class over linears of a model, which are not in it yet. A ValueError names the linear that does not fit."""
    bases = {name: as_linear(m) for name, m in linears.items()}
    for name, base in bases.items():
        must = "be a linear with a plain weight" + (", or one that keeps W packed" if cls.PACKED else "")
        got = cls._unfit(base)
        require(not got, f"{name} must {must}, for {cls.__name__}, got {got}")
    settings = cls.plan(model, bases, settings)
    layers = {}
    for name, base in bases.items():
        with refusal(f"{name}: "):
            layers[name] = cls.from_linear(base, **settings[name]).train(linears[name].training)
    return layers


def put_in(model: nn.Module, layers: Mapping[str, AdapterLinear], saved: Mapping[str, nn.Module]) -> None:
    """Puts layers in the places of their linears, gives modules copies that train, freezes all else, and connects the layers. What
    fails is undone."""
    before = {name: model.get_submodule(name) for name in layers}
    whole: list[nn.Module] = []
    try:
        for name, layer in layers.items():
            put(model, name, layer)
        for m in saved.values():
            train_whole(m)
            whole.append(m)
        own = [p for m in (*layers.values(), *whole) for p in m.parameters() if p.requires_grad]
        model.requires_grad_(False)
        for p in own:
            p.requires_grad_()
        connect(layers)
    except BaseException:
        for m in whole:
            give_up(m)
        for name, m in before.items():
            put(model, name, m)
        raise


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """What fails in the block leaves every parameter training, or not, as it did."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for p, trains in flags:
            p.requires_grad_(trains)
        raise
