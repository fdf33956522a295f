# SPDX-License-Identifier: Apache-2.0
"""ResLoRA: LoRA with shortcuts from the layers before."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import ops
from ...functional.base import added
from ...functional.lora import dropout_of
from ...limits import MAX_RANK
from ...ops.dispatch import is_compiling
from ..linear import AdapterLinear, Method
from .merged import FixedWhenMerged
from .place import place_of, refuse_places
from .rank import Variant, kaiming, trained

MODES = ("bs", "is", "ms")


class ResLoRALinear(FixedWhenMerged, Variant):
    """y = x Wᵀ + bias + what the layer's own pair and those of earlier layers give: ResLoRA (Shi et al., arXiv 2402.18039).

    Earlier layers are those of the same name with a smaller index (``layers.3.q_proj`` before ``layers.4.q_proj``) and of equal sizes;
    for layer ℓ, with scaling = lora_alpha / r, u = dropout(x), and j from 1 to ``before``:

        mode "bs", block shortcut     scaling · (u_ℓ A_ℓᵀ B_ℓᵀ + Σⱼ u_ℓ A_ℓ₋ⱼᵀ B_ℓ₋ⱼᵀ)
        mode "is", input shortcut     scaling · (u_ℓ + u_ℓ₋₁) A_ℓᵀ B_ℓᵀ
        mode "ms", middle shortcut    scaling · (u_ℓ A_ℓᵀ + Σⱼ u_ℓ₋ⱼ A_ℓ₋ⱼᵀ) B_ℓᵀ

    lora_A [r, in] starts as kaiming_uniform, lora_B [out, r] as zero: the layers start as the base. Both train, of a layer by its own
    y and by those of later layers. pre: how many earlier layers, -1 for all there are; "is" has one. before: how many of them this
    layer has, which ``plan`` counts and ``connect`` ties; a layer that has some and is not tied to them refuses its forward. The first
    layer of "is" computes u Aᵀ Bᵀ; the authors' code gives it 2 u. Dropout is drawn once for an input, wherever that goes.

    "bs" is exactly a LoRA of rank (before + 1) r. "is" and "ms" depend on the inputs of other layers: no merge, no LoRA (the paper
    merges approximately, by ratios of norms, which is not offered). They hand on [..., r] activations within one forward pass, so that
    the layers of a chain must be called one after another, once each: a layer that finds nothing from the one before, of its shape and
    recorded for gradients where its own are, raises. That is so where a block is checkpointed alone (the whole stack in one checkpoint
    works), skipped, or disabled, and in pipelines that interleave batches.
    """

    METHODS: ClassVar = {"reslora": Method({}, "ResLoRA, Shi et al., arXiv 2402.18039")}
    SETTINGS = ("r", "lora_alpha", "dropout", "mode", "pre", "before")
    FULL = "depends on what other layers are given"

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        mode: str = "bs",
        pre: int = 1,
        before: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._one_of("mode", mode, MODES)
        self._whole("pre", pre, -1)
        self._fits("pre", pre, "be 1 for mode 'is', which has one shortcut", mode != "is" or pre == 1)
        self._whole("before", before, 0)
        self._fits("before", before, f"be at most pre={pre}", pre == -1 or before <= pre)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        most = f"give (before + 1) * r <= {MAX_RANK} for mode 'bs' (r={r})"
        self._fits("before", before, most, mode != "bs" or (before + 1) * r <= MAX_RANK)
        self.mode, self.pre, self.before = mode, pre, before
        self.lora_A, self.lora_B = kaiming(r, base.in_features, **like), trained(base.out_features, r, **like)
        # In tuples, as nn.Module takes a module itself for a part: the earlier layers, the nearest first, and that which takes what
        # this layer hands on.
        self._earlier: tuple[ResLoRALinear, ...] = ()
        self._next: tuple[ResLoRALinear, ...] = ()
        self._handed: tuple[int, bool, tuple[Tensor, ...]] | None = None  # in which pass, and whether it was recorded

    @classmethod
    def plan(
        cls, model: nn.Module, linears: Mapping[str, nn.Module], settings: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """``before`` of each layer, from its place."""
        refuse_places("ResLoRALinear", settings, "before")
        planned = {}
        for chain in _chains({name: (m.in_features, m.out_features) for name, m in linears.items()}):
            for i, name in enumerate(chain):
                pre = settings[name].get("pre", 1)
                planned[name] = settings[name] | {"before": i if pre == -1 or type(pre) is not int else min(i, pre)}
        return {name: planned[name] for name in settings}

    @classmethod
    def connect(cls, layers: Mapping[str, AdapterLinear]) -> None:
        """Ties the layers of each chain to one another. A ValueError names a layer that does not fit those before it; nothing is tied then."""
        mine = {name: m for name, m in layers.items() if isinstance(m, ResLoRALinear)}
        ties = []
        for chain in _chains({name: (m.in_features, m.out_features, m.mode) for name, m in mine.items()}):
            for i, name in enumerate(chain):
                m, follow = mine[name], [mine[n] for n in chain[i + 1 : i + 2]]
                earlier = [mine[n] for n in chain[max(0, i - m.before) : i]][::-1]
                _check_chain(name, m, earlier)
                ties.append((m, tuple(earlier), tuple(n for n in follow if n.before)))
        for m, m._earlier, m._next in ties:
            m._handed = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handed": None}  # of a pass that was given up

    @property
    def low_rank(self) -> bool:
        return self.mode == "bs" or self.before + len(self._next) == 0

    @property
    def lora_rank(self) -> int:
        return self.r + (sum(m.r for m in self._earlier) if self.mode == "bs" else 0)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of "bs" the layer's own pair and the earlier ones', below and beside one another."""
        self._check_low_rank("factors")
        self._check_tied("factors")
        if not self.before:
            return self.lora_A, self.lora_B, self.scaling
        pairs = [self, *self._earlier]
        self._check_whole(*pairs)
        scale = self.scaling if {m.scaling for m in pairs} == {self.scaling} else 1.0
        b = [m.lora_B if scale == m.scaling else m.scaling * m.lora_B for m in pairs]
        a, b = ([t.to(self.lora_A) for t in of] for of in ([m.lora_A for m in pairs], b))
        return torch.cat(a), torch.cat(b, 1), scale

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.low_rank:
            return super()._adapted(x, weight, bias)
        return ops.linear_expand(x, weight, bias, self._rank(x), self.lora_B, self.scaling)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        if self.low_rank:
            return super()._beside(y, x)
        return added(y, ops.linear_expand(None, None, None, self._rank(x), self.lora_B, self.scaling))

    def _rank(self, x: Tensor) -> Tensor:
        """[..., r] that B expands, of "is" and "ms". What the next layer wants of this x is handed on, in no more than rank space."""
        self._refuse_if(
            self.__dict__.get("_is_replica"), "forward", "not be nn.DataParallel's replica, which share chains"
        )
        self._check_tied("forward")
        came = self._take(x) if self.before else self._begin_pass()
        own = self._both() if self.mode == "is" else self.lora_A
        s = ops.lora_shrink(x, own, 1.0, *dropout_of("lora_shrink", x, self.dropout, self.training))
        for following in self._next:
            if self.mode == "is":
                s, its = s.split([self.r, following.r], -1)
                handed = (its.contiguous(),)
            else:
                handed = (s, *came)[: following.before]
            self._handed = _backward(), torch.is_grad_enabled(), handed
        return sum((t.to(s.device) for t in came), s).contiguous()

    def _both(self) -> Tensor:
        """A of this layer and, where there is one, of the next, which acts on this x too: one pass over it."""
        self._check_whole(self, *self._next)
        return torch.cat([self.lora_A, *(m.lora_A.to(self.lora_A) for m in self._next)])

    def _begin_pass(self) -> tuple[()]:
        """The first of a chain: what a pass that was given up has left is of no other."""
        rest: tuple[ResLoRALinear, ...] = (self,)
        while rest:
            rest[0]._handed = None
            rest = rest[0]._next
        return ()

    def _take(self, x: Tensor) -> tuple[Tensor, ...]:
        handed, self._earlier[0]._handed = self._earlier[0]._handed, None
        must = "be called once in a forward pass, after the layer before it: not alone (checkpointing of a block for itself), "
        must += "not after a layer that was skipped, disabled or merged, not with batches in turns; mode 'bs' may be"
        self._refuse_if(handed is None or handed[0] != _backward(), "forward", must)
        _, recorded, came = handed
        must = "not record gradients where the layer before it did not (reentrant checkpointing, no_grad), they would be lost"
        self._refuse_if(torch.is_grad_enabled() and not recorded, "forward", must)
        before, now = list(came[0].shape[:-1]), list(x.shape[:-1])
        self._refuse_if(before != now, "forward", f"be given as many rows as the layer before it, {before}, got {now}")
        return came

    def _check_tied(self, who: str) -> None:
        must = f"be tied to {self.before} earlier ones; ResLoRALinear.connect(layers by name) does it"
        self._refuse_if(len(self._earlier) != self.before, who, must)

    def _check_low_rank(self, who: str) -> None:
        self._refuse_if(not self.low_rank, who, f"have mode 'bs'; {self.mode!r} {self.FULL}")

    def _check_whole(self, *layers: "ResLoRALinear") -> None:
        """torch.cat takes an empty shard without a word."""
        whole = all(m.lora_A.shape == (m.r, m.in_features) and m.lora_B.shape == (m.out_features, m.r) for m in layers)
        self._refuse_if(not whole, "forward", "be beside layers whose factors are whole, got shards (FSDP)")

    def _check_merge(self) -> None:
        self._check_low_rank("merge")
        super()._check_merge()


