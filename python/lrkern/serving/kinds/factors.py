# SPDX-License-Identifier: Apache-2.0
"""Adapters that are factors: LoRA, rsLoRA and all that can be written as low-rank factors."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...files.check import check_shape, require
from ...files.folder import Config, Sizes, Tensors, by_linear, check_plain, ranks_and_scalings
from ...files.lora_config import MORE, check_base
from ...files.own import classes, either
from ...limits import PAGE
from .kind import FAMILIES, Adapter, Kind


class Factors(NamedTuple):
    """What an adapter adds to one linear: y += scale · (x Aᵀ) Bᵀ."""

    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float


class LowRank(Kind):
    """The rows of A and of Bᵀ in whole pages, zeros past the rank."""

    parts = Mapping  # Factors by linear

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
        size = math.ceil(rank / PAGE)
        require(size <= pool.pages, f"rank {rank} needs {size} pages, the pool has {pool.pages}")
        first = next(iter(parts.values())).scale
        ranks, scales, mine = [0] * len(pool.layers), [first] * len(pool.layers), {}
        for name, f in parts.items():
            layer, r = pool._layers[name], f.a.shape[0]
            most = layer.max_rank
            require(r <= most, f"{name} must have a rank of at most {most} (the pool's max_rank there), got {r}")
            fit = (f.a.shape, f.b.shape) == ((r, layer.whole[0]), (layer.whole[1], r)) and math.isfinite(f.scale)
            require(fit, f"{name} got factors {list(f.a.shape)}, {list(f.b.shape)}, scale {f.scale}")
            ranks[layer.index], scales[layer.index] = r, f.scale
            mine[name] = layer.mine(f.a, "row", pool._rank), layer.mine(f.b.mT, "column", pool._rank)
        facts = torch.tensor(ranks, dtype=torch.int32), torch.tensor(scales)
        adapter = Adapter(self, self._host(mine, PAGE, "factors"), size, facts)
        adapter.rank = rank
        return adapter

    def _check_rank(self, rank: int) -> None:
        most = self.pool.max_rank
        require(1 <= rank <= most, f"rank must lie in 1..{most} (the pool's max_rank), got {rank}")

    def views(self, layer):
        return layer.a.unflatten(0, (-1, PAGE)), layer.b.unflatten(0, (-1, PAGE))

    def batch(self, rows):
        return _Batch(self.pool, rows)


class _Batch:
    """All of them as one multi-LoRA call a layer; the plan is made once for rows that are the same requests'."""

    def __init__(self, pool, rows):
        adapters = list(dict.fromkeys(adapter for row in rows for adapter, _ in row))
        number, K = {adapter: i for i, adapter in enumerate(adapters)}, max(map(len, rows))
        slots = [[(number[a], scale) for a, scale in row] + [(-1, 0.0)] * (K - len(row)) for row in rows]
        M = max(adapter.size for adapter in adapters)
        pages, put = [[adapter.cells + [0] * (M - adapter.size)] for adapter in adapters], pool.to_device
        ranks, scales = (torch.stack(each, 1) for each in zip(*(a.facts for a in adapters), strict=True))  # [layers, A]
        self._pool, self._acts = pool, ranks.any(1).tolist()
        self._index = put(torch.tensor([[i for i, _ in row] for row in slots], dtype=torch.int32))  # [requests, K]
        self._own = put(torch.tensor([[scale for _, scale in row] for row in slots]))
        self._pages, self._ranks = put(torch.tensor(pages, dtype=torch.int32)), put(ranks.unsqueeze(2))
        self._scales, self._alike = put(scales), [tuple(row) for row in scales.tolist()]

    def acts(self, layer):
        return self._acts[layer.index]

    def add(self, y, x, layer, along):
        plan, scales = self._plan(layer, along)
        where = self._pages, self._ranks[layer.index], plan
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


def _lora(config: Config, tensors: Tensors, linears: Sizes) -> dict[str, Factors]:
    """LoRA and rsLoRA (Hu et al., arXiv 2106.09685; arXiv 2312.03732) as PEFT writes them."""
    check_plain(config, ("use_dora", *MORE))
    check_base(config)
    result = {}
    found = by_linear(config, tensors, linears, "lora_A.weight", "lora_B.weight")
    scaled = ranks_and_scalings(config, found)
    for name, (a, b) in found.items():
        (I, O), (r, scaling) = linears[name], scaled[name]
        check_shape(f"{name}.lora_A", a, (r, I))
        check_shape(f"{name}.lora_B", b, (O, r))
        result[name] = Factors(a, b, scaling)
    return result


FAMILIES["LORA"] = _lora
