# SPDX-License-Identifier: Apache-2.0
"""The base of a PEFT model in MXFP4, in place: ``quantize`` and ``dequantize``.

transformers' quantisers are not involved: the model is quantised once it is loaded, so nothing marks it as one that may not train.
PEFT's layers over such a base are subclasses of its own that know how to merge into it; parameters, state_dict of the adapters, configs
and files stay PEFT's.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora, miss, randlora, vera
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ...limits import DTYPES
from ...nn import MXFP4Experts, MXFP4Linear
from ...nn.plain import plain_linear
from ...ops.mx import RULES
from ..layer import WRAPPERS, Patched, patch_layer, swap_back


class MXFP4Backend(QuantizationBackend):
    """How PEFT reads and writes W. Inside merge the base layer is dense."""

    layer_type, supports_merge, backend_name = "linear", True, "lrkern MXFP4"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.dequantize() if isinstance(base_layer, MXFP4Linear) else base_layer.weight.data

    def set_base_weight(self, peft_layer: BaseTunerLayer, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        if isinstance(base, MXFP4Linear):
            base.write(weight_data)
        else:
            base.weight.data = weight_data


class OverMXFP4:
    """Comes before a PEFT class of layers whose base layer is an MXFP4Linear.

    ``merge`` adds all merged adapters to the W that was there before the first of them, in float32, and rounds the sum to MXFP4 once;
    ``unmerge`` puts the very bytes back. Both warn and refuse as PEFT's do. A merge that is refused changes nothing.
    """

    quantization_backend = MXFP4Backend()
    _before: tuple[Tensor, ...] | None = None  # codes, scales and bias, while an adapter is merged

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT knows no layer by its features
            super().__init__(base_layer, *args, **kwargs)
        self.__dict__.pop("quantization_backend", None)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        packed = self.get_base_layer()
        if not isinstance(packed, MXFP4Linear):  # PEFT's own, inside the merge below
            return super().merge(safe_merge, adapter_names)
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return None
        merged = list(self.merged_adapters)
        now = tuple(t.clone() for t in _tensors(packed))
        before = self._before or now
        _put(packed, before)
        self.merged_adapters.clear()
        try:
            with self._dense() as dense:
                super().merge(safe_merge, [*merged, *names])
            if packed.bias is not None:
                _finite(dense.bias, "bias")
            _finite(dense.weight, "W")
            packed.write(dense.weight)
            if packed.bias is not None:
                packed.bias.copy_(dense.bias)
        except BaseException:
            _put(packed, now)
            self.merged_adapters[:] = merged
            raise
        self._before = before
        warnings.warn(
            "lrkern.peft: merging into MXFP4 rounds W + ΔW to 4 bits, so that the merged model is not quite the adapted one; for an exact "
            "merge call lrkern.peft.dequantize(model) first",
            stacklevel=2,
        )
        return None

    @torch.no_grad()
    def unmerge(self) -> None:
        packed = self.get_base_layer()
        if self._before is None or not isinstance(packed, MXFP4Linear):
            return super().unmerge()
        _put(packed, self._before)
        self.merged_adapters.clear()
        self._before = None
        return None

    @contextlib.contextmanager
    def _dense(self) -> Iterator[nn.Linear]:
        """Inside, the base layer is an nn.Linear with W and a bias of its own in float32."""
        owner = _owner(self)
        packed = owner._modules["base_layer"]
        dense = packed.to_linear(torch.float32)
        if dense.bias is not None:
            dense.bias = nn.Parameter(dense.bias.detach().clone(), False)
        owner._modules["base_layer"] = dense
        try:
            yield dense
        finally:
            owner._modules["base_layer"] = packed

    def __getattr__(self, name: str) -> Any:
        # PEFT's property is the base layer's weight; what that one says is lost on the way here
        return self.get_base_layer().weight if name == "weight" else super().__getattr__(name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple:
        if isinstance(base_layer, MXFP4Linear):
            return base_layer.codes.device, base_layer.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)


def _tensors(layer: MXFP4Linear) -> list[Tensor]:
    return [t for t in (layer.codes, layer.scales, layer.bias) if t is not None]


def _put(layer: MXFP4Linear, values: tuple[Tensor, ...]) -> None:
    for t, value in zip(_tensors(layer), values, strict=True):
        t.copy_(value)


def _finite(t: Tensor, what: str) -> None:
    if not t.isfinite().all():
        raise ValueError(f"lrkern.peft: merge must leave {what} finite, got inf or nan; nothing is changed")


class LoraOverMXFP4(OverMXFP4, lora.layer.Linear):
    pass


class VeraOverMXFP4(OverMXFP4, vera.layer.Linear):
    pass


class RandLoraOverMXFP4(OverMXFP4, randlora.layer.Linear):
    pass


class MissOverMXFP4(OverMXFP4, miss.layer.MissLinear):
    pass


_OVER = {cls.__mro__[2]: cls for cls in (LoraOverMXFP4, VeraOverMXFP4, RandLoraOverMXFP4, MissOverMXFP4)}
WRAPPERS[MXFP4Linear] = LoraOverMXFP4


@dataclass
class Quantized:
    """Bytes of each layer's weight before and after, by its name, and of those that stayed as they are why."""

    layers: dict[str, tuple[int, int]]
    left: dict[str, str]

    @property
    def before(self) -> int:
        return sum(before for before, _ in self.layers.values())

    @property
    def after(self) -> int:
        return sum(after for _, after in self.layers.values())

    def __str__(self) -> str:
        rows = [f"lrkern: {len(self.layers)} weights in MXFP4, {self.before:,} bytes before, {self.after:,} after"]
        rows += [f"  {name}: {before:,} bytes before, {after:,} after" for name, (before, after) in self.layers.items()]
        return "\n".join(rows + [f"  {name}: as it was, {why}" for name, why in self.left.items()])


