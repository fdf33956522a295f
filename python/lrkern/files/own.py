# SPDX-License-Identifier: Apache-2.0
"""lrkern's own adapter files, of a few kilobytes: coefficients, seeds and what makes the layers again (docs/files.md)."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..limits import DTYPES
from ..nn import variants
from ..nn.linear import AdapterLinear
from ..nn.plain import as_linear, device_of
from ..ops.basis import STREAM_VERSION
from .check import check_finite, check_shape, is_finite, is_whole, named, refusal, require, shown
from .folder import LORA, as_path, replaced
from .plain import places, plain, plainly, wraps
from .read import parse, read_tensors

__all__ = ["load_adapter", "read_layers", "save_adapter"]

FORMAT = 1
GROUP = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPES}


def classes() -> tuple[type[AdapterLinear], ...]:
    """Those that such a file holds: all that PEFT does not have as plain LoRA; of low rank first."""
    own = [cls for cls in AdapterLinear.KINDS.values() if cls.PEFT_TYPE != LORA]
    return tuple(sorted(own, key=lambda cls: not cls.has_factors()))


def either(classes: Iterable[type], last: str = " or ") -> str:
    """Their names; the variants of LoRA, where they are many, have one together."""
    classes = list(classes)
    many = sum(cls.__module__.startswith(variants.__name__) for cls in classes) > 3
    said = lambda cls: many and cls.__module__.startswith(variants.__name__)
    *names, end = dict.fromkeys(f"a layer of {variants.__name__}" if said(cls) else cls.__name__ for cls in classes)
    return f"{', '.join(names)}{last}{end}" if names else end


def own_layers(named: Iterable[tuple[str, Any]]) -> dict[str, AdapterLinear]:
    kinds = classes()
    return {name: m for name, m in named if isinstance(m, kinds)}


def check_places(who: str, model: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Files have layers by name, and who loads one changes one place: a layer may not stand at two, of one parent or several."""
    names = {m: name for name, m in model.named_modules()}
    seen: dict[nn.Module, str] = {}
    for parent, name in names.items():
        for child, m in parent._modules.items():
            if isinstance(m, kinds):
                here = f"{name}.{child}".lstrip(".")
                first = seen.setdefault(m, here)
                require(first == here, f"{who}: {first} must stand at one place of the model, got {here} too")


def _kind(layer: AdapterLinear) -> dict[str, Any]:
    dtype = next(c.dtype for c in layer.coefficients().values() if c.is_floating_point())  # a mask has another
    kind = {"class": type(layer).__name__, "in_features": layer.in_features, "out_features": layer.out_features}
    settings = {name: value for name, value in layer.settings.items() if name != "seed"}
    return kind | {"adapter_dtype": str(dtype).removeprefix("torch.")} | settings


