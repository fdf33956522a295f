# SPDX-License-Identifier: Apache-2.0
"""A model whose requests each have adapters of their own."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..files.folder import features_of
from ..functional.projection import project
from .pool import Adapter, AdapterPool, Layer, wrong


class _Batch:
    """What the layers of one forward share: who is in it and where, and the plan for each number of rows."""

    def __init__(self, pool: AdapterPool, slots: list[list[tuple[str, float]]], leased: dict[str, Adapter], times: int):
        self.pool, self.requests, self.times = pool, len(slots), times
        parts = [(i, leased[name], scale) for i, row in enumerate(slots) for name, scale in row]
        self._vectors = [part for part in parts if part[1].vectors]
        self._rounds: dict[tuple, list[tuple[Tensor | None, Tensor, Tensor]]] = {}
        self.acts = [False] * len(pool._layers)
        factors = {name: adapter for name, adapter in leased.items() if not adapter.vectors}
        if factors:
            self._put_factors([[part for part in row if part[0] in factors] for row in slots], factors)

    def _put_factors(self, slots: list[list[tuple[str, float]]], leased: dict[str, Adapter]) -> None:
        adapters, K = list(leased.values()), max(map(len, slots))
        number = {name: i for i, name in enumerate(leased)}
        absent = [(-1, 0.0)]
        rows = [[(number[name], scale) for name, scale in row] + absent * (K - len(row)) for row in slots]
        M = max(adapter.size for adapter in adapters)
        pages = [[adapter.pages + [0] * (M - adapter.size)] for adapter in adapters]
        ranks = torch.stack([adapter.ranks for adapter in adapters], 1).unsqueeze(2)  # [layers, A, 1]
        scales = torch.stack([adapter.scales for adapter in adapters], 1)  # [layers, A]
        self.acts = ranks.flatten(1).any(1).tolist()
        self._index = self._put(torch.tensor([[i for i, _ in row] for row in rows], dtype=torch.int32))  # [requests, K]
        self._own = self._put(torch.tensor([[scale for _, scale in row] for row in rows]))
        self.pages, self.ranks = self._put(torch.tensor(pages, dtype=torch.int32)), self._put(ranks)
        self._scales, self._kind = self._put(scales), [tuple(row) for row in scales.tolist()]
        self._plans: dict[int, Tensor] = {}
        self._scaled: dict[tuple, Tensor] = {}

    def _put(self, t: Tensor) -> Tensor:
        return t.pin_memory().to(self.pool.device, non_blocking=True) if self.pool.device.type == "cuda" else t

    def vectors(self, layer: Layer) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """Requests (None: all of them), slots of their vectors and scales [n, 1], as often as a request has several."""
        here = tuple(i for i, (_, adapter, _) in enumerate(self._vectors) if layer.index in adapter.host)
        if here not in self._rounds:
            rounds: list[dict[int, tuple[int, float]]] = []
            for i in here:
                request, adapter, scale = self._vectors[i]
                free = next((r for r in rounds if request not in r), None)
                if free is None:
                    rounds.append(free := {})
                free[request] = adapter.slot, scale
            self._rounds[here] = [
                (
                    None if len(r) == self.requests else self._put(torch.tensor(list(r))),
                    self._put(torch.tensor([slot for slot, _ in r.values()])),
                    self._put(torch.tensor([[scale] for _, scale in r.values()])),
                )
                for r in rounds
            ]
        return self._rounds[here]

    def check(self, x: Tensor, layer: Layer) -> None:
        """A request's rows must lie together, also where ``generate`` made several sequences of it."""
        first = x.shape[0] if x.ndim > 1 else 0
        if first not in (self.requests, self.requests * self.times):
            raise ValueError(
                f"lrkern.serving: {layer.name} got x {list(x.shape)}, whose rows do not tell which of the "
                f"{self.requests} requests they belong to"
            )

    def plan(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        """The plan of x's rows and their scales [T, K]."""
        T = x.shape[:-1].numel()
        if T not in self._plans:
            index = self._index.repeat_interleave(T // self.requests, 0)
            self._plans[T] = ops.multi_lora_plan(index, len(self.pages))
        key = T, self._kind[layer.index]
        if key not in self._scaled:
            scales = self._own * self._scales[layer.index][self._index.clamp_min(0)]
            self._scaled[key] = scales.repeat_interleave(T // self.requests, 0)
        return self._plans[T], self._scaled[key]


# What model inputs have the batch as their first dimension.
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values", "decoder_input_ids")


class MultiLoraModel:
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
            if name not in modules or features_of(modules[name]) != layer.local:
                raise wrong("model", f"have a linear {name} {list(layer.local)}", modules.get(name))
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

    def __enter__(self) -> "MultiLoraModel":
        return self

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
        if self.model.training:
            raise wrong("model", "be in eval mode", "training mode")
        if getattr(self._local, "batch", None) is not None:
            raise RuntimeError("lrkern.serving: a forward of this model is under way on this thread")
        slots = _slots(adapters, scales)
        inputs = [*args, *(kwargs[key] for key in _INPUTS if key in kwargs)]
        size = next((len(t) for t in inputs if isinstance(t, Tensor) and t.ndim), None)
        if slots is not None and size not in (None, len(slots)):
            raise wrong("adapters", f"have one entry for each of the {size} requests", len(slots))
        with torch.no_grad():
            if not any(slots or ()):
                return call(*args, **kwargs)
            with self.pool._lease(name for row in slots for name, _ in row) as leased:
                self._local.batch = _Batch(self.pool, slots, leased, times)
                try:
                    return call(*args, **kwargs)
                finally:
                    self._local.batch = None

    def _hook(self, layer: Layer) -> Callable:
        def add(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
            batch: _Batch | None = getattr(self._local, "batch", None)
            if batch is None or not (batch.acts[layer.index] or batch.vectors(layer)):
                return None
            x, out = args[0] if args else next(iter(kwargs.values())), y
            batch.check(x, layer)
            if batch.acts[layer.index]:
                plan, scales = batch.plan(x, layer)
                where = batch.pages, batch.ranks[layer.index], plan
                s = ops.multi_lora_shrink(x, layer.a, *where, scales)
                if layer.split == "row":
                    torch.distributed.all_reduce(s, group=self.pool.group)
                if y.is_contiguous():
                    ops.multi_lora_expand_(y, s, layer.b, *where)
                else:
                    out = ops.multi_lora_expand(y, s, layer.b, *where)
            if batch.vectors(layer):
                out = out.contiguous()
                self._add_vectors(out, x, layer, batch)
            return None if out is y else out

        return torch.compiler.disable(add)

    def _add_vectors(self, y: Tensor, x: Tensor, layer: Layer, batch: _Batch) -> None:
        """y += scale · b ⊙ ((d ⊙ (x Aᵀ)) B) for the requests that have vectors: one pair of GEMMs, each request's own d, b."""
        (A, B), n = layer.pair, batch.requests
        d_of, b_of = layer.slots(self.pool.pair.per_page, self.pool.pair.r)
        x, y = x.reshape(n, -1, x.shape[-1]), y.view(n, -1, y.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            for rows, slots, scales in batch.vectors(layer):
                u = project(x if rows is None else x[rows], A, transposed=True)
                if layer.split == "row":
                    torch.distributed.all_reduce(u, group=self.pool.group)
                v = u * (d_of[slots] * scales)[:, None]
                w = (project(v, B) * b_of[slots][:, None]).to(y.dtype)
                if rows is None:
                    y += w
                else:
                    y.index_add_(0, rows, w)


def _slots(adapters: Any, scales: Any) -> list[list[tuple[str, float]]] | None:
    """Per request the names and scales of its adapters."""
    if adapters is None:
        if scales is not None:
            raise wrong("scales", "come with adapters", repr(scales))
        return None
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise wrong("adapters", "be a list with one entry a request", repr(adapters))
    if scales is None:
        scales = [None] * len(adapters)
    if isinstance(scales, str) or not isinstance(scales, Sequence) or len(scales) != len(adapters):
        raise wrong("scales", f"be a list of {len(adapters)}, one entry a request", repr(scales))
    result = []
    for who, scale in zip(adapters, scales, strict=True):
        names = [] if who is None else [who] if isinstance(who, str) else who
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise wrong("adapters", "be names, None, or lists of names", repr(who))
        each = scale if isinstance(scale, Sequence) else [1.0 if scale is None else scale] * len(names)
        if len(each) != len(names) or not all(isinstance(s, (int, float)) and math.isfinite(s) for s in each):
            raise wrong("scales", f"be finite numbers, one or {len(names)} for this request", repr(scale))
        result.append([(name, float(s)) for name, s in zip(names, each, strict=True)])
    return result
