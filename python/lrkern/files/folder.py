# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: adapter_config.json and adapter_model.safetensors, and what their words mean."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..functional import lora_scaling
from ..nn.linear import AdapterLinear
from .check import is_finite, is_whole, named, refusal, require, shown
from .patterns import first_keys, first_matches
from .plain import wraps
from .read import parse, read_json, read_shards, read_tensors

if TYPE_CHECKING:
    import peft

Config = Mapping[str, Any]  # of adapter_config.json
Tensors = Mapping[str, Tensor]  # by their key in the file

Sizes = Mapping[str, tuple[int, int]]  # [I, O] of every linear of a model by name

# By peft_type, how a folder of that method is made of layers (the folder, they by name, all modules of the model by name), and how
# its config and tensors become layers over bases on the meta device. A ValueError says what no such folder or layer can be.
WRITERS: dict[str, Callable[[str | Path, Mapping[str, AdapterLinear], Mapping[str, nn.Module]], None]] = {}
READERS: dict[str, Callable[[Config, Tensors, Sizes], dict[str, AdapterLinear]]] = {}
FORKS: dict[
    str, str
] = {}  # by the flag of a LoraConfig that a fork of PEFT has, the method that it means: a peft_type to us

WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"  # one of them
DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # of DIFFUSERS' header: LoraConfigs, or nothing
PREFIX = "base_model.model."
LORA = "LORA"  # the peft_type of what FusedLoRALinear computes


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what stands at ``path`` once the block has ended without an error: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder as they are: of PEFT's, in one file or in shards with their index, or of diffusers', whose
    config is METADATA alone. ``names.as_peft`` makes PEFT's of them. A ValueError says why where they cannot be read."""
    folder = _there(folder)
    with refusal("cannot be read: ", of=(OSError,)):
        held = {entry.name for entry in islice(os.scandir(folder), 1000)}
    there = lambda name: name in held or os.path.lexists(folder / name)
    pickled = "pickle files such as adapter_model.bin are not read"
    if there(DIFFUSERS) and not there("adapter_config.json"):
        with refusal(f"{DIFFUSERS} cannot be read: "):
            metadata, tensors = read_tensors(folder / DIFFUSERS)
            with refusal(f"its metadata {METADATA} "):
                return {"peft_type": LORA, METADATA: parse(metadata.get(METADATA, "{}"))}, tensors
    one = there(WEIGHTS)
    got = sorted(map(named, held))[:4] or "an empty folder"
    require(one or there(INDEX), f"must hold {WEIGHTS}, or shards with {INDEX} ({pickled}), got {got}")
    config = read_config(folder)
    if not one:
        return config, read_shards(folder / INDEX)
    with refusal(f"{WEIGHTS} cannot be read: "):
        _, tensors = read_tensors(folder / WEIGHTS)
    return config, tensors


def read_config(folder: Path) -> dict[str, Any]:
    with refusal("adapter_config.json cannot be read: "):
        config = read_json(folder / "adapter_config.json")
    require(isinstance(config, dict), f"adapter_config.json must hold an object, got {type(config).__name__}")
    return config


def _there(folder: str | Path) -> Path:
    folder = as_path(folder)
    if not folder.is_dir():
        absent = "nothing there (what is on a hub must be downloaded first)"
        raise ValueError(f"must be a PEFT folder, got {'a file' if folder.exists() else absent}")
    return folder


def linear_of(key: str, ends: tuple[str, ...]) -> str | None:
    """Whose tensor it is by its key, which must be one of these after the linear's name."""
    end = next((end for end in ends if key.endswith(end)), None)
    return key[len(PREFIX) : -len(end)] or None if end and key.startswith(PREFIX) else None


def as_path(path: Any) -> Path:
    """Of what was given as one, where the system can ask for it: no zero byte, not too long, no ring of links."""
    why = f"a {type(path).__name__}"
    try:
        if isinstance(path, str | os.PathLike):
            os.stat(path)
            return Path(path)
    except (FileNotFoundError, NotADirectoryError):
        return Path(path)
    except (TypeError, ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"must be a path, got {shown(path)}: {why}")


def write_adapter(folder: str | Path, config: "peft.PeftConfig | dict[str, Any]", tensors: Tensors) -> None:
    """Writes a PEFT folder; a config may be what ``read_adapter`` gave."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "adapter_model.safetensors") as path:
        save_file(_apart(tensors), path, metadata={"format": "pt"})
        if isinstance(config, dict):
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        else:
            config.save_pretrained(str(folder))


def _apart(tensors: Tensors) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own, which layers that share parameters do not give them."""
    found, seen = {}, set()
    for key, t in tensors.items():
        t = t.detach().cpu().contiguous()
        found[key] = t.clone() if t.numel() and t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    return found


_words = lambda value: isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value)
_flag = ("true or false", lambda value: isinstance(value, bool))
_names = ("a string or a list of strings", lambda value: isinstance(value, str) or _words(value))
_rank = lambda value: is_whole(value, 0, 2**31 - 1)

