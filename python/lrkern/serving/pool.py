# SPDX-License-Identifier: Apache-2.0
"""Adapters by name in pools of pages, and who of them is on the device."""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..files import folder as files
from ..files.folder import features_of
from ..files.own import read_layers
from ..functional.projection import Basis, Projection
from .families import FAMILIES, Factors, Shared, of_layers

PAGE = 16  # ranks, lrkern.ops.multi_lora's
MAX_RANK = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnknownAdapter(ValueError):
    """A name that the pool does not have."""


class PoolFull(RuntimeError):
    """More pages are needed at once than there are."""


def wrong(argument: str, must: str, got: Any) -> ValueError:
    return ValueError(f"lrkern.serving: {argument} must {must}, got {got}")


class Layer:
    """A linear's pools. Sharded by columns it has B's rows of this process, by rows A's columns.

    A page is 16 rows of both. An adapter of factors has A's rows and Bᵀ's in whole pages. One of vectors has a slot, an equal
    part of a page, in which d and b lie from the start.
    """

    def __init__(self, index: int, name: str, features: tuple[int, int], split: str | None, world: int):
        self.index, self.name, self.split = index, name, split
        self.local = features
        self.whole = (features[0] * (world if split == "row" else 1), features[1] * (world if split == "column" else 1))
        self.a: Tensor  # [P, I]
        self.b: Tensor  # [P, O]
        self.pair: tuple[Projection, Projection]  # A [r, I] and B [r, O] that the vectors of all adapters share

    def mine(self, t: Tensor, which: str, rank: int) -> Tensor:
        """This process's columns of something of A ("row") or Bᵀ ("column")."""
        n = self.local[which == "column"]
        return t[..., n * rank : n * (rank + 1)] if self.split == which else t[..., :n]

    def slots(self, per_page: int, r: int) -> tuple[Tensor, Tensor]:
        """d [slots, r] and b [slots, O] of the adapters of vectors, views of the pools."""
        rows, O = PAGE // per_page, self.local[1]
        return self.a.view(-1, rows * self.a.shape[1])[:, :r], self.b.view(-1, rows * O)[:, :O]


class Pair(NamedTuple):
    """The projections that all vectors of a pool share, as the first such adapter brought them."""

    a: Projection
    b: Projection
    r: int
    per_page: int  # adapters


class Adapter:
    """One adapter's host copy, which never changes, and where on the device it is, which the pool's lock guards."""

    def __init__(
        self, ranks: list[int], scales: list[float], host: dict[int, tuple[Tensor, Tensor]], vectors: bool = False
    ):
        self.host = host  # by layer: A [16 n, I] and Bᵀ [16 n, O], zeros past the rank; or d [r] and b [O]
        self.vectors = vectors
        self.size = 0 if vectors else math.ceil(max(ranks) / PAGE)  # pages of its own
        self.ranks, self.scales = torch.tensor(ranks, dtype=torch.int32), torch.tensor(scales)
        self.pages: list[int] | None = None  # on the device
        self.slot = -1  # of vectors, counted over all pages
        self.users = 0  # forwards that may read them
        self.retired = False  # removed or replaced, but in use
        self.ready: Any = None  # CUDA: the event after its upload
        self.done: dict[Any, Any] = {}  # CUDA: by stream, the event after the last forward that read it


