# SPDX-License-Identifier: Apache-2.0
"""Which request each row of a tensor belongs to, followed through a model's forward.

``Follow`` starts at the model's own inputs, whose first dimension is the requests, and reads every call of torch in the forward:
a rule for each function says along which dimension of its result the requests lie, from shapes alone. What has no rule, and what
puts rows in another order, loses them, and an adapted linear that meets such an x is refused. No size is ever compared with the
number of requests, no value is read, nothing waits for a device.
"""

import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Owners:
    """Of ``count`` things along a dimension the request each belongs to: their own number, or what index says, negative for
    none."""

    __slots__ = ("count", "index", "made")

    def __init__(self, count: int, index: Tensor | None = None):
        self.count, self.index = count, index
        self.made: dict[Any, Any] = {}  # what kinds of adapters made for these rows, as long as they live


class Along(NamedTuple):
    """Element i of a dimension belongs to owner (i // inner) % owners.count; there are outer · owners.count · inner."""

    outer: int
    owners: Owners
    inner: int

    def spread(self, values: Tensor, none: float = 0) -> Tensor:
        """Values [requests, ...] of each request as [elements, ...]; ``none`` where an element belongs to no request."""
        if self.owners.index is not None:
            index = self.owners.index
            taken = values[index.clamp_min(0)]
            mine = (index >= 0).view(-1, *[1] * (values.ndim - 1))
            values = torch.where(mine, taken, torch.full_like(taken, none))
        values = values.repeat_interleave(self.inner, 0) if self.inner > 1 else values
        return values.repeat(self.outer, *[1] * (values.ndim - 1)) if self.outer > 1 else values


Dims = dict[int, Along]  # of a tensor, by dimension


class Lost(str):
    """The function after which nothing says whose rows these are."""


_NAME = "_lrkern_rows"  # of the attribute of a tensor: the Follow it belongs to, and its Dims or Lost


def _union(*each: Dims | Lost | None) -> Dims | Lost:
    """What operands say of one result: nothing where one is lost, or where they say different things."""
    result: Dims = {}
    for dims in each:
        if isinstance(dims, Lost):
            return dims
        for d, along in (dims or {}).items():
            if result.setdefault(d, along) != along:
                return Lost("of operands whose rows belong to different requests")
    return result


def _version(t: Tensor) -> int:
    """Counts the writes to what t and its views share; of a tensor made in inference mode nobody counts them."""
    return 0 if t.is_inference() else t._version


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (t for t in value if isinstance(t, Tensor))


