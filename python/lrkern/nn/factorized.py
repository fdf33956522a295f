# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is the product of two factors and nothing else."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .plain import no_linear, plain_linear


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which a decomposition of what has this dtype is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ [r, I] and B = U √S [O, r]."""
    root = s.sqrt()
    return root[:, None] * vh, u * root


class FactorizedLinear(nn.Module):
    """y = (x Aᵀ) Bᵀ + bias: a linear layer of rank r without a W, which ``lrkern.compress`` puts in the place of dense ones.

    A [r, in], B [out, r] and bias [out] all train: (in + out) r + out numbers for in · out + out. It is two F.linear: forward and
    backward at 512 tokens of 2048 x 2048, lrkern's shrink and expand take 1.2 times as long in float32 at r = 16 and 6.5 times in
    bfloat16 at r = 512 (Xeon with AMX, one thread); faster they were only with up to 8 rows of 16 bits at r = 16. On a GPU they
    were not compared. So autocast, torch.compile, checkpointing, torch.func and second derivatives are torch's own, and any rank
    is taken.

    A layer is smaller than its dense one where r < in · out / (in + out). A LoRA goes beside it as beside any linear:
    ``FusedLoRALinear.from_linear(layer)`` freezes the factors. There is no ``weight``: code that reads one gets an AttributeError.

    Args:
        r: rank, 0 to min(in, out); 0 is the bias alone.
        others: as nn.Linear; dtype is any float of 16 bits or more. A and B begin as the weights of two nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self._make(in_features, out_features, bias, r, device, dtype)
        self.reset_parameters()

    def _make(self, in_features: int, out_features: int, bias: bool, r: int, device: Any, dtype: Any) -> None:
        for what, n in (("in_features", in_features), ("out_features", out_features)):
            self._whole(what, n, 1, 2**31 - 1)
        self._whole("r", r, 0, min(in_features, out_features))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"{type(self).__name__}: dtype must be a float of 16 bits or more, got {dtype!r}")
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        new = lambda *shape: nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        self.A, self.B = new(r, in_features), new(out_features, r)
        self.register_parameter("bias", new(out_features) if bias else None)

    def _whole(self, name: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must be a whole number in {low}..{high}, got {value!r}")
        return value

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As two nn.Linear, without a bias and with one."""
        ends = {"A": self.in_features, "B": self.r, "bias": self.r}
        for name, fan_in in ends.items():
            if (p := getattr(self, name)) is not None and p.numel():
                p.uniform_(-1, 1).div_(math.sqrt(max(fan_in, 1)))

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, method: str = "svd"):
        """A layer of its own with a copy of the bias, in the dtype and on the device of W.

        method: "svd", the nearest W of rank r in the Frobenius norm: A = √S Vᵀ, B = U √S, computed in float32 (float64 for W in
            it); "random", as a new layer, for a state_dict to come. Over a W on the meta device both leave A and B empty there.

        Raises TypeError for what is no plain nn.Linear (a forward of its own, hooks, a packed or parametrized weight: what a
        product of two factors would not do), ValueError for another r or method, or a W with inf or nan.
        """
        if method not in ("random", "svd"):
            raise ValueError(f"{cls.__name__}.from_linear: method must be one of ['random', 'svd'], got {method!r}")
        if why := unfit(linear):
            raise TypeError(f"{cls.__name__}.from_linear: linear must be a plain nn.Linear, got {why}")
        w = linear.weight.detach()
        self = cls.__new__(cls)
        self._make(linear.in_features, linear.out_features, linear.bias is not None, r, w.device, w.dtype)
        if method == "random":
            self.reset_parameters()
        elif not w.is_meta:
            if not w.isfinite().all():
                raise ValueError(f"{cls.__name__}.from_linear: weight must be finite, got inf or nan")
            u, s, vh = torch.linalg.svd(w.to(wide(w.dtype)), full_matrices=False)
            self._set(*split(u[:, :r], s[:r], vh[:r]))
        self._set(bias=linear.bias)
        return self.train(linear.training)

    @classmethod
    def from_factors(cls, a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None):
        """A layer with copies of A [r, in], B [out, r] and bias [out], rounded once to dtype (None: that of ``a``).

        Raises ValueError where they do not fit each other."""
        fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and (bias is None or bias.shape == b.shape[:1])
        if not fits:
            got = [list(t.shape) for t in (a, b, *(() if bias is None else (bias,)))]
            raise ValueError(
                f"{cls.__name__}.from_factors: a, b and bias must be [r, in], [out, r] and [out], got {got}"
            )
        self = cls.__new__(cls)
        self._make(a.shape[1], b.shape[0], bias is not None, a.shape[0], a.device, dtype or a.dtype)
        self._set(a, b, bias)
        return self

    @torch.no_grad()
    def _set(self, a: Tensor | None = None, b: Tensor | None = None, bias: Tensor | None = None) -> None:
        for p, t in ((self.A, a), (self.B, b), (self.bias, bias)):
            if t is not None:
                p.copy_(t)

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of what forward computes."""
        return self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        return nn.functional.linear(nn.functional.linear(x, a), b, self.bias)

    @torch.no_grad()
    def product(self) -> Tensor:
        """B A [out, in], in float32 (float64 for factors in it)."""
        a, b = (t.to(wide(t.dtype)) for t in self.factors())
        return b @ a

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function: W = B A, rounded once to the factors' dtype, and a copy of the bias."""
        like = {"device": self.A.device, "dtype": self.A.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.product().to(**like), self.A.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @torch.no_grad()
    def truncate(self, r: int) -> None:
        """Lowers the rank to r in place: A and B become √S Vᵀ and U √S of the nearest matrix of rank r to B A, which is never
        formed. They stay the same parameters without a gradient; what an optimizer keeps of their old shape does not fit them any
        more: make it anew."""
        self._whole("r", r, 0, self.r)
        if r == self.r:
            return
        a, b = self.A.double(), self.B.double()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{type(self).__name__}.truncate: A and B must be finite, got inf or nan")
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
        a, b = split(qb @ u[:, :r], s[:r], vh[:r] @ qa.mT)
        self._resize(a, b)

    def _resize(self, a: Tensor, b: Tensor) -> None:
        """The same parameters with other contents: an optimizer would go on with replaced ones and train nothing."""
        for p, t in ((self.A, a), (self.B, b)):
            p.grad = None
            p.data = t.to(p.dtype, copy=True).contiguous()

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, r={self.r}"


def unfit(linear: nn.Module) -> str | None:
    """What keeps two factors from taking this linear's place, or None."""
    if got := no_linear(linear):
        return got
    return None if plain_linear(linear)[0] is not None else f"{type(linear).__name__} with more to it"
