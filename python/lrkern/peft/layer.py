# SPDX-License-Identifier: Apache-2.0
"""What every PEFT layer that ``lrkern.peft`` patches has in common: how its class changes, and how each call is decided."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..limits import DTYPES
from ..nn.plain import PLAIN, hooked, offers, plain_linear, watched  # noqa: F401, for the kinds of layers


class Plan(NamedTuple):
    weight: Tensor | None  # of a plain nn.Linear, None for any other base layer
    bias: Tensor | None
    adapters: list[tuple]  # the active ones, as ``_adapter`` gives them


class Swapped:
    """Comes before a module's PEFT class in the class that ``patch`` gives it."""

    _derived: ClassVar[dict[str, Callable[[], Any]]] = {}  # attributes of its own, and what makes them

    def __reduce_ex__(self, protocol: Any) -> tuple:
        make, args, *state = super().__reduce_ex__(protocol)
        if "_lrkern_base" not in args[0].__dict__:
            return make, args, *state
        return _rebuild, (args[0]._lrkern_mixin, args[0]._lrkern_base), *state


class Patched(Swapped):
    """A layer.

    A subclass says for which of PEFT's layers it is and how an adapter acts. Its adapters are what the functional forms take
    after x and what is x's base, and the rest of the call follows.
    """

    _method: ClassVar[str]  # the kind of layer in messages
    _config: ClassVar[type[PeftConfig]]  # PEFT makes such layers from
    _forwards: ClassVar[str]  # the module or package of the forwards that it stands for
    _no_linear: ClassVar[tuple[type, ...]] = ()  # what is of this kind and no linear
    _linear: Callable[..., Tensor]  # of x, weight, bias and an adapter: base and adapter
    _add: Callable[..., Tensor]  # of y, x and an adapter

    def __init_subclass__(cls, layers: type | None = None) -> None:
        super().__init_subclass__()
        if layers:
            KINDS[layers] = cls

    @staticmethod
    def _registers(config: Any, kinds: set[type]) -> bool:
        """Registers a config with PEFT itself, for base layers of these classes, where PEFT asks it who makes the layers."""
        return False

    def _adapter(self, name: str) -> tuple | str | None:
        """An active adapter, why PEFT's own code must run, or None where this layer has no such adapter."""
        raise NotImplementedError

    def _not_now(self) -> str | None:
        if self.disable_adapters or self.merged_adapters:
            return "adapters disabled or merged"
        if watched():
            return "global module hooks"
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "a transform of torch.func or forward-mode differentiation"
        return None

    def _plan(self) -> Plan | str:
        """How to run this layer as it is now, or why it must run PEFT's own forward."""
        if why := self._not_now():
            return why
        adapters = []
        for name in self.active_adapters:
            adapter = self._adapter(name)
            if type(adapter) is str:
                return adapter
            if adapter is not None:
                adapters.append(adapter)
        return self._over(*plain_linear(self._modules["base_layer"]), adapters) if adapters else "no active adapter"

    def _over(self, weight: Tensor | None, bias: Tensor | None, adapters: list[tuple]) -> Plan | str:
        """The plan for these over a plain nn.Linear, or any other base layer."""
        if weight is not None and weight.dtype not in DTYPES:
            return f"base dtype {weight.dtype}"
        return Plan(weight, bias, adapters)

    def _other(self, base: nn.Module, x: Tensor, adapters: list[tuple]) -> tuple[Tensor, list[tuple]]:
        """y of a base layer that is no plain nn.Linear, with what the first adapters add where it computes that together
        (``nn.plain.offers``), and the adapters that are left."""
        return base(x), adapters

    def _takes(self, plan: Plan, x: Tensor) -> bool:
        if plan.weight is None:
            return x.dtype in DTYPES
        return x.dtype == plan.weight.dtype or torch.is_autocast_enabled(x.device.type)

    def _why(self) -> str | None:
        """Why PEFT's own code would run now; None: lrkern's."""
        plan = self._plan()
        return plan if isinstance(plan, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = "called with more than x" if args or kwargs else self._plan()
        if type(plan) is str or not self._takes(plan, x):
            return super().forward(x, *args, **kwargs)
        return self._run(plan, x)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        weight, bias, adapters = plan
        if weight is None:
            y, adapters = self._other(self._modules["base_layer"], x, adapters)
        else:
            y, adapters = self._linear(x, weight, bias, adapters[0]), adapters[1:]
        for adapter in adapters:
            y = self._add(y, x, adapter)
        return y


KINDS: dict[type, type[Patched]] = {}  # by PEFT's class of layers
# By a class of base layers that PEFT knows nothing of, its LoRA layer over them: what ``register`` tells it.
WRAPPERS: dict[type, type[BaseTunerLayer]] = {}


def cannot_patch(layer: BaseTunerLayer) -> str | None:
    """Why this layer's class must stay what it is."""
    kind = _kind_of(layer)
    if isinstance(layer, kind._no_linear):
        return f"{type(layer).__name__} is no linear layer"
    if not type(layer).forward.__module__.startswith(kind._forwards):
        return f"{type(layer).__name__} has a forward of its own"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    return None


def patch_layer(layer: BaseTunerLayer) -> None:
    """Patches it where it can be."""
    if not isinstance(layer, Patched) and not cannot_patch(layer):
        swap(_kind_of(layer), layer)


def swap(mixin: type[Swapped], m: nn.Module) -> None:
    m.__dict__.update({key: make() for key, make in mixin._derived.items()})
    m.__class__ = patched_class(mixin, type(m))


def swap_back(m: Swapped) -> None:
    derived = type(m)._lrkern_mixin._derived
    m.__class__ = type(m)._lrkern_base
    for key in derived:
        m.__dict__.pop(key, None)


def _kind_of(layer: BaseTunerLayer) -> type[Patched]:
    return next(KINDS[of] for of in type(layer).__mro__ if of in KINDS)  # the nearest: AdaLoRA's is a LoRA layer


@functools.cache
def patched_class(mixin: type[Swapped], cls: type) -> type:
    """The patched subclass of a PEFT class, of the same name: repr stays PEFT's."""
    names = {"__module__": __name__, "__doc__": cls.__doc__, "_lrkern_base": cls, "_lrkern_mixin": mixin}
    return type(cls.__name__, (mixin, cls), names)


def _rebuild(mixin: type[Swapped], cls: type) -> nn.Module:
    made = patched_class(mixin, cls)
    return made.__new__(made)


def dropout_p(dropout: nn.Module) -> float | str:
    """Its probability, 0 where it does not act, or why it must run itself."""
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"dropout {type(dropout).__name__}"
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
