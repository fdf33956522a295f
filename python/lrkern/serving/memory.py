# SPDX-License-Identifier: Apache-2.0
"""The memory of a pool's pages, which grows and shrinks, and what a pool can be asked about itself."""

from bisect import insort
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..limits import PAGE
from .layer import Layer


@dataclass(frozen=True)
class AdapterStatistics:
    """One adapter of a pool.

    rank: its largest. pages: that it takes; adapters of vectors share theirs. resident: it is on the device. pinned: it stays
    there. users: forwards under way with it. hits, uploads: how often a call found it on the device, and how often it was
    copied there, since it was loaded under its name.
    """

    rank: int
    pages: int
    resident: bool
    pinned: bool
    users: int
    hits: int
    uploads: int


@dataclass(frozen=True)
class Statistics:
    """A pool at one moment.

    pages, budget: the ceiling in pages and in bytes. free_pages: of these pages those that no adapter has. bytes: that the
    pages take now. hits, uploads: as of the adapters, over all that ever were. evictions: how often one left for another.
    adapters: by name.
    """

    pages: int
    free_pages: int
    bytes: int
    budget: int
    hits: int
    uploads: int
    evictions: int
    adapters: dict[str, AdapterStatistics]


class Free:
    """Pages without an owner, the lowest first. Of those that never had one, which may be any number, the first is kept."""

    def __init__(self, pages: int):
        self._end, self._fresh, self._back = pages, 0, []

    def __len__(self) -> int:
        return len(self._back) + self._end - self._fresh

    def __iter__(self) -> Iterator[int]:
        yield from self._back
        yield from range(self._fresh, self._end)

    def lowest(self, count: int) -> int:
        """The last of so many of the lowest."""
        given = len(self._back)
        return self._back[count - 1] if count <= given else self._fresh + count - given - 1

    def take(self) -> int:
        if self._back:
            return self._back.pop(0)
        self._fresh += 1
        return self._fresh - 1

    def put(self, page: int) -> None:
        insort(self._back, page)

    def end_at(self, pages: int) -> None:
        """There are no more than these, of which some may be free."""
        self._back = [page for page in self._back if page < pages]
        self._end = max(pages, self._fresh)


def tensors_of(layers: Iterable[Layer]) -> list[Tensor]:
    return [t for layer in layers for t in (layer.a, layer.b)]


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def resize(layers: Iterable[Layer], pages: int, upload: Any, readers: Collection[Any]) -> None:
    """Gives every pool so many pages and copies those that stay, a tensor at a time: there is never more than the larger of
    the two sizes and one old tensor. On CUDA it happens on the upload stream: what the readers (streams) queue from now on waits
    for it, what they have queued keeps the old tensors alive. Where it fails, the pools done so far are larger than need be."""
    for layer in layers:
        for which in ("a", "b"):
            old, rows = getattr(layer, which), PAGE * pages
            if len(old) == rows:
                continue
            with torch.cuda.stream(upload), torch.no_grad():
                new, kept = old.new_empty(rows, old.shape[1]), min(rows, len(old))
                new[:kept].copy_(old[:kept])
                new[kept:].zero_()
            if upload:
                copied = upload.record_event()
                for stream in readers:
                    stream.wait_event(copied)
                    read_on(stream, [new])
            setattr(layer, which, new)


def read_on(stream: Any, tensors: Iterable[Tensor]) -> None:
    """The allocator gives such a tensor's memory to nobody before the stream has done what it has been given."""
    for t in tensors:
        if t.is_cuda:
            t.record_stream(stream)
