# SPDX-License-Identifier: Apache-2.0
"""Adapters that are factors: LoRA, rsLoRA and all that can be written as low-rank factors, and what DoRA and biases add."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import functional as F
from ... import ops
from ...files.check import check_shape, named, require
from ...files.own import classes, either
from ...limits import PAGE
from .kind import Adapter, Kind


class Factors(NamedTuple):
    """What an adapter adds to one linear: y += scale · ((x Aᵀ) Bᵀ + bias). Where it has a magnitude (DoRA), y less the linear's
    own bias, and what is added, are then multiplied by c = magnitude / ‖W + scale · B A‖ of each row."""

    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float
    bias: Tensor | None = None  # [O]
    magnitude: Tensor | None = None  # [O]


class Facts(NamedTuple):
    """Of an adapter, by layer of the pool."""

    ranks: Tensor  # int32
    scales: Tensor
    bends: list[bool]  # whether it has a gain and a shift there
    pages: int  # of its factors, the first of its cells; gain and shift are the last rows of its last


class LowRank(Kind):
    """The rows of A and of c ⊙ Bᵀ in whole pages, zeros past the rank. Adapters with a magnitude or biases take two rows of B's
    pool more: the gain c - 1 and a shift, y += gain ⊙ (x Wᵀ) + shift."""

    parts = Mapping  # Factors by linear, maybe with ``biases`` by module (``lora.Lora``)

    def of_layers(self, layers):
        for name, layer in layers.items():
            must = either(cls for cls in classes() if cls.has_factors())
            got = type(layer).__name__ + (layer._settings_repr() if layer.has_factors() else "")
            require(layer.low_rank, f"{name} must be {must}, got {got}, which {layer.FULL}")
            self._check_rank(layer.lora_rank)  # before factors of any size are made
        return {name: Factors(*layer.factors()) for name, layer in layers.items()}

    def read(self, parts: Mapping[str, Factors]) -> Adapter:
        pool = self.pool
        rank = max(f.a.shape[0] for f in parts.values())
        self._check_rank(rank)
        for name, f in parts.items():
            (I, O), r, most = pool._layers[name].whole, f.a.shape[0], pool._layers[name].max_rank
            require(r <= most, f"{name} must have a rank of at most {most} (the pool's max_rank there), got {r}")
            fit = (f.a.shape, f.b.shape) == ((r, I), (O, r)) and math.isfinite(f.scale)
            require(fit, f"{name} got factors {list(f.a.shape)}, {list(f.b.shape)}, scale {f.scale}")
            for key, t in (("bias", f.bias), ("magnitude", f.magnitude)):
                if t is not None:
                    check_shape(f"{name}'s {key}", t, (O,))
        trained = self._trained(getattr(parts, "biases", {}))
        dora = any(f.magnitude is not None for f in parts.values())
        size = math.ceil((rank + 2 * (dora or bool(trained) or any(f.bias is not None for f in parts.values()))) / PAGE)
        require(size <= pool.pages, f"rank {rank} needs {size} pages, the pool has {pool.pages}")

        first, count = next(iter(parts.values())), len(pool.layers)
        ranks, scales, bends, mine = [0] * count, [first.scale] * count, [False] * count, {}
        for name in dict.fromkeys((*parts, *trained)):
            layer = pool._layers[name]
            f = parts.get(name) or Factors(
                first.a.new_empty(0, layer.whole[0]), first.b.new_empty(layer.whole[1], 0), 1.0
            )
            a, b, vectors = self._mine(layer, f, trained.get(name))
            if vectors is not None:
                b = torch.cat([b, b.new_zeros(PAGE * size - len(b) - 2, b.shape[1]), vectors])
            ranks[layer.index], scales[layer.index], bends[layer.index] = len(a), f.scale, vectors is not None
            mine[name] = a, b
        facts = Facts(torch.tensor(ranks, dtype=torch.int32), torch.tensor(scales), bends, math.ceil(rank / PAGE))
        adapter = Adapter(self, self._host(mine, PAGE, "factors"), size, facts)
        adapter.rank = rank
        if dora:
            adapter.fixed = "DoRA, whose norm its scale is part of: load it with another lora_alpha"
        elif trained:
            adapter.fixed = "biases in place of the model's, which no scale multiplies"
        return adapter

    def _check_rank(self, rank: int) -> None:
        most = self.pool.max_rank
        require(1 <= rank <= most, f"rank must lie in 1..{most} (the pool's max_rank), got {rank}")

    def _trained(self, biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By linear what these are more than the model's own, where they are."""
        found, pool = {}, self.pool
        for name, bias in biases.items():
            own, layer = pool.tensor_of(f"{name}.bias"), pool._layers.get(name)
            require(own is not None, f"{named(name)}.bias must be one of the model's, which has none there")
            bias = bias if layer is None else layer.mine(bias, "column", pool._rank)
            require(bias.shape == own.shape, f"{name}.bias must have shape {list(own.shape)}, got {list(bias.shape)}")
            bias = bias.to(own.device)
            if torch.equal(bias.to(own.dtype), own):
                continue
            why = "only linears among the pool's targets can have one of their own"
            out = "name it there if it is one, train with bias='lora_only', or merge the adapter"
            require(layer is not None, f"{name}.bias must be the model's, got another: {why} ({out})")
            found[name] = (bias.float() - own.float()).cpu()
        return found

    def _mine(self, layer, f: Factors, trained: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's rows of A, of c ⊙ Bᵀ, and gain and shift [2, O] where there are any."""
        rank = self.pool._rank
        a, b = layer.mine(f.a, "row", rank), layer.mine(f.b.mT, "column", rank)
        if trained is None and f.bias is None and f.magnitude is None:
            return a, b, None
        b, vectors = b.cpu(), torch.zeros(2, b.shape[1])
        gain, shift = vectors
        if f.bias is not None:
            shift += f.scale * layer.mine(f.bias.cpu(), "column", rank)
        if f.magnitude is not None:
            w = layer.weight()
            norm = F.dora_norm(w, f.a.to(w.device), b.mT.to(w.device), f.scale)
            c = (layer.mine(f.magnitude.to(w.device, torch.float32), "column", rank) / norm).cpu()
            sound = "finite magnitudes, and rows of W + scale · B A with a finite norm above 0"
            require(
                c.isfinite().all(), f"{layer.name} must have {sound}, got {int((~c.isfinite()).sum())} that are not so"
            )
            gain += c - 1
            shift *= c
            b = c * b.float()
        if trained is not None:
            shift += trained
        return a, b, vectors

    def views(self, layer):
        return layer.a.unflatten(0, (-1, PAGE)), layer.b.unflatten(0, (-1, PAGE))

    def batch(self, rows):
        return _Batch(self.pool, rows)


class _Batch:
    """All of them as one multi-LoRA call a layer; the plan is made once for rows that are the same requests'. It is the first
    of a batch's kinds to act: gains are of the base's y."""

    def __init__(self, pool, rows):
        adapters = list(dict.fromkeys(adapter for row in rows for adapter, _ in row))
        number, K = {adapter: i for i, adapter in enumerate(adapters)}, max(map(len, rows))
        slots = [[(number[a], scale) for a, scale in row] + [(-1, 0.0)] * (K - len(row)) for row in rows]
        M = max(adapter.facts.pages for adapter in adapters)
        pages = [[(adapter.cells[: adapter.facts.pages] + [0] * M)[:M]] for adapter in adapters]
        stacked = lambda of: torch.stack([getattr(adapter.facts, of) for adapter in adapters], 1)  # [layers, A]
        ranks, scales = map(stacked, ("ranks", "scales"))
        put = pool.to_device
        self._pool, self._rows = pool, rows
        self._adds = ranks.any(1).tolist()
        bent = [adapter for adapter in adapters if any(adapter.facts.bends)]
        self._bends = [tuple(adapter for adapter in bent if adapter.facts.bends[i]) for i in range(len(self._adds))]
        self._index = put(torch.tensor([[i for i, _ in row] for row in slots], dtype=torch.int32))  # [requests, K]
        self._own = put(torch.tensor([[scale for _, scale in row] for row in slots]))
        self._pages, self._ranks = put(torch.tensor(pages, dtype=torch.int32)), put(ranks.unsqueeze(2))
        self._scales, self._alike = put(scales), [tuple(row) for row in scales.tolist()]
        self._bending: dict[tuple, tuple[Tensor, ...]] = {}

    def acts(self, layer):
        return bool(self._adds[layer.index] or self._bends[layer.index])

    def add(self, y, x, layer, along):
        if self._bends[layer.index]:
            y = self._bend(y, layer, along)
        return self._add(y, x, layer, along) if self._adds[layer.index] else y

    def _add(self, y, x, layer, along):
        plan, scales = self._plan(layer, along)
        where = self._pages, self._ranks[layer.index], plan
        if layer.embeds:
            s = ops.multi_lora_embedding(x.squeeze(-1), layer.a, *where, scales)
        else:
            s = ops.multi_lora_shrink(x, layer.a, *where, scales)
        if layer.split == "row":
            torch.distributed.all_reduce(s, group=self._pool.group)
        if not y.is_contiguous():
            return ops.multi_lora_expand(y, s, layer.b, *where)
        ops.multi_lora_expand_(y, s, layer.b, *where)
        return y

    def _plan(self, layer, along) -> tuple[Tensor, Tensor]:
        """The plan of x's rows and their scales [T, K]."""
        made, key = along.owners.made, (self, along.outer, along.inner)
        if key not in made:
            made[key] = ops.multi_lora_plan(along.spread(self._index, -1), len(self._pages))
        alike = *key, self._alike[layer.index]
        if alike not in made:
            scales = self._own * self._scales[layer.index][self._index.clamp_min(0)]
            made[alike] = along.spread(scales)
        return made[key], made[alike]

    def _bend(self, y, layer, along):
        """y + gain ⊙ (y - bias) + shift in fp32, rounded once, in the rows of those that have them."""
        requests, cells, scales = self._bending_at(self._bends[layer.index])
        vectors = layer.b.unflatten(0, (-1, PAGE))[cells, -2:].float()  # [n, K, 2, O]
        gain, shift = torch.where(scales != 0, scales * vectors, 0.0).sum(1).unbind(1)  # [n, O]
        bias = getattr(layer.module, "bias", None)

        def bent(t, gain, shift):
            wide = t.float()
            base = wide if bias is None else wide - bias.float()
            return torch.addcmul(wide, gain, base).add_(shift).to(t.dtype)

        out = y.contiguous()
        if along.outer == 1 and along.owners.index is None:
            mine = out.view(len(self._rows), -1, out.shape[-1])
            mine[requests] = bent(mine[requests], gain[:, None], shift[:, None])
        else:
            at = torch.full((len(self._rows),), -1, device=out.device)
            at[requests] = torch.arange(len(requests), device=out.device)
            at, flat = along.spread(at, -1), out.view(-1, out.shape[-1])
            flat.copy_(torch.where(at[:, None] >= 0, bent(flat, gain[at], shift[at]), flat))
        return out

    def _bending_at(self, adapters: tuple[Adapter, ...]) -> tuple[Tensor, ...]:
        """The requests that have some of these, n of them, and of each the pages of their gains and shifts [n, K] and their
        scales [n, K, 1, 1]."""
        if adapters not in self._bending:
            each = [[(adapter.cells[-1], scale) for adapter, scale in row if adapter in adapters] for row in self._rows]
            requests = [i for i, row in enumerate(each) if row]
            K, put = max(map(len, each)), self._pool.to_device
            slots = [each[i] + [(0, 0.0)] * (K - len(each[i])) for i in requests]
            cells, scales = (torch.tensor([[slot[j] for slot in row] for row in slots]) for j in (0, 1))
            self._bending[adapters] = put(torch.tensor(requests)), put(cells), put(scales[..., None, None])
        return self._bending[adapters]
