# SPDX-License-Identifier: Apache-2.0
"""LoRA-SB: LoRA-XS that starts from the first step of full fine-tuning."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linear import Method
from .rank import MiddleLinear, frozen, trained
from .spectrum import top


class LoRASBLinear(MiddleLinear):
    """y = x Wᵀ + bias + ((dropout(x) Aᵀ) Rᵀ) Bᵀ: LoRA-SB (Ponkshe et al., arXiv 2411.19557).

    lora_A [r, in] and lora_B [out, r] have orthonormal rows and columns and are frozen, lora_R [r, r] trains. ``lora_sb_init`` (of a
    model) or ``init_from`` (of a layer) makes them from a gradient, once, before training: B R A is then the best approximation of rank
    r of one step of full fine-tuning, and dR = Bᵀ G Aᵀ the R for which B R A is nearest to the gradient G of W. Until then they are the
    singular vectors of W with R = 0, and the layer is the base layer. There is no scaling: the method is made for lora_alpha = r.
    """

    METHODS: ClassVar = {"lora_sb": Method({}, "LoRA-SB, Ponkshe et al., arXiv 2411.19557")}
    SETTINGS = ("r", "dropout")
    PACKED = False  # A and B are of W
    QUANTIZES = False

    def _set_up(
        self, base: nn.Linear, r: int = 16, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None
    ) -> None:
        like = self._begin(base, r, r, dropout, adapter_dtype)
        u, _, vh = top(base.weight, r, "LoRASBLinear: it needs")
        self.lora_A, self.lora_B = frozen(vh, **like), frozen(u, **like)
        self.lora_R = trained(r, r, **like)

    def middle(self) -> Tensor:
        return self.lora_R

    @torch.no_grad()
    def init_from(self, gradient: Tensor, lr: float) -> None:
        """Writes U_r, diag(Σ_r) and V_rᵀ of -lr · sign(gradient) into B, R and A. gradient [out, in]: the loss's by W, of any positive
        scale. lr: the paper's learning rate of fine-tuning; its code takes that of the first step of the warm-up, lr / warm-up steps."""
        self._refuse_if(self.merged, "init_from", "not be merged; unmerge() first")
        _check_lr("LoRASBLinear.init_from:", lr)
        self._check_gradient("LoRASBLinear.init_from:", gradient)
        u, s, vh = top(-gradient.sign(), self.r, "LoRASBLinear.init_from: it needs")
        for p, value in ((self.lora_A, vh), (self.lora_B, u), (self.lora_R, torch.diag(lr * s))):
            p.copy_(value)

    def _check_gradient(self, who: str, gradient: Tensor) -> None:
        if gradient.shape != (shape := (self.out_features, self.in_features)):
            raise ValueError(f"{who} gradient must be {list(shape)}, got {list(gradient.shape)}")
        if not gradient.isfinite().all():
            raise ValueError(f"{who} gradient must be finite, got inf or nan")
        if not gradient.any():
            raise ValueError(
                f"{who} gradient must not be zero everywhere, which has no direction; more batches may mend it"
            )


def lora_sb_init(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], lr: float) -> None:
    """Starts all LoRASBLinear layers of a model from the sum over ``batches`` of the gradients of ``loss(model, batch)`` by their W.

    The adapters are off meanwhile. No requires_grad and no .grad of any parameter changes, and no layer where one is refused: the
    ValueError names a layer that no batch reaches, or whose gradient is not finite. ``init_from`` has lr. The model runs in its mode,
    train() or eval(); checkpoints in it must be use_reentrant=False. Call it before DDP wraps the model: that sends one process's start
    to all.

    Memory: the sums, float32 [out, in] of every such layer, and what autograd keeps of one batch, with x of every such layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    if not layers:
        raise ValueError(f"lora_sb_init: model must have LoRASBLinear layers, got {type(model).__name__} without")
    for m in layers.values():
        m._refuse_if(m.merged, "init_from", "not be merged; unmerge() first")
    _check_lr("lora_sb_init:", lr)
    sums = {name: torch.zeros_like(m.base_layer.weight, dtype=torch.float32) for name, m in layers.items()}
    anchor = torch.zeros((), requires_grad=True)  # every layer's y depends on it: the one leaf of the backward pass
    with ExitStack() as stack, torch.enable_grad():
        for name, m in layers.items():
            stack.callback(setattr, m, "enabled", m.enabled)
            m.enabled = False
            stack.callback(m.register_forward_hook(_summing(sums[name], anchor)).remove)
        for batch in batches:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                got = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"lora_sb_init: loss must give one number that the layers had a part in, got {got}")
            torch.autograd.grad(value, anchor, torch.ones_like(value), allow_unused=True)
    for name, m in layers.items():
        m._check_gradient(f"lora_sb_init: layer {name!r}:", sums[name])
    for name, m in layers.items():
        m.init_from(sums.pop(name), lr)


def _check_lr(who: str, lr: float) -> None:
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"{who} lr must be a positive number, got {lr!r}")


def _summing(total: Tensor, anchor: Tensor) -> Callable:
    """A forward hook after which the backward pass adds dyᵀ x, the gradient of this use of W, to ``total``."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0].detach()
        version = x._version

        def add(dy: Tensor) -> None:
            if x._version != version:
                raise RuntimeError("lora_sb_init: a layer's x was changed in place before the backward pass")
            total.add_(dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(dy.dtype))

        y = y + anchor
        y.register_hook(add)
        return y

    return hook
