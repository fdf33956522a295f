# SPDX-License-Identifier: Apache-2.0
"""What a kind of adapter is to the pool and to a batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...files.check import require
from ...files.folder import Config, Sizes, Tensors
from ...nn.linear import AdapterLinear
from ..layer import Layer
from ..saved import Saved, State

if TYPE_CHECKING:
    from ..pool import AdapterPool

# By peft_type, how a config and file become the parts of some kind: It refuses with a ValueError what cannot be served exactly.
FAMILIES: dict[str, Callable[[Config, Tensors, Sizes], Any]] = {}

KINDS: list[type["Kind"]] = []  # the last one that takes parts gets them


class Adapter:
    """One adapter's host copy, which never changes, and where on the device it is, which the pool's lock guards."""

    def __init__(self, kind: "Kind", host: dict[int, list[Tensor]], size: int, facts: Any):
        self.kind = kind
        self.host = host  # by layer, what belongs into the kind's views: tensors [cells, ...]
        self.size = size  # cells
        self.facts = facts  # what else its kind wants to know
        self.saved: dict[str, Saved] = {}  # modules that it has copies of
        self.held: dict[str, State] = {}  # those on the device, while it is there
        self.cells: list[int] | None = None  # on the device, counted over all pages
        self.users = 0  # forwards that may read them
        self.retired = False  # removed or replaced, but in use
        self.rank = 0  # the largest of its layers
        self.hits = self.uploads = 0
        self.ready: Any = None  # CUDA: the event after its upload
        self.done: dict[Any, Any] = {}  # CUDA: by stream, the event after the last forward that read it
        self.fixed = ""  # what of it is not in proportion to a scale, so that a request's must be 1

    @property
    def pages(self) -> list[int] | None:
        return self.cells and [cell // self.kind.per_page for cell in self.cells]


Rows = Sequence[Sequence[tuple[Adapter, float]]]  # per request its adapters and their scales


class Kind:
    """A kind of adapter in one pool. A subclass is a kind, and makes itself known by being one.

    An adapter has cells, of which a page holds ``per_page``, each an equal part of the page's 16 rows in every linear's pools.

    read(parts): the adapter, everything checked.
    views(layer): of its pools what the cells hold, a tensor [cells, rows, n] for each of the host copy.
    batch(rows): what the adapters in rows, all of this kind, do in one forward. ``acts(layer)`` says whether they do anything
        there, ``add(y, x, layer, along)`` gives y with what they add to each request's rows, which along tells of x's, y itself
        where it can be written.
    """

    parts: ClassVar[type]  # what files become before they become adapters of this kind; keys() are linears
    read: Callable[[Any], Adapter]
    views: Callable[[Layer], tuple[Tensor, ...]]
    batch: Callable[[Rows], Any]
    per_page = 1

    def __init_subclass__(cls) -> None:
        KINDS.append(cls)

    def __init__(self, pool: "AdapterPool"):
        self.pool = pool
        self.order: tuple[int, ...] = (KINDS.index(type(self)),)  # in which kinds act on a batch
        self.open: dict[int, list[int]] = {}  # by page that has room for more, its free cells

    def of_layers(self, layers: Mapping[str, AdapterLinear]) -> Any:
        """The parts of these layers of a file of lrkern's own, or None where they are not of this kind."""
        return None

    def agree(self, adapter: Adapter) -> None:
        """Shares with the pool's other adapters what this one brings and they have too; with the lock held."""

    def _host(self, parts: Mapping[str, Sequence[Tensor]], rows: int, what: str) -> dict[int, list[Tensor]]:
        """By layer copies [cells, rows, n] of tensors [R, n] of each linear, zeros past R, all in one block of memory."""
        pool, at, host = self.pool, 0, {}
        shapes = {name: [(math.ceil(len(t) / rows), rows, t.shape[1]) for t in each] for name, each in parts.items()}
        count = sum(math.prod(shape) for each in shapes.values() for shape in each)
        block = torch.zeros(count, dtype=pool.dtype, pin_memory=pool._upload_stream is not None)
        for name, each in parts.items():
            copies = host[pool._layers[name].index] = []
            for t, shape in zip(each, shapes[name], strict=True):
                copy = block[at : at + math.prod(shape)].view(shape)
                copy.flatten(0, 1)[: len(t)].copy_(t.detach())
                finite = copy.isfinite().all()
                require(finite, f"{name} must have finite {what} in {pool.dtype}, got inf or nan")
                at += copy.numel()
                copies.append(copy)
        return host
