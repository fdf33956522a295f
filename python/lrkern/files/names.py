# SPDX-License-Identifier: Apache-2.0
"""Whatever names a file has for the tensors of an adapter: PEFT's names of the same, for one model.

A key that PEFT would read as it stands means what it means to PEFT. What others are is seen from the model: one module that
they can be of is taken, two are refused, and one that is of none is left for its reader to refuse.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import diffusers
from .check import named, require
from .folder import METADATA, PREFIX, Config, Tensors, check_config, features_of, inside, saved_modules, targeted
from .patterns import first_keys
from .plain import plain, wraps
from .read import FLOAT8

# What PEFT's keys end with after a module's name; an adapter's name, which files do not have, stands after the tensor's.
_OWN = (
    "lora_(?:embedding_)?[AB]|lora_E|lora_magnitude_vector|vera_lambda_[bd]|randlora_(?:lambda|gamma|[AB])|miss_block"
)
_TUNED = re.compile(rf"(.*)\.({_OWN})(?:\.([^.]+?))??(\.weight|\.bias)?", re.DOTALL)
_SHARED = re.compile(r"(?:base_model\.(?:model\.)?)?((?:vera|randlora)_[AB])(?:\.([^.]+))?")
_SAVED = re.compile(r"(.*)\.modules_to_save\.(.*)", re.DOTALL)


def as_peft(config: Config, tensors: Tensors, model: nn.Module) -> tuple[Config, Tensors]:
    """Config and tensors of an adapter as PEFT would have written them for this model.

    config: of adapter_config.json, or ``{"peft_type": "LORA", "lora_adapter_metadata": {...}}`` of diffusers. tensors: by key, of any of
    the names that docs/files.md lists. They come back by PEFT's key, the same tensors but for float8, which becomes float32. Weights of
    the base itself (base_layer.weight beside an adapted embedding or head) must be the model's, and are left out.

    Refused with a ValueError that names the keys: a name of two modules, one tensor under two names, keys of two adapters, another
    base's weights, patterns of the config that mean one thing by the file's names and another by the model's.
    """
    check_config(config)
    if METADATA in config:
        config, tensors = diffusers.component(config, tensors, model)
    names, saved, found, came, adapters = _Names(model), saved_modules(config, model), {}, {}, {}
    # With bias="all" PEFT writes the biases of copies twice more, maybe with the adapter's name.
    again = lambda key: config.get("bias") == "all" and key.endswith(".bias") and _SAVED.fullmatch(key) is not None
    for key in sorted(tensors, key=again):
        tensor, (new, adapter) = tensors[key], names.key(key)
        if adapter is None and names.is_base(new, tensor, config, saved):
            continue
        if again(key) and new in found:
            require(
                torch.equal(tensor, tensors[came[new]]), f"{named(key)} must be the copy's bias once more, got another"
            )
            continue
        adapters[adapter] = key
        if (first := came.setdefault(new, key)) != key:
            raise ValueError(f"{named(first)} and {named(key)} are both {named(new)}: keep the one that is meant")
        found[new] = tensor.float() if tensor.dtype in FLOAT8 else tensor
    adapters.pop(None, None)
    if len(adapters) > 1:
        each = " and ".join(named(adapter or "one without a name") for adapter in list(adapters)[:2])
        raise ValueError(f"must be of one adapter, got {each}: write each into a folder of its own (save_pretrained)")
    return names.config(config), found


class _Names:
    """A model's modules by name, and which of them a name of a file means."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, {name: m for name, m in model.named_modules() if name and not wraps(m)}
        self._plain: dict[str, list[str]] = {}
        for name in self.modules:
            self._plain.setdefault(plain(name), []).append(name)
        self._known: dict[str, str | None] = {}
        self._written: dict[str, str] = {}  # by adapted module, its name in the file
        self._lost = 0  # names of no module, for which the file will be refused: soon
        self._older: list[Callable[[str], str | None]] | None = None

    def key(self, key: str) -> tuple[str, str | None]:
        """PEFT's key of the same tensor, and the adapter's name ("" where it stands nowhere, None where none could)."""
        if hit := _SHARED.fullmatch(plain(key)):
            return f"base_model.{hit[1]}", hit[2] or ""
        if hit := _TUNED.fullmatch(key):
            stem, own, adapter, end = hit.groups()
            end = "" if own == "lora_magnitude_vector" else end or ""
            if name := self.module(stem):
                self._written[name] = stem.removeprefix(PREFIX)
                return f"{PREFIX}{name}.{own}{end}", adapter or ""
            return f"{PREFIX}{stem.removeprefix(PREFIX)}.{own}{end}", None  # a linear that its reader does not find
        if hit := _SAVED.fullmatch(key):
            name, (first, _, inner) = self.module(hit[1]), hit[2].partition(".")
            for adapter, path in (("", hit[2]), (first, inner)):
                if name and path and self._holds(self.modules[name], path):
                    return f"{PREFIX}{name}.{path}", adapter
            return key, None
        stem, _, leaf = key.rpartition(".")
        inside = ".base_layer" if stem.endswith(".base_layer") else ""
        name = self.module(stem.removesuffix(inside))
        return (f"{PREFIX}{name}{inside}.{leaf}", None) if name else (key, None)

    def _holds(self, module: nn.Module, path: str) -> bool:
        owner, _, leaf = path.rpartition(".")
        owner = dict(module.named_modules()).get(owner)
        return owner is not None and (leaf in owner._parameters or leaf in owner._buffers)

    def module(self, stem: str) -> str | None:
        if stem not in self._known:
            exact = stem.removeprefix(PREFIX)
            self._known[stem] = exact if exact != stem and exact in self.modules else self._module(plain(stem))
        return self._known[stem]

    def _module(self, stem: str) -> str | None:
        exact = stem.removeprefix(PREFIX)
        asked = list(dict.fromkeys([exact, stem]))
        found = (exact != stem and self._plain.get(exact)) or self._all(asked)
        if not found and self._lost < 100:
            found = self._all(rename(each) for each in asked for rename in self._renames())
        self._lost += not found
        if len(found) > 1:
            raise ValueError(f"{named(stem)} must be one module of this model, got {found[0]} and {found[1]}")
        return found[0] if found else None

    def _all(self, names: Iterable[str | None]) -> list[str]:
        return list(dict.fromkeys(full for name in names if name for full in self._plain.get(plain(name), ())))

    def _renames(self) -> list[Callable[[str], str | None]]:
        if self._older is None:
            self._older = [*_renamed_since(self.model), *_of_text_models(self.model)]
        return self._older

    def is_base(self, key: str, tensor: Tensor, config: Config, saved: list[str]) -> bool:
        """Whether this is a weight of the base, not the adapter's: then it must be equal to the model's."""
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        name = owner.removesuffix(".base_layer")
        if name not in self.modules or not key.startswith(PREFIX):
            return False
        trained = owner == name and inside(name, saved)
        if trained or (leaf == "bias" and config.get("bias", "none") != "none"):
            return False
        module = self.modules[name]
        there = getattr(getattr(module, "base_layer", module), leaf, None)
        if isinstance(there, Tensor):
            _check_equal(key, tensor, there)
        return isinstance(there, Tensor)

    def config(self, config: Config) -> Config:
        """The config in the model's names, where the file has others."""
        written, config = self._written, dict(config)
        if all(name == each for name, each in written.items()):
            return config
        for key in ("rank_pattern", "alpha_pattern"):
            if not (patterns := config.get(key)):
                continue
            each = list(patterns)
            both = [first_keys(key, each, names) for names in (written, written.values())]
            for name, mine, theirs in zip(written, *both, strict=True):
                if mine != theirs and plain(name) != plain(written[name]):
                    got = (
                        f"another of {named(written[name])}, its name in the file, than of {named(name)}, its name here"
                    )
                    raise ValueError(f"{key} must be the same by either name, got {got}: write the model's names there")
            hits = ((name, at) for name, at in zip(written, both[1], strict=True) if at is not None)
            config[key] = {f"^{re.escape(name)}": patterns[each[at]] for name, at in hits}
        may = [name for name, m in self.modules.items() if name in written or features_of(m)]
        mine = targeted(config, may)
        if mine is None or mine >= written.keys():
            return config
        older = self._as_written(may)
        theirs = targeted(config, older)
        names = sorted(name for name, each in zip(may, older, strict=True) if each in theirs)
        if written.keys() <= set(names):  # else its reader says what is wrong with it
            only = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
            config |= {"target_modules": names, **only}
        return config

    def _as_written(self, names: list[str]) -> list[str]:
        """What these would be called in the file: as its own, which differ in how they begin."""
        begins = {}
        for name, each in self._written.items():
            ours, theirs = name.split("."), each.split(".")
            while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
                ours.pop(), theirs.pop()
            begins[".".join(ours)] = ".".join(theirs)

        def of(name: str) -> str:
            if name in self._written:
                return self._written[name]
            at = next((i for i in range(len(name), 0, -1) if name[i : i + 1] in ("", ".") and name[:i] in begins), None)
            return begins[name[:at]] + name[at:] if at else name

        return [of(name) for name in names]


