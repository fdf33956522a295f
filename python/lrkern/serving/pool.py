# SPDX-License-Identifier: Apache-2.0
"""Adapters by name in pools of pages, and who of them is on the device."""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import peft as files
from .families import FAMILIES

PAGE = 16  # ranks, lrkern.ops.multi_lora's
MAX_RANK = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnknownAdapter(ValueError):
    """A name that the pool does not have."""


class PoolFull(RuntimeError):
    """More pages are needed at once than there are."""


def wrong(argument: str, must: str, got: Any) -> ValueError:
    return ValueError(f"lrkern.serving: {argument} must {must}, got {got}")


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """[I, O] of a linear of any kind: nn.Linear, a quantised one, transformers' Conv1D. Not the one inside
    nn.MultiheadAttention, whose forward nobody calls."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    i, o = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    I, O = getattr(module, i, None), getattr(module, o, None)
    return (I, O) if isinstance(I, int) and isinstance(O, int) else None


class Layer:
    """A linear's pools. Sharded by columns it has B's rows of this process, by rows A's columns."""

    def __init__(self, index: int, name: str, features: tuple[int, int], split: str | None, world: int):
        self.index, self.name, self.split = index, name, split
        self.local = features
        self.whole = (features[0] * (world if split == "row" else 1), features[1] * (world if split == "column" else 1))
        self.a: Tensor  # [P, I]
        self.b: Tensor  # [P, O]


class Adapter:
    """One adapter's host copy, which never changes, and where on the device it is, which the pool's lock guards."""

    def __init__(self, ranks: list[int], scales: list[float], host: dict[int, tuple[Tensor, Tensor]]):
        self.host = host  # by layer: A [16 n, I] and Bᵀ [16 n, O], zeros past the rank
        self.size = math.ceil(max(ranks) / PAGE)  # pages
        self.ranks, self.scales = torch.tensor(ranks, dtype=torch.int32), torch.tensor(scales)
        self.pages: list[int] | None = None
        self.users = 0  # forwards that may read the pages
        self.pinned = self.retired = False  # retired: removed or replaced, but in use
        self.ready: Any = None  # CUDA: the event after its upload
        self.done: dict[Any, Any] = {}  # CUDA: by stream, the event after the last forward that read it


