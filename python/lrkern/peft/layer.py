# SPDX-License-Identifier: Apache-2.0
"""What every PEFT layer that ``lrkern.peft`` patches has in common: how its class changes, and when PEFT's code must run."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

DROPOUTS = (nn.Dropout, nn.Identity)
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # torch.export traces a layer whose parameters are fake
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Patched:
    """Comes before a layer's PEFT class; ``patch`` makes one by swapping the layer's class."""

    _kept: ClassVar[dict[str, Callable[[], Any]]] = {}  # what a patched layer keeps of its weights, by attribute

    def _why(self) -> str | None:
        """Why PEFT's own code would run now; None: lrkern's."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple:
        make, args, *state = super().__reduce_ex__(protocol)
        if "_lrkern_base" not in args[0].__dict__:
            return make, args, *state
        return _rebuild, (args[0]._lrkern_mixin, args[0]._lrkern_base), *state


@functools.cache
def patched_class(mixin: type[Patched], cls: type) -> type:
    """The patched subclass of a PEFT class, of the same name: repr stays PEFT's."""
    names = {"__module__": __name__, "__doc__": cls.__doc__, "_lrkern_base": cls, "_lrkern_mixin": mixin}
    return type(cls.__name__, (mixin, cls), names)


def _rebuild(mixin: type[Patched], cls: type) -> nn.Module:
    made = patched_class(mixin, cls)
    return made.__new__(made)


def not_now(layer: BaseTunerLayer) -> str | None:
    if layer.disable_adapters or layer.merged_adapters:
        return "adapters disabled or merged"
    if nn.modules.module._has_any_global_hook():
        return "global module hooks"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation"
    return None


def hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks) or (
        "forward" in m.__dict__
    )


def plain_linear(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an exact nn.Linear that nobody watches; None for any other base layer."""
    if type(base) is not nn.Linear or hooked(base):
        return None
    weight = base._parameters.get("weight")  # a pruned or parametrized layer has it elsewhere
    return (weight, base._parameters.get("bias")) if type(weight) in PLAIN else None