def quantized(model: nn.Module) -> Quantized:
    """The bytes of each weight of a model that is in MXFP4 now, linears and experts, and what they would be in the layer's dtype; to be
    printed."""
    layers = {}
    for name, m in model.named_modules():
        if isinstance(m, MXFP4Linear):
            layers[name] = m.in_features * m.out_features * m.dtype.itemsize, m.codes.numel() + m.scales.numel()
        elif isinstance(m, MXFP4Experts):
            dense = 3 * m.num_experts * m.hidden_size * m.intermediate_size * m.gate_up_proj_bias.dtype.itemsize
            layers[name] = dense, sum(b.numel() for b in m.buffers())
    return Quantized(layers, {})


def quantize(
    model: nn.Module, rule: str = "even", others: bool = False, keep: tuple[str, ...] = ("lm_head",)
) -> Quantized:
    """Turns the linears under the model's LoRA, VeRA, RandLoRA and MiSS layers into MXFP4 (``nn.MXFP4Linear``), in place, and reports
    the bytes of each.

    rule: of the scales, see ``ops.mx_quantize``. others: every other nn.Linear too, but those inside adapters, those that share their
    weight, and those whose name ends in one of ``keep``; then the model need not have adapters yet, and none of
    these weights trains any more. Adapters and biases stay. So does, with the reason in the report, what is no exact nn.Linear that nobody watches, a weight that trains beside adapters, that another
    module has too, or with inf or nan in it, and what belongs to other kinds of PEFT layers.

    Afterwards the model runs on PEFT's own code or patched (before or after), trains, saves and loads adapters, and merges: see
    ``OverMXFP4``. Raises ValueError, and changes nothing, for an unknown rule, merged adapters, and a model in which there is nothing to
    quantise.
    """
    if rule not in RULES:
        raise ValueError(f"lrkern.peft.quantize: rule must be one of {list(RULES)}, got {rule!r}")
    _refuse_merged(model, "quantize")
    chosen, left = _chosen(model, others, keep)
    if not chosen:
        reasons = "".join(f"\n  {name}: {why}" for name, why in left.items())
        must = "model must have an nn.Linear under PEFT layers" + (" or elsewhere" if others else "")
        raise ValueError(f"lrkern.peft.quantize: {must} to quantise, got {type(model).__name__} with none{reasons}")
    places: dict[int, list[str]] = {}  # a module may have several
    for name, (owner, key, _) in chosen.items():
        places.setdefault(id(owner._modules[key]), []).append(name)
    layers = {}
    for names in places.values():
        layers[names[0]] = _replace([chosen[name] for name in names], rule)
    return Quantized(layers, left)