# What a config's keys may be, beside null, which is as good as absent; of all keys whose value means anything here.
_KINDS: dict[str, tuple[str, Any]] = {
    "peft_type": ("a string", lambda value: isinstance(value, str)),
    "r": ("a whole number from 0 to 2147483647", _rank),
    "lora_alpha": ("a finite number (in float32)", is_finite),
    "rank_pattern": ("an object of whole numbers by regex", lambda value: _pattern(value, _rank)),
    "alpha_pattern": ("an object of finite numbers by regex", lambda value: _pattern(value, is_finite)),
    "target_modules": _names,
    "exclude_modules": _names,
    "modules_to_save": _names,
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda value: all(is_whole(v, 0, 2**31 - 1) for v in (value if isinstance(value, list | tuple) else [value])),
    ),
    "layers_pattern": _names,
    **dict.fromkeys(
        ("init_lora_weights", "init_weights"), ("true, false or a string", lambda value: isinstance(value, bool | str))
    ),
    "bias": ("a string", lambda value: isinstance(value, str)),
    "projection_prng_key": ("a 64-bit integer", lambda value: is_whole(value, -(2**63), 2**64 - 1)),
    **dict.fromkeys(
        (
            "use_rslora",
            "use_dora",
            "lora_bias",
            "fan_in_fan_out",
            "save_projection",
            "sparse",
            "very_sparse",
            "use_mora",
        ),
        _flag,
    ),
}


_masks = (  # of AdaLoRA: which ranks of the first are left
    "an object of lists of true or false by name",
    lambda value: _pattern(value, lambda v: isinstance(v, list) and all(isinstance(b, bool) for b in v)),
)


def _pattern(value: Any, fits: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())


def check_config(config: Any) -> None:
    """Refuses values of kinds that no config of PEFT's has: "false" must not count as true."""
    require(isinstance(config, Mapping), f"config must be an object, got {type(config).__name__}")
    adalora = {"rank_pattern": _masks} if peft_type(config) == "ADALORA" else {}
    for key, (what, fits) in (_KINDS | adalora).items():
        value = peft_type(config) if key == "peft_type" else config.get(key)
        require(value is None or fits(value), f"{key} must be {what}, got {shown(value)}")


def peft_type(config: Config) -> Any:
    """Of a config as the file has it, or as PEFT's ``to_dict`` gives it; of a fork's the method that its flag means."""
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    forks = (method for flag, method in FORKS.items() if config.get(flag) is True)
    return next(forks, kind) if kind == LORA else kind


def rank_and_scaling(config: Config, name: str) -> tuple[int, float]:
    """Of a layer, as PEFT reads rank_pattern and alpha_pattern: a key is a regex of the name or of its end after a dot."""
    return ranks_and_scalings(config, [name])[name]