class Follow(TorchFunctionMode):
    """While it is on, tensors know their rows' requests. ``read`` says whether a value of a tensor went to Python, on which
    the path through the model may depend."""

    def __init__(self, inputs: Iterable[tuple[Tensor, Dims]] = ()):
        super().__init__()
        self.read = False
        self.also: Callable | None = None  # of a call and what its rule said, whether rows are lost all the same
        # The caller's own tensors, which other threads may follow too, have no attribute of ours.
        self.inputs = {id(t): (t, dims) for t, dims in inputs}

    def mark(self, t: Tensor, dims: Dims | Lost) -> None:
        if id(t) in self.inputs:
            self.inputs[id(t)] = t, dims
        else:
            setattr(t, _NAME, (self, dims, _version(t)))

    def of(self, t: Any) -> Dims | None:
        dims = self.known(t)
        return None if isinstance(dims, Lost) else dims

    def known(self, t: Any) -> Dims | Lost | None:
        """None: nothing was ever known."""
        if not isinstance(t, Tensor):
            return None
        found = getattr(t, _NAME, None)
        if found is not None and found[0] is self:
            return found[1] if found[2] == _version(t) else Lost("a write through another view")
        return self.inputs[id(t)][1] if id(t) in self.inputs else None

    def rows(self, x: Tensor) -> Along | Lost:
        """Of x [..., n] flattened to rows."""
        known = self.known(x)
        if not known or isinstance(known, Lost):
            return known or Lost("")
        flat = reshaped(known, x.shape, (math.prod(x.shape[:-1]), x.shape[-1]))
        return flat if isinstance(flat, Lost) else flat.get(0, Lost("")) if 1 not in flat else Lost("")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        elif name in _READS:
            self.read = self.read or not _harmless(sys._getframe(1))
        given = [(t, known) for t in tensors_in((*args, *kwargs.values())) if (known := self.known(t)) is not None]
        out = func(*args, **kwargs)
        if not given:
            return out
        written = args[0] if name == "__setitem__" else out
        for t, known in given:
            if t is written:  # its rule says what it was before
                self.mark(t, known)
        if name == "__setitem__":
            _set_item(self, *args)
        elif isinstance(out, (Tensor, tuple, list)) and type(out) is not torch.Size:
            self._result(name, out, args, kwargs, next((known for _, known in given if isinstance(known, Lost)), None))
        return out

    def _result(self, name: str, out: Any, args: tuple, kwargs: dict, lost: Lost | None) -> None:
        name = name if name in RULES else name.strip("_")
        rule, dims = RULES.get(name), lost
        if rule and (lost is None or name in _DECIDES):
            try:
                dims = rule(self, out, *args, **kwargs)
            except (TypeError, LookupError, ValueError):  # an overload that the rule does not know
                dims = None
        dims = lost or Lost(name) if dims is None or (lost and not dims) else dims
        if self.also and (lost or self.also(name, dims, args, kwargs)):
            dims = lost or Lost(name)
        each = dims if isinstance(dims, list) else [dims] * (1 if isinstance(out, Tensor) else len(out))
        for t, d in zip([out] if isinstance(out, Tensor) else out, each, strict=True):
            if isinstance(t, Tensor):
                right = isinstance(d, Lost) or all(
                    a.outer * a.owners.count * a.inner == t.shape[i] for i, a in d.items()
                )
                self.mark(t, d if right else Lost(name))


# What takes values of a tensor to Python, and the callers whose decisions move no rows: they only make masks.
_READS = frozenset(
    ("__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__", "item", "tolist", "numpy",
     "nonzero", "argwhere", "equal", "allclose", "is_nonzero", "masked_select", "unique", "unique_consecutive", "bincount")
)  # fmt: skip
_MASKS = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")


def _harmless(frame: types.FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") in _MASKS


# ---- rules: of the result, from a function's own arguments; where an operand is lost so is the result, but for ``_DECIDES``

RULES: dict[str, Callable] = {}
_ADDS = "add radd iadd sub rsub isub mul rmul imul div truediv itruediv"  # what is added onto a row, experts' too, is that row's
_ATTENDS = "matmul bmm baddbmm scaled_dot_product_attention"  # the left operand, the queries, says whose the result is
_DECIDES = frozenset(f"{_ADDS} {_ATTENDS}".split())


def _rule(names: str) -> Callable:
    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def _aligned(f: Follow, t: Any, ndim: int) -> Dims:
    """A broadcast operand's, as dimensions of the result."""
    return {d + ndim - t.ndim: along for d, along in (f.of(t) or {}).items()}


@_rule(
    f"{_ADDS} subtract multiply rdiv rtruediv divide floordiv floor_divide pow rpow neg negative positive abs exp log log1p expm1 sqrt rsqrt reciprocal square sigmoid tanh erf sin "
    "cos relu relu6 gelu silu mish elu selu softplus hardtanh hardswish hardsigmoid leaky_relu logsigmoid clamp clip "
    "clamp_min clamp_max where maximum minimum eq ne lt le gt ge and or xor invert not logical_and logical_or logical_not "
    "logical_xor bitwise_and bitwise_or bitwise_not isnan isinf isfinite nan_to_num sign floor ceil round trunc remainder "
    "mod fmod lerp addcmul addcdiv atan2 masked_fill float half bfloat16 double long int bool cpu cuda clone contiguous "
    "detach data dropout"
)
def _pointwise(f: Follow, out: Tensor, *args: Any, **kwargs: Any) -> Dims | Lost:
    """In the operators' own spellings too: __radd__, add_."""
    return _union(*(_aligned(f, t, out.ndim) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))


@_rule("to type type_as fill zero")
def _in_place_of(f: Follow, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Dims | None:
    """Another dtype, or other values, in the same places."""
    return f.of(x)


@_rule("masked_scatter index_put")
def _masked_scatter(f: Follow, out: Tensor, x: Tensor, where: Any, source: Tensor, **__: Any) -> Dims | None:
    """What is nobody's, such as the features of images, takes the place of a row's own elements."""
    return f.of(x) if f.known(source) is None else None


@_rule("copy")
def _copy(f: Follow, out: Tensor, x: Tensor, source: Tensor, *_: Any, **__: Any) -> Dims:
    return _aligned(f, source, out.ndim)


def _dims(dim: Any, ndim: int) -> set[int]:
    if dim is None:
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, (tuple, list)) else [dim])}


