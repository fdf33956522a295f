# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer with an adapter: what all kinds share, and what those of low rank do.

A new kind is a class with SETTINGS, ``_set_up`` and, below LowRankLinear, ``factors``, else ``_adapted``, ``_beside`` and
``delta_weight``, and where ``low_rank`` may be true, ``factors`` too. Files, conversions and serving ask the class; none has a list of kinds.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..limits import DTYPES
from .plain import conv1d_linear, device_of, no_linear, no_packed, packed, plain_linear, shown, watched

_LARGEST = torch.finfo(torch.float32).max


def constant(value: float, *shape: int, **like: Any) -> nn.Parameter:
    """like: dtype and device, as ``_adopt`` returns them."""
    return nn.Parameter(torch.full(shape, value, **like))


def shape_repr(t: Tensor) -> str:
    """Of a repr: "[16, 64] float32"."""
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _snapshot(m: nn.Module) -> nn.Module:
    """Its settings and a copy of its parameters and buffers, with base_layer itself."""
    copy = object.__new__(type(m))
    copy.__dict__ |= m.__dict__
    copy._parameters = {
        k: p if p is None else nn.Parameter(p.detach().clone(), False) for k, p in m._parameters.items()
    }
    copy._buffers = {k: b if b is None else b.clone() for k, b in m._buffers.items()}
    copy._modules = {k: c if k == "base_layer" else _snapshot(c) for k, c in m._modules.items()}
    return copy


class Method(NamedTuple):
    """What ``lrkern.adapt`` knows a kind of layer by: the settings that make it this method, and who published it."""

    settings: dict[str, Any]
    paper: str


