# SPDX-License-Identifier: Apache-2.0
"""Adapters in and out of a model's own weights: a write of the slices, no product of factors."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files.check import require
from .adapter import Adapter, Slice, checked
from .find import check_linears

_KEPT = "_s2ft_kept"  # of a linear: goes with its copies and pickles, not with its state_dict


class _Kept(NamedTuple):
    """Where an adapter is in W, the values that were there and those that are."""

    dim: int
    index: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, w: Tensor, s: Slice) -> "_Kept":
        index = s.index.to(w.device)
        before = w.index_select(s.dim, index)
        return cls(s.dim, index, before, (before.float() + s.change.to(w.device)).to(w.dtype))

    def write(self, w: Tensor, values: Tensor) -> None:
        w.index_copy_(self.dim, self.index.to(w.device), values.to(w.device))

    def is_in(self, w: Tensor) -> bool:
        """Bit for bit: not cast, loaded, permuted or trained since."""
        if w.dtype != self.after.dtype or w.dim() != 2 or w.shape[1 - self.dim] != self.after.shape[1 - self.dim]:
            return False
        index = self.index.to(w.device)
        fits = not len(index) or int(index[-1]) < w.shape[self.dim]
        return fits and torch.equal(w.index_select(self.dim, index), self.after.to(w.device))


@torch.no_grad()
def switch(model: nn.Module, adapter: Adapter | None) -> None:
    """Puts the adapter into the weights of plain nn.Linear layers in place, W[index] += change, rounded once to W's dtype, after
    taking out what an earlier switch put in, bit for bit: the values that stood there are kept, as large as the slice. None: only
    the latter.

    Whoever runs the model needs nothing of lrkern then, and its state_dict has the adapter in it. Kept values go along with
    copies and pickles of the model.

    Refused with a ValueError, the weights as they were: linears that the model does not have, that are not plain, of another size, or
    whose weight stands at two places; a result that overflows; slices that somebody has written to since the last switch, or cast.
    """
    who = "lrkern.s2ft.switch"
    if adapter is not None:
        adapter = {name: s for name, s in checked(who, adapter).items() if len(s.index)}
        check_linears(who, model, adapter)
        for name, s in adapter.items():
            got = list(model.get_submodule(name).weight.shape)
            require(got == [*s.shape], f"{who}: {name} must have a weight of shape {list(s.shape)}, got {got}")
    held = {name: (m, m.__dict__[_KEPT]) for name, m in model.named_modules() if _KEPT in m.__dict__}
    for name, (m, kept) in held.items():
        why = "the values that the last switch left in it, for those of before to come back; load its weights again"
        require(kept.is_in(m.weight), f"{who}: weight of {name} must have {why}, got others")
    try:
        for m, kept in held.values():
            kept.write(m.weight, kept.before)
        now = {}
        for name, s in (adapter or {}).items():
            now[name] = _Kept.of(model.get_submodule(name).weight, s)
            finite = bool(now[name].after.isfinite().all())
            require(finite, f"{who}: weight of {name} must stay finite, got inf or nan")
    except BaseException:
        for m, kept in held.values():
            kept.write(m.weight, kept.after)
        raise
    for m, _ in held.values():
        del m.__dict__[_KEPT]
    for name, kept in now.items():
        m = model.get_submodule(name)
        kept.write(m.weight, kept.after)
        m.__dict__[_KEPT] = kept
