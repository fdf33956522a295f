# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA and DoRA layers on lrkern."""

import copy
import functools
from typing import Any, ClassVar, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from ... import functional as F
from ...caches import DoraNorm
from ...limits import DTYPES, MAX_RANK
from ..layer import PLAIN, WRAPPERS, Patched, Plan, dropout_p, hooked, offers, patch_layer, plain_linear
from .mixed import NAMED, check_again, in_order


class _Adapter(NamedTuple):
    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float
    dropout_p: float
    magnitude: Tensor | None = None  # DoRA


def _fits(dtype: torch.dtype, adapters: list[_Adapter]) -> bool:
    """Whether the ops take these factors over a base of that dtype."""
    return all(f.a.dtype == dtype or f.a.dtype == torch.float32 for f in adapters)


def _stored(base: nn.Module) -> Tensor | None:
    """What changes with the weight of a base layer that keeps it as it likes: PEFT dequantises what has a W_q or a weight."""
    return base.W_q if hasattr(base, "W_q") else getattr(base, "weight", None)


class FusedLora(Patched, layers=LoraLayer):
    _derived: ClassVar = {"_lrkern_norm": DoraNorm, NAMED: bool}
    _config = peft.LoraConfig
    _method, _forwards = "LoRA", "peft.tuners.lora."
    _no_linear = (Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention, ParamWrapper)

    def _adapter(self, name: str) -> _Adapter | str | None:
        modules = self._modules  # nn.Module.__getattr__ is the slow way, and this runs on every call
        a_of, magnitude = modules["lora_A"]._modules, None
        if name not in a_of:
            return None
        if name in self.lora_variant:
            variant = type(self.lora_variant[name])
            if variant is not DoraLinearVariant:
                return f"variant {variant.__name__}"
            if sum(n in a_of for n in self.active_adapters) > 1:
                return "DoRA among several active adapters"
            vector = modules["lora_magnitude_vector"]._modules[name]
            magnitude = vector._parameters.get("weight")
            if type(vector) is not DoraLinearLayer or type(magnitude) not in PLAIN:
                return f"lora_magnitude_vector is {type(vector).__name__} with a weight of {type(magnitude).__name__}"
            if hooked(vector):
                return "hooks on lora_magnitude_vector"
        a, b, dropout = a_of[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return f"lora_A and lora_B are {type(a).__name__} and {type(b).__name__}, fused with nn.Linear"
        of_a, of_b = a._parameters, b._parameters
        wa, wb = of_a.get("weight"), of_b.get("weight")
        if type(wa) not in PLAIN or type(wb) not in PLAIN:
            return f"factors of type {type(wa).__name__} and {type(wb).__name__}"
        dtype = wa.dtype
        if wb.dtype != dtype or dtype not in DTYPES:
            return f"factors of dtype {dtype} and {wb.dtype}"
        if of_a.get("bias", a) is not None or of_b.get("bias", b) is not None:
            return "lora_bias"
        p = dropout_p(dropout)
        if type(p) is str:
            return p
        if wa.size(0) > MAX_RANK:
            return f"rank {wa.size(0)}, fused up to {MAX_RANK}"
        if hooked(a) or hooked(b) or hooked(dropout):
            return "hooks on lora_A, lora_B or lora_dropout"
        scale = self.scaling[name]
        if type(scale) is float:
            return _Adapter(wa, wb, scale, p, magnitude)
        if isinstance(scale, Tensor):  # peft.utils.hotswap.prepare_model_for_compiled_hotswap
            if wb.dtype == torch.float16:  # whose range scale · B may leave
                wa, wb = wa.float(), wb.float()
            wb, scale = wb * scale.to(wb), 1.0
        return _Adapter(wa, wb, float(scale), p, magnitude)

    def _over(self, weight: Tensor | None, bias: Tensor | None, adapters: list[_Adapter]) -> Plan | str:
        plan = super()._over(weight, bias, adapters)
        if type(plan) is str or (weight is not None and _fits(weight.dtype, adapters)):
            return plan
        base = self._modules["base_layer"]
        if adapters[0].magnitude is not None and (_stored(base) is None or not hasattr(base, "bias")):
            return f"DoRA over {type(base).__name__}, which has no weight and bias"
        return Plan(None, None, adapters)

    def _takes(self, plan: Plan, x: Tensor) -> bool:
        if plan.adapters[0].magnitude is not None and x.ndim < 2:  # PEFT answers with [1, O]
            return False
        return super()._takes(plan, x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and not torch.compiler.is_compiling():
            check_again(self, "adapter_names" in kwargs)
        if kwargs and kwargs.keys() == {"adapter_names"} and not args:
            names = kwargs["adapter_names"]
            adapters = self._mixture(x, names)
            if adapters is not None:
                return self._mixed(x, names, adapters)
        return super().forward(x, *args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, f: _Adapter) -> Tensor:
        if f.magnitude is None:
            return F.lora_linear(x, weight, bias, f.a, f.b, f.scale, f.dropout_p)
        norm_of: DoraNorm = self.__dict__["_lrkern_norm"]
        p, norm = f.dropout_p if self.training else 0.0, norm_of(weight, *f[:3], self.training)
        return F.dora_linear(x, weight, bias, f.a, f.b, f.magnitude, f.scale, p, True, norm)

    def _other(self, base: nn.Module, x: Tensor, adapters: list[_Adapter]) -> tuple[Tensor, list[_Adapter]]:
        f, together = adapters[0], offers(base, "with_low_rank")
        if together is None or f.magnitude is not None or not _fits(x.dtype, adapters[:1]):
            return super()._other(base, x, adapters)
        return F.lora_into(together, x, *f[:4]), adapters[1:]

    def _add(self, y: Tensor, x: Tensor, f: _Adapter) -> Tensor:
        if f.magnitude is None:
            return F.lora_add(y, x, *f[:4])
        norm_of: DoraNorm = self.__dict__["_lrkern_norm"]
        p, base = f.dropout_p if self.training else 0.0, self._modules["base_layer"]
        turn = self.__dict__.get("fan_in_fan_out", False)
        dense = functools.cache(lambda: transpose(dequantize_module_weight(base), turn).to(x.dtype))
        g = f.magnitude / norm_of(_stored(base), *f[:3], self.training, dense)
        if p:
            x, product_of = torch.dropout(x, p, True), offers(base, "product")
            product = nn.functional.linear(x, dense()) if product_of is None else product_of(x)
        else:
            product = y if base.bias is None else y - base.bias
        return F.dora_add(y, x, product, f.a, f.b, g, f.scale)

    def _mixture(self, x: Tensor, names: Any) -> dict[str, _Adapter] | None:
        """The adapters of PEFT's mixed batch, adapter_names= of one name a row, or None where PEFT's own code must run."""
        if self._not_now() or torch.compiler.is_compiling() or not isinstance(names, (list, tuple)):
            return None
        if x.ndim < 2 or len(x) != len(names) or not x.numel() or x.dtype not in DTYPES:
            return None
        found = {}
        for name in dict.fromkeys(names):
            if name == "__base__" or name not in self._modules["lora_A"]._modules:
                continue
            adapter = "a variant" if name in self.lora_variant else self._adapter(name)
            if isinstance(adapter, str):
                return None
            found[name] = adapter
        return found

    def _mixed(self, x: Tensor, names: list[str], adapters: dict[str, _Adapter]) -> Tensor:
        """Each adapter by the op of a batch of its own, on its rows: their bits are those of that batch, forward and in the
        gradients of A and B, whatever the other rows are."""
        base = self._modules["base_layer"]
        if adapters and all(name == names[0] for name in names):
            plan = self._over(*plain_linear(base), [*adapters.values()])
            if not isinstance(plan, str) and self._takes(plan, x):
                return self._run(plan, x)
        y = base(x)
        if not adapters:
            return y
        rows, back = in_order(names, adapters, y, x)
        without = [rows.pop(0)[0]] if len(rows) > len(adapters) else []
        return back(without + [F.lora_add(*yx, *f[:4]) for yx, f in zip(rows, adapters.values(), strict=True)])

    @staticmethod
    def _registers(config: peft.LoraConfig, kinds: set[type]) -> bool:
        theirs = dict(config._custom_modules or {})  # the user's own choice of classes goes on deciding
        config._register_custom_module(dict.fromkeys([*kinds, *theirs], functools.partial(_create, theirs)))
        return True

    def _forget(self) -> None:
        self.__dict__["_lrkern_norm"].clear()

    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


def _reached(name: str) -> property:
    """Whoever reaches for the factors by name may write them through ``.data``, as PEFT's merge and hotswap do, which no
    version counter sees: what was cached of them goes."""

    def get(self: FusedLora) -> nn.Module:
        self._forget()
        return self._modules[name]

    return property(get)


for _name in ("base_layer", "lora_A", "lora_B"):
    setattr(FusedLora, _name, _reached(_name))


def _create(
    custom: dict[type, Any], target: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """What PEFT calls in place of a layer's constructor: PEFT's own choice of class, then patched."""
    own = copy.copy(config)
    own._custom_modules = custom | {of: cls for of, cls in WRAPPERS.items() if of not in custom}
    layer = LoraModel._create_new_module(own, adapter_name, target, **kwargs)
    if isinstance(layer, LoraLayer):
        patch_layer(layer)
    return layer
