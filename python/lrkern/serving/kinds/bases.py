# SPDX-License-Identifier: Apache-2.0
"""Adapters of full rank, each two diagonals around every one of many shared bases: RandLoRA."""

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import functional as F
from ...files.check import is_finite, named, require, shown
from ...files.folder import Config, Sizes, Tensors, by_linear, check_plain, linear_of
from ...files.projections import check_trained, projections
from ...functional.projection import Projection, cols_of, rows_of
from ...limits import PAGE
from ...nn import RandLoRALinear
from ..layer import Layer
from ..rows import Along
from .kind import FAMILIES, Adapter, Kind

Pair = tuple[Projection, Projection]  # A [r, smallest side] and B [n r, largest side] of the largest linear, or larger


class Diagonals(NamedTuple):
    """What an adapter adds to one linear: ``functional.randlora_add`` of them and the first rows and columns of the pair."""

    lam: Tensor  # [r, n], n = ceil(min(I, O) / r)
    gam: Tensor  # [n, min(I, O)]
    scale: float
    paper_pairing: bool
    pair: Callable[[], Pair]  # made once the sizes are seen to be right: it may be gigabytes


class Bases(dict[str, Diagonals]):
    """By linear."""


class Stored:
    """A pair on the device, beside the pools, for as long as an adapter refers to it."""

    def __init__(self, pool, pair: Pair):
        # On the stream that waits for the last forward of an adapter which leaves: there the memory is free after it.
        with torch.cuda.stream(pool._upload_stream):
            self.pair = tuple(
                p.detach().to(pool.device, pool.dtype, copy=True) if isinstance(p, Tensor) else p for p in pair
            )

    def equals(self, other: "Stored") -> bool:
        same = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b
        return all(type(a) is type(b) and same(a, b) for a, b in zip(self.pair, other.pair, strict=True))


class Part(NamedTuple):
    """Of an adapter at a linear."""

    r: int
    n: int
    scale: float
    paper_pairing: bool
    stored: Stored


class OverBases(Kind):
    """Γ lies in the rows of the narrower of a linear's two pools and Λ flat in those of the wider, in whole pages."""

    parts = Bases

    def __init__(self, pool):
        super().__init__(pool)
        self.stored: weakref.WeakSet[Stored] = weakref.WeakSet()

    def of_layers(self, layers):
        if not all(isinstance(layer, RandLoRALinear) for layer in layers.values()):
            return None
        of = lambda m: Diagonals(m.randlora_lambda, m.randlora_gamma, m.scaling, m.paper_pairing, m.projections)
        return Bases({name: of(layer) for name, layer in layers.items()})

    def read(self, parts: Mapping[str, Diagonals]) -> Adapter:
        pool, mine, units, size = self.pool, {}, {}, 1
        for name, (lam, gam, scale, *_) in parts.items():
            layer = pool._layers[name]
            require(not layer.split, f"{name} must not be split by parallel for RandLoRA, whose bases are whole")
            (low, high), (r, n) = sorted(layer.whole), lam.shape
            fit = n == math.ceil(low / r) and gam.shape == (n, low) and is_finite(scale)
            require(fit, f"{name} {list(layer.whole)} got {list(lam.shape)}, {list(gam.shape)}, scale {scale}")
            (lam, by_lam), (gam, by_gam) = map(_unit, (lam, gam))
            wide = lam.new_zeros(math.ceil(r * n / high), high)
            wide.view(-1)[: r * n] = lam.flatten()
            mine[name] = (gam, wide) if _narrow_in(layer) else (wide, gam)
            units[name], size = scale * by_lam * by_gam, max(size, *(math.ceil(len(t) / PAGE) for t in (gam, wide)))
        require(size <= pool.pages, f"lambda and gamma need {size} pages, the pool has {pool.pages}")
        host, stored, facts = self._host(mine, PAGE, "lambda and gamma"), {}, {}
        for name, (lam, _, _, paper, pair) in parts.items():
            if pair not in stored:
                stored[pair] = Stored(pool, pair())
            (A, B), (low, high), (r, n) = stored[pair].pair, sorted(pool._layers[name].whole), lam.shape
            least, got = [[r, low], [n * r, high]], [[rows_of(A), cols_of(A)], [rows_of(B), cols_of(B)]]
            enough = got[0][0] == r and got[0][1] >= low and got[1][0] >= n * r and got[1][1] >= high
            require(enough, f"{name} must have bases of at least {least}, got {got}")
            facts[pool._layers[name].index] = Part(r, n, units[name], paper, stored[pair])
        adapter = Adapter(self, host, size, facts)
        adapter.rank = max(part.r for part in facts.values())
        return adapter

    def agree(self, adapter: Adapter) -> None:
        known = {}
        for part in adapter.facts.values():
            if part.stored not in known:
                same = next((s for s in self.stored if s.equals(part.stored)), part.stored)
                known[part.stored] = same
                self.stored.add(same)
        adapter.facts = {i: part._replace(stored=known[part.stored]) for i, part in adapter.facts.items()}

    def views(self, layer):
        return layer.a.unflatten(0, (-1, PAGE)), layer.b.unflatten(0, (-1, PAGE))

    def batch(self, rows):
        return _Batch(self, rows)


