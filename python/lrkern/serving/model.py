# SPDX-License-Identifier: Apache-2.0
"""A model whose requests each have adapters of their own."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..files.check import is_finite
from ..files.folder import features_of
from .batch import Batch, Paths
from .below import copies_are_plain, dtype_of, give_back_compiled, keep_eager, keep_eager_again, modules_of, plain
from .layer import Layer, must, sizes_of
from .pool import AdapterPool
from .rows import Owners, arguments_of, tensors_of

BASE = "__base__"  # PEFT's name for no adapter


class MultiLoraModel(AbstractContextManager):
    """A transformers model whose requests, the rows of its batch, each have adapters of their own. Inference only.

    The model's own modules stay as they are, with forward hooks until ``close``; called directly the model is the base, which
    while a call with adapters runs has to be meant: see ``base``. Where no request has an adapter, so it is here, bit for bit.

    adapters: per request a name, None or "__base__" for the base, or a list of names, whose parts are added; PEFT's word
    for it, adapter_names, is the same. scales: a number for all, or per request a number (for each of its adapters), None or a
    list, times the adapter's own scale; tensors and numpy arrays too. 1 for DoRA and for biases in place of the model's, of which
    none is known. Copies of modules (modules_to_save) have none.

    config, generation_config, device and dtype are the model's. It can be saved, pickled and copied while this lives: what comes
    out is the model alone. It may be compiled, before or after: calls with adapters run what is not compiled, calls of the
    base what is.

    The requests are the first dimension of the model's input: input_ids, inputs_embeds, input_features, input_values (and the
    decoder's), else the model's main_input_name, else the first tensor. From there on they are followed through every
    function of the forward (``rows.Follow``) to the adapted linears, whatever the model does to its shapes; a linear whose
    rows may be anyone's, such as an expert that gets gathered tokens or a tower over images, raises a ValueError that names it.
    Its ways out: leave it out of the pool's targets, or say with ``rows`` whose they are. Requests that all want the
    same adapters may go anywhere.

    lengths: for packed rows, [1, tokens] or [tokens]: how many tokens each request has, in order.
    """

    def __init__(self, model: nn.Module, pool: AdapterPool):
        inner, modules = plain(model), modules_of(model)
        for name, layer in pool._layers.items():
            there = name in modules and sizes_of(modules[name]) == layer.local
            what = "an embedding" if layer.embeds else "a linear"
            must(there, "model", f"have {what} {name} {list(layer.local)}", modules.get(name))
        self.model, self.pool, self._local = model, pool, threading.local()
        self._paths, self._running, self._lock = Paths(inner), 0, threading.Lock()
        self._copied: set[str] = set()  # modules of which some adapter had a copy
        self._keywords = _keywords(inner)
        self._hooks: list[RemovableHandle] = []
        for name, layer in pool._layers.items():
            self._add_hook(modules[name].register_forward_hook, self._hook(layer))
        for name, m in modules.items():
            if features_of(m) and name not in pool._layers and type(m) is not nn.Linear:
                self._add_hook(m.register_forward_hook, self._passed)
        encoder = model.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        for m in (inner, encoder):
            if isinstance(m, nn.Module):
                self._add_hook(plain(m).register_forward_pre_hook, self._begin)
                self._add_hook(plain(m).register_forward_hook, self._end, always_call=True)
        self._all = list(model.modules())
        keep_eager(self._all, self._adapting)
        self._run = torch.compiler.disable(self._run)  # whoever compiles what calls this

    def _add_hook(self, register: Callable, hook: Callable, **options: Any) -> RemovableHandle:
        handle = register(torch.compiler.disable(hook), with_kwargs=True, **options)
        self._hooks.append(handle)
        copies_are_plain(register.__self__)
        return handle

    def close(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()
        give_back_compiled(self._all, self._adapting)
        self._hooks = []

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.model)

    def __call__(
        self,
        *args: Any,
        adapters: Sequence | None = None,
        scales: Any = None,
        adapter_names: Sequence | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        unknown = sorted(kwargs.keys() - self._keywords)
        if unknown:  # a model's forward may take any keyword and ignore it, a misspelt ``adapters`` too
            raise TypeError(f"lrkern.serving: the model's forward has no argument {unknown[0]!r}")
        return self._run(self.model, args, kwargs, _either(adapters, adapter_names), scales, 1, lengths)

    def generate(
        self,
        *args: Any,
        adapters: Sequence | None = None,
        scales: Any = None,
        adapter_names: Sequence | None = None,
        **kwargs: Any,
    ):
        """The model's ``generate``. All steps see the adapters as they are when it begins. Refused: cache_implementation
        "paged", whose forwards run in a thread and in batches of their own, and what goes on without some requests, such as
        Whisper's for more than 30 seconds."""
        given = arguments_of(self.model.generate, args, kwargs)
        config = given.get("generation_config") or self.model.generation_config
        of = lambda key: kwargs.get(key, getattr(config, key, None))
        must(of("cache_implementation") != "paged", "cache_implementation", "be one that this thread runs", "'paged'")
        times = max(of(key) or 1 for key in ("num_beams", "num_return_sequences"))
        adapters = _either(adapters, adapter_names)
        if adapters is not None and hasattr(config, "disable_compile"):  # what it has compiled does not ask for hooks
            kwargs["disable_compile"] = True
        return self._run(self.model.generate, args, kwargs, adapters, scales, times, None)

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The model for calls that mean the base, while other threads run calls with adapters:

        with served.base() as model: model(input_ids)
        """
        before, self._local.base = getattr(self._local, "base", False), True
        try:
            yield self.model
        finally:
            self._local.base = before

    @contextmanager
    def rows(self, index: Sequence[int] | Tensor) -> Iterator[None]:
        """For a model's own code that gathers or reorders rows: inside, row t of what an adapted linear gets (flattened to
        rows) belongs to request index[t] of the call, to none where it is negative. Rows follow their tokens:

            mine = served.requests(hidden)                  # [T], before they are gathered
            for expert, tokens in ...:
                with served.rows(mine[tokens]):
                    expert(hidden[tokens])

        Without a call that has adapters it does nothing.
        """
        batch = self._batch()
        if batch is None or batch.one is not None:
            yield
            return
        index = torch.as_tensor(index)
        whole = index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool
        must(whole, "rows", "be whole numbers, one a row", f"{index.dtype} {list(index.shape)}")
        if index.device.type == "cpu":  # values on a device are not waited for
            most = int(index.max()) if len(index) else -1
            must(most < batch.count, "rows", f"be below {batch.count}, the number of requests", most)
        batch.given.append(Owners(len(index), index.to(self.pool.device, torch.int64)))
        try:
            yield
        finally:
            batch.given.pop()

    def requests(self, hidden: Tensor) -> Tensor:
        """Of hidden [..., n] in this model's forward, flattened to rows, the request each belongs to: int64 [T] on its device.
        Zeros where the call has no adapters, or the same for all requests."""
        batch, T = self._batch(), hidden.shape[:-1].numel()
        if batch is None or batch.one is not None:
            return torch.zeros(T, dtype=torch.int64, device=hidden.device)
        along = batch.asked(hidden)
        return along.spread(torch.arange(batch.count, device=self.pool.device), -1).to(hidden.device)

    def _batch(self) -> Batch | None:
        return getattr(self._local, "batch", None)

    def _adapting(self) -> bool:
        return self._batch() is not None

    def _run(
        self, call: Callable, args: tuple, kwargs: dict, adapters: Any, scales: Any, times: int, lengths: Any
    ) -> Any:
        if not self._hooks:
            raise RuntimeError("lrkern.serving: this MultiLoraModel is closed")
        must(not self.model.training, "model", "be in eval mode", "training mode")
        if self._batch() is not None:
            raise RuntimeError("lrkern.serving: a forward of this model is under way on this thread")
        requests = _requests(adapters, scales)
        self._check_sizes(call, args, kwargs, requests, lengths)
        with torch.no_grad():
            if not any(requests or ()):
                with self.base():
                    return call(*args, **kwargs)
            keep_eager_again(self._all, self._adapting)
            parts = [part for row in requests for part in row]
            scaled = {name: scale for name, scale in parts if scale != 1}
            with self.pool._lease((name for name, _ in parts), scaled) as leased:
                rows = [[(leased[name], scale) for name, scale in row] for row in requests]
                batch = Batch(self.pool, rows, self._paths, times, lengths)
                for name in batch.saved:
                    self._copies(name)
                self._local.batch = batch
                self._count(1)
                try:
                    return call(*args, **kwargs)
                finally:
                    self._count(-1)
                    self._local.batch = None
                    batch.abandon()

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change

    def _check_sizes(self, call: Callable, args: tuple, kwargs: dict, requests: Any, lengths: Any) -> None:
        if requests is None:
            must(lengths is None, "lengths", "come with adapters", lengths)
            return
        if lengths is not None:
            whole = isinstance(lengths, Sequence) and all(type(n) is int and n >= 0 for n in lengths)
            must(whole and len(lengths) == len(requests), "lengths", f"be {len(requests)} whole numbers", lengths)
            return
        given = arguments_of(plain(call).forward if isinstance(call, nn.Module) else call, args, kwargs)
        inputs = tensors_of(given, getattr(self.model, "main_input_name", None))
        size = next((len(t) for t in inputs.values()), len(requests))
        must(size == len(requests), "adapters", f"have one entry for each of the {size} requests", len(requests))

    # ---- hooks

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (batch := self._batch()) is not None:
            batch.begin(module, args, kwargs)

    def _end(self, module: nn.Module, *_: Any) -> None:
        if (batch := self._batch()) is not None:
            batch.end(module)

    def _passed(self, module: nn.Module, args: tuple, kwargs: dict, y: Any) -> None:
        batch = self._batch()
        if batch is not None and batch.follow is not None and isinstance(y, Tensor):
            with torch._C.DisableTorchFunction():
                batch.passed(_first(args, kwargs), y)

    def _hook(self, layer: Layer) -> Callable:
        def add(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
            batch = self._batch()
            if batch is None:
                if self._running and not getattr(self._local, "base", False):
                    raise RuntimeError(
                        "lrkern.serving: a forward of the model without adapters, while a call with adapters runs, must be "
                        "meant as the base's; say so by `with served.base():`, or call the MultiLoraModel"
                    )
                return None
            x = _first(args, kwargs)
            x = x.unsqueeze(-1) if layer.embeds else x
            with torch._C.DisableTorchFunction():
                out = self._add(batch, layer, x, y)
            return None if out is y else out

        return add

    def _copies(self, name: str) -> None:
        """The hook of a module that some adapter has a copy of: there once it is asked for."""

        def put(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Tensor | None:
            batch = self._batch()
            if batch is None or name not in batch.saved:
                return None
            return batch.copied(name, module, args, kwargs, y, handle.id)

        with self._lock:
            if name not in self._copied and self._hooks:
                self._copied.add(name)
                handle = self._add_hook(modules_of(self.model)[name].register_forward_hook, put)

    def _add(self, batch: Batch, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        parts, out = [part for part in batch.parts if part.acts(layer)], y
        if parts:
            along = batch.along(layer.name, x)
            for part in parts:
                out = part.add(out, x, layer, along)
        batch.saw(layer, x, out)
        return out


def _first(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _either(adapters: Any, adapter_names: Any) -> Any:
    both = adapters is not None and adapter_names is not None
    must(not both, "adapters", "be given once", "adapter_names too")
    return adapters if adapter_names is None else adapter_names


def _keywords(model: nn.Module) -> set[str]:
    """Those that mean something to some module's forward."""
    known: set[str] = set()
    for forward in {type(m).forward for m in model.modules()} | {model.forward}:
        for parameter in inspect.signature(forward).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                known.add(parameter.name)
                continue
            with suppress(NameError, TypeError):
                typed = (
                    get_type_hints(forward).get(parameter.name) if parameter.annotation is not parameter.empty else None
                )
                for each in getattr(typed, "__args__", ()):  # Unpack[a TypedDict]
                    known |= getattr(each, "__annotations__", {}).keys()
    return known


