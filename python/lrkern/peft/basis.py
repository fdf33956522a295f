# SPDX-License-Identifier: Apache-2.0
"""PEFT's VeRA and RandLoRA layers on lrkern, with the projections that PEFT stores: views of them, never a copy.

VeRA saves x Aᵀ [T, r] for backward where PEFT's code saves a [T, O] as well; RandLoRA forms U = Λ A Γ in pieces
where PEFT's code stores it, and x Uᵀ, for every layer. Not to be differentiated twice.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from .. import functional as F
from .layer import DROPOUTS, DTYPES, PLAIN, Patched, hooked, not_now, plain_linear


class _Plan(NamedTuple):
    weight: Tensor | None  # of a plain nn.Linear, None for any other base layer
    bias: Tensor | None
    adapters: list[tuple]  # positional arguments of the functional forms after x and what is x's base
    casts: bool  # whether x may have another dtype than the adapters


class _FusedBasis(Patched):
    _own: str  # the prefix of PEFT's attributes
    _vectors: tuple[str, str]  # what trains

    def _arguments(self, name: str, v: Tensor, w: Tensor, A: Tensor, B: Tensor) -> tuple | str:
        """What the functional forms take of an adapter, or why PEFT's own code must run."""
        raise NotImplementedError

    def _plan(self) -> _Plan | str:
        """How to run this layer as it is now, or why it must run PEFT's own forward."""
        if why := not_now(self):
            return why
        modules, adapters = self._modules, []
        v_of, w_of = (modules[f"{self._own}_{x}"] for x in self._vectors)
        a_of, b_of = (modules[f"{self._own}_{x}"]._buffers for x in "AB")
        for name in self.active_adapters:
            if name not in v_of:
                continue
            if name not in a_of or name not in b_of:
                return f"no projections of {name}"
            tensors = v_of[name], w_of[name], a_of[name], b_of[name]
            if any(type(t) not in PLAIN for t in tensors):
                return f"tensors of type {', '.join(sorted({type(t).__name__ for t in tensors}))}"
            if any(t.dtype not in DTYPES for t in tensors):
                return f"tensors of dtype {', '.join(sorted({str(t.dtype) for t in tensors}))}"
            dropout = modules[f"{self._own}_dropout"]._modules[name]
            if type(dropout) not in DROPOUTS:
                return f"dropout {type(dropout).__name__}"
            if hooked(dropout):
                return f"hooks on {self._own}_dropout"
            arguments = self._arguments(name, *tensors)
            if isinstance(arguments, str):
                return arguments
            p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
            adapters.append((*arguments, p))
        if not adapters:
            return "no active adapter"
        weight, bias = plain_linear(modules["base_layer"]) or (None, None)
        if weight is not None and weight.dtype not in DTYPES:
            return f"base dtype {weight.dtype}"
        return _Plan(weight, bias, adapters, self._own != "vera" or getattr(self, "cast_input_dtype_enabled", True))

    def _why(self) -> str | None:
        plan = self._plan()
        return plan if isinstance(plan, str) else None

    def _takes(self, plan: _Plan, x: Tensor) -> bool:
        if x.ndim < 2 or x.dtype not in DTYPES or not (plan.casts or x.dtype == plan.adapters[0][0].dtype):
            return False
        return plan.weight is None or x.dtype == plan.weight.dtype or torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = "called with more than x" if args or kwargs else self._plan()
        if isinstance(plan, str) or not self._takes(plan, x):
            return super().forward(x, *args, **kwargs)
        linear, add = getattr(F, f"{self._own}_linear"), getattr(F, f"{self._own}_add")
        adapters = plan.adapters
        if plan.weight is None:
            y = self._modules["base_layer"](x)
        else:
            y, adapters = linear(x, plan.weight, plan.bias, *adapters[0]), adapters[1:]
        for arguments in adapters:
            y = add(y, x, *arguments)
        return y.to(x.dtype)  # under autocast too, as PEFT does


class FusedVera(_FusedBasis):
    """vera_A [r, Max] and vera_B [Max, r] are prefixes of a pair that the layers share."""

    _own, _vectors = "vera", ("lambda_d", "lambda_b")

    def _arguments(self, name: str, d: Tensor, b: Tensor, A: Tensor, B: Tensor) -> tuple | str:
        if len({t.dtype for t in (d, b, A, B)}) > 1:
            return f"vectors and projections of dtype {d.dtype}, {b.dtype}, {A.dtype}, {B.dtype}"
        r, I, O = len(d), self.in_features, self.out_features
        if A.shape[0] != r or B.shape[1] != r or A.shape[1] < I or B.shape[0] < O:
            return f"projections {list(A.shape)} and {list(B.shape)} for rank {r} and [{O}, {I}]"
        return d, b, A[:, :I].to(d.device), B[:O].mT.to(d.device)


class FusedRandLora(_FusedBasis):
    """randlora_A [r, 1, Min] and randlora_B [Max, N, r] are prefixes of a pair that the layers share."""

    _own, _vectors = "randlora", ("lambda", "gamma")

    def _arguments(self, name: str, lam: Tensor, gam: Tensor, A: Tensor, B: Tensor) -> tuple | str:
        (r, n), small, large = lam.shape, *sorted((self.in_features, self.out_features))
        if A.dtype != B.dtype:
            return f"projections of dtype {A.dtype} and {B.dtype}"
        if A.shape[0] != r or B.shape[2] != r or B.shape[1] < n or A.shape[2] < small or B.shape[0] < large:
            return f"projections {list(A.shape)} and {list(B.shape)} for {n} bases of rank {r}, {small} by {large}"
        if self.num_bases != n:  # PEFT keeps the number of the adapter that was added last
            return f"{n} bases, PEFT's layer has {self.num_bases}"
        B = B[:large, :n].flatten(1).mT  # [n r, large], row j r + k
        return lam, gam, A[:, 0, :small].to(lam.device), B.to(lam.device), float(self.scaling[name])


BASIS_KINDS = {VeraLayer: FusedVera, RandLoraLayer: FusedRandLora}