def ranks_and_scalings(config: Config, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """The same of many layers by name."""
    rslora = bool(config.get("use_rslora"))
    found = ranks_and_alphas(config, names).items()
    return {name: (r, lora_scaling(alpha, r, rslora)) for name, (r, alpha) in found}  # no larger than alpha


def ranks_and_alphas(config: Config, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Of layers by name r and lora_alpha."""
    check_config(config)
    names = list(names)

    def of(key: str, pattern: str) -> list[Any]:
        patterns, default = config.get(pattern) or {}, config.get(key)
        keys = list(patterns)
        found = first_keys(pattern, keys, names)
        return [
            patterns.get(name, default) if i is None else patterns[keys[i]]
            for name, i in zip(names, found, strict=True)
        ]

    result = {}
    for name, r, alpha in zip(names, of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern"), strict=True):
        require(r is not None, f"r of {named(name)} must be a whole number, got None")
        require(alpha is not None, f"lora_alpha of {named(name)} must be a finite number, got None")
        result[name] = r, alpha
    return result


def targeted(config: Config, names: Iterable[str]) -> set[str] | None:
    """Of these linears those that the config names, as PEFT reads it; None where it names none, or all there are."""
    check_config(config)
    names, target = list(names), config.get("target_modules")
    exclude, indices, layers = (config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if isinstance(target, str):
        for key, value in (("layers_to_transform", indices), ("layers_pattern", layers)):
            require(value is None, f"{key} must be absent where target_modules is a string, got {shown(value)}")
    require(not layers or indices is not None, "layers_to_transform must be given with layers_pattern, got None")
    if not target or target == "all-linear":
        return None
    found = _matching("target_modules", target, names)
    if not isinstance(target, str) and indices not in (None, [], ()):
        exactly = found & set(target)  # an index is asked of names that end like a target, not of whole ones
        ends = sorted(found - exactly)
        layers = [layers] if layers and isinstance(layers, str) else list(layers or ())
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in layers] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        at = [hit and hit[1] for hit in first_matches("layers_pattern", patterns, ends)]
        wanted = set(indices if isinstance(indices, list | tuple) else [indices])
        found = exactly | {name for name, i in zip(ends, at, strict=True) if i is not None and int(i) in wanted}
    return found - _matching("exclude_modules", exclude, names) if exclude else found


def _matching(key: str, pattern: Any, names: list[str]) -> set[str]:
    """Those that a regex matches, or that are, or end after a dot with, one of a list."""
    if isinstance(pattern, str):
        hits = first_matches(key, [pattern], names, whole=True)
        return {name for name, hit in zip(names, hits, strict=True) if hit}
    listed = set(pattern)
    ends = lambda name: (name[i + 1 :] for i, c in enumerate(name) if c == ".")
    return {name for name in names if name in listed or not listed.isdisjoint(ends(name))}


def saved_modules(config: Config, model: nn.Module) -> list[str]:
    """Those that PEFT copies for modules_to_save: whose names end, anywhere, like one of it; the outermost ones."""
    ends = config.get("modules_to_save") or ()
    ends = (ends,) if isinstance(ends, str) else tuple(ends)
    found: list[str] = []
    for name, _ in model.named_modules(remove_duplicate=False) if ends else ():
        if name.endswith(ends) and not inside(name, found):
            found.append(name)
    return found


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether this is one of these modules, or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def check_plain(config: Config, more: tuple[str, ...]) -> None:
    """Refuses what trains more than the adapter's own tensors."""
    for key in more:
        require(not config.get(key), f"{key} must be off, got {shown(config.get(key))}")
    bias = config.get("bias", "none")
    require(bias == "none", f"bias must be 'none', got {shown(bias)}")


def by_linear(config: Config, tensors: Tensors, linears: Sizes, *keys: str) -> dict[str, list[Tensor]]:
    """By linear the tensors of these keys, all there, of the linears that the config names and no other.

    A part of the model of which it has none (a vision tower, for an adapter of the text model) stays as the base has it, with a
    warning, as in PEFT, where adapters begin as nothing."""
    what, ends = " and ".join(keys), tuple(f".{key}" for key in keys)
    found: dict[str, dict[str, Tensor]] = {}
    for k, tensor in tensors.items():
        name = linear_of(k, ends)
        require(name, f"must hold {what} of linears, got {named(k)}")
        found.setdefault(name, {})[next(key for key in keys if k.endswith(f".{key}"))] = tensor
    require(found, f"must hold {what} of linears, got none")
    if unknown := sorted(found.keys() - linears.keys()):
        other = f"another model's, or another class's than this one with {next(iter(linears), 'none')}"
        raise ValueError(f"must be of this model's linears, got {named(unknown[0])} ({other}?)")
    lacking = [f"{name}.{k.removesuffix('.weight')}" for name in found for k in keys if k not in found[name]]
    without: list[str] = []
    if (wanted := targeted(config, linears)) is not None:
        parts, nothing = {_part(name) for name in found}, _begins_as_nothing(config)
        for name in sorted(wanted - found.keys()):
            (without if nothing and _part(name) not in {"", *parts} else lacking).append(name)
        if extra := sorted(found.keys() - wanted):
            targets = shown(config.get("target_modules"))
            raise ValueError(f"must hold what target_modules={targets} names and no more, got {extra[0]}")
    if lacking:
        raise ValueError(f"lacks {lacking[0]} and {len(lacking) - 1} more")
    if without:
        left = f"{without[0]} and {len(without) - 1} more, which target_modules names, are as in the base"
        warnings.warn(f"lrkern: the adapter has nothing for {_part(without[0])}: {left}", stacklevel=2)
    return {name: [parts[k] for k in keys] for name, parts in found.items()}


def _part(name: str) -> str:
    """The stack of layers that a linear is in, or what holds it."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else name.rpartition(".")[0]


def _begins_as_nothing(config: Config) -> bool:
    """Whether a layer that PEFT makes and nothing is loaded into adds zero."""
    lora, others = config.get("init_lora_weights"), config.get("init_weights")
    return lora in (None, True, "gaussian") and others in (None, True, "mini", "bat")


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """[I, O] of a linear of any kind: nn.Linear, a quantised one, transformers' Conv1D. Not the one inside
    nn.MultiheadAttention, whose forward nobody calls, nor torch.compile's wrapper around one."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or wraps(module):
        return None
    i, o = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    I, O = getattr(module, i, None), getattr(module, o, None)
    return (I, O) if isinstance(I, int) and isinstance(O, int) else None


def sizes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[I, O] of the linears of a model by name, a layer of ours as one linear."""
    named = {name: m for name, m in model.named_modules() if features_of(m)}
    inside = tuple(f"{name}." for name, m in named.items() if isinstance(m, AdapterLinear))
    return {name: features_of(m) for name, m in named.items() if not name.startswith(inside)}
