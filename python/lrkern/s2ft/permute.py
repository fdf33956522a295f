# SPDX-License-Identifier: Apache-2.0
"""Co-permutation: the same model with its heads and channels in another order, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.check import is_whole, require, shown
from .calibrate import still
from .find import FFN, Attention, Part, check_linears, find
from .select import Chosen, Selection, check_index

_WITHIN = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the outputs' norm, and 0.1 in 16 bits
_KINDS = {kind.__name__: kind for kind in (Attention, FFN)}


class Record(NamedTuple):
    """What ``permute`` did: unit i of a part is its unit order[i] of before. int64 on the CPU."""

    orders: tuple[tuple[Part, Tensor], ...]

    def channels(self, linear: str, side: str) -> Tensor | None:
        """Of a linear's columns ("input") or rows ("output"): where each was before, or None where nothing moved."""
        moved = (p for part, order in self.orders for p in part.places(order))
        return next((index for name, dim, index in moved if name == linear and dim == _DIM[side]), None)

    def to_json(self) -> list[list[Any]]:
        """[kind, fields of the part, order] a part, for a file beside the permuted model."""
        return [[type(part).__name__, part._asdict(), order.tolist()] for part, order in self.orders]

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """Of what ``to_json`` gave. A ValueError where it is no such thing; ``unpermute`` holds it against the model."""
        who, must = "lrkern.s2ft.Record.from_json:", "must be a list of [kind, part, order]"
        require(isinstance(data, list), f"{who} {must}, got {shown(data)}")
        return cls(tuple(_entry(entry, f"{who} {must}, got {shown(entry)}") for entry in data))


def _entry(entry: Any, refusal: str) -> tuple[Part, Tensor]:
    require(isinstance(entry, list | tuple) and len(entry) == 3 and entry[0] in [*_KINDS], refusal)
    kind, (_, fields, order) = _KINDS[entry[0]], entry
    require(isinstance(fields, dict) and fields.keys() == {*kind._fields}, refusal)
    made = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    for key, value in made.items():
        whole = key in ("heads", "kv_heads", "head_dim", "width")
        names = value if key == "up" and isinstance(value, tuple) else (value,)
        text = all(isinstance(n, str) or (n is None and key == "trains") for n in names)
        require(is_whole(value, 1, 2**31 - 1) if whole else text, refusal)
    require(kind is FFN or made["heads"] % made["kv_heads"] == 0, refusal)
    require(isinstance(order, list) and all(is_whole(n, 0, 2**31 - 1) for n in order), refusal)
    return kind(**made), torch.tensor(order, dtype=torch.int64)


_DIM = {"output": 0, "input": 1}  # of W


def permute(
    model: nn.Module, selection: Selection, example: Mapping[str, Any] | None = None
) -> tuple[Record, Selection]:
    """Puts the chosen heads and channels first, in place, so that each slice is contiguous: rows and biases of q, k, v by head and
    columns of o with them, rows and biases of gate and up by channel and columns of down with them. The model computes the
    same up to the order of its sums, and stays an ordinary model.

    In a part of which the maker (v, up) and the taker (o, down) are both chosen the order is only v, both, only o, the rest, as
    the paper's: both slices are contiguous.

    selection: what ``select`` gave. Heads that share a key and value head must be chosen together (``select(groups=True)``).
    example: keyword arguments of the model. Its outputs, tensors of the first level, are compared before and after, and if they differ
        the model is put back and refused: the check for a model of your own, whose forward may tell heads apart by number.

    Returns the record for ``unpermute``, and the selection as it is in the new order. Needs memory for one weight's copy.
    Refused with a ValueError, nothing changed: what ``find`` refuses, linears that are of no part, and halves of units or groups.
    """
    parts = _parts_of(model, selection)
    orders = tuple((part, order) for part in parts if (order := _order(part, selection)) is not None)
    record = Record(orders)
    before = _outputs(model, example) if example is not None else []
    _check("permute", model, record)
    _move(model, record, back=False)
    try:
        after = _outputs(model, example) if example is not None else []
        off = [name for (name, a), (_, b) in zip(before, after, strict=True) if not _same(a, b)]
        why = "something in it tells heads or channels apart; the model is as it was"
        require(not off, f"lrkern.s2ft.permute: model must compute the same in any order, got another {off[:1]}: {why}")
    except BaseException:
        _move(model, record, back=True)
        raise
    return record, {name: _moved(record, name, chosen) for name, chosen in selection.items()}


def reorder(model: nn.Module, orders: Iterable[tuple[Part, Tensor]]) -> Record:
    """Puts units of parts that ``find`` gave into orders of one's own: unit i becomes what is order[i] now. Orders of heads keep the
    groups that share a key and value head together. Refused with a ValueError, nothing changed."""
    record = Record(tuple((part, order.to("cpu", torch.int64)) for part, order in orders))
    known = {part.name: part for part in find(model, *_kinds(part for part, _ in record.orders))}
    for part, _ in record.orders:
        require(
            known.get(part.name) == part, f"lrkern.s2ft.reorder: {part.name} must be a part of the model, got {part}"
        )
    _check("reorder", model, record)
    _move(model, record, back=False)
    return record


