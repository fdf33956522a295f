# SPDX-License-Identifier: Apache-2.0
"""LoRA. The low-rank part is computed in the factors' dtype and added to what the base gave, as PEFT does it."""

import torch.nn.functional as F

from .common import added, composite, dropout, said, wide

A, B, SEED = "a:RI:~x", "b:OR:~x", "seed:1:i64"


def _s(x, a, scale, dropout_p, seed):
    a = a.to(wide(a.dtype))
    return scale * (dropout(x.to(a.dtype), dropout_p, seed) @ a.mT)


def _product(s, b):
    return s @ b.to(s.dtype).mT


@composite(f"x:*I {A} {SEED}")
def lora_shrink(x, a, scale, dropout_p, seed):
    return _s(x, a, scale, dropout_p, seed)


@composite("x:*I weight:OI:=x bias:O:=x b:OR:~x s:*R")
def linear_expand(x, weight, bias, s, b, scale):
    if (x is None) != (weight is None):
        raise ValueError(f"x and weight must come together, got only {'x' if weight is None else 'weight'}")
    if s.dtype not in (b.dtype, wide(b.dtype)):
        raise ValueError(f"s must be {said([wide(b.dtype), b.dtype])}, got {said([s.dtype])}")
    delta = scale * _product(s.to(wide(b.dtype)), b)
    if x is None:
        return delta.to(b.dtype) if bias is None else added(bias, delta)
    return added(F.linear(x, weight, bias), delta)


@composite(f"x:*I weight:OI:=x bias:O:=x {A} {B} b:OR:=a base_scale:O:~x {SEED}")
def lora_linear(x, weight, bias, a, b, scale, dropout_p, seed, base_scale):
    s = _s(x, a, scale, dropout_p, seed)
    if base_scale is None:
        return added(F.linear(x, weight, bias), _product(s, b)), s, None
    base = F.linear(x, weight)
    y = base.float() * base_scale.float() + _product(s, b)
    return (y if bias is None else y + bias).to(x.dtype), s, base


@composite(f"y:*O x:*I a:RI:~x b:OR:~y b:OR:=a {SEED}")
def lora_add(y, x, a, b, scale, dropout_p, seed):
    s = _s(x, a, scale, dropout_p, seed)
    return added(y, _product(s, b)), s


@composite("y:*O b:OR:~y s:*R")
def lora_expand_(y, s, b, scale):
    y.copy_(added(y, scale * _product(s.to(wide(b.dtype)), b)))