class AdapterPool:
    """Adapters by name for one model, in a fixed amount of device memory.

    Args:
        model: without PEFT's layers; on one device, where the pools go.
        budget, pages: how many bytes, or pages of 16 ranks of all layers, the pools may take; one of the two.
        targets: the linears that may have an adapter: "all-linear" (all but the output embedding), a regex of the whole
            name, or a list of ends of names.
        max_rank: of an adapter, up to 512. max_adapters: names held at once.
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
        self._reserved = 0  # pages of pinned adapters, whether they are on the device yet or not

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

    def load(self, name: str, folder: str | Path, replace: bool = False) -> None:
        """Adds a PEFT folder (adapter_config.json and adapter_model.safetensors) under this name. ``replace``: in place of
        the adapter of that name; forwards under way end with the old one. A refused call changes nothing."""
        try:
            config, tensors = files.read_adapter(folder)
        except ValueError as error:
            raise ValueError(f"lrkern.serving: adapter {name!r}: {folder}: {error}; the pool is unchanged") from error
        self._put(name, config, tensors, replace, f"{folder}: ")

    def add(
        self,
        name: str,
        config: Mapping[str, Any] | peft.PeftConfig,
        tensors: Mapping[str, Tensor],
        replace: bool = False,
    ) -> None:
        """The same with what the two files hold: a config, and tensors by key as peft.get_peft_model_state_dict gives."""
        self._put(name, config.to_dict() if isinstance(config, peft.PeftConfig) else config, tensors, replace)

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
            if not adapter.pinned:
                self._reserve(adapter.size, name)
                adapter.pinned = True
        self._bring(name)

    def unpin(self, name: str) -> None:
        with self._changed:
            adapter = self._known(name)
            if adapter.pinned:
                adapter.pinned = False
                self._reserved -= adapter.size
                self._changed.notify_all()

    def _put(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], replace: bool, where: str = ""):
        if not isinstance(name, str) or not name:
            raise wrong("name", "be a string", repr(name))
        try:
            adapter = self._read(config, tensors)
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
            pinned = old is not None and old.pinned
            if pinned:
                self._reserve(adapter.size - old.size, name)
                adapter.pinned = True
                old.pinned = False  # its pages are the new one's reserve
            self._adapters[name] = adapter
            if old is not None:
                self._retire(old)
        if pinned:
            self._bring(name)

    def _read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
        """Checks everything and makes the host copy."""
        kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
        if kind not in FAMILIES:
            raise ValueError(f"peft_type must be one of {sorted(FAMILIES)}, got {kind!r}")
        for key, tensor in tensors.items():
            if tensor.dtype not in (*_DTYPES, torch.float64):
                raise ValueError(f"{key} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        factors = FAMILIES[kind](config, tensors, self._linears)
        if outside := sorted(factors.keys() - self._layers.keys()):
            raise ValueError(f"{outside[0]} is not among the pool's targets")
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
            for t, n, split in ((f.a, layer.local[0], "row"), (f.b.mT, layer.local[1], "column")):
                mine = t[:, n * self._rank : n * (self._rank + 1)] if layer.split == split else t
                view = flat[at : at + rows[name] * n].view(rows[name], n)
                view[:r].copy_(mine.detach())
                at += view.numel()
                pair.append(view)
                if not view.isfinite().all():
                    raise ValueError(f"{name} must have finite factors in {self.dtype}, got inf or nan")
            ranks[layer.index], scales[layer.index], host[layer.index] = r, f.scale, (pair[0], pair[1])
        return Adapter(ranks, scales, host)

    # ---- who is on the device; all of it with the lock held

    def _unknown(self, name: str) -> UnknownAdapter:
        return UnknownAdapter(f"lrkern.serving: adapter must be one of the pool's {len(self._adapters)}, got {name!r}")

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise self._unknown(name)
        return self._adapters[name]

    def _reserve(self, more: int, name: str) -> None:
        if self._reserved + more > self.pages:
            raise PoolFull(
                f"lrkern.serving: pinning {name!r} needs {more} pages more, {self._reserved} of {self.pages} are pinned"
            )
        self._reserved += more

    def _retire(self, adapter: Adapter) -> None:
        if adapter.pinned:
            self._reserved -= adapter.size
        adapter.pinned, adapter.retired = False, True
        if not adapter.users:
            self._leave(adapter)
        self._changed.notify_all()

    def _leave(self, adapter: Adapter) -> None:
        """Frees the pages. On CUDA forwards may still run: what is uploaded next waits for them, on the device."""
        if adapter.pages is None:
            return
        for event in adapter.done.values():
            self._upload_stream.wait_event(event)
        self._free += adapter.pages
        adapter.pages, adapter.ready, adapter.done = None, None, {}
        self._resident.pop(adapter, None)

    def _make_room(self, batch: set[Adapter]) -> bool:
        """Whether the batch fits now; then others have left for it, least recently used first."""
        short = sum(adapter.size for adapter in batch if adapter.pages is None) - len(self._free)
        leaving = []
        for adapter in self._resident:
            if short <= 0:
                break
            if not (adapter.users or adapter.pinned or adapter in batch):
                leaving.append(adapter)
                short -= adapter.size
        if short > 0:
            return False
        for adapter in leaving:
            self._leave(adapter)
        return True

    def _enter(self, adapter: Adapter) -> None:
        pages = self._free[: adapter.size]
        with torch.cuda.stream(self._upload_stream), torch.no_grad():
            for layer in self._layers.values():
                for pool, host in zip((layer.a, layer.b), adapter.host.get(layer.index, ()), strict=False):
                    for page, rows in zip(pages, host.split(PAGE), strict=False):
                        pool[PAGE * page : PAGE * (page + 1)].copy_(rows, non_blocking=True)
            if self._upload_stream:
                adapter.ready = self._upload_stream.record_event()
        adapter.pages = pages
        del self._free[: adapter.size]
        self._resident[adapter] = None

    @contextmanager
    def _lease(self, names: Iterable[str]):
        """The adapters of these names, on the device until the end. Waits where forwards under way hold the room."""
        names = list(dict.fromkeys(names))
        with self._changed:
            while True:
                batch = [self._known(name) for name in names]
                need = sum(adapter.size for adapter in batch)
                pinned = self._reserved - sum(adapter.size for adapter in batch if adapter.pinned)
                if need + pinned > self.pages:
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