def unpermute(model: nn.Module, record: Record) -> None:
    """The order of before ``permute`` or ``reorder``, in place, bit for bit: an ordinary checkpoint again, with trained slices where
    their channels were. Of a model that ``prepare`` changed, ``release`` comes first. Refused with a ValueError, nothing changed: a
    record that does not fit the model."""
    _check("unpermute", model, record)
    _move(model, record, back=True)


def _kinds(parts: Iterable[Part]) -> tuple[bool, bool]:
    kinds = {type(part) for part in parts}
    return Attention in kinds, FFN in kinds


def _parts_of(model: nn.Module, selection: Selection) -> list[Part]:
    """Those that a selection is of."""
    require(selection, "lrkern.s2ft.permute: selection must have a linear, got none")
    found: list[Part] = []
    errors = []
    for kinds in ((True, False), (False, True)):  # a model whose other parts are refused may have these
        try:
            found += find(model, *kinds)
        except ValueError as error:
            errors.append(str(error))
    parts = [p for p in found if any(t.linear in selection for t in p.targets().values())]
    sides = {t.linear: t.side for p in parts for t in p.targets().values()}
    for name, chosen in selection.items():
        why = f" ({errors[0]})" if errors and name not in sides else ""
        text = f"must be a linear that select chooses of, side {sides.get(name, 'input or output')}"
        require(sides.get(name) == chosen.side, f"lrkern.s2ft.permute: {name} {text}, got side {chosen.side}{why}")
    return parts


def _order(part: Part, selection: Selection) -> Tensor | None:
    """Groups of heads, or channels: only those of the maker, both, only those of the taker, the rest."""
    chosen = {}
    for target in part.targets().values():
        if got := selection.get(target.linear):
            group = part.group if target.side == "input" else 1
            size, units = target.size * group, target.units // group
            index = check_index("lrkern.s2ft.permute", target.linear, got.index, size * units)
            taken = torch.bincount(index // size, minlength=units)
            whole = bool(((taken == 0) | (taken == size)).all())
            must = f"whole units of {size} channels"
            text = (
                f"must be chosen in {must}, for one order of q, k, v and o"
                if group > 1
                else f"must be chosen in {must}"
            )
            require(whole, f"lrkern.s2ft.permute: {target.linear} {text}")
            chosen[target.side] = taken > 0
    made, taken = (chosen.get(side) for side in ("output", "input"))
    if made is None and taken is None:
        return None
    made = torch.zeros_like(taken) if made is None else made
    taken = torch.zeros_like(made) if taken is None else taken
    rank = torch.where(made & ~taken, 0, torch.where(made & taken, 1, torch.where(taken, 2, 3)))
    order = rank.sort(stable=True).indices
    return (order[:, None] * part.group + torch.arange(part.group)).flatten()


def _moved(record: Record, name: str, chosen: Chosen) -> Chosen:
    channels = record.channels(name, chosen.side)
    return Chosen(chosen.side, torch.isin(channels, chosen.index.cpu()).nonzero().flatten())


def _check(what: str, model: nn.Module, record: Record) -> None:
    who = f"lrkern.s2ft.{what}:"
    linears = [name for part, _ in record.orders for name in part.linears]
    twice = sorted({name for name in linears if linears.count(name) > 1})
    require(not twice, f"{who} each linear must be of one part, got {twice[:1]} of two")
    check_linears(who[:-1], model, linears)
    for part, order in record.orders:
        whole = order.shape == (part.units,) and torch.equal(order.sort().values, torch.arange(part.units))
        require(
            whole, f"{who} order of {part.name} must have each of 0..{part.units - 1} once, got {shown(order.tolist())}"
        )
        groups = order.view(-1, part.group) // part.group
        kept = f"keep the {part.group} heads of a key and value head together"
        require((groups == groups[:, :1]).all(), f"{who} order of {part.name} must {kept}, got {shown(order.tolist())}")
        for name, dim, index in part.places(order):
            size = model.get_submodule(name).weight.shape[dim]
            require(size == len(index), f"{who} {name} must have {len(index)} {('rows', 'columns')[dim]}, got {size}")


@torch.no_grad()
def _move(model: nn.Module, record: Record, back: bool) -> None:
    for part, order in record.orders:
        for name, dim, index in part.places(order):
            m = model.get_submodule(name)
            index = (index.argsort() if back else index).to(m.weight.device)
            m.weight.copy_(m.weight.index_select(dim, index))
            if dim == 0 and m.bias is not None:
                m.bias.copy_(m.bias.index_select(0, index))


@torch.no_grad()
def _outputs(model: nn.Module, example: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    with still(model):
        out = model(**example)
    named = out.items() if isinstance(out, Mapping) else enumerate(out if isinstance(out, tuple) else (out,))
    tensors = [(f"output {name}", t) for name, t in named if isinstance(t, Tensor)]
    require(tensors, f"lrkern.s2ft.permute: model must return tensors for the example, got {type(out).__name__}")
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    off, norm = torch.linalg.vector_norm(a.double() - b.double()), torch.linalg.vector_norm(a.double())
    return bool(off <= _WITHIN.get(a.dtype, 0.1) * norm)
