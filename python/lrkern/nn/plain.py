# SPDX-License-Identifier: Apache-2.0
"""Which linears are plain: x Wᵀ + bias and nothing else. The one rule, asked in every call.

An adapter may compute a plain one itself, together with its own part. Any other base layer keeps its forward, and the adapter
adds to what that gives. Hooks, pruning and parametrizations come and go, so nothing of the answer is kept.
"""

from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # torch.export traces a layer whose parameters are fake
watched = nn.modules.module._has_any_global_hook  # by hooks of all modules at once


def hooked(m: nn.Module) -> bool:
    own = m.__dict__  # nn.Module has a __getattr__, which makes every attribute of a module slow
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def plain_linear(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of an exact nn.Linear that nobody watches; None for any other base layer."""
    if type(base) is not nn.Linear or hooked(base):
        return None, None
    parameters = base._parameters  # a pruned or parametrized layer has its weight elsewhere
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) in PLAIN and (bias is None or type(bias) in PLAIN):
        return weight, bias
    return None, None


def packed(base: nn.Module) -> bool:
    """Whether W is no tensor of floats in base.weight: quantised, in a tensor of its own kind, or elsewhere."""
    stored = base._parameters | base._buffers  # a property ``weight`` of a class that is no nn.Linear unpacks one
    weight = base.weight if isinstance(base, nn.Linear) else stored.get("weight")
    if type(weight) not in PLAIN:
        return True
    return type(base) is not nn.Linear and not (weight.is_floating_point() and weight.itemsize > 1)


def device_of(base: nn.Module) -> torch.device:
    return next((t.device for t in chain(base.parameters(), base.buffers())), torch.device("cpu"))


class Shown(Tensor):
    """W or bias of an adapter's base layer, for code that asks a linear of what dtype, device or shape it is (transformers' T5). What
    computes with it (nn.TransformerEncoderLayer's fast path, Mamba's dt_proj) would leave the adapter out, and is refused."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in _ASKED:
            name, instead = getattr(func, "__name__", func), "of base_layer it is W alone"
            raise RuntimeError(
                f"lrkern.nn: {name} of an adapter layer's weight or bias leaves the adapter out; {instead}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def shown(t: Tensor | None) -> Tensor | None:
    """A tensor that is only to be asked what it is like; a quantised or sharded one as it is."""
    return t.detach().as_subclass(Shown) if type(t) in (nn.Parameter, Tensor) else t


_ASKED = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad")}
_ASKED |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__repr__, Tensor.__len__}


def as_linear(module: nn.Module) -> nn.Module:
    """transformers' Conv1D, whose weight is [in, out], as an nn.Linear: its weight is a view of it. All else as it is."""
    return conv1d_linear(module) if type(module).__name__ == "Conv1D" else module


def conv1d_linear(conv: nn.Module) -> nn.Linear:
    linear = nn.Linear(*conv.weight.shape, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().mT, conv.weight.requires_grad), conv.bias
    return linear


def elsewhere(model: nn.Module, weights: Collection[nn.Parameter]) -> dict[int, str]:
    """By id, of these weights that stand in other modules of the model too (a head tied to the embeddings): both names."""
    found: dict[int, list[str]] = {id(w): [] for w in weights}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in found:
            found[id(p)].append(name)
    return {key: " and ".join(names[:2]) for key, names in found.items() if len(names) > 1}


def offers(base: nn.Module, name: str) -> Callable[..., Tensor] | None:
    """A method by which a base layer of another kind computes what an adapter wants, or None:

        with_low_rank(x, s, b)   x Wᵀ + bias + S Bᵀ in one accumulator
        product(x)               x Wᵀ

    Its class must define it: one that was derived of that may have a forward of its own, which nobody would call."""
    return getattr(base, name) if name in type(base).__dict__ and not hooked(base) else None


def no_linear(module: Any) -> str | None:
    """What is in the way of an adapter beside it, or None: an nn.Linear, of a subclass, hooked or parametrized too, with a
    weight that is a torch.Tensor and not of a subclass (quantised, sharded, ...)."""
    if not isinstance(module, nn.Linear):
        return type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{type(module).__name__} (inside nn.MultiheadAttention, whose forward nobody calls)"
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    kinds = {type(t if nn.parameter.is_lazy(t) else t.detach()) for t in tensors}
    others = sorted(kind.__name__ for kind in kinds - {*PLAIN})
    return f"{type(module).__name__} with a {others[0]}" if others else None


def no_packed(module: Any) -> str | None:
    """What is in the way of an adapter beside a linear that keeps W packed, or None: of a subclass of nn.Linear or with a weight of
    another kind, or any module with the sizes of a linear and a forward of its own, which keeps W in no ``weight`` of floats. One with
    modules in it may be an adapter already."""
    name, sizes = type(module).__name__, [getattr(module, f"{way}_features", None) for way in ("in", "out")]
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or not isinstance(module, nn.Module):
        return name
    if not all(type(n) is int and n > 0 for n in sizes) or type(module).forward is nn.Module.forward or module._modules:
        return name
    for t in chain(module.parameters(), module.buffers()):
        if nn.parameter.is_lazy(t) or type(t).__name__ == "DTensor":  # whose import takes a second
            return f"{name} with a {type(t).__name__}"
    return None if packed(module) else f"{name}, no nn.Linear, with a weight of floats"