def _requests(adapters: Any, scales: Any) -> list[list[tuple[str, float]]] | None:
    """Per request the names and scales of its adapters."""
    check = lambda holds, argument, what, got: holds or must(False, argument, what, repr(got))
    if adapters is None:
        check(scales is None, "scales", "come with adapters", scales)
        return None
    is_list = lambda each: isinstance(each, Sequence) and not isinstance(each, str)
    check(is_list(adapters), "adapters", "be a list with one entry a request", adapters)
    given = _numbers(scales)
    given = given if is_list(given) else [given] * len(adapters)
    check(len(given) == len(adapters), "scales", f"be a number or {len(adapters)} of them, one a request", scales)
    result = []
    for who, scale in zip(adapters, given, strict=True):
        names = [] if who in (None, BASE) else [who] if isinstance(who, str) else who
        named = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        check(named, "adapters", "be names, None, or lists of names", who)
        each = _numbers(scale)
        each = each if is_list(each) else [1.0 if each is None else each] * max(1, len(names))
        each = [_numbers(s) for s in each]
        fits = all(map(is_finite, each)) and (len(each) == len(names) or not is_list(_numbers(scale)))
        check(fits, "scales", f"be finite numbers, one or {len(names)} for this request", scale)
        result.append([(name, float(s)) for name, s in zip(names, each, strict=False)])
    return result


def _numbers(scales: Any) -> Any:
    """Of a tensor or of numpy what it holds, in one read."""
    return scales.tolist() if hasattr(scales, "tolist") else scales
