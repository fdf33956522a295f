# SPDX-License-Identifier: Apache-2.0
"""What the published variants of LoRA share. A method is one file here: a class with its formula, ``_set_up`` and ``factors``."""

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ...limits import MAX_RANK
from ..linear import LowRankLinear
from ..plain import packed

_EMPTY = inspect.Parameter.empty


class Variant(LowRankLinear):
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ with A and B as the subclass makes them of what it trains.

    W stays frozen and as it was. What does not train (factors of an SVD, masks) are parameters without a gradient, so that files and
    state_dicts have them and load what was trained beside them.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        r: rank. lora_alpha: scale = lora_alpha / r, as in LoRA, where the method does not say otherwise.
        dropout: probability on the adapter's input.
        adapter_dtype: of what trains, float32 where None, as in PEFT; or the dtype of W.
    """

    PACKED = True  # but for methods that take their factors out of W
    MOST: ClassVar[int] = MAX_RANK  # rank that the kernels are asked for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_set_up" in cls.__dict__:
            _sign(cls)

    def _begin(self, base: nn.Module, r: int, lora_alpha: float, dropout: float, adapter_dtype) -> dict[str, Any]:
        """Checks what all have, takes the base layer; dtype and device of parameters."""
        self._whole("r", r, 1, MAX_RANK)
        self._finite("lora_alpha", lora_alpha)
        self._probability("dropout", dropout)
        known = not packed(base) and not base.weight.is_meta  # else ``unlike`` asks, once there is a base
        if known and adapter_dtype not in (None, torch.float32, base.weight.dtype):
            must = f"must be float32 or the base layer's dtype, {base.weight.dtype}"
            raise ValueError(f"{type(self).__name__}: adapter_dtype {must}, got {adapter_dtype!r}")
        like = self._adopt(base, r, adapter_dtype)
        self.lora_alpha, self.dropout = lora_alpha, float(dropout)
        self.scaling = F.lora_scaling(lora_alpha, r)
        return like

    def unlike(self, base: nn.Module) -> str | None:
        linear = base.base_layer if isinstance(base, type(self)) else base
        of_w = None if packed(linear) else linear.weight.dtype
        odd = {p.dtype for p in self.coefficients().values() if p.is_floating_point()} - {torch.float32, of_w}
        return f"a W of {of_w} beside coefficients in {odd.pop()}" if odd and of_w else None

    def _fits(self, name: str, value: object, must: str, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{type(self).__name__}: {name} must {must}, got {value!r}")

    def _settings_repr(self) -> str:
        return "".join(f", {name}={value}" for name, value in self.settings.items() if value is not None)


class MiddleLinear(Variant):
    """y = x Wᵀ + bias + scale · ((dropout(x) Aᵀ) Mᵀ) Bᵀ with frozen lora_A [r, in] and lora_B [out, q]: only what M is made of trains.

    Forward keeps x Aᵀ [T, r] and not x, backward forms no gradient of A and B (``functional.middle_linear``).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def middle(self) -> Tensor:
        """M [q, r], or a gate [r]; differentiable in what trains."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.middle_linear(x, weight, bias, *self._operands(), self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.middle_add(y, x, *self._operands(), self.dropout, self.training)

    def _operands(self) -> tuple:
        return self.middle(), self.lora_A, self.lora_B, self.scaling

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """M A [q, in] and B [out, q]."""
        m, a = self.middle(), self.lora_A
        return (m[:, None] * a if m.dim() == 1 else m @ a), self.lora_B, self.scaling

    @property
    def lora_rank(self) -> int:
        return self.lora_B.shape[1]


def trained(*shape: int, std: float = 0.0, **like: Any) -> nn.Parameter:
    """Zero, or normal."""
    p = nn.Parameter(torch.zeros(*shape, **like))
    return p if std == 0.0 else nn.init.normal_(p, std=std)


def kaiming(*shape: int, **like: Any) -> nn.Parameter:
    """As LoRA's A begins: uniform on ±1 / sqrt(in), kaiming_uniform with a = sqrt(5)."""
    p = nn.Parameter(torch.empty(*shape, **like))
    return nn.init.kaiming_uniform_(p, a=math.sqrt(5)) if p.numel() else p


def frozen(t: Tensor, **like: Any) -> nn.Parameter:
    """A copy, of a dtype and device."""
    return nn.Parameter(t.detach().to(**like, copy=True).contiguous(), requires_grad=False)


def _sign(cls: type[Variant]) -> None:
    """Gives both ways to a layer the signature of its ``_set_up``, so that help() and editors show its settings."""
    settings = list(inspect.signature(cls._set_up).parameters.values())[2:]
    settings = [p.replace(kind=p.KEYWORD_ONLY) for p in settings]
    keyword = lambda name, default, kind: inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
    )
    sizes = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int) for n in _SIZES]
    bias = inspect.Parameter("bias", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=True, annotation=bool)
    where = [
        keyword("device", None, torch.device | str | None),
        keyword("dtype", None, torch.dtype | None),
    ]
    cls.__signature__ = inspect.Signature([*sizes, bias, *settings, *where], return_annotation=cls)

    def from_linear(cls, linear, **settings):
        return cls._wrap(linear, **settings)

    linear = inspect.Parameter("linear", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=nn.Module)
    self = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    from_linear.__signature__ = inspect.Signature([self, linear, *settings], return_annotation=cls)
    from_linear.__doc__ = "Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."
    cls.from_linear = classmethod(from_linear)


_SIZES = ("in_features", "out_features")
