# SPDX-License-Identifier: Apache-2.0
"""Which heads and channels to train."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.check import require, shown
from .calibrate import Batches, Seen, calibrate, squares
from .find import Part, Target, find

BY = ("random", "weight", "activation", "gradient", "product")
ROLES = ("o", "v", "down", "up")


class Chosen(NamedTuple):
    """Of a linear's W: columns (side "input") or rows ("output"), ascending int64."""

    side: str
    index: Tensor


Selection = dict[str, Chosen]  # by the linear's name


def check_index(who: str, name: str, index: Tensor, channels: int) -> Tensor:
    """int64 on the CPU: distinct whole numbers below a linear's channels."""
    must = f"index of {name} must be a 1-D tensor of distinct whole numbers in 0..{channels - 1}"
    whole = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    require(whole, f"{who}: {must}, got {getattr(index, 'dtype', type(index).__name__)}")
    index = index.cpu().long().contiguous()
    held = bool(((index >= 0) & (index < channels)).all()) and len(index.unique()) == len(index)
    require(held, f"{who}: {must}, got {shown(index.tolist())}")
    return index


def select(
    model: nn.Module,
    *,
    o: float = 0.0,
    down: float = 0.0,
    v: float = 0.0,
    up: float = 0.0,
    by: str = "random",
    largest: bool = True,
    scope: str = "layer",
    multiple: int = 16,
    groups: bool | None = None,
    batches: Batches | None = None,
    generator: torch.Generator | int | None = None,
) -> Selection:
    """Chooses heads and channels of the parts that ``find`` tells: the S2FT-R, -W, -A, -G and -S of Yang et al., arXiv
    2412.06289. The paper's names only are known here; the definitions below are ours, not verified against the paper.

    o, v: fractions of heads, whose columns of o's weight (v: rows of v's weight) are chosen, whole heads.
    down, up: fractions of channels, columns of down's weight (rows of up's).
    by: what ranks a unit, a head or a channel. S is its slice of W, a the activations at its channels (what enters o and down,
        what leaves v and up), t the tokens of all batches:
        "random"      each with the same chance
        "weight"      ‖S‖, over all elements
        "activation"  sqrt(mean over t of ‖a[t]‖²)
        "gradient"    sqrt(Σ over batches of ‖dL/dS‖²)
        "product"     the product of "weight" and "activation"
    largest: those that rank highest, or lowest; of equal ones those that come first.
    scope: "layer", the same fraction of each layer, channels rounded to ``multiple``, heads to whole ones, at least one of
        either; "global", as the paper, of all layers' units of a kind together, which leaves ragged counts and layers without any.
    groups: heads in whole groups that share a key and value head, ranked by the group's norm, as ``permute`` needs it. None: where
        v is chosen too.
    batches: for all but random and weight: keyword arguments of the model, with labels where gradients are asked for; or a function of
        the model that runs it (and backward). The model is in eval mode and frozen meanwhile.
    generator: of random, on the CPU, or its seed; None is torch's own.

    A ValueError says what is wrong with an argument, and what ``find`` refuses is refused. Nothing of the model changes.
    """
    asked = {"o": o, "v": v, "down": down, "up": up}
    who = "lrkern.s2ft.select:"
    for name, value in asked.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        require(number, f"{who} {name} must be a number in [0, 1], got {value!r}")
    require(any(asked.values()), f"{who} one of {', '.join(ROLES)} must be above 0, got none")
    require(isinstance(by, str) and by in BY, f"{who} by must be one of {', '.join(BY)}, got {by!r}")
    require(scope in ("layer", "global"), f"{who} scope must be layer or global, got {scope!r}")
    require(type(multiple) is int and multiple > 0, f"{who} multiple must be a whole number above 0, got {multiple!r}")
    needs = by not in ("random", "weight")
    require(not needs or batches is not None, f"{who} batches must be given for by={by!r}, got None")
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    grouped = bool(o and v) if groups is None else groups
    parts = find(model, attention=bool(o or v), ffn=bool(down or up))
    plan = [(part, role, t) for part in parts for role, t in _targets(part, asked).items()]
    seen = calibrate(model, [t for *_, t in plan], batches, by == "gradient") if needs and batches is not None else {}
    ranked: dict[str, list[tuple[Target, Tensor]]] = {role: [] for role in ROLES}
    for part, role, target in plan:
        if role == "o" and grouped:
            target = target._replace(units=target.units // part.group, size=target.size * part.group)
        scores = _scores(model.get_submodule(target.linear).weight, target, by, seen.get(target.linear), generator)
        require(scores.isfinite().all(), f"{who} {by} of {target.linear} must be finite, got inf or nan")
        ranked[role].append((target, scores if largest else -scores))
    found: Selection = {}
    for role, fraction in asked.items():
        found |= (_each if scope == "layer" else _among)(ranked[role], fraction, multiple)
    return {t.linear: found[t.linear] for *_, t in plan if t.linear in found}


def _targets(part: Part, asked: Mapping[str, float]) -> dict[str, Target]:
    targets = part.targets()
    told = "must have one linear whose name says that it is no gate, for up"
    require("up" in targets or "down" not in targets or not asked["up"], f"lrkern.s2ft.select: {part.name} {told}")
    return {role: t for role, t in targets.items() if asked[role]}


def _scores(w: Tensor, target: Target, by: str, seen: Seen | None, generator: Any) -> Tensor:
    """[units] float32."""
    if by == "random":
        return torch.rand(target.units, generator=generator)
    unit = lambda sums: sums.view(target.units, target.size).sum(1).sqrt()
    if seen is not None and by == "gradient":
        return unit(seen.gradients)
    active = unit(seen.activations / seen.tokens) if seen is not None else torch.ones(target.units)
    return active if by == "activation" else active * unit(squares(w, 0 if target.side == "input" else 1))


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _chosen(target: Target, units: Tensor) -> Chosen:
    index = units.sort().values[:, None] * target.size + torch.arange(target.size)
    return Chosen(target.side, index.flatten())


def _each(ranked: list[tuple[Target, Tensor]], fraction: float, multiple: int) -> Selection:
    found = {}
    for target, scores in ranked:
        step = multiple if target.size == 1 else 1
        n = target.units if fraction == 1 else max(step, step * _rounded(fraction * target.units / step))
        best = scores.sort(descending=True, stable=True).indices[: min(n, target.units)]
        found[target.linear] = _chosen(target, best)
    return found


def _among(ranked: list[tuple[Target, Tensor]], fraction: float, multiple: int) -> Selection:
    if not ranked:
        return {}
    scores = torch.cat([scores for _, scores in ranked])
    best = scores.sort(descending=True, stable=True).indices[: max(1, _rounded(fraction * len(scores)))]
    taken, found, at = torch.zeros(len(scores), dtype=torch.bool), {}, 0
    taken[best] = True
    for target, _ in ranked:
        units = taken[at : at + target.units].nonzero().flatten()
        at += target.units
        if len(units):
            found[target.linear] = _chosen(target, units)
    return found
