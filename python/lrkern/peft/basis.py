# SPDX-License-Identifier: Apache-2.0
"""PEFT's layers over a pair of projections that it stores once for all: views of them, never a copy."""

from typing import ClassVar

from torch import Tensor

from ..limits import DTYPES
from .layer import PLAIN, Patched, Plan, dropout_p, hooked


class FusedBasis(Patched):
    """Not to be differentiated twice."""

    _own: ClassVar[tuple[str, ...]]  # PEFT's names of the two that train, of the projections, of dropout

    def _arguments(self, name: str, v: Tensor, w: Tensor, A: Tensor, B: Tensor) -> tuple | str:
        """What the functional forms take of an adapter before dropout_p, or why PEFT's own code must run."""
        raise NotImplementedError

    def _adapter(self, name: str) -> tuple | str | None:
        modules, (v, w, a, b, drop) = self._modules, self._own  # this runs on every call
        v_of, a_of, b_of = modules[v], modules[a]._buffers, modules[b]._buffers
        if name not in v_of:
            return None
        if name not in a_of or name not in b_of:
            return f"no projections of {name}"
        tensors = v_of[name], modules[w][name], a_of[name], b_of[name]  # sharded, a vector may be no parameter
        for t in tensors:
            if type(t) not in PLAIN:
                return f"tensors of type {', '.join(sorted({type(t).__name__ for t in tensors}))}"
            if t.dtype not in DTYPES:
                return f"tensors of dtype {', '.join(sorted({str(t.dtype) for t in tensors}))}"
        dropout = modules[drop]._modules[name]
        p = dropout_p(dropout)
        if isinstance(p, str):
            return p
        if hooked(dropout):
            return f"hooks on {drop}"
        arguments = self._arguments(name, *tensors)
        return arguments if isinstance(arguments, str) else (*arguments, p)

    def _takes(self, plan: Plan, x: Tensor) -> bool:
        return x.ndim >= 2 and x.dtype in DTYPES and super()._takes(plan, x)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        y = super()._run(plan, x)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # under autocast too, as PEFT does
