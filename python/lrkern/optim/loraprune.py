# SPDX-License-Identifier: Apache-2.0
"""LoRAPrune's groups."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.variants import LoRAPruneLinear
from .rule import Rule, plain
from .schedule import cubic


class PruneGroup(NamedTuple):
    """Layers by name whose features go together: ``size`` outputs of every layer of ``out``, and the inputs of those of ``into`` that read
    them, which all have as many. size 1: single features. Or with ``heads`` each layer's outputs, or inputs, are cut into so many parts: a key and
    value head goes with the query heads that attend to it."""

    out: tuple[str, ...]
    into: tuple[str, ...] = ()
    size: int = 1
    heads: int = 0


class LoRAPrunePruning(Rule):
    """Masks the groups of features that matter least: LoRAPrune (Zhang et al., arXiv 2305.18403).

    After each step the importance of a group is 0.9 of what it was and 0.1 of Σ s / (‖s‖ + 1e-8) over its layers, s = ``LoRAPruneLinear.scores``
    of outputs or inputs; a step whose scores are not finite changes nothing. Every ``every`` steps ⌊share(t) · groups⌋ are masked in each
    PruneGroup, those that are masked already first. share(t) is 0 up to start · total_steps, ratio from (1 - final) · total_steps on, and
    ratio - ratio (1 - (t - t_i) / (t_f - t_i))³ between them. The authors' code stops before it gets to ratio, here the last step of the
    schedule masks too. Its scores come before the optimizer's step, here after it.

    Layers of ``into`` are not masked; ``LoRAPruneLinear.sliced`` makes all of them smaller in the end. The ends of a
    model, which the code leaves whole, are left out of ``groups`` by who makes it.

    Args:
        groups: of layer names, or ``llama_groups(model, head_dim)``.
        ratio: share of each group that is masked in the end.
    """

    LAYER = LoRAPruneLinear
    SETTINGS: ClassVar = ("groups", "total_steps", "ratio", "every", "start", "final")

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[PruneGroup],
        total_steps: int,
        ratio: float = 0.5,
        every: int = 10,
        start: float = 0.1,
        final: float = 0.1,
    ):
        plain = [{"out": [*g.out], "into": [*g.into], "size": g.size, "heads": g.heads} for g in groups]
        super().__init__(
            model, groups=plain, total_steps=total_steps, ratio=ratio, every=every, start=start, final=final
        )
        for name in ("total_steps", "every"):
            self._whole(name, 1)
        for name in ("ratio", "start", "final"):
            self._share(name)
        self._must("ratio", ratio < 1, "leave something")
        self._must("final", start + final < 1, f"be less than 1 - start = {1 - start}")
        self._must("groups", bool(plain), "have a PruneGroup")
        taken: set[str] = set()
        for i, group in enumerate(plain):
            self._check_group(f"LoRAPrunePruning: groups[{i}]", group, taken)
        self.importance: list[Tensor] = [torch.zeros(self._count(g)) for g in plain]

    def _check_group(self, who: str, group: dict[str, Any], taken: set[str]) -> None:
        names, size, heads = (*group["out"], *group["into"]), group["size"], group["heads"]
        if unknown := [n for n in names if n not in self.layers]:
            raise ValueError(f"{who} must name LoRAPruneLinear layers, got {unknown[0]!r}")
        if not group["out"] or taken & {*group["out"]} or len({*group["out"]}) < len(group["out"]):
            raise ValueError(f"{who}.out must name layers, each in one group, got {group['out']}")
        taken |= {*group["out"]}
        out, into = (
            [self.layers[n].out_features for n in group["out"]],
            [self.layers[n].in_features for n in group["into"]],
        )
        whole = all(type(n) is int for n in (size, heads)) and size >= 1 and heads >= 0 and (size == 1 or heads == 0)
        if not whole:
            raise ValueError(f"{who} must have a size >= 1 or a number of heads, got size={size!r}, heads={heads!r}")
        if heads and any(n % heads for n in out + into):
            raise ValueError(f"{who} must have multiples of heads={heads} features, got out {out}, into {into}")
        if not heads and (len({*out, *into}) > 1 or out[0] % size):
            must = f"have as many outputs as inputs, a multiple of size={size}"
            raise ValueError(f"{who} must {must}, got out {out}, into {into}")

    def _count(self, group: dict[str, Any]) -> int:
        return group["heads"] or self.layers[group["out"][0]].out_features // group["size"]

    def share(self, step: int) -> float:
        """Of the groups that are masked at this step."""
        total = self.total_steps
        return cubic(step, self.start * total, total - self.final * total, 0.0, self.ratio)

    def _step(self, n, optimizer):
        found = [self._score(group) for group in self.groups]
        if all(bool(s.isfinite().all()) for s in found):
            self.importance = [0.9 * old + 0.1 * s for old, s in zip(self.importance, found, strict=True)]
        share = self.share(n)
        if share > 0 and (n % self.every == 0 or (share == self.ratio and self.share(n - 1) < share)):
            for group, importance in zip(self.groups, self.importance, strict=True):
                self._mask(group, importance, share)

    def _score(self, group: dict[str, Any]) -> Tensor:
        """[groups] on the CPU."""
        count = self._count(group)
        total = torch.zeros(count)
        for side, names in (("out", group["out"]), ("in", group["into"])):
            for layer in (self.layers[name] for name in names):
                s = layer.scores((layer.out_features if side == "out" else layer.in_features) // count, side)
                total += (s / (s.norm() + 1e-8)).cpu()
        return total

    def _mask(self, group: dict[str, Any], importance: Tensor, share: float) -> None:
        count = self._count(group)
        there = self.layers[group["out"][0]].mask.view(count, -1)[:, 0].cpu()
        order = importance.masked_fill(~there, -1).sort(stable=True).indices
        gone = max(int(share * len(order) + 1e-9), int((~there).sum()))
        for name in group["out"]:
            self.layers[name].prune(order[:gone], self.layers[name].out_features // count)

    def _state(self) -> dict[str, Any]:
        return {"importance": [*self.importance]}

    def _load(self, state: dict[str, Any]) -> None:
        self.importance = [t.cpu() for t in state["importance"]]


def llama_groups(model: nn.Module, head_dim: int) -> list[PruneGroup]:
    """Of a model with Llama's names: heads of q_proj, k_proj and v_proj with o_proj's inputs, and the features of gate_proj and up_proj with
    down_proj's inputs. In grouped-query attention a key and value head goes with the query heads that attend to it. Only LoRAPruneLinear
    layers count; the heads are those of the smallest of an attention's."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    parts = {
        "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
        "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
    }
    for name, m in model.named_modules():
        block, _, last = name.rpartition(".")
        out, into = parts.get(block.rpartition(".")[2], ((), ()))
        if isinstance(m, LoRAPruneLinear) and last in (*out, *into):
            found = groups.setdefault((block, block.rpartition(".")[2]), {"out": [], "into": []})
            found["out" if last in out else "into"].append(name)
    sizes = {
        n: model.get_submodule(n).out_features
        for (_, kind), g in groups.items()
        if kind == "self_attn"
        for n in g["out"]
    }
    whole = type(head_dim) is int and head_dim >= 1
    if wrong := [n for n, size in sizes.items() if not whole or size % head_dim]:
        must = f"divide the outputs of q_proj, k_proj and v_proj, {sizes[wrong[0]]} of {wrong[0]!r}"
        raise ValueError(f"llama_groups: head_dim must {must}, got {head_dim!r}")
    heads = lambda g: min(sizes[name] for name in g["out"]) // head_dim
    return [
        PruneGroup(
            tuple(map(plain, g["out"])), tuple(map(plain, g["into"])), heads=heads(g) if kind == "self_attn" else 0
        )
        for (_, kind), g in groups.items()
        if g["out"]
    ]
