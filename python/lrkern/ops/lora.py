# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv 2106.09685): its two products, and what they make with and without a base layer."""

import torch
from torch import Tensor

from .composites import lora as composites
from .dispatch import Op, like_contiguous, s_dtype


def _shrunk(x, a, **_):
    return a.new_empty((*x.shape[:-1], a.shape[0]), dtype=s_dtype(a.dtype))


_shrink = Op(
    "lora_shrink",
    composites.lora_shrink,
    results=_shrunk,
    trains="x a",
    casts="x a",
    shards={"": {"tokens": "TRR>T", "row": "L1R>P"}, "_bwd": {"tokens": "TTRR>TP", "row": "RL1R>L1"}},
)


def lora_shrink(x: Tensor, a: Tensor, scale: float = 1.0, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """S = scale · D(x) Aᵀ, the low-rank activations [..., R] in the dtype of ``a``; in float32 where that is float16, whose
    range scale · S leaves before PEFT's order of the same products does.

    x [..., I]; a [R, I]; seed int64 [1] on x's device where dropout_p > 0. Differentiable in x and a.
    fp32 accumulation, one rounding. A row's bits do not depend on the other rows.
    """
    return _shrink(x, a, scale, dropout_p, seed)


def _expanded(x, bias, s, b, **_):
    like = x if x is not None else bias if bias is not None else b
    return like.new_empty((*s.shape[:-1], b.shape[0]))


def _casts_beside_s(low, *_):
    return low, low, low, s_dtype(low), low, None


_expand = Op(
    "linear_expand",
    composites.linear_expand,
    results=_expanded,
    trains="x weight bias s b",
    saved_for={"x": "weight", "weight": "x"},
    casts=_casts_beside_s,
    shards={"": {"tokens": "TRRTR>T", "column": "R00R0>L"}, "_bwd": {"tokens": "TTRTR>TPPTP", "column": "LR0R0>P00P0"}},
)


def linear_expand(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, s: Tensor, b: Tensor, scale: float = 1.0
) -> Tensor:
    """y = x Wᵀ + bias + scale · S Bᵀ [..., O]. Without x and weight: y = bias + scale · S Bᵀ.

    x [..., I]; weight [O, I]; bias [O]; s [..., R], of b's dtype or beside a float16 b float32; b [O, R]. Without x and bias y
    has b's dtype. Differentiable in all tensors. The base product is
    ATen's linear; S Bᵀ is added into its result, so y is rounded twice.
    """
    return _expand(x, weight, bias, s, b, scale)


def _layer_results(x, weight, a, base_scale, **_):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, _shrunk(x, a), None if base_scale is None else like_contiguous(y)


_linear = Op(
    "lora_linear",
    composites.lora_linear,
    results=_layer_results,
    trains="x weight bias a b base_scale",
    saved_for={"base": "base_scale"},
    casts=lambda low, *_: (*(low,) * 5, None, None, None, torch.float32),
    shards={
        "": {"tokens": "TRRRRRR>T", "column": "R00R0R0>L", "row": "L1.1RRR>P"},
        "_fwd": {"tokens": "TRRRRRR>TTT", "column": "R00R0R0>LRL", "row": "L1.1RRR>PPP"},
        "_bwd": {"tokens": "TTRRRTRRT>TPPPPP", "column": "LR0R0RR0L>P00P00", "row": "RL11RRRRR>L1R1RR"},
    },
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> Tensor:
    """y = c ⊙ (x Wᵀ) + bias + scale · (D(x) Aᵀ) Bᵀ, a linear layer with a LoRA adapter (Hu et al., arXiv 2106.09685).

    x [..., I]; weight [O, I]; bias [O] or None; a [R, I]; b [O, R]; seed int64 [1] where dropout_p > 0; c is base_scale
    [O] (x's dtype or float32), ones where None: DoRA's g is c with g ⊙ b as b (``functional.dora_linear``).
    Differentiable in all float tensors; saves x, S [T, R], the seed, and x Wᵀ where base_scale requires a gradient.
    Double backward is refused.
    """
    return _linear(x, weight, bias, a, b, scale, dropout_p, seed, base_scale)


def _sum_results(y, x, a, **_):
    return like_contiguous(y), _shrunk(x, a)


def _casts_beside_y(low, y, *_):
    """y stays as the base layer gave it; where it is of another dtype, a and b are float32."""
    factors = low if y.dtype == low else torch.float32
    return None, low, factors, factors, None, None, None


_add = Op(
    "lora_add",
    composites.lora_add,
    results=_sum_results,
    trains="x a b",
    passes="y",
    casts=_casts_beside_y,
    shards={
        "": {"tokens": "TTRRR>T", "column": "LRR0R>L"},
        "_fwd": {"tokens": "TTRRR>TT", "column": "LRR0R>LR"},
        "_bwd": {"tokens": "TTRRTR>TPP", "column": "LRR0RR>PP0"},
    },
)


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """y + scale · (D(x) Aᵀ) Bᵀ as a new tensor: LoRA beside a base layer of any kind (quantised, ...) that gave y.

    y [..., O]; x [..., I]; a [R, I]; b [O, R]. The dtypes of y and x may differ where a and b are float32.
    Differentiable in all float tensors; saves x, S [T, R] and the seed. Double backward is refused.
    """
    return _add(y, x, a, b, scale, dropout_p, seed)


_expand_into = Op("lora_expand_", composites.lora_expand_, instead="lora_add")


def lora_expand_(y: Tensor, s: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """y += scale · S Bᵀ in place, beside anyone's base GEMM. y [..., O]; s [..., R] as in ``linear_expand``; b [O, R].

    Not differentiable: raises when gradients are recorded and an argument requires one; use ``lora_add`` or
    ``linear_expand`` then.
    """
    _expand_into(y, s, b, scale)
