# SPDX-License-Identifier: Apache-2.0
"""WeLore: ranks by one threshold on the normalised singular values of all layers."""

import bisect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import require
from ..nn import FactorizedLinear
from ..nn.factorized import wide
from .model import Report, put, targets

WHO = "lrkern.compress.welore"


def welore(
    model: nn.Module,
    ratio: float | None = None,
    *,
    tau: float | None = None,
    min_reduction: float | None = None,
    freeze: bool = True,
    target_modules: Any = "all-linear",
    **rules: Any,
) -> Report:
    """Compresses a model's linears in place by WeLore (Jaiswal et al., arXiv 2407.11239).

    σ' = (σ - min σ) / (max σ - min σ) in each W, 1 where all are equal up to rounding, and k = #{σ' >= tau} with one tau for all.
    W ≈ (U_k √S) (√S V_kᵀ) where that is smaller than W, (in + out) k < in · out. These, the low-rank components, train, with their
    biases; the other targeted layers stay dense and are frozen, and with ``freeze`` so is all else of the model.

    Args:
        ratio: effective rank reduction as in the paper: the removed ranks of the low-rank components over all ranks of the targeted
            layers. tau is then the smallest at which it is reached (a number in 0..1; one of ratio and tau is given).
        min_reduction: in place of the rule of sizes, a layer is a low-rank component where more than this share of its ranks goes:
            the authors' code has 0.4999, the same for square W. Their checkpoints lack biases and are bfloat16; both are kept here.
        target_modules, rules: as everywhere in ``lrkern.compress``.

    Singular values come first, alone; then the factors of the low-rank components, which are in memory beside the dense weights until
    all are there. Also refused: a ratio that tau = 1 does not reach.
    """
    for name, value in (("ratio", ratio), ("tau", tau), ("min_reduction", min_reduction)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        require(value is None or number, f"{WHO}: {name} must be a number in 0..1, got {value!r}")
    require((ratio is None) != (tau is None), f"{WHO}: one of ratio and tau must be given, got {ratio!r} and {tau!r}")
    linears = targets(WHO, model, target_modules, rules)
    spectra = {name: _normalised(m.weight) for name, m in linears.items()}
    shapes = {name: tuple(m.weight.shape) for name, m in linears.items()}
    ranks = lambda at: _ranks(spectra, shapes, at, min_reduction)
    if tau is None:
        tau = _search(spectra, ranks, ratio)
    layers = {name: FactorizedLinear.from_linear(linears[name], r) for name, r in ranks(tau).items()}
    for m in (model,) if freeze else linears.values():
        m.requires_grad_(False)
    return put(model, linears, layers, tau)


@torch.no_grad()
def _normalised(w: Tensor) -> Tensor:
    """σ', from the largest on, float64 on the CPU; ones where all σ are equal up to rounding, whose σ' would be noise."""
    s = torch.linalg.svdvals(w.to(wide(w.dtype))).double().cpu()
    span, noise = s[0] - s[-1], max(torch.finfo(w.dtype).eps, max(w.shape) * torch.finfo(wide(w.dtype)).eps)
    return (s - s[-1]) / span if span > noise * s[0] else torch.ones_like(s)


def _ranks(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], tau: float, min_reduction: float | None
) -> dict[str, int]:
    """Of the low-rank components at this tau."""
    found = {}
    for name, s in spectra.items():
        k, (o, i) = int((s >= tau).sum()), shapes[name]
        low = k * (o + i) < o * i if min_reduction is None else (len(s) - k) / len(s) > min_reduction
        if low:
            found[name] = k
    return found


def _search(spectra: Mapping[str, Tensor], ranks: Any, ratio: float) -> float:
    """The smallest tau of those at which a rank changes with this reduction, which never falls as tau grows."""
    steps, whole = torch.cat([*spectra.values()]).unique().tolist(), sum(map(len, spectra.values()))

    def reduction(at: float) -> float:
        return sum(len(spectra[name]) - k for name, k in ranks(at).items()) / whole

    at = bisect.bisect_left(steps, ratio, key=reduction)
    require(at < len(steps), f"{WHO}: ratio must be at most {reduction(steps[-1]):.4f} for these layers, got {ratio!r}")
    return steps[at]
