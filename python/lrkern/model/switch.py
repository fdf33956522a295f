# SPDX-License-Identifier: Apache-2.0
"""The adapters of a whole model merged into its weights, taken out of them again, and turned off for a while."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..files.check import require
from ..nn.linear import AdapterLinear
from ..nn.plain import elsewhere
from .adapt import require_model
from .saved import saved_in, swap


def layers_of(who: str, model: nn.Module) -> dict[str, AdapterLinear]:
    require_model(who, model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
    got = type(model).__name__
    require(found, f"{who}: model must have adapters of lrkern, got {got} with none (PEFT's own have their methods)")
    return found


def merge(model: nn.Module) -> None:
    """Writes every adapter of a model into its W (``AdapterLinear.merge``): forward is then the base model's, as fast as that.

    All or none: where a layer refuses (it is merged or disabled, keeps W packed, its method has no merge, W would not be finite), those
    before it are unmerged, so that their W is as it was up to one rounding. A W that another module has too (a tied head) is refused,
    as that one would change with it. What trains whole (modules_to_save) is in the model as it is.
    """
    layers = layers_of("lrkern.merge", model)
    weights = {name: getattr(m.base_layer, "weight", None) for name, m in layers.items()}
    shared = elsewhere(model, [w for w in weights.values() if w is not None])
    for name, w in weights.items():
        with _named("merge", name):
            require(id(w) not in shared, f"W must be of one module, got {shared.get(id(w))}, which are tied")
            layers[name]._check_merge()
    merged: list[AdapterLinear] = []
    try:
        for name, layer in layers.items():
            with _named("merge", name):
                layer.merge()
            merged.append(layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Takes out of every W of a model what ``merge`` added, up to the rounding of its dtype. Layers that are not merged stay as they
    are."""
    for name, layer in layers_of("lrkern.unmerge", model).items():
        with _named("unmerge", name):
            layer.unmerge()


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Inside ``with lrkern.disable(model):`` the model answers as before ``adapt``: adapters are off, and modules that train whole have
    what they had before. Of train_bias layers the trained bias stays. Refused with a RuntimeError, nothing changed: a model with a layer
    that is merged (``unmerge`` first), or disabled already, by hand or by an outer block."""
    layers = layers_of("lrkern.disable", model)
    for name, layer in layers.items():
        for state, is_so in (("merged", layer.merged), ("disabled already", not layer.enabled)):
            if is_so:
                raise RuntimeError(f"lrkern.disable: no layer may be merged or disabled already, got {name}, {state}")
    with ExitStack() as undo:
        for layer in layers.values():
            layer.disable_adapter()
            undo.callback(layer.enable_adapter)
        for m in saved_in(model).values():
            swap(m)
            undo.callback(swap, m)
        yield model


@contextmanager
def _named(who: str, name: str) -> Iterator[None]:
    """Says of which layer an error is, with its kind."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise type(error)(f"lrkern.{who}: {name}: {error}") from error