class AdapterPool:
    """Adapters by name for one model, in a fixed amount of device memory.

    Args:
        model: without PEFT's layers; on one device, where the pools go.
        budget, pages: how many bytes, or pages of 16 ranks of all layers, the pools may take; one of the two. Up to 16
            adapters of vectors (VeRA) share a page. Their one pair of projections comes on top, with the first of them.
        targets: the linears that may have an adapter: "all-linear" (all but the output embedding), a regex of the whole
            name, or a list of ends of names.
        max_rank: of an adapter of factors, up to 512. max_adapters: names held at once.
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
        max_rank: int = 64,
        max_adapters: int = 4096,
        dtype: torch.dtype | None = None,
        parallel: Mapping[str, str] | None = None,
        group: Any = None,
    ):
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise wrong("model", "be without PEFT layers", type(model).__name__)
        if not 1 <= max_rank <= MAX_RANK:
            raise wrong("max_rank", f"lie in 1..{MAX_RANK}", max_rank)
        if (budget is None) == (pages is None):
            raise wrong("budget or pages", "be given, and not both", f"budget={budget}, pages={pages}")
        if dtype not in (None, *_DTYPES):
            raise wrong("dtype", "be float32, float16 or bfloat16", dtype)
        parallel = dict(parallel or {})
        if not set(parallel.values()) <= {"column", "row"}:
            raise wrong("parallel", "say column or row", sorted(set(parallel.values()) - {"column", "row"}))
        self.group, self._rank, world = group, 0, 1
        if parallel:
            self._rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

        head = getattr(model, "get_output_embeddings", lambda: None)()
        every = {name: m for name, m in model.named_modules() if features_of(m)}
        modules = {name: m for name, m in every.items() if _targeted(targets, name, m is head)}
        if not modules:
            raise wrong("targets", "name linears of the model", targets)
        splits = {name: next((v for k, v in parallel.items() if _ends(name, k)), None) for name in every}
        layers = {n: Layer(-1, n, features_of(m), splits[n], world) for n, m in every.items()}
        self._linears = {name: layer.whole for name, layer in layers.items()}
        self._layers = {name: layers[name] for name in modules}
        for index, layer in enumerate(self._layers.values()):
            layer.index = index

        weights = [w for m in modules.values() if isinstance(w := getattr(m, "weight", None), Tensor)]
        kinds, devices = {w.dtype for w in weights}, {p.device for p in model.parameters()}
        if len(devices) != 1 or (device := devices.pop()).type == "meta":
            raise wrong("model", "be on one device", sorted(map(str, devices)) or "meta")
        only = kinds.pop() if len(kinds) == 1 and len(weights) == len(modules) else None
        self.device, self.dtype = device, dtype or (only if only in _DTYPES else torch.float32)
        self.max_rank, self.max_adapters = max_rank, max_adapters
        self.page_bytes = PAGE * self.dtype.itemsize * sum(sum(layer.local) for layer in self._layers.values())
        self.pages = pages if pages is not None else budget // self.page_bytes
        if self.pages < 1:
            raise wrong("budget or pages", f"hold a page, {self.page_bytes} bytes", f"budget={budget}, pages={pages}")
        for layer in self._layers.values():
            I, O = layer.local
            layer.a = torch.zeros(PAGE * self.pages, I, dtype=self.dtype, device=device)
            layer.b = torch.zeros(PAGE * self.pages, O, dtype=self.dtype, device=device)
        self._upload_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._upload_stream:
            self._upload_stream.wait_stream(torch.cuda.current_stream(device))

        self._changed = threading.Condition(threading.RLock())  # guards all that follows
        self._adapters: dict[str, Adapter] = {}
        self._resident: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first
        self._free = list(range(self.pages))
        self._open: dict[int, list[int]] = {}  # by page that holds vectors and has room for more, its free slots
        self._reserved: set[Adapter] = set()  # pinned, whether they are on the device yet or not
        self.pair: Pair | None = None  # once there is, it stays

    # ---- what is there

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def names(self) -> list[str]:
        with self._changed:
            return list(self._adapters)

    @property
    def resident(self) -> list[str]:
        """Names on the device."""
        with self._changed:
            return [name for name, adapter in self._adapters.items() if adapter.pages is not None]

    @property
    def layers(self) -> list[str]:
        return list(self._layers)

    # ---- changes

    def load(self, name: str, path: str | Path, replace: bool = False) -> None:
        """Adds under this name a PEFT folder (adapter_config.json and adapter_model.safetensors) or a file of
        lrkern.nn.basis_file.save_adapter with NOLA or VeRA layers: VeRA layers that share a pair (one seed, r, max_in and
        max_out) are vectors, all others factors. ``replace``: in place of the adapter of that name; forwards under way end
        with the old one. A refused call changes nothing."""
        if Path(path).is_file():
            self._put(name, lambda: of_layers(read_layers(path), self._linears), replace, f"{path}: ")
        else:
            self._put(name, lambda: self._parts(*files.read_adapter(path)), replace, f"{path}: ")

    def add(
        self,
        name: str,
        config: Mapping[str, Any] | peft.PeftConfig,
        tensors: Mapping[str, Tensor],
        replace: bool = False,
    ) -> None:
        """The same with what the two files hold: a config, and tensors by key as peft.get_peft_model_state_dict gives."""
        config = config.to_dict() if isinstance(config, peft.PeftConfig) else config
        self._put(name, lambda: self._parts(config, tensors), replace)

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

    def _put(self, name: str, read: Callable[[], dict[str, Factors] | Shared], replace: bool, where: str = "") -> None:
        if not isinstance(name, str) or not name:
            raise wrong("name", "be a string", repr(name))
        try:
            adapter, pair = self._host_copy(read())
        except (ValueError, TypeError, re.error) as error:
            raise ValueError(f"lrkern.serving: adapter {name!r}: {where}{error}; the pool is unchanged") from error
        with self._changed:
            old = self._adapters.get(name)
            if replace and old is None:
                raise self._unknown(name)
            if not replace and old is not None:
                raise wrong("name", "be new (or say replace=True)", repr(name))
            if old is None and len(self._adapters) >= self.max_adapters:
                raise PoolFull(f"lrkern.serving: max_adapters is {self.max_adapters}, and {name!r} would be one more")
            if pair is not None:
                self._agree(pair, name)
            pinned = old in self._reserved
            if pinned:
                self._reserve({*self._reserved, adapter} - {old}, name)
            self._adapters[name] = adapter
            if old is not None:
                self._retire(old)
        if pinned:
            self._bring(name)

    def _parts(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors] | Shared:
        kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
        if kind not in FAMILIES:
            raise ValueError(f"peft_type must be one of {sorted(FAMILIES)}, got {kind!r}")
        for key, tensor in tensors.items():
            if tensor.dtype not in (*_DTYPES, torch.float64):
                raise ValueError(f"{key} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        return FAMILIES[kind](config, tensors, self._linears)

    def _host_copy(self, parts: dict[str, Factors] | Shared) -> tuple[Adapter, Pair | None]:
        """Checks everything."""
        if outside := sorted((parts.vectors if isinstance(parts, Shared) else parts).keys() - self._layers.keys()):
            raise ValueError(f"{outside[0]} is not among the pool's targets")
        return self._read_vectors(parts) if isinstance(parts, Shared) else (self._read_factors(parts), None)

    def _read_factors(self, factors: Mapping[str, Factors]) -> Adapter:
        rank = max(f.a.shape[0] for f in factors.values())
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"rank must lie in 1..{self.max_rank} (the pool's max_rank), got {rank}")
        if math.ceil(rank / PAGE) > self.pages:
            raise ValueError(f"rank {rank} needs {math.ceil(rank / PAGE)} pages, the pool has {self.pages}")
        first = next(iter(factors.values())).scale
        ranks, scales, host = [0] * len(self._layers), [first] * len(self._layers), {}
        rows = {name: PAGE * math.ceil(f.a.shape[0] / PAGE) for name, f in factors.items()}
        count = sum(n * sum(self._layers[name].local) for name, n in rows.items())
        flat = torch.zeros(count, dtype=self.dtype, pin_memory=self._upload_stream is not None)
        at = 0
        for name, f in factors.items():
            layer, r = self._layers[name], f.a.shape[0]
            if (f.a.shape, f.b.shape) != ((r, layer.whole[0]), (layer.whole[1], r)) or not math.isfinite(f.scale):
                raise ValueError(f"{name} got factors {list(f.a.shape)}, {list(f.b.shape)}, scale {f.scale}")
            pair = []
            for t, split in ((f.a, "row"), (f.b.mT, "column")):
                mine = layer.mine(t.detach(), split, self._rank)
                n = mine.shape[1]
                view = flat[at : at + rows[name] * n].view(rows[name], n)
                view[:r].copy_(mine)
                at += view.numel()
                pair.append(view)
                if not view.isfinite().all():
                    raise ValueError(f"{name} must have finite factors in {self.dtype}, got inf or nan")
            ranks[layer.index], scales[layer.index], host[layer.index] = r, f.scale, (pair[0], pair[1])
        return Adapter(ranks, scales, host)

    def _read_vectors(self, shared: Shared) -> tuple[Adapter, Pair]:
        """d lies in the room of 16 rows of A's pool, or as small a part of it as holds it in every layer."""
        r, i = shared.a.shape if isinstance(shared.a, Tensor) else (shared.a.rows, shared.a.cols)
        r_b, o = shared.b.shape if isinstance(shared.b, Tensor) else (shared.b.rows, shared.b.cols)
        room = PAGE * min(layer.local[0] for layer in self._layers.values())
        if r != r_b or not 1 <= r <= room:
            raise ValueError(
                f"rank must lie in 1..{room} (what a page holds of the narrowest linear), got {r} and {r_b}"
            )
        host: dict[int, tuple[Tensor, Tensor]] = {}
        for name, (d, b) in shared.vectors.items():
            layer = self._layers[name]
            if d.shape != (r,) or b.shape != layer.whole[1:] or i < layer.whole[0] or o < layer.whole[1]:
                raise ValueError(
                    f"{name} {list(layer.whole)} got vectors {list(d.shape)} and {list(b.shape)} of projections "
                    f"{[r, i]} and {[r_b, o]}"
                )
            both = torch.cat([d.detach().cpu(), layer.mine(b.detach(), "column", self._rank).cpu()]).to(self.dtype)
            if not both.isfinite().all():
                raise ValueError(f"{name} must have finite vectors in {self.dtype}, got inf or nan")
            host[layer.index] = tuple((both.pin_memory() if self._upload_stream else both).split([r, len(both) - r]))
        per_page = PAGE
        while per_page * r > room:
            per_page //= 2
        none = [0] * len(self._layers)
        return Adapter(none, none, host, vectors=True), Pair(shared.a, shared.b, r, per_page)

    def _agree(self, new: Pair, name: str) -> None:
        """All adapters of vectors have the pool's pair, which is that of the first; with the lock held."""
        if (old := self.pair) is None:
            new = new._replace(
                **{x: p.detach().clone() for x, p in zip("ab", new, strict=False) if isinstance(p, Tensor)}
            )
            whole = [new.a, new.b]
            if any(layer.split for layer in self._layers.values()):  # a Basis has no columns in the middle
                whole = [p.fill(torch.empty(0)) if isinstance(p, Basis) else p for p in whole]
            whole = [p.to(self.device, self.dtype) if isinstance(p, Tensor) else p for p in whole]
            for layer in self._layers.values():
                layer.pair = tuple(
                    p._replace(cols=n) if isinstance(p, Basis) else layer.mine(p, which, self._rank)
                    for p, n, which in zip(whole, layer.local, ("row", "column"), strict=True)
                )
            self.pair = new
            return
        sizes = [
            [list(p.shape) if isinstance(p, Tensor) else [p.rows, p.cols] for p in pair[:2]] for pair in (old, new)
        ]
        must = f"lrkern.serving: adapter {name!r}: its projections must be the pool's"
        if sizes[0] != sizes[1]:
            raise ValueError(f"{must}, of shapes {sizes[0]}, got {sizes[1]}; the pool is unchanged")
        for x, a, b in zip("AB", old[:2], new[:2], strict=True):
            if type(a) is not type(b) or not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
                raise ValueError(
                    f"{must}, which the first such adapter brought, got another {x} (of another projection_prng_key?); the "
                    "pool is unchanged"
                )

    # ---- who is on the device; all of it with the lock held

    def _unknown(self, name: str) -> UnknownAdapter:
        return UnknownAdapter(f"lrkern.serving: adapter must be one of the pool's {len(self._adapters)}, got {name!r}")

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise self._unknown(name)
        return self._adapters[name]

    def _pages(self, adapters: Collection[Adapter]) -> int:
        """How many these take when they lie as close as they can."""
        vectors = sum(adapter.vectors for adapter in adapters)
        return sum(adapter.size for adapter in adapters) + (math.ceil(vectors / self.pair.per_page) if vectors else 0)

    def _reserve(self, pinned: set[Adapter], name: str) -> None:
        need, now = self._pages(pinned), self._pages(self._reserved)
        if need > self.pages:
            raise PoolFull(
                f"lrkern.serving: pinning {name!r} needs {need - now} pages more, {now} of {self.pages} are pinned"
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
        if adapter.pages is None:
            return
        for event in adapter.done.values():
            self._upload_stream.wait_event(event)
        if adapter.vectors:
            (page,) = adapter.pages
            slots = self._open.setdefault(page, [])
            slots.append(adapter.slot)
            if len(slots) == self.pair.per_page:
                del self._open[page]
                self._free.append(page)
        else:
            self._free += adapter.pages
        adapter.pages, adapter.ready, adapter.done = None, None, {}
        self._resident.pop(adapter, None)

    def _lacks(self, adapters: Collection[Adapter], pages: int, slots: int) -> int:
        """How many pages more than these, and than these slots in pages begun, the adapters need."""
        vectors = sum(adapter.vectors for adapter in adapters) - slots
        more = math.ceil(vectors / self.pair.per_page) if vectors > 0 else 0
        return sum(adapter.size for adapter in adapters) + more - pages

    def _make_room(self, batch: set[Adapter]) -> bool:
        """Whether the batch fits now; then others have left for it, least recently used first. Idle vectors that stay, pinned
        or in the batch, may lie one a page: where need be they move together."""
        absent = [adapter for adapter in batch if adapter.pages is None]
        if not absent:
            return True
        busy = [adapter for adapter in self._resident if adapter.users]
        staying = {a for a in self._resident if not a.users and (a in batch or a in self._reserved)}
        begun = {adapter.pages[0] for adapter in busy if adapter.vectors}
        slots = len(begun) * self.pair.per_page - sum(a.vectors for a in busy) if begun else 0
        pages = self.pages - len(begun) - sum(adapter.size for adapter in busy)
        if self._lacks([*staying, *absent], pages, slots) > 0:
            return False
        lacks = lambda: self._lacks(absent, len(self._free), sum(map(len, self._open.values()))) > 0
        for adapter in list(self._resident):
            if not lacks():
                return True
            if not adapter.users and adapter not in staying:
                self._leave(adapter)
        if lacks():
            moving = [adapter for adapter in staying if adapter.vectors]
            for adapter in moving:
                self._leave(adapter)
            for adapter in moving:
                self._enter(adapter)
        return True

    def _enter(self, adapter: Adapter) -> None:
        if adapter.vectors:
            n = self.pair.per_page
            if not self._open:
                page = self._free.pop(0)
                self._open[page] = list(range(n * page, n * (page + 1)))
            page, slots = next(iter(self._open.items()))
            adapter.pages, adapter.slot = [page], slots.pop(0)
            if not slots:
                del self._open[page]
        else:
            adapter.pages = self._free[: adapter.size]
            del self._free[: adapter.size]
        with torch.cuda.stream(self._upload_stream), torch.no_grad():
            for layer in self._layers.values():
                parts = adapter.host.get(layer.index, ())
                if adapter.vectors:
                    for pool, host in zip(layer.slots(self.pair.per_page, self.pair.r), parts, strict=False):
                        pool[adapter.slot].copy_(host, non_blocking=True)
                    continue
                for pool, host in zip((layer.a, layer.b), parts, strict=False):
                    for page, rows in zip(adapter.pages, host.split(PAGE), strict=False):
                        pool[PAGE * page : PAGE * (page + 1)].copy_(rows, non_blocking=True)
            if self._upload_stream:
                adapter.ready = self._upload_stream.record_event()
        self._resident[adapter] = None

    @contextmanager
    def _lease(self, names: Iterable[str]):
        """The adapters of these names, on the device until the end. Waits where forwards under way hold the room."""
        names = list(dict.fromkeys(names))
        with self._changed:
            while True:
                batch = [self._known(name) for name in names]
                if self._pages({*batch, *self._reserved}) > self.pages:
                    need, pinned = self._pages(batch), self._pages(self._reserved.difference(batch))
                    raise PoolFull(
                        f"lrkern.serving: this batch's {len(batch)} adapters need {need} pages "
                        f"({need * self.page_bytes} bytes), the pool has {self.pages} ({self.pages * self.page_bytes} "
                        f"bytes), {pinned} of them pinned by others"
                    )
                if self._make_room(set(batch)):
                    break
                self._changed.wait()
            for adapter in batch:
                if adapter.pages is None:
                    self._enter(adapter)
                self._resident.move_to_end(adapter)
            for adapter in batch:
                adapter.users += 1
        try:
            stream = torch.cuda.current_stream(self.device) if self._upload_stream else None
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
        try:
            with self._lease([name]):
                pass
        except UnknownAdapter:  # removed by another thread just now
            pass


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _targeted(targets: str | Sequence[str], name: str, is_head: bool) -> bool:
    if targets == "all-linear":
        return not is_head
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends(name, end) for end in targets)