def _but(f: Follow, x: Tensor, gone: set[int]) -> Dims:
    return {d: along for d, along in (f.of(x) or {}).items() if d not in gone}


def _mixed_along(position: int, default: int | None = None) -> Callable:
    """Elements depend on, or come from, others along dim, the argument at this position after x or by its name."""

    def rule(f: Follow, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Dims:
        named = kwargs.get("dim", kwargs.get("dims", default))
        return _but(f, x, _dims(args[position] if len(args) > position else named, x.ndim))

    return rule


for _names, _position, _default in (
    ("softmax log_softmax cumsum cumprod logcumsumexp cummax cummin flip", 0, None), ("sort argsort", 0, -1),
    ("topk", 1, -1), ("roll", 1, None), ("normalize", 1, 1), ("split chunk tensor_split split_with_sizes", 1, 0),
):  # fmt: skip
    _rule(_names)(_mixed_along(_position, _default))


@_rule("mean sum nansum amax amin max min prod argmax argmin all any logsumexp median var std norm vector_norm")
def _reduced(f: Follow, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Dims | Lost:
    if args and isinstance(args[0], Tensor):  # max(x, y)
        return _pointwise(f, out, x, *args)
    first = out if isinstance(out, Tensor) else out[0]
    if "dim" not in kwargs and any(isinstance(a, (bool, str)) or a is None for a in args[:1]):
        raise TypeError
    named = kwargs.get("dim", kwargs.get("axis"))
    gone = _dims(args[0] if named is None and args else named, x.ndim)
    if first.ndim not in (x.ndim, x.ndim - len(gone)):  # norm(x, p)
        raise TypeError
    less = lambda d: 0 if first.ndim == x.ndim else sum(g < d for g in gone)
    return {d - less(d): along for d, along in _but(f, x, gone).items()}


@_rule("layer_norm rms_norm")
def _layer_norm(f: Follow, out: Tensor, x: Tensor, shape: Sequence[int] = (1,), *_: Any, **kwargs: Any):
    last = x.ndim - len(kwargs.get("normalized_shape", shape))
    return {d: along for d, along in (f.of(x) or {}).items() if d < last}


@_rule("group_norm batch_norm instance_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
       "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d interpolate pixel_shuffle")  # fmt: skip
def _first(f: Follow, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Dims:
    """What mixes all but the first dimension."""
    return {d: along for d, along in (f.of(x) or {}).items() if d == 0 and out.ndim == x.ndim}


@_rule("linear bilinear")
def _linear(f: Follow, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Dims:
    return {d: along for d, along in (f.of(x) or {}).items() if d < x.ndim - 1}


def _led(f: Follow, leader: Tensor, own: Dims, *others: Dims) -> Dims | Lost:
    """What the leader says, and the others where it says nothing of a dimension."""
    known = f.known(leader)
    if isinstance(known, Lost):
        return known
    return own if own else _union(*others)


@_rule("matmul rmatmul mm bmm")
def _matmul(f: Follow, out: Tensor, a: Tensor, b: Tensor, **__: Any) -> Dims | Lost:
    if a.ndim < 2 or b.ndim < 2:
        raise TypeError
    left = {d: along for d, along in _aligned(f, a, out.ndim).items() if d != out.ndim - 1}
    right = {d: along for d, along in _aligned(f, b, out.ndim).items() if d != out.ndim - 2}
    return _led(f, a, left, right)


@_rule("addmm baddbmm")
def _addmm(f: Follow, out: Tensor, c: Tensor, *factors: Tensor, **named: Any) -> Dims | Lost:
    a, b = factors or (named.get(f"batch{i}", named.get(f"mat{i}")) for i in (1, 2))
    product = _matmul(f, out, a, b)
    return product if isinstance(product, Lost) else _union(_aligned(f, c, out.ndim), product)


@_rule("einsum")
def _einsum(f: Follow, out: Tensor, equation: str, *operands: Any) -> Dims | Lost:
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    inputs, result = equation.replace(" ", "").replace("...", ".").split("->")
    leading = "0123456789"  # letters of the dimensions that ... stands for, aligned at its end
    spell = lambda letters, ndim: letters.replace(".", leading[len(leading) - (ndim - len(letters) + 1) :])
    result = spell(result, out.ndim)
    each = []
    for letters, t in zip(inputs.split(","), operands, strict=True):
        letters = spell(letters, t.ndim)
        each.append({result.index(letters[d]): a for d, a in (f.of(t) or {}).items() if letters[d] in result})
    return _union(*each)


@_rule("scaled_dot_product_attention")
def _attention(f: Follow, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Dims | Lost:
    """q [..., queries, n]; keys and values share the leading dimensions, and may be fewer heads."""
    lead = lambda t: {d: along for d, along in (f.of(t) or {}).items() if d < t.ndim - 3 or (t.ndim == 3 and d == 0)}
    return _led(f, q, {d: along for d, along in (f.of(q) or {}).items() if d < q.ndim - 1}, lead(k), lead(v))


@_rule("embedding")
def _embedding(f: Follow, out: Tensor, ids: Tensor, *_: Any, **__: Any) -> Dims | None:
    return f.of(ids)


@_rule("multi_head_attention_forward")
def _mha(f: Follow, out: tuple, query: Tensor, *_: Any, **__: Any) -> list:
    return [{d: along for d, along in (f.of(query) or {}).items() if d < query.ndim - 1}, Lost("attention weights")]


@_rule("scatter scatter_add scatter_reduce index_add index_copy index_reduce index_fill")
def _into(f: Follow, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Dims:
    """Along dim anything may have come from anywhere."""
    return _but(f, x, {dim % x.ndim})


@_rule("gather take_along_dim")
def _gather(f: Follow, out: Tensor, x: Tensor, dim: int, index: Tensor, **__: Any) -> Dims | Lost:
    gone = dim % x.ndim
    kept = {d: along for d, along in (f.of(x) or {}).items() if d != gone}
    return _union(
        kept, {d: along for d, along in (f.of(index) or {}).items() if d != gone or gone not in (f.of(x) or {})}
    )


@_rule("index_select")
def _index_select(f: Follow, out: Tensor, x: Tensor, dim: int, index: Tensor, **__: Any) -> Dims | Lost:
    own = f.of(x) or {}
    if dim % x.ndim in own:
        return {d: along for d, along in own.items() if d != dim % x.ndim} or Lost("index_select")
    places = f.of(index) or {}
    return _union(own, {dim % x.ndim: places[0]} if 0 in places else {})


# ---- of other shapes


def reshaped(dims: Dims, old: Sequence[int], new: Sequence[int]) -> Dims | Lost:
    """The owners of a dimension stay together in one of the new ones, or are lost."""
    old, new, result = list(old), list(new), {}
    if 0 in old:
        return dims if old == new else Lost("reshape")
    for d, (outer, owners, inner) in dims.items():
        before, after = math.prod(old[:d]) * outer, inner * math.prod(old[d + 1 :])
        left = 1
        for e, size in enumerate(new):
            right = math.prod(new[e + 1 :])
            if before % left == 0 and after % right == 0 and before // left * owners.count * (after // right) == size:
                if e in result:
                    return Lost("reshape")
                result[e] = Along(before // left, owners, after // right)
                break
            left *= size
        else:
            return Lost("reshape")
    return result


@_rule("view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze")
def _reshape(f: Follow, out: Tensor, x: Tensor, *args: Any, **__: Any) -> Dims | Lost:
    if out.numel() != x.numel():  # view(dtype)
        return {d: along for d, along in (f.of(x) or {}).items() if d < x.ndim - 1}
    return reshaped(f.of(x) or {}, x.shape, out.shape)


def _permuted(f: Follow, x: Tensor, order: Sequence[int]) -> Dims:
    order = [d % x.ndim for d in order]
    return {order.index(d): along for d, along in (f.of(x) or {}).items()}


@_rule("transpose swapaxes swapdims")
def _transpose(f: Follow, out: Tensor, x: Tensor, a: int = 0, b: int = 1, dim0: Any = None, dim1: Any = None) -> Dims:
    a, b = (a if dim0 is None else dim0) % x.ndim, (b if dim1 is None else dim1) % x.ndim
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permuted(f, x, order)


_rule("mT mH adjoint t")(lambda f, out, x: _transpose(f, out, x, -1, -2))
_rule("T")(lambda f, out, x: _permuted(f, x, range(x.ndim)[::-1]))


@_rule("permute")
def _permute(f: Follow, out: Tensor, x: Tensor, *order: Any, dims: Any = None) -> Dims:
    return _permuted(f, x, dims or (order[0] if isinstance(order[0], (tuple, list)) else order))


@_rule("movedim moveaxis")
def _movedim(f: Follow, out: Tensor, x: Tensor, source: int, destination: int) -> Dims:
    order = [d for d in range(x.ndim) if d != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return _permuted(f, x, order)


@_rule("expand expand_as broadcast_to")
def _expand(f: Follow, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Dims:
    return _aligned(f, x, out.ndim)


@_rule("repeat tile")
def _repeat(f: Follow, out: Tensor, x: Tensor, *times: Any, **__: Any) -> Dims:
    aligned = _aligned(f, x, out.ndim)
    sizes = [1] * (out.ndim - x.ndim) + list(x.shape)
    return {d: a._replace(outer=a.outer * (out.shape[d] // sizes[d])) for d, a in aligned.items()}


@_rule("repeat_interleave")
def _repeat_interleave(f: Follow, out: Tensor, x: Tensor, repeats: int, dim: int | None = None, **__: Any) -> Dims:
    if not isinstance(repeats, int) or dim is None:
        raise TypeError
    dim %= x.ndim
    return {d: a._replace(inner=a.inner * repeats) if d == dim else a for d, a in (f.of(x) or {}).items()}


@_rule("cat concat concatenate hstack vstack")
def _cat(f: Follow, out: Tensor, tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None, **__: Any):
    dim = (dim if axis is None else axis) % out.ndim
    real = [t for t in tensors if t.ndim == out.ndim]
    whole = _union(*(f.of(t) for t in real))
    return whole if isinstance(whole, Lost) else {d: a for d, a in whole.items() if d != dim}


@_rule("stack")
def _stack(f: Follow, out: Tensor, tensors: Sequence[Tensor], dim: int = 0, **__: Any) -> Dims | Lost:
    dim %= out.ndim
    return _union(*({d + (d >= dim): along for d, along in (f.of(t) or {}).items()} for t in tensors))


@_rule("unbind")
def _unbind(f: Follow, out: tuple, x: Tensor, dim: int = 0) -> Dims:
    dim %= x.ndim
    return {d - (d > dim): along for d, along in (f.of(x) or {}).items() if d != dim}


@_rule("select")
def _select(f: Follow, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Dims:
    return _unbind(f, (), x, dim)


@_rule("narrow")
def _narrow(f: Follow, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Dims:
    return _but(f, x, {dim % x.ndim})


_rule("tril triu")(lambda f, out, x, *_, **__: f.of(x))


@_rule("pad")
def _pad(f: Follow, out: Tensor, x: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> Dims:
    return _but(f, x, {x.ndim - 1 - i // 2 for i, n in enumerate(pad) if n})


def _keyed(key: Any, x: Tensor) -> list[tuple[str, int | None, Any]]:
    """x[key], one entry for each of x's dimensions and each new one: ("keep" | "cut" | "gone" | "new" | "index", dim, key)."""
    keys = list(key) if isinstance(key, tuple) else [key]
    is_index = lambda k: isinstance(k, (Tensor, list))
    if any(
        isinstance(k, bool) or (is_index(k) and torch.as_tensor(k).dtype in (torch.bool, torch.uint8)) for k in keys
    ):
        raise TypeError
    taken = sum(k is not None and k is not Ellipsis for k in keys)
    at = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    keys[at : at + 1] = [slice(None)] * (x.ndim - taken)
    entries, d = [], 0
    for k in keys:
        if k is None:
            entries.append(("new", None, None))
            continue
        if isinstance(k, slice):
            whole = k.indices(x.shape[d]) == (0, x.shape[d], 1)
            entries.append(("keep" if whole else "cut", d, k))
        elif is_index(k):
            entries.append(("index", d, k))
        else:
            entries.append(("gone", d, k))
        d += 1
    return entries


@_rule("getitem")
def _get_item(f: Follow, out: Tensor, x: Tensor, key: Any) -> Dims | Lost:
    entries, own, result, d = _keyed(key, x), f.of(x) or {}, {}, 0
    indices = [e for e in entries if e[0] == "index"]
    if len(indices) > 1 or (indices and any(e[0] == "gone" for e in entries)):
        raise TypeError  # where their dimension goes depends on all of them
    for what, dim, k in entries:
        if what == "gone":
            continue
        if what == "index":
            if dim in own:
                return Lost("indexing")
            inside = f.of(k) or {} if isinstance(k, Tensor) else {}
            result |= {d + i: along for i, along in inside.items()}
            d += torch.as_tensor(k).ndim
            continue
        if what == "keep" and dim in own:
            result[d] = own[dim]
        d += 1
    return result


def _set_item(f: Follow, x: Tensor, key: Any, value: Any) -> None:
    """Rows may be put into a place that was nobody's, such as ids shifted to the right. Along a dimension of rows only all of
    them at once: in a part of it other rows may lie."""
    known = f.known(value)
    if known is None:  # nobody's: the row's own elements have other values
        return
    if isinstance(known, Lost):
        return f.mark(x, known)
    own, placed = f.of(x) or {}, known
    try:
        entries = _keyed(key, x)
        moved = any(what != "keep" and d in own for what, d, _ in entries)
        kept = [e for e in entries if e[0] != "gone"]
        if placed and any(what in ("index", "new") for what, _, _ in kept):
            raise TypeError
        put = [(kept[d], along) for d, along in _aligned(f, value, len(kept)).items()] if placed else []
        if moved or any(what != "keep" for (what, *_), _ in put):
            raise TypeError
        f.mark(x, _union(own, {d: along for (_, d, _), along in put}))
    except (TypeError, LookupError):
        f.mark(x, Lost("assignment"))


# ---- where rows come from

INPUTS = (
    "input_ids", "inputs_embeds", "input_features", "input_values", "decoder_input_ids", "decoder_inputs_embeds",
)  # fmt: skip


def arguments_of(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name; of a call that does not fit, what is named: the call says so better."""
    signature = inspect.signature(function)
    try:
        found = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:
        return dict(kwargs)
    for parameter in signature.parameters.values():
        if parameter.name in found and parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name)
        elif parameter.name in found and parameter.kind is parameter.VAR_POSITIONAL:
            found |= {f"{parameter.name}[{i}]": value for i, value in enumerate(found.pop(parameter.name))}
    return found


def tensors_of(arguments: Mapping[str, Any], main: str | None) -> dict[str, Tensor]:
    """Of a forward's arguments by name those whose rows are the requests': the texts and sounds that transformers' models take,
    else the model's own main_input_name, else the first tensor."""
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.ndim}
    found = {name: tensors[name] for name in INPUTS if name in tensors}
    encoded = arguments.get("encoder_outputs")
    if encoded is not None and len(encoded) and isinstance(first := encoded[0], Tensor):
        found["encoder_outputs"] = first
    if found:
        return found
    first = main if main in tensors else next(iter(tensors), None)
    return {} if first is None else {first: tensors[first]}
