# SPDX-License-Identifier: Apache-2.0
"""Drop-in for Hugging Face PEFT.

``lrkern.peft.patch(model)`` makes an existing PEFT model run on lrkern, in place; ``register(config, model)`` makes the
layers that PEFT creates from a config fused from the start; ``report(model)`` says what runs, ``unpatch(model)`` undoes it.
``patch`` also takes VeRA and RandLoRA layers, with the projections that PEFT stores (``basis``).

A LoRA layer over an exact nn.Linear runs as one op. Over any other base layer (bitsandbytes, GPTQ, AWQ, torchao, ...) the
base runs untouched and lrkern adds the low-rank part. DoRA is fused over both. What a layer does is decided in every call
from the layer as it then is (``_plan``); what is not fused runs PEFT's own forward. Only a layer's class changes:
parameters, state_dict, configs and files stay PEFT's, and nothing in PEFT is monkeypatched.

Adapter files of lrkern's own modules: ``save_adapter`` and ``load_adapter`` write and read PEFT's format (safetensors
only).
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from .. import functional as F
from .. import ops
from ..caches import DoraNorm, MixedFactors
from ..files.folder import rank_and_scaling, read_adapter, write_adapter  # noqa: F401
from ..files.lora import load_adapter, save_adapter
from .basis import BASIS_KINDS, FusedRandLora, FusedVera  # noqa: F401
from .layer import DROPOUTS, DTYPES, PLAIN, Patched, hooked, not_now, patched_class, plain_linear

__all__ = ["Report", "load_adapter", "patch", "register", "report", "save_adapter", "unpatch"]

_NO_LINEAR = (Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention, ParamWrapper)


class _Adapter(NamedTuple):
    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float
    dropout_p: float  # 0 where it does not act


class _Plan(NamedTuple):
    weight: Tensor | None  # of a plain nn.Linear, None for any other base layer
    bias: Tensor | None
    adapters: list[_Adapter]
    magnitude: Tensor | None  # DoRA


# ---------------------------------------------------------------------------------------------------- the decision


def _plan(layer: LoraLayer) -> _Plan | str:
    """How to run this layer as it is now, or why it must run PEFT's own forward."""
    if why := not_now(layer):
        return why
    modules = layer._modules  # nn.Module.__getattr__ is the slow way, and this runs on every call
    a_of, b_of = modules["lora_A"]._modules, modules["lora_B"]._modules
    active = [name for name in layer.active_adapters if name in a_of]
    if not active:
        return "no active adapter"
    magnitude, adapters = None, []
    for name in active:
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name])
            if variant is not DoraLinearVariant:
                return f"variant {variant.__name__}"
            if len(active) > 1:
                return "DoRA among several active adapters"
            vector = modules["lora_magnitude_vector"]._modules[name]
            magnitude = vector._parameters.get("weight")
            if type(vector) is not DoraLinearLayer or type(magnitude) not in PLAIN:
                return f"lora_magnitude_vector is {type(vector).__name__} with a weight of {type(magnitude).__name__}"
            if hooked(vector):
                return "hooks on lora_magnitude_vector"
        adapter = _adapter(layer, name, a_of[name], b_of[name], modules["lora_dropout"]._modules[name])
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    base = modules["base_layer"]
    if plain := plain_linear(base):
        if plain[0].dtype not in DTYPES:
            return f"base dtype {plain[0].dtype}"
        if all(f.a.dtype in (plain[0].dtype, torch.float32) for f in adapters):
            return _Plan(*plain, adapters, magnitude)
    if magnitude is not None and not (hasattr(base, "weight") and hasattr(base, "bias")):
        return f"DoRA over {type(base).__name__}, which has no weight and bias"
    return _Plan(None, None, adapters, magnitude)


def _mixture(layer: LoraLayer, x: Tensor, names: Any) -> dict[str, _Adapter] | None:
    """The adapters of PEFT's mixed batch, adapter_names= of one name a row, or None where PEFT's own code must run."""
    if not_now(layer) or torch.compiler.is_compiling() or not isinstance(names, (list, tuple)):
        return None
    if x.ndim < 2 or len(x) != len(names) or not x.numel() or x.dtype not in DTYPES:
        return None
    modules, found = layer._modules, {}
    a_of, b_of = modules["lora_A"]._modules, modules["lora_B"]._modules
    for name in dict.fromkeys(names):
        if name == "__base__" or name not in a_of:
            continue
        if name in layer.lora_variant:
            return None
        adapter = _adapter(layer, name, a_of[name], b_of[name], modules["lora_dropout"]._modules[name])
        if isinstance(adapter, str) or adapter.dropout_p:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, adapter.a, adapter.b)):
            return None
        found[name] = adapter
    return found


