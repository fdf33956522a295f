# SPDX-License-Identifier: Apache-2.0
"""Names without torch.compile's wrappers: files have them so, whatever part of a model is compiled."""

from collections.abc import Iterable, Mapping

from torch import nn

from .check import named, require


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod") if "_orig_mod" in name else name


def wraps(module: nn.Module) -> bool:
    """Whether this is torch.compile's wrapper, which passes on what the module in it has."""
    return "_orig_mod" in module._modules


def plainly(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The same by plain name."""
    inner = {name: m for name, m in modules.items() if not wraps(m)}
    found = {plain(name): m for name, m in inner.items()}
    twice = next((name for name, m in inner.items() if found[plain(name)] is not m), None)
    require(twice is None, f"{twice} must have one name without _orig_mod, got another module of that name")
    return found


def places(names: Iterable[str], among: Iterable[str]) -> dict[str, str]:
    """By name in a file the one here that is it, as it stands or plainly."""
    here: dict[str, list[str]] = {}
    for name in among:
        here.setdefault(plain(name), []).append(name)
    found: dict[str, str] = {}
    came: dict[str, str] = {}
    for name in names:
        alike = here.get(plain(name), [])
        alike = [name] if name in alike else alike
        require(alike, f"has {named(name)}, which the model does not")
        require(len(alike) == 1, f"{named(name)} must be one module of the model, got {' and '.join(alike[:2])}")
        first = came.setdefault(alike[0], name)
        require(first == name, f"{named(first)} and {named(name)} are both {alike[0]}: keep the one that is meant")
        found[name] = alike[0]
    return found
