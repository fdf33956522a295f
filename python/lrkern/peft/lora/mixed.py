# SPDX-License-Identifier: Apache-2.0
"""PEFT's mixed batches, adapter_names= of one name a row: their rows by adapter, and how they train."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.autograd import Function

from ..layer import Swapped, swap

NAMED = "_lrkern_named"  # of a layer: whether its last forward in training had adapter_names


class _Rows(Function):
    """x[order] for a permutation, whose gradient is a gather as well."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        return dy.index_select(0, ctx.inverse), None, None


def in_order(
    names: Sequence[str], adapters: Iterable[str], *tensors: Tensor
) -> tuple[list[tuple[Tensor, ...]], Callable[[list[Tensor]], Tensor]]:
    """Rows of the tensors together: those without an adapter where there are some, then each adapter's, in order. And what
    makes one tensor of rows in this order. Where the batch lies in it already they are views."""
    number = {name: i for i, name in enumerate(adapters, 1)}
    groups = [number.get(name, 0) for name in names]
    order = sorted(range(len(names)), key=groups.__getitem__)
    counts = [groups.count(i) for i in range(len(number) + 1)]
    counts = counts if counts[0] else counts[1:]
    if order == list(range(len(names))):
        return [*zip(*(t.split(counts) for t in tensors), strict=True)], torch.cat
    device = tensors[0].device
    at = torch.tensor(order).to(device)
    back = torch.tensor(sorted(range(len(names)), key=order.__getitem__)).to(device)
    rows = [*zip(*(_Rows.apply(t, at, back).split(counts) for t in tensors), strict=True)]
    return rows, lambda each: _Rows.apply(torch.cat(each), back, at)


# ---------------------------------------------------------------------------------------------------- training


def allow_training(model: nn.Module) -> None:
    """Every LoraModel of the model takes adapter_names= in training."""
    found = [m for m in model.modules() if isinstance(m, LoraModel)]
    if not found:
        raise ValueError(
            "lrkern.peft.patch: model must have a PEFT LoraModel in it for mixed_training, got "
            f"{type(model).__name__} with none"
        )
    for m in found:
        if not isinstance(m, MixedTraining):
            swap(MixedTraining, m)


class MixedTraining(Swapped):
    """Comes before LoraModel, which injects adapter_names into its layers and refuses to in training."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        training = self.training
        if training:
            self._check(names)
        with ExitStack() as stack:
            self.training = False  # of this module alone: PEFT's check is all that reads it here
            try:
                stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            finally:
                self.training = training
            stack.enter_context(_remembered(self, names))
            stack.callback(_unhook, self)
            yield

    def _check(self, names: Any) -> None:
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"lrkern.peft: adapter_names must be a list of str in training, got {type(names).__name__}")
        for layer in self.modules():
            for name in names if isinstance(layer, LoraLayer) else ():
                if name in layer.lora_variant:
                    variant = type(layer.lora_variant[name]).__name__
                    raise ValueError(
                        f"lrkern.peft: adapter_names must name plain LoRA adapters in training, got {name!r} ({variant})"
                    )


def _unhook(model: nn.Module) -> None:
    """PEFT leaves its hooks behind where a forward raises, out of memory say: the next one would have this one's names."""
    for m in model.modules():
        for key, hook in list(m._forward_pre_hooks.items()):
            if isinstance(hook, partial) and hook.func is _adapter_names_pre_forward_hook:
                del m._forward_pre_hooks[key]
                m._forward_pre_hooks_with_kwargs.pop(key, None)


# Activation checkpointing runs a part of the model again in backward, when PEFT's hooks that inject the names are gone. These
# attributes hold who does it: transformers' and torch's CheckpointWrapper's.
CHECKPOINTS = "_gradient_checkpointing_func", "checkpoint_fn"


@contextmanager
def _remembered(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, what is checkpointed takes the names with it."""
    now = [True]
    changed = [(m, key, m.__dict__[key]) for m in model.modules() for key in CHECKPOINTS if key in m.__dict__]
    for m, key, checkpoint in changed:
        m.__dict__[key] = partial(_checkpoint, checkpoint, m, names, now)
    try:
        yield
    finally:
        now.clear()
        for m, key, checkpoint in changed:
            m.__dict__[key] = checkpoint


def _checkpoint(
    checkpoint: Callable, owner: nn.Module, names: Sequence[str], now: list, function: Callable, *args, **kw
):
    def run(*args: Any, **kwargs: Any) -> Any:
        if now:
            return function(*args, **kwargs)
        with _named(owner, names):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kw)


@contextmanager
def _named(part: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """As LoraModel does for the whole model."""
    inject = lambda m, args, kwargs: (args, kwargs | {"adapter_names": names})
    layers = [m for m in part.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [m.register_forward_pre_hook(inject, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_again(layer: nn.Module, named: bool) -> None:
    """A forward within backward() is a checkpoint's second run. It must not lack the names that the first one had."""
    if named:
        layer.__dict__[NAMED] = True
    elif layer.__dict__.get(NAMED):
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "lrkern.peft: a checkpointed forward with adapter_names must get them again, got none in its second run; "
                "use gradient_checkpointing_enable() of the model, or torch's checkpoint_wrapper"
            )
        layer.__dict__[NAMED] = False
