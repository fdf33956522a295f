# SPDX-License-Identifier: Apache-2.0
"""What ``adapt`` made of a model, as a folder, and a folder put into a model.

LoRA, DoRA and AdaLoRA are PEFT's own folders. Any other method is CONFIG beside ADAPTER, one of lrkern's own files (``files.own``), and
SAVED, the modules that train whole, where there are any. docs/files.md has the format.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import adalora, lora, own
from ..files.check import named, refusal, require, shown
from ..files.folder import (
    LORA,
    PREFIX,
    READERS,
    as_path,
    check_config,
    inside,
    peft_type,
    read_adapter,
    saved_modules,
    sizes_of,
    write_adapter,
)
from ..files.names import as_peft
from ..files.plain import plain, plainly, wraps
from ..files.read import opened, read_json, read_tensors
from ..nn import FusedLoRALinear
from ..nn.linear import AdapterLinear
from .adapt import as_before, make, put_in, require_model
from .methods import method_of
from .report import Report
from .saved import are_back, check_may_train, check_values, put_values, saved_in, saved_tensors, split
from .switch import layers_of
from .targets import check_bare

FORMAT = 1
CONFIG, ADAPTER, SAVED = "lrkern.json", "adapter.safetensors", "saved_modules.safetensors"
PEFTS = "adapter_config.json"
# By peft_type the methods whose folders are PEFT's: config and tensors of who asks, the model and the names of its modules_to_save.
FOLDERS: dict[str, Callable] = {LORA: lora.as_folder, "ADALORA": adalora.as_folder}


def save(model: nn.Module, folder: str | Path) -> None:
    """Writes what ``adapt`` made of a model as a folder that ``load`` reads: its adapters, and modules_to_save.

    LoRA, DoRA and AdaLoRA are written as PEFT writes them, for ``PeftModel.from_pretrained`` too (``lrkern.peft.save_adapter`` says
    what such a folder cannot hold). Any other method: lrkern.json, which names the method, its settings, this version and the base;
    adapter.safetensors, as ``lrkern.files.save`` writes it; saved_modules.safetensors. It is an adapter of the base as it was: neither
    merged nor enabled is of it.

    Refused with a ValueError before anything is written: layers of several methods (``lrkern.files.save`` holds those that it can),
    values that are not finite, a model inside ``disable``, a folder that holds an adapter in the other format.
    """
    who = "lrkern.save"
    layers, saved = plainly(layers_of(who, model)), saved_in(model)
    methods = {name: method_of(m) or type(m).__name__ for name, m in layers.items()}
    first, *others = dict.fromkeys(methods.values())
    require(not others, f"{who}: model must have layers of one method, got {first} and {', '.join(others)}")
    require(not are_back(saved), f"{who}: model must not be disabled, got one inside lrkern.disable")
    cls = type(next(iter(layers.values())))
    with refusal(f"{who}: "):
        path, whole = as_path(folder), saved_tensors(model)
        other = CONFIG if cls.PEFT_TYPE in FOLDERS else PEFTS
        must = f"must hold no adapter in another format, got one with {other}"
        require(not (path / other).exists(), f"{named(str(folder))} {must}")
    if as_folder := FOLDERS.get(cls.PEFT_TYPE):
        config, tensors = as_folder(who, model, list(saved) or None)
        config.base_model_name_or_path = _name_or_path(model)
        write_adapter(path, config, tensors | {PREFIX + key: t for key, t in whole.items()})
    else:
        _write(model, path, first, layers, list(saved), whole)


def _write(
    model: nn.Module,
    path: Path,
    method: str,
    layers: Mapping[str, AdapterLinear],
    saved: list[str],
    whole: Mapping[str, Tensor],
) -> None:
    with _folder(path), tempfile.TemporaryDirectory(dir=path, prefix=".") as made:
        made = Path(made)
        own.save_adapter(model, made / ADAPTER)
        if whole:
            save_file(dict(whole), made / SAVED)
        config = {
            "format": FORMAT,
            "lrkern": sys.modules[__package__.partition(".")[0]].__version__,
            "method": method,
            "settings": _shared([m.settings for m in layers.values()]),
            "base": {"class": type(_plain(model)).__name__, "name_or_path": _name_or_path(model)},
            "layers": list(layers),
            "modules_to_save": saved,
            "files": {file.name: _digest(file) for file in sorted(made.iterdir())},
        }
        (made / CONFIG).write_text(json.dumps(config, indent=2))
        for name in (ADAPTER, SAVED, CONFIG):  # which says what the others must be: half of this is refused
            if (made / name).exists():
                (made / name).replace(path / name)
    if not whole:
        (path / SAVED).unlink(missing_ok=True)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """It is there; if it was not, what fails leaves none."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            path.rmdir()
        raise


