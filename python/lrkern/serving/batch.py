# SPDX-License-Identifier: Apache-2.0
"""The requests of one call: what they add to each layer, and which of its rows are whose."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .below import modules_of, ours
from .kinds.kind import Rows
from .layer import Layer, must
from .pool import AdapterPool
from .rows import Along, Dims, Follow, Lost, Owners, arguments_of, tensors_of
from .saved import apart, copies, over

# Whose modules take the same path through a forward for all inputs of the same shapes, as long as no value of a tensor goes to
# Python. Others are followed in every forward.
_KNOWN = ("torch", "transformers", "bitsandbytes", "torchao")

_WAYS = "leave it out of the pool's targets, give its rows with MultiLoraModel.rows, or "

Found = dict[tuple[str, torch.Size], tuple[int, int] | Lost]  # by layer and x's shape, how the requests lie in x's rows


class Paths:
    """What following forwards has shown, by what a forward was given. A forward that was given the same needs no following."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.found: dict[Any, Found] = {}

    def key(self, *parts: Any) -> Any:
        try:
            return tuple(map(_outline, parts))
        except TypeError:  # nothing is known of some argument
            return None

    def keep(self, key: Any, found: Found, follow: Follow) -> None:
        hooks = lambda m: [h for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) if not ours(h)]
        known = lambda m: type(m).__module__.split(".")[0] in _KNOWN and "forward" not in vars(m) and not hooks(m)
        if key is not None and not follow.read and all(map(known, modules_of(self.model).values())):
            self.found[key] = found


