# SPDX-License-Identifier: Apache-2.0
"""What a kind of adapter is to the pool and to a batch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...nn.linear import AdapterLinear
from ..layer import Layer

if TYPE_CHECKING:
    from ..pool import AdapterPool

# By peft_type, how a config and file become the parts of some kind: (config, tensors by their key in the file, [I, O] of every
# linear of the model by name). It refuses with a ValueError what cannot be served exactly.
FAMILIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, tuple[int, int]]], Any]] = {}

KINDS: list[type["Kind"]] = []  # in the order in which they act on a batch


class Adapter:
    """One adapter's host copy, which never changes, and where on the device it is, which the pool's lock guards."""

    def __init__(self, kind: "Kind", host: dict[int, tuple[Tensor, Tensor]], size: int = 0, facts: Any = None):
        self.kind = kind
        self.host = host  # by layer
        self.size = size  # pages of its own
        self.facts = facts  # what else its kind wants to know
        self.pages: list[int] | None = None  # on the device
        self.cell: int | None = None  # its place where adapters share pages, counted over all of them
        self.users = 0  # forwards that may read them
        self.retired = False  # removed or replaced, but in use
        self.ready: Any = None  # CUDA: the event after its upload
        self.done: dict[Any, Any] = {}  # CUDA: by stream, the event after the last forward that read it


Rows = Sequence[Sequence[tuple[Adapter, float]]]  # per request its adapters and their scales


class Batch:
    """What the adapters of one kind do in one forward."""

    def acts(self, layer: Layer) -> bool:
        raise NotImplementedError

    def add(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """y with what the adapters add to each request's rows, y itself where it can be written."""
        raise NotImplementedError


class Kind:
    """A kind of adapter in one pool. A subclass is a kind of its own, and makes itself known by being one.

    Where not overridden, each adapter has pages of its own.
    """

    parts: ClassVar[type]  # what files become before they become adapters of this kind
    cells = 0  # free places in pages that adapters share

    def __init_subclass__(cls) -> None:
        KINDS.append(cls)

    def __init__(self, pool: "AdapterPool"):
        self.pool = pool

    # ---- reading

    @classmethod
    def of_layers(cls, layers: Mapping[str, AdapterLinear]) -> Any:
        """The parts of these layers of a file of lrkern's own, or None where they are not of this kind."""
        return None

    @staticmethod
    def names(parts: Any) -> Collection[str]:
        """Of the linears that these parts are of."""
        return parts.keys()

    def read(self, parts: Any) -> tuple[Adapter, Any]:
        """Checks everything: the host copy, and what must agree with the other adapters of the pool."""
        raise NotImplementedError

    def agree(self, terms: Any, name: str) -> None:
        """Takes what the first adapter brings, and refuses what differs from it; with the pool's lock held."""

    # ---- the device's pages, with the pool's lock held

    def needs(self, adapters: Collection[Adapter], cells: int = 0) -> int:
        """How many pages these take when they lie as close as they can, beside so many free cells."""
        return sum(adapter.size for adapter in adapters)

    def held(self, adapters: Collection[Adapter]) -> tuple[int, int]:
        """The pages of these, and the cells there that are not theirs."""
        return self.needs(adapters), 0

    def enter(self, adapter: Adapter, free: list[int]) -> None:
        """Takes its room out of the free pages."""
        adapter.pages = free[: adapter.size]
        del free[: adapter.size]

    def leave(self, adapter: Adapter, free: list[int]) -> None:
        free += adapter.pages

    def copies(self, adapter: Adapter, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the layer's pools where the adapter has its room, and what of the host copy belongs there."""
        raise NotImplementedError

    # ---- a forward

    def batch(self, rows: Rows, put: Callable[[Tensor], Tensor]) -> Batch:
        """rows: the adapters of this kind alone; put: makes a copy on the device."""
        raise NotImplementedError
