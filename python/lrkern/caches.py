# SPDX-License-Identifier: Apache-2.0
"""What is derived of an adapter's weights and kept, where the user asked for it.

Nothing cheap changes when a weight is written through ``.data``, by numpy or by FSDP gathering new values, so nothing derived
outlives the call it was made in, but inside PEFT's own opt-in: ``with peft.helpers.DoraCaching():``.
"""

import operator
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import functional as F
from .ops.dispatch import PLAIN


def asked_for() -> bool:
    """Whether PEFT's DoraCaching is on. Who has not imported PEFT cannot have asked."""
    return getattr(sys.modules.get("peft.tuners.lora.dora"), "ENABLE_DORA_CACHING", False)


def _state(tensors: tuple[Tensor, ...]) -> list | None:
    """What mostly changes with their contents; None where nothing tells: in inference mode tensors have no version, and in a
    process group FSDP may gather new values."""
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_group or any(t.is_inference() for t in tensors):
        return None
    return [(t.data_ptr() if type(t) in PLAIN else 0, t._version) for t in tensors]


class DoraNorm:
    """‖W + scale · B A‖ per row. Kept inside DoraCaching and out of training, as PEFT does, until W, A, B or the scale
    changes by their version counters. Copies and pickles are empty."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._kept: tuple | None = None

    def __call__(
        self,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        training: bool,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """weight: W, or where it is quantised what changes with it, with ``dense`` to get W [O, I] itself."""
        norm = lambda: F.dora_norm(weight if dense is None else dense(), a, b, scale)
        if torch.compiler.is_compiling():
            return norm()
        if training or not asked_for():
            self.clear()
            return norm()
        tensors = weight, a, b
        if (state := _state(tensors)) is None:
            self.clear()
            return norm()
        if self._kept is not None:
            of, at, result = self._kept
            if all(map(operator.is_, of, tensors)) and at == (state, scale):
                return result
        with torch.inference_mode(False):  # a tensor that later calls in any mode may use
            result = norm()
        self._kept = (
            (tensors, (state, scale), result) if type(result) is Tensor else None
        )  # nothing stays of a fake run
        return result

    def __deepcopy__(self, memo) -> "DoraNorm":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class MixedFactors(DoraNorm):
    """Pools of factors were kept here once; pickles of 0.1 name it."""
