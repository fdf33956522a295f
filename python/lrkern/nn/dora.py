# SPDX-License-Identifier: Apache-2.0
"""What DoRA needs of its weights, kept as long as they stay as they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F

_PLAIN = (Tensor, torch.nn.Parameter)


class _Seen:
    """Tensors and what their version counters said, to tell later whether they are the same with the same contents."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.state = tensors, self._state(tensors)

    @staticmethod
    def _state(tensors: tuple[Tensor, ...]) -> list | None:
        if any(t.is_inference() for t in tensors):
            return None  # they have no version
        return [(t.data_ptr() if type(t) in _PLAIN else 0, t._version) for t in tensors]

    def still(self, *tensors: Tensor) -> bool:
        same = all(p is q for p, q in zip(self.tensors, tensors, strict=True))
        return same and self.state is not None and self.state == self._state(tensors)


class DoraNorm:
    """‖W + scale · B A‖ per row. Under no_grad it is kept until W, A, B or the scale changes; where gradients are
    recorded only ‖W‖ is, until W changes.

    Version counters do not see a write through ``.data``: ``clear`` is for whoever makes one. A recorded forward clears
    too. Nor do they see FSDP gather new values: in a process group nothing is kept.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._weight = self._factors = None  # (_Seen, result)

    def __call__(
        self, weight: Tensor, a: Tensor, b: Tensor, scale: float, dense: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """weight: W, or where it is quantised what changes with it, with ``dense`` to get W [O, I] itself."""
        dense = dense or (lambda: weight)
        if torch.compiler.is_compiling():
            return F.dora_norm(dense(), a, b, scale)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.clear()
            return F.dora_norm(dense(), a, b, scale)
        if torch.is_grad_enabled():
            self._factors = None
        elif self._factors and self._factors[1] == scale and self._factors[0].still(weight, a, b):
            return self._factors[2]
        w, kept = dense(), self._weight
        if not (kept and kept[0].still(weight)):
            kept = _Seen(weight), F.row_norm(w)
        norm = F.dora_norm(w, a, b, scale, kept[1])
        if type(norm) is Tensor:  # nothing stays of a fake run
            self._weight = kept
            if not torch.is_grad_enabled():
                self._factors = _Seen(weight, a, b), scale, norm
        return norm

    def __deepcopy__(self, memo) -> "DoraNorm":
        return DoraNorm()

    def __reduce__(self):
        return DoraNorm, ()
