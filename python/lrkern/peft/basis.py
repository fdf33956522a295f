# SPDX-License-Identifier: Apache-2.0
"""PEFT's layers over a pair of projections that it stores once for all: views of them, never a copy."""

from typing import ClassVar

from torch import Tensor

from ..limits import DTYPES
from .layer import PLAIN, Patched, Plan, dropout_p, hooked


class FusedBasis(Patched):
    """Not to be differentiated twice."""

    _own: ClassVar[str]  # the prefix of PEFT's attributes
    _vectors: ClassVar[tuple[str, str]]  # what trains

    def _arguments(self, name: str, v: Tensor, w: Tensor, A: Tensor, B: Tensor) -> tuple | str:
        """What the functional forms take of an adapter before dropout_p, or why PEFT's own code must run."""
        raise NotImplementedError

    def _adapter(self, name: str) -> tuple | str | None:
        modules = self._modules
        v_of, w_of = (modules[f"{self._own}_{x}"] for x in self._vectors)
        a_of, b_of = (modules[f"{self._own}_{x}"]._buffers for x in "AB")
        if name not in v_of:
            return None
        if name not in a_of or name not in b_of:
            return f"no projections of {name}"
        tensors = v_of[name], w_of[name], a_of[name], b_of[name]
        for t in tensors:
            if type(t) not in PLAIN:
                return f"tensors of type {', '.join(sorted({type(t).__name__ for t in tensors}))}"
            if t.dtype not in DTYPES:
                return f"tensors of dtype {', '.join(sorted({str(t.dtype) for t in tensors}))}"
        dropout = modules[f"{self._own}_dropout"]._modules[name]
        p = dropout_p(dropout)
        if isinstance(p, str):
            return p
        if hooked(dropout):
            return f"hooks on {self._own}_dropout"
        arguments = self._arguments(name, *tensors)
        return arguments if isinstance(arguments, str) else (*arguments, p)

    def _takes(self, plan: Plan, x: Tensor) -> bool:
        return x.ndim >= 2 and x.dtype in DTYPES and super()._takes(plan, x)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        return super()._run(plan, x).to(x.dtype)  # under autocast too, as PEFT does