def _backward() -> int:
    """Which backward pass of autograd runs here, as where checkpointing calls layers again; -1 in a forward pass."""
    return -1 if is_compiling() else torch._C._current_graph_task_id()


def _check_chain(name: str, m: ResLoRALinear, earlier: list[ResLoRALinear]) -> None:
    """earlier: the nearest first."""
    if len(earlier) < m.before:
        raise ValueError(f"ResLoRALinear: {name} must have {m.before} layers before it, got {len(earlier)}")
    ranks = sum(e.r for e in (m, *earlier))
    if m.mode == "bs" and ranks > MAX_RANK:
        raise ValueError(f"ResLoRALinear: {name} must have ranks of {MAX_RANK} together for mode 'bs', got {ranks}")
    if m.mode == "ms" and any(e.r != m.r for e in earlier):
        ranks = [e.r for e in earlier]
        raise ValueError(f"ResLoRALinear: {name} must have the r of those before it for mode 'ms', {ranks}, got {m.r}")
    if m.mode == "ms" and m.before > earlier[0].before + 1 if earlier else False:
        must = f"must have at most {earlier[0].before + 1} before it, one more than the layer before"
        raise ValueError(f"ResLoRALinear: {name} {must}, got {m.before}")


def _chains(layers: Mapping[str, tuple]) -> list[list[str]]:
    """Names that differ in their first number alone, by that number. Another value of a name begins a new chain."""
    alike: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in layers:
        before, index, after = place_of(name)
        alike.setdefault((before, after), []).append((index, name))
    chains: list[list[str]] = []
    for members in alike.values():
        for i, (_, name) in enumerate(sorted(members)):
            if not i or layers[name] != layers[chains[-1][-1]]:
                chains.append([])
            chains[-1].append(name)
    return chains
