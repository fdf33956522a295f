# SPDX-License-Identifier: Apache-2.0
"""What is derived of an adapter's weights, cached as long as they stay as they are.

Version counters tell. They do not see a write through ``.data``, for which there is ``clear``, nor FSDP gathering new
values: in a process group nothing is cached. Copies and pickles of a cache are empty ones.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .limits import PAGE
from .ops.dispatch import PLAIN


def _state(tensors: Sequence[Tensor]) -> list | None:
    """What changes with their contents; None where nothing tells: in inference mode tensors have no version."""
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_group or any(t.is_inference() for t in tensors):
        return None
    return [(t.data_ptr() if type(t) in PLAIN else 0, t._version) for t in tensors]


class _Cache:
    """Results by name, each of certain tensors and of one more value."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._results: dict[str, tuple] = {}

    def _find(self, name: str, tensors: Sequence[Tensor], value: Any = None) -> Any:
        of, state, at, result = self._results.get(name, ((), None, None, None))
        same = state is not None and at == value and len(of) == len(tensors) and all(map(operator.is_, of, tensors))
        return result if same and state == _state(tensors) else None

    def _keep(self, name: str, tensors: Sequence[Tensor], result: Any, value: Any = None) -> Any:
        self._results.pop(name, None)
        if (state := _state(tensors)) is not None:
            self._results[name] = tensors, state, value, result
        return result

    def __deepcopy__(self, memo) -> "_Cache":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class DoraNorm(_Cache):
    """‖W + scale · B A‖ per row. Under no_grad it is cached until W, A, B or the scale changes; where gradients are
    recorded only ‖W‖ is, until W changes. A recorded forward clears the rest."""

    def __call__(
        self, weight: Tensor, a: Tensor, b: Tensor, scale: float, dense: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """weight: W, or where it is quantised what changes with it, with ``dense`` to get W [O, I] itself."""
        tensors = weight, a, b
        if torch.compiler.is_compiling():
            return F.dora_norm(weight if dense is None else dense(), a, b, scale)
        if torch.is_grad_enabled():
            self._results.pop("norm", None)
        elif (norm := self._find("norm", tensors, scale)) is not None:
            return norm
        w, of_w = weight if dense is None else dense(), self._find("weight", tensors[:1])
        of_w = F.dora.row_norm(w) if of_w is None else of_w
        norm = F.dora_norm(w, a, b, scale, of_w)
        if type(norm) is Tensor:  # nothing stays of a fake run
            self._keep("weight", tensors[:1], of_w)
            if not torch.is_grad_enabled():
                self._keep("norm", tensors, norm, scale)
        return norm


class MixedFactors(_Cache):
    """The factors of several adapters as one multi-LoRA pool: A [R, I] and B [O, R] of each adapter ->
    a_pool [P, I], b_pool [P, O], pages [A, 1, M], ranks [A, 1]."""

    def __call__(self, factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [t for pair in factors for t in pair]
        pool = self._find("pool", tensors, dtype)
        return self._keep("pool", tensors, self._build(factors, dtype), dtype) if pool is None else pool

    @staticmethod
    @torch.no_grad()
    def _build(factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a, _ in factors]
        counts = [-(-r // PAGE) for r in ranks]

        def pool(each: list[Tensor]) -> Tensor:
            """One cat: a copy per adapter would cost more than the products on a small model."""
            tail = each[0].new_zeros(PAGE, each[0].shape[1])
            return torch.cat([t for rows in each for t in (rows, tail[: -len(rows) % PAGE])]).to(dtype)

        ends, most = [*accumulate(counts)], max(counts)
        pages = [[[*range(end - n, end), *[0] * (most - n)]] for end, n in zip(ends, counts, strict=True)]
        to = lambda values: torch.tensor(values, dtype=torch.int32).to(factors[0][0].device)
        a_pool, b_pool = pool([a for a, _ in factors]), pool([b.mT for _, b in factors])
        return a_pool, b_pool, to(pages), to(ranks)[:, None]