def _narrow_in(layer: Layer) -> bool:
    return layer.local[0] <= layer.local[1]


def _unit(t: Tensor) -> tuple[Tensor, float]:
    """t over a power of two, and that: what lies around 1 keeps its digits in float16. Not what is zero or no number."""
    t = t.detach().float()
    most = t.abs().max().item()
    unit = 2.0 ** math.frexp(most)[1] if 0 < most < math.inf else 1.0
    return t / unit, unit


class _Batch:
    """By adapter and scale their requests' rows, gathered: 2 T min(I, O) (I + O) flop for T rows, as for a full matrix of each."""

    def __init__(self, kind: OverBases, rows):
        self._kind, groups = kind, {}
        for i, row in enumerate(rows):
            for slot, (adapter, scale) in enumerate(row):  # who has an adapter twice is in two groups of it
                groups.setdefault((adapter, scale, slot), []).append(i)
        put = kind.pool.to_device
        cells = {adapter: put(torch.tensor(adapter.cells)) for adapter, *_ in groups}
        self._groups = [(adapter, cells[adapter], scale, tuple(own)) for (adapter, scale, _), own in groups.items()]
        self._count = len(rows)

    def acts(self, layer):
        return any(layer.index in adapter.facts for adapter, *_ in self._groups)

    def add(self, y, x, layer, along):
        out = y.contiguous()
        flat, x = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        for adapter, cells, scale, requests in self._groups:
            if (part := adapter.facts.get(layer.index)) is None:
                continue
            rows, mask = self._rows(along, requests)
            mine = (flat, x) if rows is None else (flat[rows], x[rows])
            got = F.randlora_add(
                *mine, *self._operands(layer, part, cells), scale * part.scale, 0.0, False, part.paper_pairing
            )
            got = got.to(flat.dtype)
            if rows is None:
                flat.copy_(torch.where(mask, got, flat))
            else:
                flat[rows] = got
        return out

    def _operands(self, layer: Layer, part: Part, cells: Tensor) -> tuple:
        pools = self._kind.views(layer)
        narrow, wide = pools if _narrow_in(layer) else pools[::-1]
        (low, high), (r, n) = sorted(layer.local), part[:2]
        gam = narrow[cells[: math.ceil(n / PAGE)]].view(-1, low)[:n]
        lam = wide[cells[: math.ceil(r * n / high / PAGE)]].flatten()[: r * n].view(r, n)
        first = lambda p, rows, cols: p[:rows, :cols] if isinstance(p, Tensor) else p._replace(rows=rows, cols=cols)
        A, B = part.stored.pair
        return lam, gam, first(A, r, low), first(B, n * r, high)

    def _rows(self, along: Along, requests: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Of these requests: which rows, or where only the device knows, whether each [T, 1]."""
        made, key = along.owners.made, (self, along.outer, along.inner, requests)
        if key not in made:
            mine = torch.zeros(self._count, 1, dtype=torch.bool)
            mine[list(requests)] = True
            put = self._kind.pool.to_device
            known = along.owners.index is None
            mine = along.spread(mine if known else put(mine))
            made[key] = (put(mine.squeeze(1).nonzero().squeeze(1)), None) if known else (None, mine)
        return made[key]


def _randlora(config: Config, tensors: Tensors, linears: Sizes) -> Bases:
    """RandLoRA (Albert et al., arXiv 2502.00987) as PEFT writes it: with its bases, or drawn again from their key."""
    check_plain(config, ("modules_to_save",))
    alpha, own = config.get("randlora_alpha"), {}
    require(is_finite(alpha), f"randlora_alpha must be a finite number, got {shown(alpha)}")
    for key, t in tensors.items():
        end = next((end for end in ("randlora_A", "randlora_B") if key.endswith(f".{end}")), None)
        if end is None:
            own[key] = t
        elif key != f"base_model.{end}":  # PEFT writes the pair once more for every linear
            whole = tensors.get(f"base_model.{end}")
            same = linear_of(key, (f".{end}",)) in linears and whole is not None and torch.equal(t, whole)
            require(same, f"{named(key)} must be base_model.{end}, which all linears share, got another")
    found = by_linear(config, own, linears, "randlora_lambda", "randlora_gamma")
    sizes = {name: linears[name] for name in found}
    check_trained(config, tensors, sizes)
    most = max(map(max, sizes.values()))  # a pair is no larger than a few linears, whatever a file of kilobytes says
    require(config["r"] <= most, f"r must lie in 1..{most} (the largest side of its linears), got {config['r']}")

    @functools.cache
    def pair() -> Pair:
        A, B = projections(config, tensors, sizes.values())
        return A[:, 0], B.permute(1, 2, 0).flatten(0, 1)  # [r, 1, Min] and [Max, N, r], whose row is j r + k

    scale = alpha / config["r"]
    return Bases({name: Diagonals(lam, gam, scale, False, pair) for name, (lam, gam) in found.items()})


FAMILIES["RANDLORA"] = _randlora
