# SPDX-License-Identifier: Apache-2.0
"""LoRD: the outputs of a layer projected to their principal components."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import named, require
from ..files.folder import ranks_and_scalings
from ..nn import FactorizedLinear
from .model import Report, put, targets

WHO = "lrkern.compress.lord"


def lord(
    model: nn.Module,
    batches: Iterable[Any],
    r: int,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    layers_at_once: int | None = None,
    target_modules: Any = "all-linear",
    **rules: Any,
) -> Report:
    """Compresses a model's linears in place by LoRD (Kaushal, Vaidhya and Rish, arXiv 2309.14021).

    With V_r [out, r] the first eigenvectors of the covariance of a layer's outputs y = x Wᵀ + bias over calibration data, W becomes
    V_r (V_rᵀ W): B = V_r, A = V_rᵀ W. No other projection of y to r dimensions has a smaller mean squared error. The bias becomes
    mean(y) - B A mean(x), so that the mean output is kept to the last rounding; a layer without one gets one. That this is the
    authors' own correction is not verified, their code is not public. All factors and biases of the new layers train, what else
    trains stays.

    Args:
        batches: calibration data: mappings for model(**batch), tuples or lists for model(*batch), or one argument each. Every row of
            a layer's input counts, padding too. The model runs in eval mode, uncompressed, without gradients.
        r: rank of all layers, 1 to min(in, out). rank_pattern: other ranks, by PEFT's regexes of names.
        layers_at_once: how many layers' covariances are collected in one run over ``batches``, which must then be a list or another
            iterable that begins anew; None for all in one. Each takes 8 · out² bytes on the layer's device, in float64: 134 MB for
            4096 outputs.
        target_modules, rules: as everywhere in ``lrkern.compress``.

    Also refused: another rank, a layer that saw no more rows than its rank (or was never called), that saw or gave inf or nan, batches
    that do not begin anew.
    """
    linears = targets(WHO, model, target_modules, rules)
    said = {"r": r, "lora_alpha": 1, "rank_pattern": rank_pattern}
    ranks = {name: rank for name, (rank, _) in ranks_and_scalings(said, linears).items()}
    for name, rank in ranks.items():
        most = min(linears[name].weight.shape)
        require(1 <= rank <= most, f"{WHO}: r of {named(name)} must be a whole number in 1..{most}, got {rank!r}")
    some = layers_at_once is None or (type(layers_at_once) is int and layers_at_once > 0)
    require(some, f"{WHO}: layers_at_once must be a whole number > 0 or None, got {layers_at_once!r}")
    once = layers_at_once is None or layers_at_once >= len(linears)
    require(once or iter(batches) is not batches, f"{WHO}: batches must begin anew for layers_at_once, got an iterator")
    layers, names = {}, iter(linears)
    while group := [*islice(names, layers_at_once)]:
        seen = _observed(model, {name: linears[name] for name in group}, batches)
        for name in group:
            layers[name] = _projected(name, linears[name], ranks[name], seen.pop(name))
    return put(model, linears, layers)


class Moments:
    """Of what a layer saw, in float64: rows, the means of x [I] and y [O], and Σ (y - mean) (y - mean)ᵀ [O, O]."""

    def __init__(self, linear: nn.Linear):
        like = {"device": linear.weight.device, "dtype": torch.float64}
        self.rows, self.x, self.y = 0, torch.zeros(linear.in_features, **like), torch.zeros(linear.out_features, **like)
        self.scatter = torch.zeros(linear.out_features, linear.out_features, **like)

    def __call__(self, linear: nn.Linear, args: tuple, kwargs: dict, y: Tensor) -> None:
        """A forward hook: batches are joined by their means, which loses nothing where these are large."""
        x = (args[0] if args else kwargs["input"]).detach().flatten(0, -2).to(self.x)
        y = y.detach().flatten(0, -2).to(self.y)
        if not len(x):
            return
        share = len(x) / (self.rows + len(x))
        mean = y.mean(0)
        step, centred = mean - self.y, y - mean
        self.scatter.addmm_(centred.mT, centred).addr_(step, step, alpha=self.rows * share)
        self.x += share * (x.mean(0) - self.x)
        self.y += share * step
        self.rows += len(x)


@torch.no_grad()
def _observed(model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Any]) -> dict[str, Moments]:
    seen = {name: Moments(m) for name, m in linears.items()}
    hooks = [m.register_forward_hook(seen[name], with_kwargs=True) for name, m in linears.items()]
    try:
        with _evaluating(model):
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*batch) if isinstance(batch, tuple | list) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, flag in training.items():
            m.training = flag


@torch.no_grad()
def _projected(name: str, linear: nn.Linear, r: int, seen: Moments) -> FactorizedLinear:
    rows = f"{WHO}: {named(name)} must see more rows in batches than its rank {r}, got {seen.rows}"
    require(seen.rows > r, rows)
    finite = seen.scatter.isfinite().all() and seen.x.isfinite().all() and seen.y.isfinite().all()
    require(finite, f"{WHO}: inputs and outputs of {named(name)} must be finite, got inf or nan")
    w = linear.weight
    b = torch.linalg.eigh(seen.scatter).eigenvectors[:, -r:].flip(1)
    a = (b.mT @ w.double()).to(w.dtype)
    b = b.to(w.dtype)
    bias = seen.y - b.double() @ (a.double() @ seen.x)
    return FactorizedLinear.from_factors(a, b, bias).train(linear.training)
