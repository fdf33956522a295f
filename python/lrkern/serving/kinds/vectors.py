# SPDX-License-Identifier: Apache-2.0
"""Adapters that are vectors over one pair of projections, which all of a pool share: VeRA."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...files.folder import check_shape
from ...files.projections import projections
from ...functional.projection import Basis, Projection, project
from ...limits import PAGE
from .kind import FAMILIES, Adapter, Batch, Kind
from .read import by_linear, plain


class Vectors(NamedTuple):
    """What an adapter adds to one linear where a pair of projections is shared: y += b ⊙ ((d ⊙ (x Aᵀ)) B)."""

    d: Tensor  # [r]
    b: Tensor  # [O]


class Shared(NamedTuple):
    """Adapters of vectors. All of a pool have the same pair, of which a linear takes the first columns."""

    a: Projection  # [r, largest I]
    b: Projection  # [r, largest O]
    vectors: dict[str, Vectors]  # by linear


class Pair(NamedTuple):
    """The projections that all vectors of a pool share, as the first such adapter brought them."""

    a: Projection
    b: Projection
    r: int
    per_page: int  # adapters


def _sizes(p: Projection) -> list[int]:
    return [p.rows, p.cols] if isinstance(p, Basis) else list(p.shape)


class OverPair(Kind):
    """Each adapter has a cell, an equal part of a page, in which d and b lie from the start. The pair lies beside the pools."""

    parts = Shared

    def __init__(self, pool):
        super().__init__(pool)
        self.pair: Pair | None = None  # once there is, it stays
        self.pairs: list[tuple[Projection, Projection]] = []  # by layer, A [r, I] and B [r, O]
        self.open: dict[int, list[int]] = {}  # by page that has room for more, its free cells

    @classmethod
    def of_layers(cls, layers):
        pairs = {layer.shared_pair() for layer in layers.values()}
        if len(pairs) != 1 or None in pairs:
            return None
        vectors = {name: Vectors(*layer.coefficients().values()) for name, layer in layers.items()}
        return Shared(*pairs.pop(), vectors)

    @staticmethod
    def names(parts):
        return parts.vectors.keys()

    def read(self, parts: Shared) -> tuple[Adapter, Pair]:
        pool, layers = self.pool, self.pool._layers
        (r, i), (r_b, o) = map(_sizes, parts[:2])
        room = PAGE * min(layer.local[0] for layer in layers.values())
        if r != r_b or not 1 <= r <= room:
            raise ValueError(
                f"rank must lie in 1..{room} (what a page holds of the narrowest linear), got {r} and {r_b}"
            )
        host: dict[int, tuple[Tensor, Tensor]] = {}
        for name, (d, b) in parts.vectors.items():
            layer = layers[name]
            if d.shape != (r,) or b.shape != layer.whole[1:] or i < layer.whole[0] or o < layer.whole[1]:
                raise ValueError(
                    f"{name} {list(layer.whole)} got vectors {list(d.shape)} and {list(b.shape)} of projections "
                    f"{[r, i]} and {[r_b, o]}"
                )
            both = torch.cat([d.detach().cpu(), layer.mine(b.detach(), "column", pool._rank).cpu()]).to(pool.dtype)
            if not both.isfinite().all():
                raise ValueError(f"{name} must have finite vectors in {pool.dtype}, got inf or nan")
            host[layer.index] = tuple((both.pin_memory() if pool._upload_stream else both).split([r, len(both) - r]))
        per_page = PAGE
        while per_page * r > room:
            per_page //= 2
        return Adapter(self, host), Pair(parts.a, parts.b, r, per_page)

    def agree(self, terms: Pair, name: str) -> None:
        if self.pair is None:
            self._take(terms)
            return
        sizes = [[_sizes(p) for p in pair[:2]] for pair in (self.pair, terms)]
        must = f"lrkern.serving: adapter {name!r}: its projections must be the pool's"
        if sizes[0] != sizes[1]:
            raise ValueError(f"{must}, of shapes {sizes[0]}, got {sizes[1]}; the pool is unchanged")
        for x, a, b in zip("AB", self.pair[:2], terms[:2], strict=True):
            if type(a) is not type(b) or not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
                raise ValueError(
                    f"{must}, which the first such adapter brought, got another {x} (of another projection_prng_key?); the "
                    "pool is unchanged"
                )

    def _take(self, pair: Pair) -> None:
        pool, layers = self.pool, self.pool._layers.values()
        whole = [p.detach().clone() if isinstance(p, Tensor) else p for p in pair[:2]]
        self.pair = Pair(*whole, *pair[2:])
        if any(layer.split for layer in layers):  # a Basis has no columns in the middle
            whole = [p.fill(torch.empty(0)) if isinstance(p, Basis) else p for p in whole]
        whole = [p.to(pool.device, pool.dtype) if isinstance(p, Tensor) else p for p in whole]
        self.pairs = [
            tuple(
                p._replace(cols=n) if isinstance(p, Basis) else layer.mine(p, which, pool._rank)
                for p, n, which in zip(whole, layer.local, ("row", "column"), strict=True)
            )
            for layer in layers
        ]

    # ---- room

    @property
    def cells(self) -> int:
        return sum(map(len, self.open.values()))

    def needs(self, adapters, cells=0):
        more = len(adapters) - cells
        return math.ceil(more / self.pair.per_page) if more > 0 else 0

    def held(self, adapters):
        pages = {adapter.pages[0] for adapter in adapters}
        return len(pages), len(pages) * self.pair.per_page - len(adapters)

    def enter(self, adapter, free):
        n = self.pair.per_page
        if not self.open:
            page = free.pop(0)
            self.open[page] = list(range(n * page, n * (page + 1)))
        page, cells = next(iter(self.open.items()))
        adapter.pages, adapter.cell = [page], cells.pop(0)
        if not cells:
            del self.open[page]

    def leave(self, adapter, free):
        (page,) = adapter.pages
        cells = self.open.setdefault(page, [])
        cells.append(adapter.cell)
        if len(cells) == self.pair.per_page:
            del self.open[page]
            free.append(page)

    def views(self, layer) -> tuple[Tensor, Tensor]:
        """d [cells, r] and b [cells, O], views of the layer's pools."""
        rows, O = PAGE // self.pair.per_page, layer.local[1]
        return layer.a.view(-1, rows * layer.a.shape[1])[:, : self.pair.r], layer.b.view(-1, rows * O)[:, :O]

    def copies(self, adapter, layer):
        for cells, host in zip(self.views(layer), adapter.host[layer.index], strict=True):
            yield cells[adapter.cell], host

    def batch(self, rows, put):
        return _Batch(self, rows, put)