def _adapter(layer: LoraLayer, name: str, a: nn.Module, b: nn.Module, dropout: nn.Module) -> _Adapter | str:
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"lora_A and lora_B are {type(a).__name__} and {type(b).__name__}, fused with nn.Linear"
    wa, wb = a._parameters.get("weight"), b._parameters.get("weight")
    if type(wa) not in PLAIN or type(wb) not in PLAIN:
        return f"factors of type {type(wa).__name__} and {type(wb).__name__}"
    if wa.dtype != wb.dtype or wa.dtype not in DTYPES:
        return f"factors of dtype {wa.dtype} and {wb.dtype}"
    if a.bias is not None or b.bias is not None:
        return "lora_bias"
    if type(dropout) not in DROPOUTS:
        return f"dropout {type(dropout).__name__}"
    if wa.shape[0] > 512:
        return f"rank {wa.shape[0]}, fused up to 512"
    if hooked(a) or hooked(b) or hooked(dropout):
        return "hooks on lora_A, lora_B or lora_dropout"
    scale = layer.scaling[name]
    if isinstance(scale, Tensor):  # peft.utils.hotswap.prepare_model_for_compiled_hotswap
        wb, scale = wb * scale.to(wb), 1.0
    return _Adapter(wa, wb, float(scale), dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)


# ---------------------------------------------------------------------------------------------------- the layer


class _Fused(Patched):
    """A LoRA layer."""

    _kept: ClassVar = {"_lrkern_norm": DoraNorm, "_lrkern_mixed": MixedFactors}

    def _why(self) -> str | None:
        plan = _plan(self)
        return plan if isinstance(plan, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.keys() == {"adapter_names"} and not args:
            names = kwargs["adapter_names"]
            adapters = _mixture(self, x, names)
            return super().forward(x, **kwargs) if adapters is None else self._mixed(x, names, adapters)
        plan = "called with more than x" if args or kwargs else _plan(self)
        if isinstance(plan, str) or not _takes(plan, x):
            return super().forward(x, *args, **kwargs)
        weight, bias, adapters, magnitude = plan
        if magnitude is not None:
            return self._dora(x, weight, bias, adapters[0], magnitude)
        if weight is None:
            y = self._modules["base_layer"](x)
        else:
            y, adapters = F.lora_linear(x, weight, bias, *adapters[0]), adapters[1:]
        for a, b, scale, p in adapters:
            y = _add(y, x, a, b, scale, p)
        return y

    def _mixed(self, x: Tensor, names: list[str], adapters: dict[str, _Adapter]) -> Tensor:
        y = self._modules["base_layer"](x)
        if not adapters:
            return y
        dtypes = {x.dtype, y.dtype, *(f.a.dtype for f in adapters.values())}
        kept: MixedFactors = self.__dict__["_lrkern_mixed"]
        a_pool, b_pool, *where = kept(
            [(f.a, f.b) for f in adapters.values()], dtypes.pop() if len(dtypes) == 1 else torch.float32
        )
        number, times = {name: i for i, name in enumerate(adapters)}, x.shape[:-1].numel() // len(names)
        index = torch.tensor([number.get(name, -1) for name in names], dtype=torch.int32)
        scales = torch.tensor([adapters[name].scale if name in adapters else 0.0 for name in names])
        index, scales = (t.to(x.device).repeat_interleave(times) for t in (index, scales))
        plan = ops.multi_lora_plan(index, len(adapters))
        s = ops.multi_lora_shrink(x, a_pool, *where, plan, scales)
        return ops.multi_lora_expand(y, s, b_pool, *where, plan)

    def _forget(self) -> None:
        for key in self._kept:
            self.__dict__[key].clear()

    def _dora(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, f: _Adapter, magnitude: Tensor) -> Tensor:
        norm_of: DoraNorm = self.__dict__["_lrkern_norm"]
        p = f.dropout_p if self.training else 0.0
        if weight is not None:
            return F.dora_linear(x, weight, bias, f.a, f.b, magnitude, f.scale, p, True, norm_of(weight, *f[:3]))
        base = self._modules["base_layer"]
        turn = self.__dict__.get("fan_in_fan_out", False)
        dense = functools.cache(lambda: transpose(dequantize_module_weight(base), turn).to(x.dtype))
        y = base(x)
        g = magnitude / norm_of(base.weight, *f[:3], dense)
        if p:
            x = torch.dropout(x, p, True)
            product = nn.functional.linear(x, dense())
        else:
            product = y if base.bias is None else y - base.bias
        return _add((y + (g - 1) * product).to(y.dtype), x, f.a, (g[:, None] * f.b).to(f.b.dtype), f.scale, 0.0)

    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


def _reached(name: str) -> property:
    """Whoever reaches for the factors by name may write them through ``.data``, as PEFT's merge and hotswap do, which no
    version counter sees: what was kept of them goes."""

    def get(self: _Fused) -> nn.Module:
        self._forget()
        return self._modules[name]

    return property(get)


for _name in ("base_layer", "lora_A", "lora_B"):
    setattr(_Fused, _name, _reached(_name))


def _takes(plan: _Plan, x: Tensor) -> bool:
    if plan.magnitude is not None and x.ndim < 2:  # PEFT answers with [1, O]
        return False
    if plan.weight is not None:
        return x.dtype == plan.weight.dtype or torch.is_autocast_enabled(x.device.type)
    return x.dtype in DTYPES


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    if a.dtype != torch.float32 and not a.dtype == x.dtype == y.dtype:  # a base layer may answer in a dtype of its own
        a, b = a.float(), b.float()
    return F.lora_add(y, x, a, b, scale, p)


# ---------------------------------------------------------------------------------------------------- for users


@dataclass
class Report:
    """Per adapted layer its name and None (fused) or the reason why PEFT's own code runs."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> int:
        return sum(why is None for why in self.layers.values())

    def __str__(self) -> str:
        lines = [f"lrkern: {self.fused} of {len(self.layers)} adapted layers fused"]
        return "\n".join(lines + [f"  {name}: PEFT's own code, {why}" for name, why in self.layers.items() if why])


_KINDS = {LoraLayer: _Fused, **BASIS_KINDS}  # by PEFT's class of layers, what comes before it
_TUNERS = ("peft.tuners.lora.", "peft.tuners.vera.layer", "peft.tuners.randlora.layer")


def _cannot_patch(layer: BaseTunerLayer) -> str | None:
    """Why this layer's class must stay what it is."""
    if isinstance(layer, _NO_LINEAR):
        return f"{type(layer).__name__} is no linear layer"
    if not type(layer).forward.__module__.startswith(_TUNERS):
        return f"{type(layer).__name__} has a forward of its own"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    return None


def _patch(layer: BaseTunerLayer) -> str | None:
    if not isinstance(layer, Patched):
        if why := _cannot_patch(layer):
            return why
        mixin = next(mixin for kind, mixin in _KINDS.items() if isinstance(layer, kind))
        layer.__dict__.update({key: make() for key, make in mixin._kept.items()})
        layer.__class__ = patched_class(mixin, type(layer))
    return layer._why()


def _layers(model: nn.Module, who: str) -> dict[str, BaseTunerLayer]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, tuple(_KINDS))}
    if not layers:
        raise ValueError(
            f"lrkern.peft.{who}: model must have PEFT LoRA layers (or VeRA, RandLoRA), got {type(model).__name__} with none"
        )
    return layers


