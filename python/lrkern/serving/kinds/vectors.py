# SPDX-License-Identifier: Apache-2.0
"""Adapters that are vectors over a pair of projections, which many of a pool share: VeRA."""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...files.check import require
from ...files.folder import Config, Sizes, Tensors, by_linear, check_plain
from ...files.projections import check_trained, pair_shapes, projections
from ...functional.projection import Basis, Projection, cols_of, project, rows_of
from ...limits import PAGE
from .kind import FAMILIES, Adapter, Kind


class Vectors(NamedTuple):
    """What an adapter adds to one linear where a pair of projections is shared: y += b ⊙ ((d ⊙ (x Aᵀ)) B)."""

    d: Tensor  # [r]
    b: Tensor  # [O]


class Drawn(NamedTuple):
    """A projection that is made once its shape is seen to be right: it may be gigabytes, of a file of kilobytes."""

    rows: int
    cols: int
    make: Callable[[], Tensor]


class Shared(NamedTuple):
    """An adapter of vectors. All that have an equal pair share it; a linear takes its first columns."""

    a: Projection | Drawn  # [r, largest I]
    b: Projection | Drawn  # [r, largest O]
    vectors: dict[str, Vectors]  # by linear

    def keys(self) -> Iterable[str]:
        return self.vectors.keys()


Pair = tuple[Projection, Projection]  # A [r, I] and B [r, O]


class OverPair(Kind):
    """Each adapter has a cell, an equal part of a page, in which d and b lie from the start.

    The pool's own is without a pair: it reads adapters, and knows for each pair, as long as an adapter of it lives, the one that
    they lie in, with pages and a place in a batch of its own. A pair lies beside the pools.
    """

    parts = Shared
    _numbers = itertools.count(1)

    def __init__(self, pool, pair: Pair | None = None):
        super().__init__(pool)
        linears = [layer for layer in pool._layers.values() if not layer.embeds]
        self.room = PAGE * min((layer.local[0] for layer in linears), default=0)  # of a page of the narrowest A
        self.over: weakref.WeakSet[OverPair] = weakref.WeakSet()
        if pair is not None:
            self.order = *self.order, next(self._numbers)
            self._take(pair)

    def of_layers(self, layers):
        pairs = {layer.shared_pair() for layer in layers.values()}
        if len(pairs) != 1 or None in pairs:
            return None
        vectors = {name: Vectors(*layer.coefficients().values()) for name, layer in layers.items()}
        return Shared(*pairs.pop(), vectors)

    def read(self, parts: Shared) -> Adapter:
        pool, layers = self.pool, self.pool._layers
        (r, i), (r_b, o) = ((rows_of(p), cols_of(p)) for p in parts[:2])
        most = f"{self.room} (what a page holds of the narrowest linear)"
        require(r == r_b and 1 <= r <= self.room, f"rank must lie in 1..{most}, got {r} and {r_b}")
        mine = {}
        for name, (d, b) in parts.vectors.items():
            layer = layers[name]
            require(not layer.embeds, f"{name} must be a linear, got an embedding")
            fit = d.shape == (r,) and b.shape == layer.whole[1:] and i >= layer.whole[0] and o >= layer.whole[1]
            got = f"vectors {list(d.shape)} and {list(b.shape)} of projections {[r, i]} and {[r_b, o]}"
            require(fit, f"{name} {list(layer.whole)} got {got}")
            mine[name] = d[None], layer.mine(b, "column", pool._rank)[None]
        host = self._host(mine, 1, "vectors")
        pair = tuple(p.make() if isinstance(p, Drawn) else p for p in parts[:2])
        adapter = Adapter(self, host, 1, pair)
        adapter.rank = r
        return adapter

    def agree(self, adapter: Adapter) -> None:
        pair, adapter.facts = adapter.facts, None
        over = next((over for over in self.over if over.has(pair)), None) or OverPair(self.pool, pair)
        self.over.add(over)
        adapter.kind = over

    def has(self, pair: Pair) -> bool:
        same = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b
        return all(type(a) is type(b) and same(a, b) for a, b in zip(self.pair, pair, strict=True))

    def _take(self, pair: Pair) -> None:
        pool, layers = self.pool, self.pool._layers.values()
        self.pair = whole = tuple(p.detach().clone() if isinstance(p, Tensor) else p for p in pair)
        self.r, self.per_page = rows_of(whole[0]), PAGE
        while self.per_page * self.r > self.room:
            self.per_page //= 2
        if any(layer.split for layer in layers):  # a Basis has no columns in the middle
            whole = [p.fill(torch.empty(0)) if isinstance(p, Basis) else p for p in whole]
        # On the stream that waits for the last forward of an adapter which leaves: there the memory is free after it.
        with torch.cuda.stream(pool._upload_stream):
            whole = [p.to(pool.device, pool.dtype) if isinstance(p, Tensor) else p for p in whole]
        self.pairs = [  # of it what each layer takes
            tuple(
                p._replace(cols=n) if isinstance(p, Basis) else layer.mine(p, which, pool._rank)
                for p, n, which in zip(whole, layer.local, ("row", "column"), strict=True)
            )
            for layer in layers  # an embedding's are never read
        ]

    def views(self, layer):
        rows, (I, O) = PAGE // self.per_page, layer.local
        return layer.a.view(-1, 1, rows * I)[..., : self.r], layer.b.view(-1, 1, rows * O)[..., :O]

    def batch(self, rows):
        return _Batch(self, rows)