def _outline(value: Any) -> Any:
    """Of an argument, that on which the path of library code may depend."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        grow = lambda k: "mask" in str(k) or "position" in str(k)  # with every token generated
        return tuple((k, None if grow(k) and isinstance(v, Tensor) else _outline(v)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_outline, value))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size)):
        return type(value), value
    if hasattr(value, "get_seq_length"):  # a cache: an empty one is filled, from a full one less is computed
        inner = [getattr(value, f"{name}_attention_cache", None) for name in ("self", "cross")]
        updated = tuple(getattr(value, "is_updated", {}).values())
        filled = None if inner[0] is not None else value.is_initialized
        return type(value), filled, updated, tuple(map(_outline, inner))
    raise TypeError


class Batch:
    """Requests with the adapters of each, of a call with ``times`` rows a request (``generate`` with beams).

    lengths: of each request's part of rows that lie behind one another in one row of the input.
    """

    def __init__(
        self, pool: AdapterPool, rows: Rows, paths: Paths, times: int = 1, lengths: Sequence[int] | None = None
    ):
        self.count, self.times, self.lengths, self.paths = len(rows), times, lengths, paths
        # Requests that want the same are one: every row is its, wherever the model puts it.
        self.one = Owners(1) if all(row == rows[0] for row in rows) else None
        rows = rows[:1] if self.one else rows
        kinds = sorted({adapter.kind for row in rows for adapter, _ in row}, key=lambda kind: kind.order)
        own = lambda kind: [[part for part in row if part[0].kind is kind] for row in rows]
        self.parts = [kind.batch(own(kind)) for kind in kinds]
        put = lambda mine: pool.to_device(torch.tensor(mine))
        self.saved = {
            name: [(state, put(mine)) for state, mine in each] for name, each in copies(rows, pool.layers).items()
        }
        self.given: list[Owners] = []  # with MultiLoraModel.rows, the innermost last
        self._owners = Owners(self.count)
        if lengths is not None:
            each = torch.arange(self.count).repeat_interleave(torch.tensor(lengths))
            self._owners = Owners(len(each), pool.to_device(each))
        # Of the forward that runs, from the inputs of ``_inside`` on:
        self._inside: nn.Module | None = None
        self.follow: Follow | None = None
        self._key: Any = None
        self._found: Found = {}

    # ---- a forward of the model, or of its encoder alone

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.one or self._inside is not None:
            return
        arguments = arguments_of(module.forward, args, kwargs)
        inputs = tensors_of(arguments, getattr(module, "main_input_name", None))
        times = self.times if module is self.paths.model else 1
        dims = {name: self._of_input(name, t, times) for name, t in inputs.items()}
        of = module is self.paths.model, self._owners.count, times, self.lengths is None, *sorted(self.saved)
        self._inside, self._key = module, self.paths.key(*of, arguments)
        if self._key in self.paths.found:
            self._found = self.paths.found[self._key]
            return
        self.follow, self._found = Follow((t, dims[name]) for name, t in inputs.items()), {}
        self.follow.__enter__()

    def _of_input(self, name: str, t: Tensor, times: int) -> Dims:
        if self.lengths is None:
            each = f"have {times} rows for each" if times > 1 else "have a row for each"
            must(len(t) == self.count * times, name, f"{each} of the call's {self.count} requests", list(t.shape))
            return {0: Along(1, self._owners, times)}
        lead, n = t.shape[: t.ndim - t.is_floating_point()], self._owners.count
        must(lead in ((n,), (1, n)), name, f"have the {n} tokens that lengths has, in one row", list(t.shape))
        return {len(lead) - 1: Along(1, self._owners, 1)}

    def end(self, module: nn.Module) -> None:
        if self._inside is module:
            follow, self.follow, self._inside = self.follow, None, None
            if follow is not None:
                follow.__exit__(None, None, None)
                self.paths.keep(self._key, self._found, follow)

    def abandon(self) -> None:
        """After what no hook is called for, such as a KeyboardInterrupt."""
        if self._inside is not None:
            self._key = None
            self.end(self._inside)

    # ---- in a layer

    def saw(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        """A linear of any kind leaves rows where they are."""
        if self.follow is not None:
            self.passed(x, y)
            self._note(layer.name, x)

    def _note(self, name: str, x: Tensor) -> None:
        rows = self.follow.rows(x)
        now = rows if isinstance(rows, Lost) else (rows.outer, rows.inner)
        if self._found.setdefault((name, x.shape), now) != now:
            self._key = None  # the same shape has two meanings: it has to be followed each time

    def passed(self, x: Tensor, y: Tensor) -> None:
        known = self.follow.known(x)
        if known is not None and y.shape[:-1] == x.shape[:-1]:
            lost = isinstance(known, Lost)
            self.follow.mark(y, known if lost else {d: along for d, along in known.items() if d < x.ndim - 1})

    def copied(self, name: str, module: nn.Module, args: tuple, kwargs: dict, y: Tensor, before: int) -> Tensor:
        """y with the rows of adapters that have a copy of this module as their copies give them."""
        must(isinstance(y, Tensor) and y.ndim, f"{name} of modules_to_save", "return a tensor", type(y).__name__)
        what, out = f"{name} (modules_to_save)", y
        along = self.along(what, y, "")
        if self.follow is not None:
            self._note(what, y)
        for state, mine in self.saved[name]:
            own = self._apart(what, over(module, state, before), args, kwargs, along)
            if self.one or out.shape != own.shape:  # of another size: then all rows are
                out = own
            else:
                out = torch.where(along.spread(mine).view(*y.shape[:-1], 1), own, out)
        return out

    def _apart(self, what: str, module: nn.Module, args: tuple, kwargs: dict, along: Along) -> Tensor:
        """A module's result, whose rows must depend on rows of the same request alone, where they are followed."""
        if self.follow is None:
            return module(*args, **kwargs)
        with apart(self.follow):
            own = module(*args, **kwargs)
        rows = self.follow.rows(own)
        after = f" after {rows}" if isinstance(rows, Lost) and rows else ""
        self._key = self._key if rows == along else None  # nothing of this forward is known
        must(rows == along, what, "give each request what its own rows make", f"something else{after}")
        return own

    def along(self, name: str, x: Tensor, ways: str = _WAYS) -> Along:
        """Whose x's rows are, in the layer of this name; refuses where that is not known."""
        T = x.shape[:-1].numel()
        if self.one is not None:
            return Along(1, self.one, T)
        if self.given:
            here = self.given[-1]
            must(here.count == T, "rows", f"have one entry for each of the {T} rows that {name} got", here.count)
            return Along(1, here, 1)
        if self._inside is None:
            rows: Any = Lost("a call from outside the model's forward")
        elif self.follow is not None:
            rows = self.follow.rows(x)
        elif (rows := self._found.get((name, x.shape))) is None:
            self.paths.found.pop(self._key, None)
            raise RuntimeError(
                f"lrkern.serving: {name} got x {list(x.shape)}, which it did not in an earlier forward with inputs of these "
                "shapes; what was known of them is forgotten, call again"
            )
        elif not isinstance(rows, Lost):
            rows = Along(rows[0], self._owners, rows[1])
        if not isinstance(rows, Lost):
            return rows
        raise ValueError(
            f"lrkern.serving: {name} got x {list(x.shape)}, whose rows do not tell which of the {self.count} requests they "
            f"belong to{rows and f', after {rows}'}; {ways}give all requests of a call "
            "the same adapters"
        )

    def asked(self, hidden: Tensor) -> Along:
        """Such a forward is followed each time, since who asks needs it then."""
        along, self._key = self.along("MultiLoraModel.requests", hidden), None
        return along