def patch(model: nn.Module) -> Report:
    """Makes the LoRA, VeRA and RandLoRA linears of a PEFT model run on lrkern, in place, and reports per layer."""
    return Report({name: _patch(layer) for name, layer in _layers(model, "patch").items()})


def report(model: nn.Module) -> Report:
    """What each adapted layer of the model would do if it were called now. Changes nothing."""
    layers = _layers(model, "report").items()
    return Report({n: m._why() if isinstance(m, Patched) else _cannot_patch(m) or "not patched" for n, m in layers})


def unpatch(model: nn.Module) -> None:
    """Gives every layer that ``patch`` or ``register`` took its PEFT class back."""
    patched = [m for m in model.modules() if isinstance(m, Patched)]
    for m in patched:
        if "_lrkern_base" not in type(m).__dict__:  # such as FSDP2's own subclass of a layer
            raise RuntimeError(f"lrkern.peft.unpatch: {type(m).__name__} was made of a patched layer, undo that first")
    for m in patched:
        m.__class__ = type(m)._lrkern_base
        for key in m.__dict__.keys() & {key for mixin in _KINDS.values() for key in mixin._kept}:
            del m.__dict__[key]


def register(config: peft.LoraConfig, model: nn.Module) -> None:
    """Makes the LoRA layers that PEFT creates from this config fused from the start, whatever their base layer:

        lrkern.peft.register(config, model); model = peft.get_peft_model(model, config)

    or PeftModel.from_pretrained(model, folder, config=config). PEFT does not write a registration to its files.
    """
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"lrkern.peft.register: config must be a peft.LoraConfig, got {type(config).__name__}")
    theirs = dict(config._custom_modules or {})  # the user's own choice of classes goes on deciding
    kinds = {type(m) for m in model.modules() if not list(m.children()) and [*m.parameters(), *m.buffers()]}
    if any(isinstance(m, LoraLayer) for m in model.modules()) or not kinds:
        raise ValueError(
            "lrkern.peft.register: model must be a model without LoRA layers yet (patch is for those), with layers to "
            f"adapt, got {type(model).__name__}"
        )
    config._register_custom_module(dict.fromkeys([*kinds, *theirs], functools.partial(_create, theirs)))


def _create(
    custom: dict[type, Any], target: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """What PEFT calls in place of a layer's constructor: PEFT's own choice of class, then patched."""
    own = copy.copy(config)
    own._custom_modules = custom
    layer = LoraModel._create_new_module(own, adapter_name, target, **kwargs)
    if isinstance(layer, LoraLayer):
        _patch(layer)
    return layer
