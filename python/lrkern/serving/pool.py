# SPDX-License-Identifier: Apache-2.0
"""Adapters by name in pools of pages, and who of them is on the device."""

import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..files.check import is_whole, named, refusal, require, shown
from ..files.folder import Config, Tensors, as_path, inside, read_adapter
from ..files.own import read_layers
from ..limits import DTYPES, MAX_RANK, PAGE
from .below import modules_of, only_device, plain, unwrapped
from .kinds.kind import KINDS, Adapter, Kind
from .kinds.read import of_folder, of_layers
from .layer import Layer, must, sizes_of
from .memory import AdapterStatistics, Free, Statistics, capturing, read_on, resize, tensors_of


class UnknownAdapter(ValueError):
    """A name that the pool does not have."""


class PoolFull(RuntimeError):
    """More pages are needed at once than there are, or than there is memory for under a captured CUDA graph."""


class AdapterPool:
    """Adapters by name for one model, in device memory with a ceiling.

    Args:
        model: without PEFT's layers; whole on one device, where the pools go. It may be compiled.
        budget, pages: how many bytes, or pages of 16 ranks of all layers, the pools may take; one of the two. They take none
            until adapters need it, and then grow, twofold and up to this ceiling (``grow``, ``shrink``). Up to 16
            adapters of vectors (VeRA) that have one pair of projections share a page. A pair comes on top, for as long as an
            adapter has it: r · (in + out) numbers, of the widest of its linears; of RandLoRA's in · out. So do modules that an
            adapter has whole copies of (modules_to_save), while it is on the device.
        targets: the linears and embeddings that may have an adapter: "all-linear" (all but embeddings, the output's too), a
            regex of the whole name, or a list of ends of names. An embedding takes 16 · (V + D) numbers of a page.
        max_rank: of an adapter of factors, up to 512; or by the end of a linear's name, "*" for all others: the first that fits.
            DoRA or biases take pages for two ranks more.
        max_adapters: names held at once.
        dtype: of the pools; None means the model's, or float32 where that is no float or not one.
        parallel: for tensor parallelism, "column" or "row" by the end of a linear's name. The model's linears are then
            this process's shards, adapters are whole. A row-parallel linear must return y summed over the group.
        group: the process group of ``parallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | None = None,
        pages: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        max_rank: int | Mapping[str, int] = 64,
        max_adapters: int = 4096,
        dtype: torch.dtype | None = None,
        parallel: Mapping[str, str] | None = None,
        group: Any = None,
    ):
        must(isinstance(model, nn.Module), "model", "be an nn.Module", type(model).__name__)
        model = plain(model)
        adapted = any(isinstance(m, BaseTunerLayer) for m in model.modules())
        must(not adapted, "model", "be without PEFT layers", type(model).__name__)
        limits = dict(max_rank) if isinstance(max_rank, Mapping) else {"*": max_rank}
        must(all(isinstance(k, str) for k in limits), "max_rank", "say ranks by name", shown(max_rank))
        lie = limits and all(is_whole(r, 1, MAX_RANK) for r in limits.values())
        must(lie, "max_rank", f"lie in 1..{MAX_RANK}", shown(max_rank))
        must(is_whole(max_adapters, 1, 2**31 - 1), "max_adapters", "be a whole number above 0", shown(max_adapters))
        room = f"budget={shown(budget)}, pages={shown(pages)}"
        must((budget is None) != (pages is None), "budget or pages", "be given, and not both", room)
        one, given = ("budget", budget) if pages is None else ("pages", pages)
        must(is_whole(given, 1, 2**62), one, "be a whole number above 0", shown(given))
        must(dtype in (None, *DTYPES), "dtype", "be float32, float16 or bfloat16", shown(dtype))
        fits = parallel is None or (isinstance(parallel, Mapping) and all(isinstance(k, str) for k in parallel))
        must(fits, "parallel", "say column or row by name", shown(parallel))
        parallel = dict(parallel or {})
        others = [v for v in parallel.values() if not isinstance(v, str) or v not in ("column", "row")]
        must(not others, "parallel", "say column or row", shown(others))
        listed = isinstance(targets, Collection) and all(isinstance(t, str) for t in targets)
        must(listed, "targets", "be a string or a list of them", shown(targets))
        with refusal("lrkern.serving: targets must be a regex: ", of=(re.error, RecursionError, OverflowError)):
            chosen = re.compile(targets) if isinstance(targets, str) and targets != "all-linear" else targets
        self._model, self.group, self._rank, world = model, group, 0, 1
        if parallel:
            self._rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

        head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
        every = {name: m for name, m in modules_of(model).items() if sizes_of(m)}
        embeds = lambda m: isinstance(m, nn.Embedding)
        modules = {n: m for n, m in every.items() if _targeted(chosen, n, m is head or embeds(m))}
        must(modules, "targets", "name linears of the model, or embeddings", shown(targets))
        splits = {name: next((v for k, v in parallel.items() if _ends(name, k)), None) for name in every}
        layers = {n: Layer(-1, n, sizes_of(m), splits[n], world) for n, m in every.items()}
        for name, layer in layers.items():
            layer.embeds = embeds(every[name])
            whole = not (layer.embeds and layer.split and name in modules)
            must(whole, "parallel", "not split embeddings", f"{name}: {layer.split}")
        self._linears = {name: layer.whole for name, layer in layers.items() if not layer.embeds}
        self._layers = {name: layers[name] for name in modules}
        self._split = [name for name, layer in layers.items() if layer.split]
        for index, layer in enumerate(self._layers.values()):
            layer.index, layer.module = index, modules[layer.name]
            layer.max_rank = next((r for end, r in limits.items() if _ends(layer.name, end)), limits.get("*"))
            must(layer.max_rank, "max_rank", 'name every target (or "*")', f"none for {layer.name}")
        unused = [end for end in limits if end != "*" and not any(_ends(name, end) for name in self._layers)]
        must(not unused, "max_rank", "name targets", shown(unused))

        weights = [w for m in modules.values() if isinstance(w := getattr(m, "weight", None), Tensor)]
        kinds, device = {w.dtype for w in weights}, only_device(model)
        only = kinds.pop() if len(kinds) == 1 and len(weights) == len(modules) else None
        self.device, self.dtype = device, dtype or (only if only in DTYPES else torch.float32)
        self.max_rank = max(layer.max_rank for layer in self._layers.values())
        self.max_adapters = max_adapters
        self.page_bytes = PAGE * self.dtype.itemsize * sum(sum(layer.local) for layer in self._layers.values())
        self.pages = pages if pages is not None else budget // self.page_bytes
        must(self.pages >= 1, "budget or pages", f"hold a page, {self.page_bytes} bytes", room)
        for layer in self._layers.values():
            layer.a, layer.b = (torch.empty(0, n, dtype=self.dtype, device=device) for n in layer.local)
        self._upload_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        self._changed = threading.Condition(threading.RLock())  # guards all that follows
        self._adapters: dict[str, Adapter] = {}
        self._resident: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first
        self._free = Free(self.pages)
        self._backed = 0  # pages that have memory, the lowest
        self._captured: set[Adapter] = set()  # read by CUDA graphs, which may run at any time
        self._kept: list[Tensor] = []  # on the host, read by such a graph
        self._readers: set[Any] = set()  # CUDA: streams that forwards ran on
        self._hits = self._uploads = self._evictions = 0
        self._reserved: set[Adapter] = set()  # pinned, whether they are on the device yet or not
        self._kinds = [kind(self) for kind in KINDS]

    # ---- what is there

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> list[str]:
        """As they are now: a list of its own."""
        with self._changed:
            return list(self._adapters)

    @property
    def resident(self) -> list[str]:
        """Names on the device."""
        with self._changed:
            return [name for name, adapter in self._adapters.items() if adapter.cells is not None]

    @property
    def layers(self) -> list[str]:
        return list(self._layers)

    def statistics(self) -> Statistics:
        """All of one moment, as a copy (``dataclasses.asdict`` makes plain dicts of it)."""
        with self._changed:
            adapters = {
                name: AdapterStatistics(
                    rank=a.rank,
                    pages=self._pages([a]),
                    resident=a.cells is not None,
                    pinned=a in self._reserved,
                    users=a.users,
                    hits=a.hits,
                    uploads=a.uploads,
                )
                for name, a in self._adapters.items()
            }
            return Statistics(
                pages=self.pages,
                free_pages=len(self._free),
                bytes=sum(t.nbytes for t in tensors_of(self._layers.values())),
                budget=self.pages * self.page_bytes,
                hits=self._hits,
                uploads=self._uploads,
                evictions=self._evictions,
                adapters=adapters,
            )

    # ---- memory

    def grow(self, pages: int | None = None) -> None:
        """Takes memory for so many pages now, all of them by default: none of it moves later, as long as nobody shrinks it.
        Forwards may be under way. The peak is the new size and one linear's old pool."""
        pages = self.pages if pages is None else pages
        must(is_whole(pages, 0, self.pages), "pages", f"lie in 0..{self.pages}", shown(pages))
        with self._changed:
            self._resize(max(pages, self._backed))

    def shrink(self, pages: int | None = None) -> None:
        """Gives back the memory of what lies past so many pages; by default that which no adapter on the device needs. Adapters
        that lie there move; those that do not fit leave, least recently used first. What is pinned or in use by forwards under
        way stays on the device, and what is in use where it is."""
        most = self.pages if pages is None else pages
        must(is_whole(most, 0, self.pages), "pages", f"lie in 0..{self.pages}", shown(pages))
        with self._changed:
            self._may_move()
            order = list(self._resident)
            cells = Counter(adapter.kind for adapter in order for _ in range(adapter.size))
            need = lambda: sum(math.ceil(n / kind.per_page) for kind, n in cells.items())
            for adapter in order:
                if need() > most and not adapter.users and adapter not in self._reserved:
                    cells[adapter.kind] -= adapter.size
                    self._evict(adapter)
            used = Counter(kind for kind, _ in {(a.kind, page) for a in self._resident for page in a.pages})
            loose = {
                kind for kind, n in used.items() if n > math.ceil(cells[kind] / kind.per_page)
            }  # of those that share
            idle = [a for a in order if a.cells is not None and not a.users]
            moving = [a for a in idle if a.kind in loose or max(a.pages) >= need()]
            for adapter in moving:
                self._leave(adapter)
            for adapter in moving:
                self._enter(adapter)
            for adapter in order:
                if adapter in self._resident:
                    self._resident.move_to_end(adapter)
            end = max((page + 1 for adapter in self._resident for page in adapter.pages), default=0)
            self._resize(min(self._backed, end if pages is None else max(end, pages)))
            self._changed.notify_all()

    @property
    def _room(self) -> int:
        """The pages there may be: under captured graphs those that there are, since the pools cannot move."""
        return self._backed if self._captured else self.pages

    def _why(self) -> str:
        return (
            f" (of {self.pages}: a CUDA graph was captured over them, under which the pools cannot move; call pool.grow() "
            "before the capture)"
            if self._captured
            else ""
        )

    def _may_move(self) -> None:
        if self._captured:
            raise PoolFull(f"lrkern.serving: the pool must stay at {self._backed} pages{self._why()}")

    def _resize(self, pages: int) -> None:
        if all(len(t) == PAGE * pages for t in tensors_of(self._layers.values())):
            return
        self._may_move()
        self._backed = min(pages, self._backed)  # what holds even where memory runs out below
        resize(self._layers.values(), pages, self._upload_stream, self._readers)
        self._backed = pages
        if self._upload_stream:
            moved = self._upload_stream.record_event()
            for adapter in self._resident:
                adapter.ready = moved

    def _back(self, adapters: Collection[Adapter]) -> None:
        """Memory for those that are not on the device yet, for whom there is room."""
        need = self._pages(adapters, self._open(adapters))
        if need and (last := self._free.lowest(need)) >= self._backed:
            self._resize(min(self.pages, max(last + 1, 2 * self._backed)))

    def _open(self, adapters: Iterable[Adapter]) -> dict[Kind, int]:
        """Free cells of pages in use, by these adapters' kinds."""
        return {kind: sum(map(len, kind.open.values())) for kind in {adapter.kind for adapter in adapters}}

    # ---- changes

    def load(self, name: str, path: str | Path, replace: bool = False) -> None:
        """Adds under this name a PEFT folder (adapter_config.json and adapter_model.safetensors, or its shards), one of
        diffusers' (pytorch_lora_weights.safetensors), or a file of lrkern.files.save's: VeRA layers that share a pair (one seed,
        r, max_in and max_out) are vectors, RandLoRA is lambda and gamma over bases, all others must be of low rank and are
        factors. Keys may be named as other tools do (docs/files.md). DoRA takes the norm of the weights that the model has now;
        a request's scale of it, and of biases in place of the model's, must be 1. ``replace``: in place of the adapter of that
        name, if there is one; forwards under way end with the old one. A refused call changes nothing."""

        def read():
            if as_path(path).exists() and not Path(path).is_dir():
                return of_layers(read_layers(path, self._linears), self._linears, reversed(self._kinds)), {}
            return self._parts(*read_adapter(path))

        self._put(name, read, replace, f"{named(str(path))}: ")

    def add(self, name: str, config: Config | peft.PeftConfig, tensors: Tensors, replace: bool = False) -> None:
        """The same with what the two files hold: a config, and tensors by key as peft.get_peft_model_state_dict gives."""
        config = config.to_dict() if isinstance(config, peft.PeftConfig) else config
        self._put(name, lambda: self._parts(config, tensors), replace)

    def _parts(self, config: Config, tensors: Tensors) -> Any:
        return of_folder(config, tensors, self._linears, reversed(self._kinds), unwrapped(self._model))

    def remove(self, name: str) -> None:
        """Forwards under way end with it; its pages are free after them."""
        with self._changed:
            adapter = self._known(name)
            del self._adapters[name]
            self._retire(adapter)

    def pin(self, name: str) -> None:
        """Uploads an adapter and keeps it on the device. Its successors by ``replace`` are pinned too."""
        with self._changed:
            adapter = self._known(name)
            self._reserve({*self._reserved, adapter}, name)
        self._bring(name)

    def unpin(self, name: str) -> None:
        with self._changed:
            adapter = self._known(name)
            self._reserved.discard(adapter)
            self._changed.notify_all()

    def tensor_of(self, name: str) -> Tensor | None:
        """A parameter or buffer of the model by its name."""
        module, _, key = name.rpartition(".")
        try:
            t = getattr(self._model.get_submodule(module), key, None)
        except AttributeError:
            return None
        return t.detach() if isinstance(t, Tensor) else None

    def to_device(self, t: Tensor) -> Tensor:
        """A copy on the device, which nobody waits for."""
        if self.device.type != "cuda":
            return t
        t = t.pin_memory()
        if capturing(self.device):  # every replay copies it again
            self._kept.append(t)
        return t.to(self.device, non_blocking=True)

    def _put(self, name: str, read: Callable[[], Any], replace: bool, where: str = "") -> None:
        must(isinstance(name, str) and name, "name", "be a string", shown(name))
        # What is wrong in a file is said where it is read, as a ValueError; the others are for families of somebody's own.
        errors = (
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RuntimeError,
            MemoryError,
            re.error,
        )
        with refusal(f"lrkern.serving: adapter {shown(name)}: {where}", "; the pool is unchanged", errors):
            parts, saved = read()
            kind = next(kind for kind in reversed(self._kinds) if isinstance(parts, kind.parts))
            if outside := sorted(parts.keys() - self._layers.keys()):
                way = f"the pool must be made with it (targets=[..., {outside[0]!r}])"
                raise ValueError(f"{outside[0]} is not among the pool's targets; {way}")
            adapter = kind.read(parts)
            split = next((name for name in self._split if inside(name, saved)), None)
            require(split is None, f"{split} must not be split (parallel) where an adapter has a copy of it")
            pinned = lambda state: {key: t.pin_memory() if self._upload_stream else t for key, t in state.items()}
            adapter.saved = {module: one._replace(state=pinned(one.state)) for module, one in saved.items()}
        with self._changed:
            old = self._adapters.get(name)
            must(replace or old is None, "name", "be new (or say replace=True)", repr(name))
            if old is None and len(self._adapters) >= self.max_adapters:
                raise PoolFull(f"lrkern.serving: max_adapters is {self.max_adapters}, and {name!r} would be one more")
            kind.agree(adapter)
            pinned = old in self._reserved
            if pinned:
                self._reserve({*self._reserved, adapter} - {old}, name)
            self._adapters[name] = adapter
            if old is not None:
                self._retire(old)
        if pinned:
            self._bring(name)

    # ---- who is on the device; all of it with the lock held

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UnknownAdapter(
                f"lrkern.serving: adapter must be one of the pool's {len(self._adapters)}, got {name!r}"
            )
        return self._adapters[name]

    def _pages(self, adapters: Collection[Adapter], free: Mapping[Kind, int] | None = None) -> int:
        """How many these take when they lie as close as they can, beside so many free cells of each kind."""
        cells = Counter(adapter.kind for adapter in adapters for _ in range(adapter.size))
        return sum(max(0, math.ceil((n - (free or {}).get(kind, 0)) / kind.per_page)) for kind, n in cells.items())

    def _reserve(self, pinned: set[Adapter], name: str) -> None:
        need, now = (self._pages(each | self._captured) for each in (pinned, self._reserved))
        if need > self._room:
            raise PoolFull(
                f"lrkern.serving: pinning {name!r} needs {need - now} pages more, {now} of {self._room} are pinned{self._why()}"
            )
        self._reserved = pinned

    def _retire(self, adapter: Adapter) -> None:
        self._reserved.discard(adapter)
        adapter.retired = True
        if not adapter.users:
            self._leave(adapter)
        self._changed.notify_all()

    def _leave(self, adapter: Adapter) -> None:
        """Frees the room. On CUDA forwards may still run: what is uploaded next waits for them, on the device."""
        if adapter.cells is None:
            return
        for event in adapter.done.values():
            self._upload_stream.wait_event(event)
        for cell in adapter.cells:
            page = cell // adapter.kind.per_page
            free = adapter.kind.open.setdefault(page, [])
            free.append(cell)
            if len(free) == adapter.kind.per_page:
                del adapter.kind.open[page]
                self._free.put(page)
        adapter.cells, adapter.ready, adapter.done, adapter.held = None, None, {}, {}
        self._resident.pop(adapter, None)

    def _evict(self, adapter: Adapter) -> None:
        self._evictions += 1
        self._leave(adapter)

    def _make_room(self, batch: set[Adapter]) -> bool:
        """Whether the batch fits now; then others have left for it, least recently used first. Of adapters that share pages
        those that stay idle, pinned or in the batch, may lie one a page: where need be they move together."""
        absent = [adapter for adapter in batch if adapter.cells is None]
        if not absent:
            return True
        busy = [adapter for adapter in self._resident if adapter.users]
        begun = {(adapter.kind, page) for adapter in busy for page in adapter.pages}
        beside = Counter(
            kind for kind, _ in begun for _ in range(kind.per_page)
        )  # free there when all others have left
        beside.subtract(adapter.kind for adapter in busy for _ in range(adapter.size))
        staying = {a for a in self._resident if not a.users and (a in batch or a in self._reserved)}
        if self._pages([*staying, *absent], beside) > self._room - len(begun):
            return False
        lacks = lambda: self._pages(absent, self._open(absent)) > len(self._free)
        for adapter in list(self._resident):
            if not lacks():
                return True
            if not adapter.users and adapter not in staying:
                self._evict(adapter)
        if lacks():
            moving = [adapter for adapter in staying if adapter.kind.per_page > 1]
            for adapter in moving:
                self._leave(adapter)
            for adapter in moving:
                self._enter(adapter)
        return True

    def _enter(self, adapter: Adapter) -> None:
        with torch.cuda.stream(self._upload_stream):  # first: where there is no memory for it, nothing has changed
            put = lambda state: {key: t.to(self.device, non_blocking=True) for key, t in state.items()}
            adapter.held = {name: put(saved.state) for name, saved in adapter.saved.items()}
        kind, adapter.cells = adapter.kind, []
        for _ in range(adapter.size):
            if not kind.open:
                page = self._free.take()
                kind.open[page] = list(range(kind.per_page * page, kind.per_page * (page + 1)))
            page = min(kind.open)
            free = kind.open[page]
            adapter.cells.append(free.pop(0))
            if not free:
                del kind.open[page]
        with torch.cuda.stream(self._upload_stream), torch.no_grad():
            for layer in self._layers.values():
                for view, host in zip(kind.views(layer), adapter.host.get(layer.index, ()), strict=False):
                    for cell, rows in zip(adapter.cells, host, strict=False):
                        view[cell].copy_(rows, non_blocking=True)
            if self._upload_stream:
                adapter.ready = self._upload_stream.record_event()
        self._resident[adapter] = None
        adapter.uploads += 1
        self._uploads += 1

    @contextmanager
    def _lease(self, names: Iterable[str], scaled: Mapping[str, float] | None = None):
        """The adapters of these names, on the device until the end. Waits where forwards under way hold the room. ``scaled``:
        those that a request scales. One that a CUDA graph captures may run again at any time: its adapters stay as they are for
        good."""
        names = list(dict.fromkeys(names))
        captured = capturing(self.device)
        with self._changed:
            for name in names if captured else ():
                if self._known(name).cells is None:
                    raise RuntimeError(
                        f"lrkern.serving: adapter {name!r} must be on the device before a CUDA graph is captured with it: "
                        "call pool.pin() of it first"
                    )
            while True:
                batch = [self._known(name) for name in names]
                for name, scale in (scaled or {}).items():
                    fixed = self._known(name).fixed
                    must(not fixed, "scales", f"be 1 for {name!r} ({fixed})", scale)
                pinned = self._reserved | self._captured
                if self._pages({*batch, *pinned}) > self._room:
                    need, others = self._pages(batch), self._pages(pinned.difference(batch))
                    raise PoolFull(
                        f"lrkern.serving: this batch's {len(batch)} adapters need {need} pages "
                        f"({need * self.page_bytes} bytes), the pool has {self._room} ({self._room * self.page_bytes} "
                        f"bytes){self._why()}, {others} of them pinned by others"
                    )
                if self._make_room(set(batch)):
                    break
                self._changed.wait()
            self._back([adapter for adapter in batch if adapter.cells is None])
            for adapter in batch:
                if adapter.cells is None:
                    self._enter(adapter)
                else:
                    adapter.hits += 1
                    self._hits += 1
                self._resident.move_to_end(adapter)
            stream = torch.cuda.current_stream(self.device) if self._upload_stream else None
            if stream and stream not in self._readers:
                read_on(stream, tensors_of(self._layers.values()))
                self._readers.add(stream)
            if captured:
                self._captured.update(batch)
                self._free.end_at(self._backed)
            for adapter in batch:
                adapter.users += 1
        if captured:  # without waiting for uploads, which a capture cannot: torch.cuda.graph has waited before it began
            yield dict(zip(names, batch, strict=True))
            return
        try:
            for adapter in batch if stream else ():
                stream.wait_event(adapter.ready)
            yield dict(zip(names, batch, strict=True))
        finally:
            event = stream.record_event() if stream else None
            with self._changed:
                for adapter in batch:
                    adapter.users -= 1
                    if event:
                        adapter.done[stream] = event
                    if adapter.retired and not adapter.users:
                        self._leave(adapter)
                self._changed.notify_all()

    def _bring(self, name: str) -> None:
        with suppress(UnknownAdapter), self._lease([name]):  # removed by another thread just now
            pass


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _targeted(targets: str | re.Pattern | Collection[str], name: str, is_head: bool) -> bool:
    if targets == "all-linear":
        return not is_head
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(name) is not None
    return any(_ends(name, end) for end in targets)
