# SPDX-License-Identifier: Apache-2.0
"""A model whose requests each have adapters of their own."""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..files.folder import features_of
from .kinds.kind import Rows
from .layer import Layer, must
from .pool import AdapterPool


class _Batch:
    """What the layers of one forward share: who is in it, and what the adapters of each kind do."""

    def __init__(self, pool: AdapterPool, rows: Rows, times: int):
        self.requests, self.times = len(rows), times
        kinds = {adapter.kind for row in rows for adapter, _ in row}
        own = lambda kind: [[part for part in row if part[0].kind is kind] for row in rows]
        self.parts = [kind.batch(own(kind)) for kind in pool._kinds if kind in kinds]

    def check(self, x: Tensor, layer: Layer) -> None:
        """A request's rows must lie together, also where ``generate`` made several sequences of it."""
        first = x.shape[0] if x.ndim > 1 else 0
        if first not in (self.requests, self.requests * self.times):
            raise ValueError(
                f"lrkern.serving: {layer.name} got x {list(x.shape)}, whose rows do not tell which of the "
                f"{self.requests} requests they belong to"
            )


# What model inputs have the batch as their first dimension.
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values", "decoder_input_ids")


class MultiLoraModel(AbstractContextManager):
    """A transformers model whose requests, the rows of its batch, each have adapters of their own. Inference only.

    The model's own modules stay as they are, with a forward hook on the pool's linears until ``close``; called directly
    the model is the base. Where no request has an adapter, so it is here, bit for bit. The first dimension of what an
    adapted linear is given must be the batch.

    adapters: per request a name, None for the base, or a list of names, whose parts are added. scales: per request a number
    (for each of its adapters) or a list, times the adapter's own scale.
    """

    def __init__(self, model: nn.Module, pool: AdapterPool):
        modules = dict(model.named_modules())
        for name, layer in pool._layers.items():
            there = name in modules and features_of(modules[name]) == layer.local
            must(there, "model", f"have a linear {name} {list(layer.local)}", modules.get(name))
        self.model, self.pool, self._local = model, pool, threading.local()
        self._hooks = [
            modules[name].register_forward_hook(self._hook(layer), with_kwargs=True)
            for name, layer in pool._layers.items()
        ]

    def close(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, *args: Any, adapters: Sequence | None = None, scales: Sequence | None = None, **kwargs: Any):
        return self._run(self.model, args, kwargs, adapters, scales, 1)

    def generate(self, *args: Any, adapters: Sequence | None = None, scales: Sequence | None = None, **kwargs: Any):
        """The model's ``generate``. All steps see the adapters as they are when it begins."""
        config = kwargs.get("generation_config") or self.model.generation_config
        each = (kwargs.get(key, getattr(config, key, None)) or 1 for key in ("num_beams", "num_return_sequences"))
        return self._run(self.model.generate, args, kwargs, adapters, scales, max(each))

    def _run(self, call: Callable, args: tuple, kwargs: dict, adapters: Any, scales: Any, times: int) -> Any:
        if not self._hooks:
            raise RuntimeError("lrkern.serving: this MultiLoraModel is closed")
        must(not self.model.training, "model", "be in eval mode", "training mode")
        if getattr(self._local, "batch", None) is not None:
            raise RuntimeError("lrkern.serving: a forward of this model is under way on this thread")
        requests = _requests(adapters, scales)
        inputs = [*args, *(kwargs[key] for key in _INPUTS if key in kwargs)]
        size = next((len(t) for t in inputs if isinstance(t, Tensor) and t.ndim), None)
        fits = requests is None or size in (None, len(requests))
        must(fits, "adapters", f"have one entry for each of the {size} requests", fits or len(requests))
        with torch.no_grad():
            if not any(requests or ()):
                return call(*args, **kwargs)
            with self.pool._lease(name for row in requests for name, _ in row) as leased:
                rows = [[(leased[name], scale) for name, scale in row] for row in requests]
                self._local.batch = _Batch(self.pool, rows, times)
                try:
                    return call(*args, **kwargs)
                finally:
                    self._local.batch = None

    def _hook(self, layer: Layer) -> Callable:
        def add(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
            batch: _Batch | None = getattr(self._local, "batch", None)
            parts = [part for part in batch.parts if part.acts(layer)] if batch else []
            if not parts:
                return None
            x, out = args[0] if args else next(iter(kwargs.values())), y
            batch.check(x, layer)
            for part in parts:
                out = part.add(out, x, layer)
            return None if out is y else out

        return torch.compiler.disable(add)


def _requests(adapters: Any, scales: Any) -> list[list[tuple[str, float]]] | None:
    """Per request the names and scales of its adapters."""
    check = lambda holds, argument, what, got: holds or must(False, argument, what, repr(got))
    if adapters is None:
        check(scales is None, "scales", "come with adapters", scales)
        return None
    is_list = lambda each: isinstance(each, Sequence) and not isinstance(each, str)
    check(is_list(adapters), "adapters", "be a list with one entry a request", adapters)
    scales = [None] * len(adapters) if scales is None else scales
    fits = is_list(scales) and len(scales) == len(adapters)
    check(fits, "scales", f"be a list of {len(adapters)}, one entry a request", scales)
    result = []
    for who, scale in zip(adapters, scales, strict=True):
        names = [] if who is None else [who] if isinstance(who, str) else who
        named = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        check(named, "adapters", "be names, None, or lists of names", who)
        each = scale if isinstance(scale, Sequence) else [1.0 if scale is None else scale] * len(names)
        fits = len(each) == len(names) and all(isinstance(s, (int, float)) and math.isfinite(s) for s in each)
        check(fits, "scales", f"be finite numbers, one or {len(names)} for this request", scale)
        result.append([(name, float(s)) for name, s in zip(names, each, strict=True)])
    return result
