# SPDX-License-Identifier: Apache-2.0
"""A linear layer without a W whose ranks are trained in order of importance."""

from typing import Any

import torch
from torch import Tensor, nn

from .factorized import FactorizedLinear


class MaestroLinear(FactorizedLinear):
    """y = (x A[:b]ᵀ) B[:, :b]ᵀ + bias: Maestro (Horváth et al., arXiv 2308.14929), there W = U Vᵀ with U = B [out, k], V = Aᵀ [in, k].

    Training runs prefixes of the ranks, drawn anew for each step (``active``, ``compress.prefix``), so that the first ranks learn
    what matters most; a hierarchical group lasso (``lasso``, ``compress.group_lasso``) pulls the last ones to zero, and ``shrink``
    drops them. A, B and bias train, ranks from ``active`` on have zero gradients. With b = k it is the dense product.

    In torch.compile each ``active`` is a graph of its own, and torch gives up after 8 of them; for drawn prefixes set
    torch._dynamo.config.allow_unspec_int_on_nn_module, with which one graph runs all. A state_dict holds the ranks that are left:
    load it into a layer of that r.

    Args:
        r: how many ranks there are, 0 to min(in, out), which None means.
        others: as FactorizedLinear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self._make(in_features, out_features, bias, r, device, dtype)
        self.reset_parameters()

    def _make(self, in_features: int, out_features: int, bias: bool, r: int | None, device: Any, dtype: Any) -> None:
        super()._make(
            in_features, out_features, bias, min(in_features, out_features) if r is None else r, device, dtype
        )
        self._active: int | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int | None = None, method: str = "svd"):
        """As ``FactorizedLinear.from_linear``, of full rank where r is None: with "svd" y is the linear's up to rounding."""
        return super().from_linear(linear, r, method)

    @property
    def active(self) -> int | None:
        """How many of the first ranks run, 0 to r; None for all there are. It is no part of a state_dict."""
        return self._active

    @active.setter
    def active(self, b: int | None) -> None:
        self._active = None if b is None else self._whole("active", b, 0, self.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self._active
        return (self.A, self.B) if b is None else (self.A[:b], self.B[:, :b])

    def _resize(self, a: Tensor, b: Tensor) -> None:
        super()._resize(a, b)
        self._active = None

    def norms(self, hierarchical: bool = True) -> tuple[Tensor, Tensor]:
        """‖A[j:]‖ and ‖B[:, j:]‖ of every rank j [r], of all ranks from j on; otherwise of rank j alone. In float32 at least and
        differentiable, with the subgradient 0 where a norm is 0 (where the authors' code has nan)."""
        return _norms(self.A, 1, hierarchical), _norms(self.B, 0, hierarchical)

    def lasso(self, hierarchical: bool = True) -> Tensor:
        """Σ_j (‖A[j:]‖ + ‖B[:, j:]‖), to be added to the loss times λ."""
        a, b = self.norms(hierarchical)
        return (a + b).sum()

    @torch.no_grad()
    def importance(self, hierarchical: bool = True) -> Tensor:
        """‖A[j:]‖ · ‖B[:, j:]‖ of every rank j [r]; hierarchically it never grows with j."""
        a, b = self.norms(hierarchical)
        return a * b

    def shrink(
        self, threshold: float = 1e-5, hierarchical: bool = True, optimizer: torch.optim.Optimizer | None = None
    ) -> int:
        """Drops the ranks whose ``importance`` is below the threshold, in place, and returns how many are left.

        A and B stay the same parameters and lose these ranks, and so does what ``optimizer`` keeps of them in their shape (momenta);
        without it, one with such a state fails at its next step. Where ranks went, ``active`` is None. Refused with a ValueError, the
        layer as it was: another threshold, importances that are nan, or state of the optimizer in a shape that says no ranks.
        """
        return self._drop(*self._plan(threshold, hierarchical, optimizer))

    @torch.no_grad()
    def _plan(
        self, threshold: float, hierarchical: bool, optimizer: torch.optim.Optimizer | None
    ) -> tuple[Tensor, list[tuple[dict[str, Any], str, int]]]:
        """Which ranks stay, and what an optimizer keeps by rank."""
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not threshold >= 0:
            raise ValueError(f"{type(self).__name__}.shrink: threshold must be a number >= 0, got {threshold!r}")
        importance = self.importance(hierarchical)
        if importance.isnan().any():
            raise ValueError(f"{type(self).__name__}.shrink: A and B must be finite, got nan")
        kept = (importance >= threshold).nonzero()[:, 0]
        return kept, [] if optimizer is None else self._states(optimizer)

    @torch.no_grad()
    def _drop(self, kept: Tensor, states: list[tuple[dict[str, Any], str, int]]) -> int:
        if len(kept) == self.r:
            return self.r
        for state, name, dim in states:
            state[name] = state[name].index_select(dim, kept)
        grads = self.A.grad, self.B.grad
        self._resize(self.A.data[kept], self.B.data[:, kept])
        for p, grad, dim in zip((self.A, self.B), grads, (0, 1), strict=True):
            p.grad = None if grad is None else grad.index_select(dim, kept)
        return self.r

    def _states(self, optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], str, int]]:
        """What an optimizer keeps of A and B by rank: where, and the dimension of the ranks."""
        found = []
        for p, dim in ((self.A, 0), (self.B, 1)):
            state = optimizer.state.get(p, {})
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1 < p.numel():
                    continue  # a count of steps
                if value.shape != p.shape:
                    must = f"keep its state in the shape of the factors {list(p.shape)} or as single numbers"
                    raise ValueError(
                        f"{type(self).__name__}.shrink: optimizer must {must}, got {name} {list(value.shape)}"
                    )
                found.append((state, name, dim))
        return found

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self._active is None else f", active={self._active}")


def _norms(p: Tensor, dim: int, hierarchical: bool) -> Tensor:
    """Over dim, of each rank or of all from it on."""
    squares = p.to(torch.promote_types(p.dtype, torch.float32)).square().sum(dim)
    if hierarchical:
        squares = squares.flip(0).cumsum(0).flip(0)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