class AdapterLinear(nn.Module):
    """y = x Wᵀ + bias + what the adapter adds. W stays frozen, the coefficients train; with r = 0 it is the base layer alone.

    A base layer that is no plain nn.Linear (``nn.plain``: a forward of its own, hooks, a parametrized or pruned weight) keeps its
    forward, and the adapter adds to it. What it is is asked in every call.

    While the layer is merged, W holds the adapter: ``state_dict``, ``load_state_dict``, ``merge``, ``disable_adapter`` and a
    forward in training mode that records gradients are refused with a RuntimeError. What is written to coefficients or
    settings then acts from ``unmerge`` on, which takes from W what ``merge`` added. Files, copies and pickles are as ever.
    """

    SETTINGS: ClassVar[tuple[str, ...]]  # attributes that, given to from_linear, make the same layer again
    KINDS: ClassVar[dict[str, type["AdapterLinear"]]] = {}  # by name the classes that have SETTINGS of their own
    METHODS: ClassVar[dict[str, Method]] = {}  # that it is, by the name ``lrkern.adapt`` takes
    # The method as PEFT has it: peft_type of its config, and the settings that are one for all layers there.
    PEFT_TYPE: ClassVar[str | None] = None
    PEFT_SHARES: ClassVar[tuple[str, ...]] = ()

    PACKED: ClassVar[bool] = False  # whether the base layer may keep W packed, see ``nn.plain.no_packed``
    QUANTIZES: ClassVar[bool] = True  # whether a file may keep the coefficients in 8 or 4 bits

    low_rank = False  # whether a LoRA of lower rank than W equals it: that of ``factors``
    FULL: ClassVar[str] = "has full rank"  # why not
    _SUM = "W + delta_weight()"  # what merge writes, in its errors
    _as_merged: "AdapterLinear | None" = None  # what the adapter was when it was merged

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
    def from_conv1d(cls, conv: nn.Module, **settings: Any):
        """Wraps transformers' Conv1D, whose weight is [in, out]: the base layer's is a view of it, so that ``merge`` writes there."""
        if type(conv).__name__ != "Conv1D" or not isinstance(getattr(conv, "weight", None), nn.Parameter):
            raise TypeError(f"{cls.__name__}.from_conv1d: conv must be a Conv1D, got {type(conv).__name__}")
        return cls.from_linear(conv1d_linear(conv), **settings)

    @classmethod
    def _wrap(cls, linear: nn.Linear, *args: Any, **settings: Any):
        if got := cls._unfit(linear):
            must = "must be an nn.Linear with a plain weight"
            if cls.PACKED:
                must += ", or a linear that keeps W packed (in_features, out_features, a forward, no parts)"
            raise TypeError(f"{cls.__name__}.from_linear: linear {must}, got {got}")
        self = cls.__new__(cls)
        self._make(linear, *args, **settings)
        return self

    @classmethod
    def _unfit(cls, linear: nn.Module) -> str | None:
        got = no_linear(linear)
        if not got or not cls.PACKED:
            return got
        why = no_packed(linear)
        return why and (got if isinstance(linear, nn.Linear) else why)

    def _make(self, base: nn.Linear, *args: Any, **settings: Any) -> None:
        if unknown := [name for name in settings if name not in (*self.SETTINGS, "adapter_dtype")]:
            raise TypeError(f"{type(self).__name__}._set_up() got an unexpected keyword argument {unknown[0]!r}")
        nn.Module.__init__(self)
        trained = [(p, p.requires_grad) for p in base.parameters()]
        try:
            self._set_up(base, *args, **settings)
        except BaseException:
            for p, trains in trained:  # a base layer that was refused is as it was
                p.requires_grad_(trains)
            raise

    def _set_up(self, base: nn.Linear, **settings: Any) -> None:
        """Checks the settings, takes the base layer with ``_adopt`` and makes the coefficients."""
        raise NotImplementedError

    def _adopt(self, base: nn.Linear, r: int, adapter_dtype: torch.dtype | None) -> dict[str, Any]:
        """Takes and freezes the base layer; returns dtype and device of coefficients beside it."""
        of_base = None if self.PACKED and packed(base) else base.weight.dtype
        for what, dtype in (("dtype of the base layer", of_base), ("adapter_dtype", adapter_dtype)):
            if dtype not in (None, *DTYPES):
                must = "must be float32, float16 or bfloat16"
                raise ValueError(f"{type(self).__name__}: {what} {must}, got {dtype!r}")
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.base_layer = base.requires_grad_(False)
        self.enabled, self.merged = True, False
        return {"dtype": adapter_dtype or torch.float32, "device": device_of(base)}

    def _whole(self, name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must be a whole number in {low}..{high}, got {value!r}")
        return value

    def _number(self, name: str, value: Any, must: str, low: float, high: float) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must {must}, got {value!r}")

    def _finite(self, name: str, value: Any) -> None:
        self._number(name, value, "be a finite number", -_LARGEST, _LARGEST)

    def _probability(self, name: str, value: Any) -> None:
        self._number(name, value, "lie in [0, 1]", 0.0, 1.0)

    def _flag(self, name: str, value: Any) -> None:
        if type(value) is not bool:
            raise ValueError(f"{type(self).__name__}: {name} must be True or False, got {value!r}")

    def _one_of(self, name: str, value: Any, known: Any) -> None:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{type(self).__name__}: {name} must be one of {sorted(known)}, got {value!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this layer again: from_linear(linear, **settings), but for the values of the coefficients."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    __jit_unused_properties__: ClassVar = ["weight", "bias"]

    @property
    def weight(self) -> Tensor:
        """base_layer's, to be asked for its dtype, device and shape (``plain.shown``)."""
        return shown(self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        return shown(self.base_layer.bias)

    def coefficients(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, by their key in the state_dict."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    @classmethod
    def plan(
        cls, model: nn.Module, linears: Mapping[str, nn.Module], settings: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The settings of each layer of a model, by name in the model's order, of those that the user gave: what the layers share, or
        what follows from their place. A ValueError says why the model does not fit. Changes nothing."""
        return settings

    @classmethod
    def connect(cls, layers: Mapping[str, "AdapterLinear"]) -> None:
        """Called with all layers of this kind of a model once they are in it: what they share, or know of one another."""

    def not_peft(self) -> str | None:
        """What keeps this layer from being PEFT's method of PEFT_TYPE: "<setting> must ..., got ..."."""
        return None

    @classmethod
    def has_factors(cls) -> bool:
        """Whether layers of this kind may be of low rank."""
        return hasattr(cls, "factors")

    @property
    def lora_rank(self) -> int:
        """Of the LoRA that ``factors`` gives."""
        return self.r

    def shared_pair(self) -> tuple[F.Basis, F.Basis] | None:
        """A [r, I] and B [r, O] as large as they are shared with other layers, where the adapter is
        b ⊙ ((d ⊙ (x Aᵀ)) B) and its coefficients are d [r] and b [out]: what serving keeps once for all layers."""
        return None

    def unlike(self, base: nn.Module) -> str | None:
        """What says that this layer, read from a file, is not of this base layer or layer of its kind, where it can tell."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled or not self.r:
            return self._base_alone(x)
        base = self._modules["base_layer"]  # nn.Module.__getattr__ is the slow way
        weight, bias = plain_linear(base)
        if watched():
            return self._beside(base(x), x)
        return self._over(base, x) if weight is None else self._adapted(x, weight, bias)

    def _base_alone(self, x: Tensor) -> Tensor:
        if self.merged:
            self._refuse_if(
                not self.enabled, "forward", "be enabled while merged, W holds the adapter; unmerge() first"
            )
            trains = self.r and self.training and torch.is_grad_enabled()
            trains = trains and any(p.requires_grad for p in self.coefficients().values())
            self._refuse_if(
                trains, "forward", "not be merged in training, nothing would train; unmerge() or eval() first"
            )
        return self.base_layer(x)

    def _refuse_if(self, wrong: Any, who: str, must: str) -> None:
        if wrong:
            raise RuntimeError(f"{type(self).__name__}.{who}: the layer must {must}")

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Over a plain base layer."""
        raise NotImplementedError

    def _over(self, base: nn.Module, x: Tensor) -> Tensor:
        """Over a base layer of any other kind."""
        return self._beside(base(x), x)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        """Beside a base layer of any other kind, which gave y."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW [out, in] in float32: what ``merge`` adds to W."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight(), rounded once to W's dtype; forward is the base layer from then on. Refuses a non-finite
        result and leaves W as it was; a layer that is merged or disabled; and a base layer that is no plain nn.Linear."""
        self._check_merge()
        if self.r:
            now = _snapshot(self)
            self._write(now._merged_weight(self.base_layer.weight.float()), "merge")
            self.__dict__["_as_merged"] = now  # not a submodule
        self.merged = True

    def _check_merge(self) -> None:
        self._refuse_if(self.merged, "merge", "not be merged already; unmerge() first")
        self._refuse_if(not self.enabled, "merge", "be enabled; enable_adapter() first")
        kind, plain = type(self.base_layer).__name__, plain_linear(self.base_layer)[0] is not None
        must = f"have a plain nn.Linear without hooks as base_layer, W is not all that {kind} computes"
        if packed(self.base_layer):
            must = (
                f"have a plain nn.Linear as base_layer, {kind} keeps W packed; load its coefficients into a layer over the dequantised "
                "nn.Linear and merge that"
            )
        self._refuse_if(not plain, "merge", must)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes from W what ``merge`` added: W up to the rounding of its dtype. Does nothing where it is not merged."""
        if self.r and self.merged:
            then, w = self._as_merged or self, self.base_layer.weight
            for name, t in (*then.named_parameters(), *then.named_buffers()):
                if not name.startswith("base_layer."):
                    t.data = t.data.to(w.device)
            self._write(then._unmerged_weight(w.float()), "unmerge")
        self.__dict__.pop("_as_merged", None)
        self.merged = False

    def _merged_weight(self, w: Tensor) -> Tensor:
        return w + self.delta_weight()

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        return w - self.delta_weight()

    def _write(self, new: Tensor, who: str) -> None:
        w = self.base_layer.weight
        new = new.to(w.dtype)
        if not new.isfinite().all():
            raise ValueError(f"{type(self).__name__}.{who}: {self._SUM} must be finite, got inf or nan; W is unchanged")
        w.copy_(new)

    # A state_dict has W and the adapter: with W merged, it would count the adapter twice, or leave a W that no unmerge mends.
    # base_layer.state_dict() is the merged linear.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._refuse_if(self.merged, "state_dict", f"not be merged (layer {prefix[:-1]!r}); unmerge() first")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._refuse_if(self.merged, "load_state_dict", f"not be merged (layer {prefix[:-1]!r}); unmerge() first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def enable_adapter(self, enabled: bool = True) -> None:
        self._refuse_if(self.merged and not enabled, "disable_adapter", "not be merged; unmerge() first")
        self.enabled = enabled

    def disable_adapter(self) -> None:
        self.enable_adapter(False)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}{self._settings_repr()}"
        text += "".join(f", {name}: {shape_repr(p)}" for name, p in self._parameters.items() if p is not None)
        return text + (", merged" if self.merged else "") + ("" if self.enabled else ", disabled")

    def _settings_repr(self) -> str:
        return "".join(f", {name}={value}" for name, value in self.settings.items())


class LowRankLinear(AdapterLinear):
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ, with A and B as ``factors`` makes them of the coefficients.

    Forward, delta_weight, merge, ``convert.to_lora`` and serving follow. ``_set_up`` sets ``dropout``. A subclass that has a
    shorter way to y than through its factors overrides ``_adapted``.
    """

    low_rank = True

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] and the scale of their product; differentiable where ``_adapted`` is not overridden."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.lora_linear(x, weight, bias, *self.factors(), self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.lora_add(y, x, *self.factors(), self.dropout, self.training)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scale · B A [out, in] in float32: what ``merge`` adds to W."""
        a, b, scale = self.factors()
        return scale * (b.float() @ a.float())