class _Batch(Batch):
    """One pair of GEMMs a layer for all requests, each with its own d and b."""

    def __init__(self, kind: OverPair, rows, put):
        self._kind, self._put, self._requests = kind, put, len(rows)
        self._parts = [(i, adapter, scale) for i, row in enumerate(rows) for adapter, scale in row]
        self._rounds: dict[tuple, list[tuple[Tensor | None, Tensor, Tensor]]] = {}

    def acts(self, layer):
        return bool(self._rounds_of(layer))

    def _rounds_of(self, layer) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """Requests (None: all of them), cells of their vectors and scales [n, 1], as often as a request has several."""
        here = tuple(i for i, (_, adapter, _) in enumerate(self._parts) if layer.index in adapter.host)
        if here not in self._rounds:
            rounds: list[dict[int, tuple[int, float]]] = []
            for i in here:
                request, adapter, scale = self._parts[i]
                free = next((r for r in rounds if request not in r), None)
                if free is None:
                    rounds.append(free := {})
                free[request] = adapter.cell, scale
            self._rounds[here] = [
                (
                    None if len(r) == self._requests else self._put(torch.tensor(list(r))),
                    self._put(torch.tensor([cell for cell, _ in r.values()])),
                    self._put(torch.tensor([[scale] for _, scale in r.values()])),
                )
                for r in rounds
            ]
        return self._rounds[here]

    def add(self, y, x, layer):
        out, (A, B) = y.contiguous(), self._kind.pairs[layer.index]
        d_of, b_of = self._kind.views(layer)
        x, y = (t.reshape(self._requests, -1, t.shape[-1]) for t in (x, out))
        with torch.autocast(x.device.type, enabled=False):
            for rows, cells, scales in self._rounds_of(layer):
                u = project(x if rows is None else x[rows], A, transposed=True)
                if layer.split == "row":
                    torch.distributed.all_reduce(u, group=self._kind.pool.group)
                v = u * (d_of[cells] * scales)[:, None]
                w = (project(v, B) * b_of[cells][:, None]).to(y.dtype)
                if rows is None:
                    y += w
                else:
                    y.index_add_(0, rows, w)
        return out


def _vera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]]) -> Shared:
    """VeRA (Kopiczko et al., arXiv 2310.11454) as PEFT writes it: with its projections, or drawn again from their key."""
    plain(config, ("modules_to_save",))
    own = {k: t for k, t in tensors.items() if k not in ("base_model.vera_A", "base_model.vera_B")}
    found = by_linear(config, own, linears, "vera_lambda_d", "vera_lambda_b")
    A, B = projections(config, tensors, [linears[name] for name in found])
    for name, (d, b) in found.items():
        check_shape(f"{name}.vera_lambda_d", d, (config["r"],))
        check_shape(f"{name}.vera_lambda_b", b, linears[name][1:])
    return Shared(A, B.mT, {name: Vectors(*vectors) for name, vectors in found.items()})


FAMILIES["VERA"] = _vera