def _replace(places: list[tuple], rule: str) -> tuple[int, int]:
    """Of one linear in all of its places; the bytes of its weight before and after."""
    owner, key, _ = places[0]
    linear = owner._modules[key]
    packed = MXFP4Linear.from_linear(linear, rule).train(linear.training)
    for owner, key, layer in places:
        owner._modules[key] = packed
        if layer is not None:
            _become(layer, _OVER[_peft_class(layer)])
    return linear.weight.numel() * linear.weight.element_size(), packed.codes.numel() + packed.scales.numel()


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Undoes ``quantize``, in place: every MXFP4Linear of the model becomes an nn.Linear of the W that it computes with, in dtype or that
    of the layer. Merging and saving the whole model are then those of a dense one. ValueError while adapters are merged."""
    _refuse_merged(model, "dequantize")
    made: dict[nn.Module, nn.Linear] = {}
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if isinstance(child, MXFP4Linear):
                if child not in made:
                    made[child] = child.to_linear(dtype).train(child.training)
                owner._modules[key] = made[child]
    for layer in model.modules():
        if isinstance(layer, OverMXFP4) and not isinstance(layer.get_base_layer(), MXFP4Linear):
            theirs = _peft_class(layer)
            _become(layer, next(of for of, cls in _OVER.items() if cls is theirs))


def _refuse_merged(model: nn.Module, who: str) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged_adapters:
            got = f"{', '.join(map(repr, layer.merged_adapters))} in {name}"
            raise ValueError(f"lrkern.peft.{who}: model must have no merged adapters, unmerge them first; got {got}")


def _chosen(model: nn.Module, others: bool, keep: tuple[str, ...]) -> tuple[dict[str, tuple], dict[str, str]]:
    """By name of the linear its owner, the key there and the PEFT layer over it; and why others stay."""
    chosen, left, inside = {}, {}, set()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    adapted = any(
        isinstance(m, BaseTunerLayer) for m in model.modules()
    )  # of a model fresh from its file everything trains
    why_not = lambda m: _why_not(m, adapted, uses[id(m._parameters.get("weight"))] > places[id(m)])
    for name, m in model.named_modules():
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside |= {id(child) for child in m.modules()}
        if isinstance(m, BaseTunerLayer):
            owner = _owner(m)
            if owner is not m and isinstance(m.get_base_layer(), nn.Linear):
                left[name] = "it is under several PEFT layers"
                chosen.pop(f"{name}.base_layer", None)
                continue
            linear = owner._modules.get("base_layer")
            if linear is None or isinstance(linear, MXFP4Linear):
                continue
            why = why_not(linear)
            if why is None and _peft_class(m) not in _OVER:
                why = f"PEFT's {_peft_class(m).__module__}.{_peft_class(m).__name__} is over it"
            if why:
                left[name] = why
            else:
                chosen[name] = owner, "base_layer", m
    for path, parent in model.named_modules() if others else ():
        for key, m in parent._modules.items():
            name = f"{path}.{key}" if path else key
            if not isinstance(m, nn.Linear) or isinstance(m, BaseTunerLayer) or id(m) in inside or key in keep:
                continue
            if why := why_not(m):
                left[name] = why
            else:
                chosen[name] = parent, key, None
    return chosen, left


def _why_not(linear: nn.Module, adapted: bool, shared: bool) -> str | None:
    """Why a layer stays as it is."""
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is no nn.Linear"
    weight, _ = plain_linear(linear)
    if weight is None:
        return "hooks, a forward of its own or a weight of another type"
    if weight.dtype not in DTYPES:
        return f"a weight of {weight.dtype}"
    if weight.is_meta or not weight.numel():
        return "a weight without values"
    if adapted and weight.requires_grad:
        return "its weight trains"
    if shared:
        return "another module has its weight too"
    return None if weight.isfinite().all() else "inf or nan in its weight"


def _owner(layer: BaseTunerLayer) -> nn.Module:
    """The layer whose base_layer is none of PEFT's."""
    while hasattr(inner := layer._modules.get("base_layer"), "base_layer"):
        layer = inner
    return layer


def _peft_class(layer: nn.Module) -> type:
    return type(layer)._lrkern_base if isinstance(layer, Patched) else type(layer)


def _become(layer: nn.Module, cls: type) -> None:
    """Changes a PEFT layer's class; one that is patched stays so."""
    patched = isinstance(layer, Patched)
    if patched:
        swap_back(layer)
    layer.__class__ = cls
    if issubclass(cls, OverMXFP4):
        layer.__dict__.pop("quantization_backend", None)  # PEFT's answer for a dense base; the class has another
    if patched:
        patch_layer(layer)