class _Batch:
    """One pair of GEMMs a layer for all requests, each with its own d and b."""

    def __init__(self, kind: OverPair, rows):
        self._kind, self._requests = kind, len(rows)
        self._parts = [(i, adapter, scale) for i, row in enumerate(rows) for adapter, scale in row]
        self._rounds: dict[tuple, list[tuple[Tensor | None, Tensor, Tensor]]] = {}

    def acts(self, layer):
        return bool(self._rounds_of(layer))

    def _rounds_of(self, layer) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """Requests (None: all of them), cells of their vectors and scales [n, 1, 1], as often as a request has several."""
        here = tuple(i for i, (_, adapter, _) in enumerate(self._parts) if layer.index in adapter.host)
        if here not in self._rounds:
            rounds: list[dict[int, tuple[int, float]]] = []
            for i in here:
                request, adapter, scale = self._parts[i]
                free = next((r for r in rounds if request not in r), None)
                if free is None:
                    rounds.append(free := {})
                free[request] = adapter.cells[0], scale
            put = self._kind.pool.to_device
            self._rounds[here] = [
                (
                    None if len(r) == self._requests else put(torch.tensor(list(r))),
                    put(torch.tensor([cell for cell, _ in r.values()])),
                    put(torch.tensor([[[scale]] for _, scale in r.values()])),
                )
                for r in rounds
            ]
        return self._rounds[here]

    def add(self, y, x, layer, along):
        out, (A, B) = y.contiguous(), self._kind.pairs[layer.index]
        d_of, b_of = self._kind.views(layer)
        together = along.outer == 1 and along.owners.index is None
        blocks = self._requests if together else x.shape[:-1].numel()
        x, y = (t.reshape(blocks, -1, t.shape[-1]) for t in (x, out))
        with torch.autocast(x.device.type, enabled=False):
            for rows, cells, scales in self._rounds_of(layer):
                mine = None
                if not together:
                    mine, cells, scales = self._by_row(along, rows, cells, scales)
                    rows = None
                u = project(x if rows is None else x[rows], A, transposed=True)
                if layer.split == "row":
                    torch.distributed.all_reduce(u, group=self._kind.pool.group)
                d, b = d_of[cells], b_of[cells]
                if b.dtype == torch.float16:  # scale and d together may leave its range, where b brings them back
                    b = b * scales
                else:
                    d = d * scales
                w = (project(u * d, B) * b).to(y.dtype)
                if mine is not None:
                    y.copy_(torch.where(mine, y + w, y))
                elif rows is None:
                    y += w
                else:
                    y.index_add_(0, rows, w)
        return out

    def _by_row(self, along, rows, cells, scales) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a row takes part [T, 1, 1], its cell [T] and its scale [T, 1, 1]."""
        whole = slice(None) if rows is None else rows
        mine, cell = cells.new_zeros(self._requests, 1, 1), cells.new_zeros(self._requests)
        scale = scales.new_zeros(self._requests, 1, 1)
        mine[whole], cell[whole], scale[whole] = 1, cells, scales
        return along.spread(mine).bool(), along.spread(cell), along.spread(scale)


def _vera(config: Config, tensors: Tensors, linears: Sizes) -> Shared:
    """VeRA (Kopiczko et al., arXiv 2310.11454) as PEFT writes it: with its projections, or drawn again from their key."""
    check_plain(config, ())
    own = {k: t for k, t in tensors.items() if k not in ("base_model.vera_A", "base_model.vera_B")}
    found = by_linear(config, own, linears, "vera_lambda_d", "vera_lambda_b")
    sizes = {name: linears[name] for name in found}
    check_trained(config, tensors, sizes)
    r, most = config["r"], PAGE * min(I for I, _ in sizes.values())
    require(r <= most, f"rank must lie in 1..{most}, got {r}")  # what no pool takes, before a pair of it is drawn
    a, b = pair_shapes("VERA", r, sizes.values())
    pair = functools.cache(lambda: projections(config, tensors, sizes.values()))
    A, B = Drawn(*a, lambda: pair()[0]), Drawn(*b[::-1], lambda: pair()[1].mT)
    return Shared(A, B, {name: Vectors(*vectors) for name, vectors in found.items()})


FAMILIES["VERA"] = _vera