def _shared(settings: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = settings
    return {key: value for key, value in first.items() if all(s[key] == value for s in others)}


def _plain(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _name_or_path(model: nn.Module) -> str | None:
    model = _plain(model)
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with opened(path) as (descriptor, size):
        for at in range(0, size, 1 << 20):
            found.update(os.pread(descriptor, 1 << 20, at))
    return found.hexdigest()


class Read(NamedTuple):
    """What a folder holds for a model: layers by name, that were read or are new; of LoRA, parameters and what they are to be; and the
    values of modules that train whole, by name."""

    layers: dict[str, AdapterLinear]
    values: list[tuple[Tensor, Tensor]]
    saved: dict[str, dict[str, Tensor]]


def load(model: nn.Module, folder: str | Path) -> Report:
    """Puts what a folder holds into a model, in place.

    folder: what ``save`` wrote, of any method; PEFT's of LoRA, DoRA, AdaLoRA or MiSS, whoever wrote it, with keys named as other tools
        do (docs/files.md); or one of lrkern's own files. It is checked whole before anything changes.

    A base model gets layers and modules_to_save as ``adapt`` makes them, and is frozen but for them. A model that is adapted already
    takes the values, where it has the same layers, settings and modules_to_save. Refused with a ValueError, the model as it was: what
    is not of this model or method, values that are not finite in the model's dtypes, a layer that is merged, a model inside ``disable``.
    """
    require_model("lrkern.load", model)
    with refusal(f"lrkern.load: {named(str(folder))}: ", "; the model is unchanged"):
        path, saved = as_path(folder), saved_in(model)
        require(not are_back(saved), "the model must not be disabled, got one inside lrkern.disable")
        there = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
        for name, m in there.items():
            require(not m.merged, f"{name} is merged in the model; unmerge it first")
        if not there:
            check_bare(model)
        with as_before(model):
            if path.is_file():
                found = Read(_layers(path, model), [], {})
            else:
                found = _ours(path, model) if (path / CONFIG).exists() else _pefts(path, model, there)
            modules = _modules(model, found.saved)
            if there:
                _same("layers", there, found.layers)
                _same("modules_to_save", saved, modules)
            for name, values in found.saved.items():
                check_values(name, modules[name], values)
            layers = found.layers
            if not found.values:
                own.place(model, layers)
                layers = {name: model.get_submodule(name) for name in layers}
            if not there:
                put_in(model, layers, modules)
        with torch.no_grad():
            for p, value in found.values:
                p.copy_(value)
        for name, values in found.saved.items():
            put_values(modules[name], values)
    return Report.of(model, method_of(next(iter(layers.values()))) or "", layers)


def _same(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if odd := sorted(here.keys() ^ there.keys()):
        only = "the model" if odd[0] in here else "the folder"
        raise ValueError(f"{what} must be those that the model has already, got {named(odd[0])}, which only {only} has")


def _modules(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, nn.Module]:
    modules = plainly(dict(model.named_modules()))
    for name in saved:
        require(name in modules, f"has {named(name)} of modules_to_save, which the model does not")
        check_may_train(name, modules[name])
    return {name: modules[name] for name in saved}


def _layers(path: Path, model: nn.Module) -> dict[str, AdapterLinear]:
    return own.read_layers(path, [name for name, m in model.named_modules() if not wraps(m)])


_KINDS = {"method": str, "settings": dict, "base": dict, "layers": list, "modules_to_save": list, "files": dict}


def _ours(path: Path, model: nn.Module) -> Read:
    require(not (path / PEFTS).exists(), f"must hold one adapter, got {CONFIG} and {PEFTS}")
    with refusal(f"{CONFIG} cannot be read: "):
        config = read_json(path / CONFIG)
        require(isinstance(config, dict), f"must be an object, got {shown(config)}")
        version = config.get("format")
        require(type(version) is int and version == FORMAT, f"format must be {FORMAT}, got {shown(version)}")
        for key, kind in _KINDS.items():
            require(isinstance(config.get(key), kind), f"{key} must be a {kind.__name__}, got {shown(config.get(key))}")
        names, files = config["modules_to_save"], config["files"]
        words = all(isinstance(name, str) for name in names)
        require(words, f"modules_to_save must be names, got {shown(names)}")
        want = {ADAPTER} | ({SAVED} if names else set())
        require(files.keys() == want, f"files must be {sorted(want)}, got {shown(sorted(files))}")
    for name, digest in files.items():
        with refusal(f"{name} cannot be read: "):
            same = _digest(path / name) == digest
        require(same, f"{name} must be the one that {CONFIG} was written with, got another")
    layers = _layers(path / ADAPTER, model)
    said, found = {plain(str(name)) for name in config["layers"]}, {plain(name) for name in layers}
    require(said == found, f"{CONFIG} must name the layers of {ADAPTER}, got others")
    methods = sorted({method_of(m) or type(m).__name__ for m in layers.values()})
    require(methods == [config["method"]], f"method must be {' and '.join(methods)}, got {shown(config['method'])}")
    parts = {"": {}}
    if names:
        with refusal(f"{SAVED} cannot be read: "):
            parts = split(read_tensors(path / SAVED)[1], names)
    extra = sorted(parts.pop(""))
    require(not extra, f"{SAVED} must hold modules_to_save and no more, got {named(''.join(extra[:1]))}")
    return Read(layers, [], parts)


def _pefts(path: Path, model: nn.Module, there: Mapping[str, AdapterLinear]) -> Read:
    config, tensors = read_adapter(path)
    check_config(config)
    kind, known = peft_type(config), [LORA, *READERS]
    require(kind in known, f"peft_type must be one of {', '.join(known)}, got {shown(kind)}")
    config, tensors = as_peft(config, tensors, model)
    names = saved_modules(config, model)
    parts = split(tensors, names, PREFIX)
    tensors, config = parts.pop(""), {**config, "modules_to_save": None}
    linears = {name: size for name, size in sizes_of(model).items() if not inside(name, names)}
    if kind != LORA:
        return Read(READERS[kind](config, tensors, linears), [], parts)
    if there:
        odd = next((name for name, m in there.items() if type(m) is not FusedLoRALinear), None)
        require(odd is None, f"{odd} must be a FusedLoRALinear in the model, got {type(there.get(odd)).__name__}")
        layers = dict(there)
    else:
        settings = lora.described(config, tensors, linears)
        layers = make(model, FusedLoRALinear, {name: model.get_submodule(name) for name in settings}, settings)
    return Read(layers, lora.values(config, tensors, layers), parts)
