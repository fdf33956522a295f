# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model are meant, what takes their place, and what came of it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..files.check import named, require
from ..files.folder import targeted
from ..nn import FactorizedLinear
from ..nn.factorized import unfit
from ..nn.linear import AdapterLinear

RULES = ("exclude_modules", "layers_to_transform", "layers_pattern")  # of PEFT's configs, beside target_modules


class Layer(NamedTuple):
    """rank: None where the layer stayed dense; whole: the rank of its W; parameters now and before, the bias among them."""

    rank: int | None
    whole: int
    parameters: int
    before: int

    def __str__(self) -> str:
        rank = "dense" if self.rank is None else f"rank {self.rank} of {self.whole}"
        return f"{rank}, {self.parameters} of {self.before} parameters"


class Report(NamedTuple):
    """layers: the targeted linears by name; the whole model's parameters now and before, and how many train; tau: WeLore's."""

    layers: dict[str, Layer]
    parameters: int
    before: int
    trainable: int
    tau: float | None = None

    @property
    def reduction(self) -> float:
        """Share of the targeted layers' ranks that are gone: the effective rank reduction of WeLore's paper."""
        removed = sum(layer.whole - layer.rank for layer in self.layers.values() if layer.rank is not None)
        return removed / sum(layer.whole for layer in self.layers.values())

    def __str__(self) -> str:
        of = f"{self.parameters} of {self.before} parameters are left, {self.trainable} train"
        tau = "" if self.tau is None else f", tau {self.tau:g}"
        return "\n".join([of + tau, *(f"{name}: {layer}" for name, layer in self.layers.items())])


def targets(who: str, model: nn.Module, target_modules: Any, rules: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The linears that PEFT's rules name, each fit to be replaced: plain, finite, of a W that nobody else has. "all-linear" is every
    nn.Linear but the model's output embeddings. ValueErrors say why where one is not, or none is named."""
    if unknown := [key for key in rules if key not in RULES]:
        raise TypeError(f"{who}() got an unexpected keyword argument {unknown[0]!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if adapted := next((name for name, m in modules.items() if _adapter(m)), None):
        raise ValueError(f"{who}: model must have no adapters yet, got {type(modules[adapted]).__name__} {adapted!r}")
    every, head = target_modules == "all-linear", None
    if every:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head and name}
    found = targeted({"target_modules": ".*" if every else target_modules, **rules}, linears)
    require(found, f"{who}: target_modules must name linears of the model, got {target_modules!r}, which names none")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in sorted(found):
        why = _why_not(linears[name], owners[id(linears[name].weight)], modules[name.rpartition(".")[0]])
        require(not why, f"{who}: {named(name)} must be a plain nn.Linear of its own, got {why}; see exclude_modules")
    return {name: m for name, m in linears.items() if name in found}


def _adapter(m: nn.Module) -> bool:
    """This library's or PEFT's, whose base layer and factors are linears too."""
    return isinstance(m, AdapterLinear) or any(c.__name__ == "BaseTunerLayer" for c in type(m).__mro__)


def _why_not(linear: nn.Linear, owners: int, parent: nn.Module) -> str | None:
    if why := unfit(linear):
        return why
    if owners > 1:
        return "one whose weight is used in another place too"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return f"one whose weight {type(parent).__name__} reads in evaluation"
    if linear.weight.is_meta:
        return "one on the meta device"
    return None if linear.weight.isfinite().all() else "a weight with inf or nan"


def replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def size(m: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in m.parameters() if p.requires_grad or not trainable)


def put(model: nn.Module, linears: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], tau: Any = None) -> Report:
    """layers in the place of linears; those that are not among them stay dense."""
    before, rows = size(model), {}
    for name, linear in linears.items():
        now = layers.get(name, linear)
        rank = now.r if isinstance(now, FactorizedLinear) else None
        rows[name] = Layer(rank, min(linear.in_features, linear.out_features), size(now), size(linear))
    replace(model, layers)
    return Report(rows, size(model), before, size(model, trainable=True), tau)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the state_dict of a compressed model into the dense model of the same class, in place: linears of which it has the factors
    A and B become ``FactorizedLinear`` of those ranks. FactorizedLinear and MaestroLinear layers that are there already, after
    ``maestro`` say, stay what they are and take the ranks. Make the optimizer afterwards; what trains is in no state_dict.

    A ValueError where factors fit no linear or keys are missing or in excess; the model is then as it was."""
    who, layers = "lrkern.compress.restore", {}
    for key, a in state.items():
        name, b = key.removesuffix(".A"), state.get(key[:-1] + "B")
        if name == key or b is None or name + ".weight" in state:
            continue
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        inside = isinstance(linear, FactorizedLinear)
        if inside and linear.A.shape == a.shape:
            continue
        require(
            inside or (isinstance(linear, nn.Linear) and not unfit(linear)),
            f"{who}: {named(name)} must be a plain nn.Linear of this model",
        )
        i, o, r = linear.in_features, linear.out_features, len(a) if a.ndim else None
        must = f"{who}: factors of {named(name)} must be [r, {i}] and [{o}, r]"
        require([a.shape, b.shape] == [(r, i), (o, r)], f"{must}, got {list(a.shape)} and {list(b.shape)}")
        like = {"device": (p := next(linear.parameters())).device, "dtype": p.dtype}
        bias = linear.bias is not None or f"{name}.bias" in state  # LoRD gives it one
        layers[name] = (type(linear) if inside else FactorizedLinear)(i, o, bias, r=r, **like)
        layers[name].train(linear.training)
    before = {name: model.get_submodule(name) for name in layers}
    replace(model, layers)
    own = model.state_dict()
    wrong = [k for k in state if k not in own or own[k].shape != state[k].shape] + [k for k in own if k not in state]
    if wrong:
        replace(model, before)
        raise ValueError(
            f"{who}: state must be of this model, compressed; {named(wrong[0])} and {len(wrong) - 1} more are not"
        )
    model.load_state_dict(state)