def _check_equal(key: str, tensor: Tensor, weight: Tensor) -> None:
    """As one rounds to the other: PEFT saves in the dtype that the base had then."""
    wrong = f"{named(key)} is a weight of the base and must be this model's, got"
    way = "merge the adapter with its own base by PEFT, or train the module as one of modules_to_save"
    known = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    require(known, f"{wrong} one that cannot be compared with {type(weight).__name__} of {weight.dtype}")
    shapes = f"shape {list(tensor.shape)} for {list(weight.shape)}"
    require(tensor.shape == weight.shape, f"{wrong} {shapes} (was the vocabulary resized?): {way}")
    theirs, ours = (t.detach().reshape(t.shape[0] if t.ndim else 1, -1) for t in (tensor, weight))
    for a, b in zip(theirs.split(4096), ours.split(4096), strict=True):  # of a vocabulary, a few MB at a time
        a = a.to(b.device)
        same = torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype).float(), a.float())
        require(same, f"{wrong} other values: it was trained, or is of another base; {way}")


def _renamed_since(model: nn.Module) -> Iterator[Callable[[str], str | None]]:
    """As transformers renamed modules, vision-language models in 4.52 among them, and PEFT follows it."""
    model = getattr(model, "_orig_mod", model)
    for pattern, new in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        yield lambda name, pattern=pattern, new=new: re.sub(pattern, new, name)
    if not hasattr(getattr(model, "config", None), "model_type") or not hasattr(model, "base_model_prefix"):
        return
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers before 5 has the mapping above
        return
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    end = ".lora_A.weight"  # the patterns are of whole keys
    yield lambda name: rename_source_key(name + end, renamings, [])[0].removesuffix(end)


def _of_text_models(model: nn.Module) -> Iterator[Callable[[str], str | None]]:
    """As a text model's names stand in a model with more than text: behind where its decoder, or what holds that, stands."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    if (
        not hasattr(model, "get_decoder")
        or text is None
        or text() is config
        or getattr(config, "is_encoder_decoder", False)
    ):
        return
    decoder = model.get_decoder()
    where = next((plain(name) for name, m in model.named_modules() if m is decoder), "").split(".")
    begin = f"{getattr(decoder, 'base_model_prefix', '')}."
    for n in range(len(where), 0, -1):
        at = ".".join(where[:n])
        yield lambda name, at=at: f"{at}.{name}"
        yield lambda name, at=at: f"{at}.{name.removeprefix(begin)}" if name.startswith(begin) else None