def _quantize(c: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [n] int8, or [(n + 1) // 2] uint8 for 4 bits, and scales [groups] float32."""
    m, c = 2 ** (bits - 1) - 1, c.float().flatten()
    groups = nn.functional.pad(c, (0, -len(c) % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1) / m
    codes = (
        (groups / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-m, m).to(torch.int8).flatten()[: len(c)]
    )
    if bits == 8:
        return codes, scale
    nibbles = (nn.functional.pad(codes, (0, len(codes) % 2)) + 8).to(torch.uint8).view(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4, scale


def _dequantize(codes: Tensor, scale: Tensor, n: int, bits: int) -> Tensor:
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).to(torch.int8).flatten()[:n] - 8
    return codes * scale.repeat_interleave(GROUP)[:n]


def save_adapter(model: nn.Module, path: str | Path, bits: int | None = None) -> None:
    """Writes the adapters of a model's layers, all kinds that PEFT's LoRA is not, as one file, without base weights.

    bits: None keeps the coefficients as they are, 8 or 4 quantises them (docs/files.md).
    """
    require(bits in (None, 8, 4), f"save_adapter: bits must be None, 8 or 4, got {bits!r}")
    layers, got = plainly(own_layers(model.named_modules())), type(model).__name__
    require(layers, f"save_adapter: model must have {either(classes())} layers, got {got} with none")
    check_places("save_adapter", model, classes())
    tensors, kinds, entries = {}, [], {}
    first_of: dict[int, str] = {}  # a parameter that several layers have is written once
    shared: dict[str, str] = {}
    for name, layer in layers.items():
        _check_settings(name, layer)
        exact = f"save_adapter: bits must be None for {type(layer).__name__} ({name}), whose values are those of W, got {bits}"
        require(bits is None or layer.QUANTIZES, exact)
        kind = _kind(layer)
        if kind not in kinds:
            kinds.append(kind)
        entries[name] = kinds.index(kind), layer.settings.get("seed")
        for key, c in layer.coefficients().items():
            key = f"{name}.{key}"
            first = first_of.setdefault(id(c), key)
            if first != key:
                shared[key] = first
                continue
            c = c.detach().cpu().contiguous()
            require(c.isfinite().all(), f"save_adapter: {key} must be finite, got inf or nan")
            if bits is None or not c.is_floating_point():
                tensors[key] = c.clone()
            else:
                tensors[key], tensors[f"{key}.scale"] = _quantize(c, bits)
    header = {"format": FORMAT, "stream": STREAM_VERSION, "bits": bits, "kinds": kinds, "layers": entries}
    header |= {"shared": shared} if shared else {}
    with replaced(Path(path)) as path:
        save_file(tensors, path, metadata={"lrkern": json.dumps(header, separators=(",", ":"))})


def _check_settings(name: str, layer: AdapterLinear) -> None:
    """What is written of a layer must make it again: not one of a class of the user's own, nor with attributes that were
    written since and follow from no setting."""
    cls, got = type(layer), type(layer).__name__
    of_ours = f"save_adapter: {name} must be {either(classes())}, got {got}, a subclass"
    require(cls.KINDS.get(got) is cls, of_ours)
    made = cls.from_linear(
        nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"), **layer.settings
    )
    for key, value in vars(made).items():
        if not key.startswith("_") and key not in ("training", "enabled", "merged"):
            same, got = getattr(layer, key) == value, getattr(layer, key)
            require(same, f"save_adapter: {name}.{key} must be {value}, which its settings give, got {got}")


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Puts the adapters of a file into a model: an nn.Linear that has a layer's name is replaced by that layer over it, and a
    layer that is there already, with the same settings, takes the coefficients and the seed. What ``save_adapter``
    wrote without bits computes the same bits. The whole file is checked before anything changes."""
    with refusal(f"load_adapter: {named(str(path))}: ", "; the model is unchanged"):
        place(model, read_layers(path, [name for name, m in model.named_modules() if not wraps(m)]))


def place(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> None:
    """Puts layers over bases on the meta device into a model, as ``load_adapter`` says."""
    for name, layer in layers.items():
        _check_place(model, name, layer)
    there = {name: model.get_submodule(name) for name in layers}
    has = {name: m for name, m in there.items() if isinstance(m, classes())}
    new = {name: layer for name, layer in layers.items() if name not in has}
    _check_shared(has, layers)
    moved: dict[tuple[int, torch.device], tuple[Tensor, nn.Parameter]] = {}  # what layers share, they share on
    for name, layer in new.items():
        device = device_of(there[name])
        for key, c in layer.coefficients().items():
            here = nn.Parameter(c.detach().to(device), c.requires_grad)
            put(layer, key, moved.setdefault((id(c), device), (c, here))[1])
        for key, b in layer._buffers.items():
            layer._buffers[key] = b if b is None else b.to(device)
    connect(has | new)
    for name, layer in layers.items():
        if name in has:  # coefficients that it has, in its own dtype
            with torch.no_grad():
                for key, c in has[name].coefficients().items():
                    c.copy_(layer.get_parameter(key))
            if "seed" in layer.settings:
                has[name].seed = layer.seed
        else:
            layer.base_layer = as_linear(there[name]).requires_grad_(False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.train(there[name].training))


def _check_shared(has: Mapping[str, AdapterLinear], layers: Mapping[str, AdapterLinear]) -> None:
    """One parameter takes one value."""
    came: dict[int, Tensor] = {}
    for name, m in has.items():
        for key, c in m.coefficients().items():
            new = layers[name].get_parameter(key)
            first = came.setdefault(id(c), new)
            same = first is new or torch.equal(first, new)
            require(
                same, f"{name}.{key} must be the same in all layers, which share it in the model, got different ones"
            )


def connect(layers: Mapping[str, AdapterLinear]) -> None:
    """Each kind's own ``connect``, with those of its layers."""
    for cls in dict.fromkeys(map(type, layers.values())):
        cls.connect({plain(name): m for name, m in layers.items() if type(m) is cls})


def put(layer: AdapterLinear, key: str, c: Tensor) -> None:
    """A parameter itself, or a new one of a tensor."""
    owner, _, name = key.rpartition(".")
    owner = layer.get_submodule(owner)
    setattr(owner, name, c if isinstance(c, nn.Parameter) else nn.Parameter(c, owner._parameters[name].requires_grad))


def read_layers(path: str | Path, among: Collection[str] | None = None) -> dict[str, AdapterLinear]:
    """The layers of a file by name, coefficients included, over base layers on the meta device. Checks the whole file.

    among: what the layers may be called, checked before any of them is made."""
    header, tensors = _read(as_path(path))
    layers, kinds, shared = header["layers"], [_Described.of(kind) for kind in header["kinds"]], header["shared"]
    owners = {key[: at.start()] for key in (*tensors, *shared) for at in re.finditer(r"\.", key)}
    here = places(layers, layers if among is None else among)
    for name, entry in layers.items():
        must = f"{named(name)} must be [which of the {len(kinds)} kinds, seed]"
        pair = isinstance(entry, list) and len(entry) == 2 and is_whole(entry[0], 0, len(kinds) - 1)
        require(pair, f"{must}, got {shown(entry)}")
        require(name in owners, f"lacks the coefficients of {named(name)}")
    bits, own = header["bits"], {}
    for name, (index, seed) in layers.items():
        own[name] = _layer(name, kinds[index], seed, bits, tensors, shared)
    expected = {f"{name}.{key}": (layer, key) for name, layer in own.items() for key in layer.coefficients()}
    if extra := sorted(({key.removesuffix(".scale") for key in tensors} | shared.keys()) - expected.keys()):
        raise ValueError(f"has {named(extra[0])} and {len(extra) - 1} more that are of no layer")
    _share(expected, shared)
    made = {here[name]: layer for name, layer in own.items()}
    _connect_as_read(made)
    return made


def _share(parameters: Mapping[str, tuple[AdapterLinear, str]], shared: Mapping[str, str]) -> None:
    """Gives the layers what they share."""
    for key, first in shared.items():
        has = first in parameters and first not in shared
        require(has, f"shared: {named(key)} must be that of a tensor of this file, got {named(first)}")
        (layer, own), (source, its) = parameters[key], parameters[first]
        c, like = source.get_parameter(its), layer.get_parameter(own)
        same = (c.shape, c.dtype, c.requires_grad) == (like.shape, like.dtype, like.requires_grad)
        require(
            same,
            f"shared: {named(key)} must be {like.dtype} {list(like.shape)}, got {c.dtype} {list(c.shape)} of {named(first)}",
        )
        put(layer, own, c)


def _connect_as_read(layers: Mapping[str, AdapterLinear]) -> None:
    """A layer that takes over what others have must have had the same."""
    read = {(name, key): c for name, m in layers.items() for key, c in m.coefficients().items()}
    connect(layers)
    for (name, key), c in read.items():
        now = layers[name].get_parameter(key)
        same = now is c or torch.equal(now, c)
        require(same, f"{named(name)}.{key} must be what all layers of its kind share, got other values")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with refusal("cannot be read: "):
        metadata, tensors = read_tensors(path)
        with refusal("its metadata lrkern "):
            header = parse(metadata.get("lrkern", "null"))
    require(isinstance(header, dict), "must be a file of save_adapter's, got one without the metadata lrkern")
    found, stream, bits = (header.get(key) for key in ("format", "stream", "bits"))
    same = lambda value, want: type(value) is int and value == want
    require(same(found, FORMAT), f"format must be {FORMAT}, got {shown(found)}, another lrkern's")
    ours = f"{STREAM_VERSION}, the random stream this lrkern generates"
    require(same(stream, STREAM_VERSION), f"stream must be {ours}, got {shown(stream)}")
    known = "bits" in header and (bits is None or same(bits, 8) or same(bits, 4))
    require(known, f"bits must be null, 8 or 4, got {shown(bits) if 'bits' in header else 'none'}")
    listed = isinstance(header.get("layers"), dict) and isinstance(header.get("kinds"), list)
    require(listed, "must list kinds and layers in its metadata")
    shared = header.setdefault("shared", {})
    words = isinstance(shared, dict) and all(isinstance(value, str) for value in shared.values())
    require(words, f"shared must be an object of keys, got {shown(shared)}")
    twice = next((key for key in shared if key in tensors), None)
    require(twice is None, f"shared: {named(twice or '')} must be no tensor of its own")
    return header, tensors


class _Described(NamedTuple):
    """A kind of layers as the metadata has it, checked as far as it can be without a seed."""

    cls: type[AdapterLinear]
    sizes: tuple[int, int]
    dtype: torch.dtype
    settings: dict[str, Any]  # but the seed

    @classmethod
    def of(cls, kind: Any) -> "_Described":
        with refusal("kinds: "):
            require(isinstance(kind, dict), f"must be objects, got {shown(kind)}")
            settings = dict(kind)
            named_by = {c.__name__: c for c in classes()}
            name, *sizes, dtype = (settings.pop(k, None) for k in _ABOUT)
            require(isinstance(name, str) and name in named_by, f"class must be {either(classes())}, got {shown(name)}")
            whole = all(is_whole(n, 0, 2**31 - 1) for n in sizes) and math.prod(sizes) < 2**59
            require(whole, f"in_features and out_features must be sizes of a linear, got {shown(sizes)}")
            fits = isinstance(dtype, str) and dtype in _DTYPES
            require(fits, f"adapter_dtype must be one of {sorted(_DTYPES)}, got {shown(dtype)}")
            default = {k: v for k, v in _defaults(named_by[name]).items() if k != "seed"}
            known = settings.keys() == default.keys()
            require(known, f"settings must be {sorted(default)}, got {shown(sorted(settings))}")
            for key, value in settings.items():
                what, holds = _like(default[key])
                require(holds(value), f"{key} must be {what}, got {shown(value)}")
            return cls(named_by[name], tuple(sizes), _DTYPES[dtype], settings)


_ABOUT = "class", "in_features", "out_features", "adapter_dtype"


@cache
def _defaults(cls: type[AdapterLinear]) -> dict[str, Any]:
    seed = {"seed": 0} if "seed" in cls.SETTINGS else {}
    wide = nn.Linear(4096, 4096, bias=False, device="meta")  # enough for any default, of no memory
    return cls.from_linear(wide, **seed).settings


def _like(default: Any) -> tuple[str, Callable[[Any], bool]]:
    """What a setting must be that has this default; which values it may have is for the class to say."""
    if isinstance(default, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(default, int):
        return "a whole number", lambda value: type(value) is int
    if isinstance(default, float):
        return "a finite number (in float32)", is_finite
    return "a string", lambda value: isinstance(value, str)


def _layer(
    name: str, kind: _Described, seed: Any, bits: int | None, tensors: dict[str, Tensor], shared: Mapping[str, str]
) -> AdapterLinear:
    """The layer as the file describes it, coefficients included but those of another key, over a base on the meta device."""
    settings = {key: kind.settings.get(key, seed) for key in kind.cls.SETTINGS}
    layer = _over_meta(name, kind.cls, kind.sizes, settings, kind.dtype)
    for key, c in layer.coefficients().items():
        if f"{name}.{key}" not in shared:
            put(layer, key, _values(f"{name}.{key}", c, bits, tensors))
    return layer


def _over_meta(
    name: str, cls: type[AdapterLinear], sizes: tuple[int, int], settings: dict[str, Any], dtype: torch.dtype
):
    with refusal(f"{named(name)} cannot be made: "):
        return cls.from_linear(nn.Linear(*sizes, bias=False, device="meta"), **settings, adapter_dtype=dtype)


def as_layer(
    name: str, cls: type[AdapterLinear], sizes: tuple[int, int], settings: dict[str, Any], tensors: dict[str, Tensor]
) -> AdapterLinear:
    """The layer that has these settings and coefficients, by their key in its state_dict, over a base on the meta device."""
    dtypes = {t.dtype for t in tensors.values()}
    one = len(dtypes) == 1 and dtypes <= {*DTYPES}
    layer = _over_meta(name, cls, sizes, settings, dtypes.pop() if one else torch.float32)
    for key, c in layer.coefficients().items():
        check_shape(f"{name}.{key}", tensors[key], c.shape)
        check_finite(f"{name}.{key}", tensors[key])
        put(layer, key, tensors[key].to(c.dtype, copy=True))  # the file's own bytes would change with it
        check_finite(f"{name}.{key} in {c.dtype}", layer.get_parameter(key))
    return layer


def _values(key: str, like: Tensor, bits: int | None, tensors: dict[str, Tensor]) -> Tensor:
    """The coefficients of this key, checked, of like's shape and dtype."""
    n, groups = like.numel(), -(-like.numel() // GROUP)
    bits = bits if like.is_floating_point() else None  # a mask is kept as it is
    expected = {key: (like.dtype, like.shape)}
    if bits:
        codes = (torch.int8, (n,)) if bits == 8 else (torch.uint8, ((n + 1) // 2,))
        expected = {key: codes, f"{key}.scale": (torch.float32, (groups,))}
    for k, (dtype, shape) in expected.items():
        require(k in tensors, f"lacks {named(k)}")
        t = tensors[k]
        same = t.dtype == dtype and t.shape == shape
        require(same, f"{named(k)} must be {dtype} {list(shape)}, got {t.dtype} {list(t.shape)}")
    if bits:
        c = _dequantize(tensors[key], tensors[f"{key}.scale"], n, bits).view(like.shape).to(like.dtype)
    else:
        c = tensors[key].clone()  # the file's own bytes would change with it
    require(c.isfinite().all(), f"{named(key)} must be finite, got inf or nan")
    return c


def _check_place(model: nn.Module, name: str, layer: AdapterLinear) -> None:
    there = as_linear(model.get_submodule(name))
    if isinstance(there, classes()):
        require(not there.merged, f"{name} is merged in the model; unmerge it first")
        got, want = ({k: v for k, v in _kind(m).items() if k != "adapter_dtype"} for m in (there, layer))
        changed = {k: (want[k], got.get(k)) for k in want if want[k] != got.get(k)}
        require(got == want, f"{name} differs from the model's: {changed} (file, model)")
        for key, c in there.coefficients().items():
            fits = layer.get_parameter(key).to(c.dtype).isfinite().all()
            require(fits, f"{name}.{key} must be finite in the model's {c.dtype}, got inf or nan")
        require(not (got := layer.unlike(there)), f"{name} must be of the model's base, got {got}")
        return
    must = f"{name} must be an nn.Linear with a plain weight in the model"
    require(not (got := layer._unfit(there)), f"{must}, got {got}")
    require(name, "an nn.Linear cannot be replaced in itself; give the module that holds it")
    got, want = [there.out_features, there.in_features], [layer.out_features, layer.in_features]
    require(got == want, f"{name} must have a weight of shape {want} in the model, got {got}")
    require(not (got := layer.unlike(there)), f"{name} must be of the model's base, got {got}")
