# SPDX-License-Identifier: Apache-2.0
"""Adapters alone: base layers whose GEMM is replaced by a stored result, forward (y) and backward (dx)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from suite import Call, Data, Suite
from torch import Tensor, nn
from torch.autograd import Function

OPS = torch.ops.lrkern


class Stored(Function):
    """A base layer that costs nothing: y and dx are there already."""

    @staticmethod
    def forward(ctx, x, y, dx):
        ctx.save_for_backward(dx)
        return y.data  # no view: PEFT's AdaLoRA adds to it in place, as to a GEMM's result

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0], None, None


class StoredLinear(nn.Linear):
    """Stands where PEFT expects a base layer. The weight is the true one: DoRA reads it for its norm."""

    def __init__(self, linear: nn.Linear, y: Tensor, dx: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.y, self.dx = y, dx

    def forward(self, x: Tensor) -> Tensor:
        return Stored.apply(x, self.y, self.dx) if torch.is_grad_enabled() else self.y


def frozen(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.mT.shape, device="meta")
    linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    return linear


class LayerSuite(Suite):
    """Of adapters beside one linear layer: its data has linear, and what that layer's GEMM gives, y and dx."""

    against = "peft"

    def base(self, d: Data) -> Call:
        return Call(lambda: d.linear(d.inputs["x"]), truth=lambda x, weight, bias, **_: F.linear(x, weight, bias))

    @staticmethod
    def beside(d: Data, run: Callable[[Tensor], Tensor], **facts: Any) -> Call:
        """run(y) over the layer's result, and alone over a stored one, into which it may write where it does not train."""
        x, y = d.inputs["x"], d.y.clone()
        return Call(lambda: run(d.linear(x)), Call(lambda: run(Stored.apply(x, y, d.dx) if d.train else y)), **facts)


class StoredOps:
    """lrkern's ops with the base GEMM left out of lora_linear: the same kernels, adding into the stored y and dx in place
    as lora_linear adds into what the GEMM made (lora_add beside a stored base would leave one more sum of two dx to
    autograd). Where no gradient is asked for, lora_add of y stands there, which writes a new y. Layer, wrapper and autograd
    around them are the real ones.

    Never cheaper than the op without its GEMM: in training two or three op calls take the place of one; under dropout the
    stored dx costs a pass of its own; with base_scale a GEMM of one column stays. The base is frozen; x and all of the
    adapter take gradients.
    """

    def __init__(self, y: Tensor, dx: Tensor, z: Tensor | None = None):
        """y = x Wᵀ + bias, or with base_scale c · x Wᵀ + bias; z = x Wᵀ."""
        self.y, self.dx, self.z = y, dx, z
        self.a_as_b: Tensor | None = None  # A [R, I] as a factor B [I, R], of the first call
        self.lora_linear = SimpleNamespace(default=self.without_gradient)
        self.lora_linear_fwd = SimpleNamespace(default=self.forward)
        self.lora_linear_bwd = SimpleNamespace(default=self.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(OPS, name)

    def without_gradient(self, x, weight, bias, a, b, scale, p, seed, c):
        return OPS.lora_add.default(self.y, x, a, b, scale, p, seed)

    def forward(self, x, weight, bias, a, b, scale, p, seed, c):
        if c is not None:
            return *OPS.lora_add_fwd.default(self.y, x, a, b, scale, p, seed), self.z
        s = OPS.lora_shrink.default(x, a, scale, p, seed)
        OPS.lora_expand_.default(self.y, s, b)
        return self.y.detach(), s, None

    def backward(self, dy, x, weight, a, b, s, scale, p, seed, c, z, *_):
        dc, dx = None, self.dx
        if c is not None:  # the op's rescaling of dY, beside the dW of a base one column wide
            column = x[:, :1], weight[:, :1], a[:, :1]
            *_, dc = OPS.lora_linear_bwd.default(
                dy, *column, b, s, scale, 0.0, None, c, z, False, True, False, False, False, True
            )
        *_, ds, db = OPS.linear_expand_bwd.default(dy, None, None, s, b, 1.0, False, False, False, True, True)
        part, da = OPS.lora_shrink_bwd.default(ds, x, a, scale, p, seed, bool(p), True)
        if p:
            dx = part.add_(dx)
        else:
            if self.a_as_b is None:
                self.a_as_b = a.mT.contiguous()
            OPS.lora_expand_.default(dx, ds, self.a_as_b, scale)
        return dx, None, None, da, db, dc


# ---- for providers whose parameters are no inputs of the case


class WithDw(Function):
    """A linear layer of which W trains, though it asks for no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        torch.mm(dy.mT, x)
        return dy @ weight, None, None


class Trained(Function):
    """run(x) with the gradients of a module's own parameters in the step: asked for the one of x, it makes them as well."""

    @staticmethod
    def forward(ctx, run, module, x):
        if not x.requires_grad:
            return run(x)
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            ctx.of = inner, [p for p in module.parameters() if p.requires_grad], run(inner)
        return ctx.of[2].detach()

    @staticmethod
    def backward(ctx, dy):
        x, parameters, y = ctx.of
        return None, None, torch.autograd.grad(y, [x, *parameters], dy)[0]
