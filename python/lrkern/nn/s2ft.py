# SPDX-License-Identifier: Apache-2.0
"""A linear layer of which a slice of W trains."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import refuse_tangents, under_transforms
from .linear import AdapterLinear, Method
from .plain import PLAIN, elsewhere, plain_linear, watched

SIDES = {"output": 0, "input": 1}  # and the dimension of W
_RANGES = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")


def as_text(columns: Sequence[int]) -> str:
    """Ascending numbers as ranges: "0-63,70"."""
    ends = [0, *(i for i, (a, b) in enumerate(pairwise(columns), 1) if b != a + 1), len(columns)]
    runs = [(columns[a], columns[b - 1]) for a, b in pairwise(ends) if b > a]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def as_columns(index: Any) -> list[int] | None:
    """The numbers of a text, a sequence or a tensor, or None where it is nothing of the kind."""
    if isinstance(index, str):
        if not _RANGES.fullmatch(index):
            return None
        ends = [[int(n) for n in part.split("-")] for part in index.split(",") if part]
        if any(e[-1] >= 2**31 or e[0] > e[-1] for e in ends):
            return None
        return [n for e in ends for n in range(e[0], e[-1] + 1)]
    if isinstance(index, Tensor):
        whole = index.dim() == 1 and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        return index.tolist() if whole else None
    if not isinstance(index, Sequence) or any(type(n) is not int for n in index):
        return None
    return list(index)


class S2FTLinear(AdapterLinear):
    """y = x Wᵀ + bias, of which some columns of W (input features) or some rows (output features) train: S2FT (Yang et al., arXiv
    2412.06289); ``ops.slice_linear``.

    Trained: ``slice``, [out, s] or of rows [s, in], the values of W's slice themselves, so that an optimizer, weight decay too,
    does with them what it would do with W. ``start`` is what they were; their difference, ``change()``, is the adapter. Every forward
    writes the slice into base_layer.weight, in place, and while the layer is disabled what it was: there is one W. Backward computes dx
    and the slice of dW, for which x[:, index] is saved, of rows x itself. Under autocast it is the cast copy of W that a forward writes to;
    ``sync`` and ``state_dict`` write W itself.

    Over a base layer with hooks or a forward of its own, W is written all the same and its forward runs. One whose weight is made of
    others (pruned, parametrized) is refused.

    Args:
        index: which columns or rows, ascending: numbers, a tensor, or ranges as text, "0-63,70". Neighbours are read faster.
        side: "input" trains W[:, index] (o_proj, down_proj), "output" W[index] (v_proj, up_proj).
        adapter_dtype: of slice and start, float32 or W's dtype; None means float32.
    """

    METHODS: ClassVar = {"s2ft": Method({}, "S2FT, Yang et al., arXiv 2412.06289")}
    SETTINGS = ("index", "side")
    QUANTIZES = False
    low_rank = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        index: str | Sequence[int] | Tensor = "",
        side: str = "input",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(base, index=index, side=side, adapter_dtype=adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        index: str | Sequence[int] | Tensor = "",
        side: str = "input",
        adapter_dtype: torch.dtype | None = None,
    ) -> "S2FTLinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(linear, index=index, side=side, adapter_dtype=adapter_dtype)

    def _set_up(self, base, index, side, adapter_dtype) -> None:
        self._one_of("side", side, SIDES)
        features, columns = base.weight.shape[SIDES[side]], as_columns(index)
        fit = columns is not None and all(a < b for a, b in pairwise([-1, *columns, features]))
        if not fit:
            must = f"be distinct whole numbers in ascending order, or their ranges as text, below the {features} {side} features"
            raise ValueError(f"{type(self).__name__}: index must {must}, got {index!r}")
        like = self._adopt(base, len(columns), adapter_dtype or torch.float32)
        if like["dtype"] not in (torch.float32, base.weight.dtype) and not base.weight.is_meta:
            must = f"be float32 or the dtype of the base layer, {base.weight.dtype}"
            raise ValueError(f"{type(self).__name__}: adapter_dtype must {must}, got {adapter_dtype}")
        self.index, self.side = as_text(columns), side
        found = torch.tensor(columns, dtype=torch.int32)
        self.register_buffer("columns", found if base.weight.is_meta else found.to(base.weight.device))
        values = base.weight.detach().index_select(self._dim, found.to(base.weight.device)).to(like["dtype"])
        self.slice, self.start = nn.Parameter(values), nn.Parameter(values.clone(), False)

    @classmethod
    def plan(cls, model, linears, settings):
        """Refuses to train nothing, and a W that other modules have too: forward writes the slice into it."""
        if none := next((name for name, s in settings.items() if not as_columns(s.get("index", ""))), None):
            must = "name the features that train (lrkern.s2ft.prepare chooses them for a model)"
            raise ValueError(f"{cls.__name__}: index of {none} must {must}, got {settings[none].get('index', '')!r}")
        if shared := elsewhere(model, [m.weight for m in linears.values()]):
            both = next(iter(shared.values()))
            raise ValueError(f"{cls.__name__}: W must be of one module, which it is written into, got {both}, tied")
        return settings

    @property
    def _dim(self) -> int:
        return SIDES[self.side]

    def change(self) -> Tensor:
        """slice - start in float32, of slice's shape: the adapter."""
        return self.slice.float() - self.start.float()

    @torch.no_grad()
    def sync(self) -> None:
        """Writes the slice (of a disabled layer what it was) into W, as a forward does: for those who read W after a step."""
        w, now = self._weight("sync"), self.slice if self.enabled else self.start
        w.index_copy_(self._dim, self.columns.long(), now.to(w.dtype))

    def _weight(self, who: str) -> Tensor:
        """W as a tensor that the base layer computes with, to be written."""
        w = self._modules["base_layer"]._parameters.get("weight")
        got = type(self.base_layer).__name__ if w is None else f"{type(w).__name__}"
        self._refuse_if(type(w) not in PLAIN, who, f"have a base layer with a weight of its own to write to, got {got}")
        return w

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.r:
            return self._base_alone(x)
        now, base = self.slice if self.enabled else self.start, self._modules["base_layer"]
        weight, bias = plain_linear(base)
        if weight is not None and not watched():
            return ops.slice_linear(x, weight, bias, now, self.columns, self._dim)
        refuse_tangents("gather_matmul" if self._dim == 1 else "scatter_add", (x, now))
        if under_transforms():  # nothing is written: there may be a slice for each sample
            w = self._weight("forward")
            w = w.index_copy(self._dim, self.columns.long(), now.detach().to(w.dtype))
            y = torch.func.functional_call(base, {"weight": w}, (x,))
        else:
            self.sync()
            y = base(x)
        if not (torch.is_grad_enabled() and now.requires_grad):
            return y
        nothing = (now - now.detach()).to(x.dtype)  # but its gradient is the slice's
        if self._dim == 1:
            return ops.gather_matmul(y, x, nothing.mT, self.columns)
        return ops.scatter_add(y, nn.functional.linear(x, nothing), self.columns)

    def merge(self) -> None:
        """W holds the slice from now on, whatever is written to it, and forward is the base layer's. Refused as of any layer."""
        self._check_merge()
        self._refuse_if(not self.slice.isfinite().all(), "merge", "have a finite slice, got inf or nan")
        self.sync()
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """W is what it was before training, bit for bit; forward writes the slice again."""
        if self.merged:
            w = self._weight("unmerge")
            w.index_copy_(self._dim, self.columns.long(), self.start.to(w.dtype))
        self.merged = False

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        whole = torch.zeros(self.out_features, self.in_features, device=self.slice.device)
        return whole.index_copy_(self._dim, self.columns.long(), self.change())

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [s, in] and B [out, s] in float32, exact: one of them picks the features, the other is the change."""
        picks = torch.zeros(self.r, (self.out_features, self.in_features)[self._dim], device=self.slice.device)
        picks[torch.arange(self.r), self.columns.long()] = 1.0
        return (picks, self.change(), 1.0) if self._dim == 1 else (self.change(), picks.mT, 1.0)

    def unlike(self, base: nn.Module) -> str | None:
        w, columns = base.weight if isinstance(base, nn.Linear) else None, self.columns.long()
        if w is not None and self.slice.dtype not in (torch.float32, w.dtype):
            return f"a W of {w.dtype} beside a slice of {self.slice.dtype}"
        there = base.start if w is None else w.index_select(self._dim, columns.to(w.device))
        same = torch.equal(there.detach().float().cpu(), self.start.detach().float().cpu())
        return None if same else "a slice of W that is not the one it was trained from"

    def _settings_repr(self) -> str:
        index = self.index if len(self.index) <= 40 else f"{self.index[:37]}..."
        return f", index={index!r} ({self.r}), side={self.side!r}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self.merged and not self.base_layer.weight.is_meta:
            self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # An error that is raised, not collected: the base layer below would be loaded all the same.
        given = state_dict.get(f"{prefix}columns")
        if given is not None and given.tolist() != as_columns(self.index):
            got = as_text(given.tolist())
            raise RuntimeError(
                f"{type(self).__name__}: {prefix}columns must be {self.index!r}, got {got!r}; the layer is unchanged"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
