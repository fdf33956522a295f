# SPDX-License-Identifier: Apache-2.0
"""A model made ready for S2FT, what it learnt taken out of it, and the model made ordinary again."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files.check import require
from ..nn import S2FTLinear
from .adapter import Adapter, Slice, checked
from .find import check_linears
from .permute import Record, permute, unpermute
from .select import Selection, select


class Prepared(NamedTuple):
    """layers: the slices that train, as the model has them now; record: of the co-permutation, if there was one; parameters that
    train, and all of the model's."""

    layers: Selection
    record: Record | None
    trainable: int
    total: int

    def __str__(self) -> str:
        lines = [f"{name}: {len(index)} channels, {side}" for name, (side, index) in self.layers.items()]
        return "\n".join([f"{self.trainable} of {self.total} parameters train", *lines])


def prepare(
    model: nn.Module,
    selection: Selection | None = None,
    *,
    copermute: bool = True,
    example: Mapping[str, Any] | None = None,
    adapter_dtype: torch.dtype | None = None,
    **how: Any,
) -> Prepared:
    """Puts ``nn.S2FTLinear`` in the place of the chosen linears and freezes all else, in place.

    selection: what ``select`` gave; None calls it with the other keyword arguments (o, down, v, up, by, ...), heads in whole
        groups where the model is co-permuted.
    copermute: brings the chosen channels together first, so that each slice is contiguous (``permute``, which takes example).
    adapter_dtype: as S2FTLinear has it.

    After training, ``extract`` gives the adapter and ``release`` the ordinary model. Refused as select, permute and S2FTLinear refuse,
    the model as it was.
    """
    who = "lrkern.s2ft.prepare"
    require(
        selection is None or not how, f"{who}: selection must be given alone or not, got {', '.join(how)} beside it"
    )
    if selection is None:
        selection = select(model, **{"groups": True if copermute else None} | how)
    check_linears(who, model, selection)
    total, flags = sum(p.numel() for p in model.parameters()), [(p, p.requires_grad) for p in model.parameters()]
    record, moved = permute(model, selection, example) if copermute else (None, selection)
    layers: dict[str, S2FTLinear] = {}
    try:
        for name, (side, index) in moved.items():
            linear = model.get_submodule(name)
            layers[name] = S2FTLinear.from_linear(linear, index=index, side=side, adapter_dtype=adapter_dtype)
    except BaseException:
        if record is not None:
            unpermute(model, record)
        for p, trains in flags:
            p.requires_grad_(trains)
        raise
    model.requires_grad_(False)
    for name, layer in layers.items():
        _put(model, name, layer.train(model.get_submodule(name).training))
    return Prepared(moved, record, sum(layer.slice.numel() for layer in layers.values()), total)


def extract(model: nn.Module, record: Record | None = None) -> Adapter:
    """What training changed of the model's S2FTLinear layers, in float32: a copy. With the record of ``prepare``, in the order of
    channels that the model had before: an adapter of the ordinary checkpoint."""
    adapter: Adapter = {}
    for name, layer in _layers("extract", model).items():
        side, index, change = layer.side, layer.columns.long().cpu(), layer.change().detach().clone()
        dim, channels = (1, layer.in_features) if side == "input" else (0, layer.out_features)
        if record is not None and (was := record.channels(name, side)) is not None:
            index, order = was[index].sort()
            change = change.index_select(dim, order.to(change.device))
        adapter[name] = Slice(side, index, change, channels)
    return checked("lrkern.s2ft.extract", adapter)


def release(model: nn.Module, record: Record | None = None) -> None:
    """Ordinary nn.Linear layers again in the place of the S2FTLinear ones, with what they learnt in their weights, and with the
    record of ``prepare`` the order of channels of before: an ordinary checkpoint. All else is bit for bit what it was. Parameters stay
    frozen. Refused with a ValueError, nothing changed: layers that are merged or disabled, and a record that does not fit."""
    layers = _layers("release", model)
    for name, layer in layers.items():
        state = "merged" if layer.merged else "disabled" if not layer.enabled else None
        require(state is None, f"lrkern.s2ft.release: {name} must be enabled and not merged, got one that is {state}")
    for layer in layers.values():
        layer.sync()
    try:
        for name, layer in layers.items():
            _put(model, name, layer.base_layer.train(layer.training))
        if record is not None:
            unpermute(model, record)
    except BaseException:
        for name, layer in layers.items():
            _put(model, name, layer)
        raise


def _layers(who: str, model: nn.Module) -> dict[str, S2FTLinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, S2FTLinear) and name}
    require(layers, f"lrkern.s2ft.{who}: model must hold S2FTLinear layers, got {type(model).__name__} with none")
    return layers


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
