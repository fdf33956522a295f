# SPDX-License-Identifier: Apache-2.0
"""Attention and feed-forward parts of a model's blocks, told by the linears they have and not by the class of the model.

Each part has hidden units between its linears, heads or channels: rows of those that make them, columns of the one that takes
them. Any order of the units computes the same, as long as nothing else in the part knows one unit from another; what does
is refused.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.check import require
from ..nn.plain import plain_linear

# The last word of a linear's name. What takes the heads and what is in a feed-forward part is told by shapes alone.
_ROLES = {
    role: re.compile(rf"(w?{role}|{word})(_?(proj|projection|lin|linear))?")
    for role, word in (("q", "query"), ("k", "key"), ("v", "value"))
}
_GATE = re.compile(r"gate|(^|_)w1$|wi_0$")


class Target(NamedTuple):
    """A linear of which units may be trained: columns of W (side "input") or rows (side "output"), ``size`` of them a unit."""

    linear: str
    side: str
    units: int
    size: int


class Attention(NamedTuple):
    """q, k, v: rows by head, o: columns by head. Head h reads key and value head h // (heads // kv_heads)."""

    name: str
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> tuple[str, ...]:
        return self.q, self.k, self.v, self.o

    @property
    def units(self) -> int:
        return self.heads

    @property
    def group(self) -> int:
        """Heads that share a key and value head, and move together."""
        return self.heads // self.kv_heads

    def targets(self) -> dict[str, Target]:
        heads = Target(self.o, "input", self.heads, self.head_dim)
        return {"o": heads, "v": Target(self.v, "output", self.kv_heads, self.head_dim)}

    def places(self, order: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(linear, dimension of W, its channels in the new order) of an order of heads."""
        q, kv = _channels(order, self.head_dim), _channels(order[:: self.group] // self.group, self.head_dim)
        yield from ((self.q, 0, q), (self.k, 0, kv), (self.v, 0, kv), (self.o, 1, q))


class FFN(NamedTuple):
    """gate and up, or up alone: rows by channel, down: columns by channel. ``trains``: the one of ``up`` that is no gate, or
    None where names do not say."""

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    trains: str | None

    group = 1

    @property
    def linears(self) -> tuple[str, ...]:
        return *self.up, self.down

    @property
    def units(self) -> int:
        return self.width

    def targets(self) -> dict[str, Target]:
        down = {"down": Target(self.down, "input", self.width, 1)}
        return down | ({"up": Target(self.trains, "output", self.width, 1)} if self.trains else {})

    def places(self, order: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        yield from ((name, 0, order) for name in self.up)
        yield self.down, 1, order


Part = Attention | FFN


def _channels(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def find(model: nn.Module, attention: bool = True, ffn: bool = True) -> list[Part]:
    """The attention and feed-forward parts of a model's blocks, in the model's order.

    Attention: a module with linears named as query, key and value (q_proj, query, q_lin, ...), and one more linear, in it or
    in its parent, that takes the heads (o_proj, output.dense, ...); MHA and GQA. A block is what stands in an nn.ModuleList
    and holds attention. Its other linears must be [F, H] and [H, F], or two of [F, H] and one [H, F]: its feed-forward part.
    Llama, Qwen2, Qwen3, Mistral, BERT and what is built as they are have this form.

    Refused with a ValueError that names the module and says why: a model without such a block; q, k and v in one linear; blocks
    beside one with attention that have none; sizes that are not whole heads or not the config's; experts; parameters and
    buffers with a value a head or a channel (norms over all heads, sinks, position biases, of one block or of all), where norms over
    head_dim alone are shared by the heads and stay; what depends on a head's number (alibi, random blocks); linears that are no plain
    nn.Linear (hooks, parametrizations, adapters), and weights that stand at two places.

    attention, ffn: which parts to look for; of the other kind nothing is asked.
    """
    require(attention or ffn, "lrkern.s2ft.find: attention or ffn must be True, got neither")
    modules = dict(model.named_modules())
    holders = {name: roles for name, m in modules.items() if (roles := _roles(name, m))}
    form = "attention with linears of its own for query, key and value"
    got = ", ".join(sorted({type(m).__name__ for m in modules.values() if "ttention" in type(m).__name__}))
    require(holders, f"lrkern.s2ft.find: model must have {form}, got {got or type(model).__name__}")
    blocks: dict[str, list[str]] = {}
    for name in holders:
        blocks.setdefault(_block(modules, name), []).append(name)
    for beside in sorted({_parent(block) for block in blocks if block}):
        for child in modules[beside]._modules:
            name = _join(beside, child)
            require(name in blocks, f"lrkern.s2ft.find: {name} must have {form} as the blocks beside it, got none")
    parts: list[Part] = []
    heads: dict[str, set[int]] = {}  # by what holds the list of blocks
    for block, names in blocks.items():
        takers = {name: _taker(modules, name, holders[name], block) for name in names}
        if attention:
            found = [_attention(modules, name, holders[name], *takers[name]) for name in names]
            heads.setdefault(_parent(_parent(block)), set()).update(part.heads for part in found)
            parts += found
        parts += [_ffn(modules, block, (*names, *(o for _, o in takers.values())))] if ffn else []
    _check_outside(modules, tuple(blocks), heads)
    check_linears("lrkern.s2ft.find", model, [name for part in parts for name in part.linears])
    return parts


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _within(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(f"{scope}.")


def _refuse_unless(holds: Any, name: str, text: str) -> None:
    require(holds, f"lrkern.s2ft.find: {name or 'the model'} {text}")


def _roles(name: str, module: nn.Module) -> dict[str, str] | None:
    """q, k and v among the linears that a module has itself."""
    own = [child for child, m in module._modules.items() if isinstance(m, nn.Linear)]
    roles = {role: [c for c in own if word.fullmatch(c.lower())] for role, word in _ROLES.items()}
    return {role: _join(name, c[0]) for role, c in roles.items()} if all(len(c) == 1 for c in roles.values()) else None


def _block(modules: dict[str, nn.Module], name: str) -> str:
    """The innermost that holds it and stands in an nn.ModuleList, or the model."""
    while name and not isinstance(modules[_parent(name)], nn.ModuleList):
        name = _parent(name)
    return name


def _linears(modules: dict[str, nn.Module], scope: str) -> dict[str, nn.Linear]:
    return {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and _within(name, scope)}


def _tensors(modules: dict[str, nn.Module], scope: str, but: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name in a module, without those of some others."""
    for name, m in modules.items():
        if _within(name, scope) and not any(_within(name, other) for other in but):
            for key, t in (*m._parameters.items(), *m._buffers.items()):
                if t is not None:
                    yield _join(name, key), t


def _taker(modules: dict[str, nn.Module], holder: str, roles: dict[str, str], block: str) -> tuple[str, str]:
    """The one linear that takes the heads, in the module that has q, k and v or, where that has no other, in its parent; and which."""
    scope = holder
    others = _linears(modules, scope).keys() - roles.values()
    if not others and holder != block:
        scope = _parent(holder)
        others = _linears(modules, scope).keys() - roles.values()
    text = "must have one linear beside query, key and value, that takes the heads"
    _refuse_unless(len(others) == 1, scope, f"{text}, got {', '.join(sorted(others)) or 'none'}")
    return scope, others.pop()


def _attention(modules: dict[str, nn.Module], holder: str, roles: dict[str, str], scope: str, o: str) -> Attention:
    q, k, v = roles["q"], roles["k"], roles["v"]
    heads, kv_heads, head_dim = _heads(modules, holder, q, k, v, o)
    held = modules[holder]
    config = getattr(held, "config", None)
    alibi = getattr(config, "position_embedding_type", None) == "alibi" or getattr(config, "alibi", False)
    _refuse_unless(not alibi, holder, "must not have alibi, whose slopes depend on a head's number")
    random = hasattr(held, "num_random_blocks") or getattr(config, "attention_type", None) == "block_sparse"
    _refuse_unless(not random, holder, "must not attend to random blocks, which depend on a head's number")
    for name, t in _tensors(modules, holder, (q, k, v, o)):
        shared = t.dim() == 1 and len(t) == head_dim and "norm" in _parent(name).rpartition(".")[2].lower()
        shared = shared or t.numel() == 1 or "inv_freq" in name
        why = "nothing else that may tell heads apart (norms over head_dim do not)"
        _refuse_unless(shared, holder, f"must have {why}, got {name} {list(t.shape)}")
    if scope != holder:  # modules stand in the order they are applied in, as BERT's dense and LayerNorm
        beside = [name for name in modules if _within(name, scope) and not _within(name, holder)]
        before = beside[: beside.index(o)]
        for name, t in _tensors(modules, scope, (holder, o)):
            fits = _parent(name) not in before and t.dim() <= 1
            _refuse_unless(fits, scope, f"must have nothing between the heads and {o}, got {name} {list(t.shape)}")
    return Attention(holder, q, k, v, o, heads, kv_heads, head_dim)


def _check_outside(modules: dict[str, nn.Module], blocks: tuple[str, ...], heads: dict[str, set[int]]) -> None:
    """Nothing of the model has a value a head for all blocks, as MPNet's and LayoutLMv3's position biases. A linear has them as rows;
    one that is further away, a classifier, may have as many by chance."""
    for name, t in _tensors(modules, "", blocks):
        owner, _, key = name.rpartition(".")
        linear = isinstance(modules[owner], nn.Linear)
        count = len(t) if linear and key == "weight" else t.shape[-1] if not linear and t.dim() in (1, 2) else 1
        for beside, counts in heads.items():
            fits = count not in counts - {1} or "inv_freq" in key or (linear and not _within(owner, beside))
            text = f"must have no values by head outside its blocks, got {name} {list(t.shape)}"
            _refuse_unless(fits, beside, text)


def _heads(modules: dict[str, nn.Module], holder: str, *linears: str) -> tuple[int, int, int]:
    held = modules[holder]
    config = getattr(held, "config", None)
    said = _first(held, "num_heads", "num_attention_heads", "n_heads") or _first(config, "num_attention_heads")
    head_dim = _first(held, "head_dim", "attention_head_size", "head_size")
    (rows, k_rows, v_rows), columns = (modules[n].out_features for n in linears[:3]), modules[linears[3]].in_features
    head_dim = head_dim or (rows // said if said else None)
    _refuse_unless(head_dim, holder, "must say its head_dim or number of heads, or its config, got neither")
    heads, kv_heads = rows // head_dim, k_rows // head_dim
    whole = rows == columns == heads * head_dim and k_rows == v_rows == kv_heads * head_dim
    whole = whole and kv_heads > 0 and heads % kv_heads == 0 and said in (None, heads)
    told = f"{said or heads} heads of {head_dim}"
    got = f"{rows}, {k_rows} and {v_rows} rows of q, k and v and {columns} columns of the linear that takes the heads"
    _refuse_unless(
        whole, holder, f"must have {told}, key and value heads that divide them, and a column for each, got {got}"
    )
    groups = _first(held, "num_key_value_groups")
    grouped = f"must have {heads // kv_heads} heads for a key and value head, as its weights do, got {groups}"
    _refuse_unless(groups in (None, heads // kv_heads), holder, grouped)
    return heads, kv_heads, head_dim


def _first(owner: Any, *keys: str) -> int | None:
    return next((n for key in keys if type(n := getattr(owner, key, None)) is int and n > 0), None)


def _ffn(modules: dict[str, nn.Module], block: str, attention: tuple[str, ...]) -> FFN:
    """Of what is in a block beside attention."""
    linears = {n: m for n, m in _linears(modules, block).items() if not any(_within(n, other) for other in attention)}
    shapes = Counter((m.out_features, m.in_features) for m in linears.values())
    wide = [shape for shape, n in shapes.items() if shapes.keys() == {shape, shape[::-1]} and n == len(linears) - 1]
    text = "must have beside attention two or three linears, up [F, H], maybe gate [F, H], and down [H, F]"
    got = ", ".join(f"{n} {[m.out_features, m.in_features]}" for n, m in linears.items())
    # Of [N, N] nobody knows which is up; of two, [F, H] then [H, F], the first.
    told = len(linears) in (2, 3) and wide and shapes.keys() != {wide[0]}
    _refuse_unless(told, block, f"{text}, got {got or 'none'}")
    names = list(linears)
    width, hidden = wide[0] if len(linears) == 3 else linears[names[0]].weight.shape
    up = tuple(n for n in names if linears[n].out_features == width)
    down = next(n for n in names if n not in up)
    for name, t in _tensors(modules, block, (*linears, *attention)):
        shared = t.numel() == 1 or (t.dim() == 1 and len(t) == hidden)
        why = f"nothing else that may tell the {width} channels apart"
        _refuse_unless(shared, block, f"must have {why}, got {name} {list(t.shape)}")
    plain = [n for n in up if not _GATE.search(n.rpartition(".")[2])]
    trains = up[0] if len(up) == 1 else plain[0] if len(plain) == 1 else None
    return FFN(_common([*up, down]), up, down, width, trains)


def _common(names: list[str]) -> str:
    """The innermost module that holds them all."""
    words = [name.split(".") for name in names]
    same = 0
    while len({tuple(w[: same + 1]) for w in words}) == 1:
        same += 1
    return ".".join(words[0][:same])


def check_linears(who: str, model: nn.Module, names: Iterable[str]) -> None:
    """They are plain nn.Linear with weights of their own that no other place of the model has."""
    modules = dict(model.named_modules())
    places: dict[int, list[str]] = {}
    for owner, m in model.named_modules(remove_duplicate=False):
        for key, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None and t.numel() and not t.is_meta:
                places.setdefault(t.data_ptr(), []).append(_join(owner, key))
    for name in names:
        m = modules.get(name)
        require(m is not None, f"{who}: {name} must be a linear of the model, got no such module")
        must = "must be a plain nn.Linear without hooks, parametrizations or adapters"
        own = name.rpartition(".")[2] != "base_layer"  # as adapters call it, ours and PEFT's
        require(own and plain_linear(m)[0] is not None, f"{who}: {name} {must}, got {type(m).__name__}")
        for key, t in m._parameters.items():
            if t is not None:
                require(not t.is_meta, f"{who}: {name}.{key} must have values, got one on the meta device")
                others = [place for place in places.get(t.data_ptr(), []) if place != _join(name, key)]
                once = "must stand at one place of the model"
                require(not others, f"{who}: {name}.{key} {once}, got {', '.join(others[:1])} too")
