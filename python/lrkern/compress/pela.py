# SPDX-License-Identifier: Apache-2.0
"""PELA: every linear in factors of one compression ratio, and the losses that hold it to its teacher."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import is_finite, named, require
from ..nn import FactorizedLinear
from .model import Report, put, targets


def pela(model: nn.Module, ratio: float = 3.0, *, target_modules: Any = "all-linear", **rules: Any) -> Report:
    """Compresses a model's linears in place by PELA (Guo, Wang and Kankanhalli, arXiv 2310.10700): W ≈ (U_r √S) (√S V_rᵀ) with r = floor(in · out / (ratio (in + out))), a layer of 1 / ratio of the parameters.

    The new layers train, bias too; what else trains stays. Make the teacher before: ``teacher = copy.deepcopy(model).eval()
    .requires_grad_(False)``. Then loss + 0.1 · ``feature_loss`` + ``weight_loss`` is the paper's.

    Args:
        ratio: at least 1. The authors' code has 3 and leaves linears of less than 10 outputs dense: name them in exclude_modules.
        target_modules, rules: as everywhere in ``lrkern.compress``.

    Also refused: another ratio, a layer of rank 0.
    """
    who = "lrkern.compress.pela"
    require(is_finite(ratio) and ratio >= 1, f"{who}: ratio must be a finite number >= 1, got {ratio!r}")
    linears = targets(who, model, target_modules, rules)
    ranks = {}
    for name, m in linears.items():
        i, o = m.in_features, m.out_features
        ranks[name] = math.floor(i * o / (ratio * (i + o)))
        must = f"{who}: {named(name)} [{o}, {i}] must have a rank >= 1 at this ratio, got 0; see exclude_modules"
        require(ranks[name], must)
    return put(model, linears, {name: FactorizedLinear.from_linear(m, ranks[name]) for name, m in linears.items()})


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over pairs of features (the outputs of blocks, say) of their mean squared error; no gradient flows to the teacher's.

    ValueError where they are not as many or not of one shape (the authors' code leaves out what is in excess)."""
    who, shapes = "lrkern.compress.feature_loss", [[list(t.shape) for t in each] for each in (student, teacher)]
    require(shapes[0] and shapes[0] == shapes[1], f"{who}: student and teacher must have one shape each, got {shapes}")
    pairs = zip(student, teacher, strict=True)
    return torch.stack([nn.functional.mse_loss(s, t.detach().to(s.dtype)) for s, t in pairs]).mean()


def weight_loss(student: nn.Module, teacher: nn.Module, eps: float = 1e-3) -> Tensor:
    """mean_ℓ (max |B A - W_t| - eps)² over the student's FactorizedLinear layers, W_t the teacher's weight of the same name.

    The gradient of a maximum is that of one entry, so that nothing of W's size is kept for backward; of several equal ones the first
    has it. The teacher's weights get none. ValueError where the student has no such layer, or the teacher no weight of its shape."""
    who = "lrkern.compress.weight_loss"
    layers = {name: m for name, m in student.named_modules() if isinstance(m, FactorizedLinear)}
    require(layers, f"{who}: student must have FactorizedLinear layers, got none")
    dense = dict(teacher.named_parameters(remove_duplicate=False))
    losses = []
    for name, layer in layers.items():
        w, shape = dense.get(f"{name}.weight"), (layer.out_features, layer.in_features)
        got = None if w is None else list(w.shape)
        require(got == [*shape], f"{who}: {named(name)}.weight of teacher must have shape {[*shape]}, got {got}")
        losses.append((_largest(layer, w.detach()) - eps).square())
    return torch.stack(losses).mean()


def _largest(layer: FactorizedLinear, w: Tensor) -> Tensor:
    """max |B A - W| in float32 at least, differentiable in A and B."""
    off = layer.product()
    at = off.sub_(w).abs_().argmax()
    a, b = (t.to(off.dtype) for t in layer.factors())
    o, i = at // layer.in_features, at % layer.in_features
    return (b[o] @ a[:, i] - w[o, i].to(off.dtype)).abs()
