# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer with an adapter: what all kinds share, and what those of low rank do.

A new kind is a class with SETTINGS, ``_set_up`` and, below LowRankLinear, ``factors``, else ``_adapted`` and ``delta_weight``.
Files, conversions and serving ask the class; none has a list of kinds.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F


def is_plain_linear(module: Any) -> bool:
    """Whether it is an nn.Linear whose weight is a torch.Tensor, not one of a subclass (quantised, sharded, ...)."""
    return isinstance(module, nn.Linear) and type(module.weight.data) is Tensor


def constant(value: float, *shape: int, **like: Any) -> nn.Parameter:
    """like: dtype and device, as ``_adopt`` returns them."""
    return nn.Parameter(torch.full(shape, value, **like))


class AdapterLinear(nn.Module):
    """y = x Wᵀ + bias + what the adapter adds. W stays frozen, the coefficients train; with r = 0 it is the base layer alone."""

    SETTINGS: ClassVar[tuple[str, ...]]  # attributes that, given to from_linear, make the same layer again
    KINDS: ClassVar[dict[str, type["AdapterLinear"]]] = {}  # by name the classes that have SETTINGS of their own
    # The method as PEFT has it: peft_type of its config, and the settings that are one for all layers there.
    PEFT_TYPE: ClassVar[str | None] = None
    PEFT_SHARES: ClassVar[tuple[str, ...]] = ()

    _SUM = "W + delta_weight()"  # what merge writes, in its errors

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "SETTINGS" in cls.__dict__:
            cls.KINDS.setdefault(cls.__name__, cls)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        self._make(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), **settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any):
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(linear, **settings)

    @classmethod
    def _wrap(cls, linear: nn.Linear, *args: Any, **settings: Any):
        if not is_plain_linear(linear):
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be an nn.Linear with a plain weight, got {linear}"
            )
        self = cls.__new__(cls)
        self._make(linear, *args, **settings)
        return self

    def _make(self, base: nn.Linear, *args: Any, **settings: Any) -> None:
        if unknown := [name for name in settings if name not in (*self.SETTINGS, "adapter_dtype")]:
            raise TypeError(f"{type(self).__name__}._set_up() got an unexpected keyword argument {unknown[0]!r}")
        nn.Module.__init__(self)
        self._set_up(base, *args, **settings)

    def _set_up(self, base: nn.Linear, **settings: Any) -> None:
        """Checks the settings, takes the base layer with ``_adopt`` and makes the coefficients."""
        raise NotImplementedError

    def _adopt(self, base: nn.Linear, r: int, adapter_dtype: torch.dtype | None) -> dict[str, Any]:
        """Takes and freezes the base layer; returns dtype and device of coefficients beside it."""
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.base_layer = base.requires_grad_(False)
        self.enabled, self.merged = True, False
        low = base.weight.dtype in (torch.float16, torch.bfloat16)
        return {"dtype": adapter_dtype or (torch.float32 if low else base.weight.dtype), "device": base.weight.device}

    def _whole(self, name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must be a whole number in {low}..{high}, got {value!r}")
        return value

    def _finite(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value!r}")

    def _probability(self, name: str, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{type(self).__name__}: {name} must lie in [0, 1], got {value}")

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this layer again: from_linear(linear, **settings), but for the values of the coefficients."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def coefficients(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, by their key in the state_dict."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    def not_peft(self) -> str | None:
        """What keeps this layer from being PEFT's method of PEFT_TYPE: "<setting> must ..., got ..."."""
        return None

    def shared_pair(self) -> tuple[F.Basis, F.Basis] | None:
        """A [r, I] and B [r, O] as large as they are shared with other layers, where the adapter is
        b ⊙ ((d ⊙ (x Aᵀ)) B) and its coefficients are d [r] and b [out]: what serving keeps once for all layers."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged or not self.enabled or not self.r else self._adapted(x)

    def _adapted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW [out, in] in float32: what ``merge`` adds to W."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight(), rounded once to W's dtype; forward is the base layer from then on. Refuses a non-finite
        result and leaves W as it was."""
        if self.r and not self.merged:
            self._write(self._merged_weight(self.base_layer.weight.float()))
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes from W what ``merge`` added: W up to the rounding of its dtype."""
        if self.r and self.merged:
            self._write(self._unmerged_weight(self.base_layer.weight.float()))
        self.merged = False

    def _merged_weight(self, w: Tensor) -> Tensor:
        return w + self.delta_weight()

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        return w - self.delta_weight()

    def _write(self, new: Tensor) -> None:
        w = self.base_layer.weight
        new = new.to(w.dtype)
        if not new.isfinite().all():
            raise ValueError(f"{type(self).__name__}.merge: {self._SUM} must be finite, got inf or nan; W is unchanged")
        w.copy_(new)

    def enable_adapter(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def disable_adapter(self) -> None:
        self.enabled = False

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}{self._settings_repr()}"
        return text + (", merged" if self.merged else "") + ("" if self.enabled else ", disabled")

    def _settings_repr(self) -> str:
        return "".join(f", {name}={value}" for name, value in self.settings.items())


class LowRankLinear(AdapterLinear):
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ, with A and B as ``factors`` makes them of the coefficients.

    Forward, delta_weight, merge, ``convert.to_lora`` and serving follow. ``_set_up`` sets ``dropout``. A subclass that has a
    shorter way to y than through its factors overrides ``_adapted``.
    """

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] and the scale of their product; differentiable where ``_adapted`` is not overridden."""
        raise NotImplementedError

    def _adapted(self, x: Tensor) -> Tensor:
        base = self.base_layer
        return F.lora_linear(x, base.weight, base.bias, *self.factors(), self.dropout, self.training)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scale · B A [out, in] in float32: what ``merge`` adds to W."""
        a, b, scale = self.factors()
        return scale * (b.float() @ a.float())
