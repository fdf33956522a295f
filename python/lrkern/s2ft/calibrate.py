# SPDX-License-Identifier: Apache-2.0
"""What a model's linears see on batches of the user: sizes of activations and gradients, in float32, channel by channel."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..files.check import require
from .find import Target

Batches = Iterable[Mapping[str, Any]] | Callable[[nn.Module], Any]
PANEL = 256  # channels whose float32 copies, or gradient, are there at a time


def squares(w: Tensor, dim: int) -> Tensor:
    """Σ w² over one dimension of a matrix, in float32 and without a float32 copy of it."""
    parts = [panel.float().square().sum(dim) for panel in w.detach().split(PANEL, 1 - dim)]
    return torch.cat(parts).cpu()


class Seen:
    """Sums over all tokens, and the number of tokens."""

    def __init__(self, channels: int):
        self.activations, self.gradients = torch.zeros(channels), torch.zeros(channels)
        self.tokens, self.backwards = 0, 0


def calibrate(model: nn.Module, targets: Iterable[Target], batches: Batches, gradients: bool) -> dict[str, Seen]:
    """Of each target, over its channels c (columns of W, or rows): Σ a[t, c]² of what enters the linear there, or leaves it,
    and, with gradients, Σ over batches of ‖dL/dW of the channel‖². The gradient of W is made a panel of channels at a time.

    The model runs in eval mode with all parameters frozen; flags are put back, and no parameter gets a grad.
    """
    seen = {t.linear: Seen(t.units * t.size) for t in targets}
    hooks = [
        model.get_submodule(t.linear).register_forward_hook(_watch(seen[t.linear], t.side, gradients)) for t in targets
    ]
    try:
        with still(model), torch.set_grad_enabled(gradients):
            if callable(batches):
                batches(model)
            else:
                for batch in batches:
                    out = model(**batch)
                    if gradients:
                        loss = getattr(out, "loss", None)
                        text = "batches must give the model labels, for a loss"
                        require(loss is not None, f"lrkern.s2ft.select: {text}, got outputs without one")
                        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, s in seen.items():
        got = "none" if not s.tokens else "no backward"
        require(s.tokens and (s.backwards or not gradients), f"lrkern.s2ft.select: {name} must see a batch, got {got}")
    return seen


def _watch(seen: Seen, side: str, gradients: bool) -> Callable:
    def hook(linear: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        seen.activations += squares(x if side == "input" else y.detach().flatten(0, -2), 0)
        seen.tokens += len(x)
        if not gradients or not torch.is_grad_enabled():
            return y
        if not y.requires_grad:  # the first of a frozen model
            y = y.detach().requires_grad_()

        def backward(dy: Tensor) -> None:
            g = dy.flatten(0, -2)
            across, along = (g, x) if side == "input" else (x, g)  # dW's panel: all of one, channels of the other
            sums = [(across.mT @ panel).float().square().sum(0) for panel in along.split(PANEL, 1)]
            seen.gradients += torch.cat(sums).cpu()
            seen.backwards += 1

        y.register_hook(backward)
        return y

    return hook


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """In eval mode and frozen, for a while."""
    training = {m: m.training for m in model.modules()}
    trains = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for m, flag in training.items():
            m.training = flag
        for p, flag in trains.items():
            p.requires_grad_(flag)
