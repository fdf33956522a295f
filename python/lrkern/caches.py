# SPDX-License-Identifier: Apache-2.0
"""What is derived of an adapter's weights, cached as long as they stay as they are.

Version counters tell whether they did. They do not see a write through ``.data``: ``clear`` is for whoever makes one. Nor do
they see FSDP gather new values: in a process group nothing is cached. Copies and pickles of a cache are empty ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import functional as F
from .limits import PAGE

_PLAIN = (Tensor, torch.nn.Parameter)


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Seen:
    """Tensors and what their version counters said, to tell later whether they are the same with the same contents."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.state = tensors, self._state(tensors)

    @staticmethod
    def _state(tensors: tuple[Tensor, ...]) -> list | None:
        if any(t.is_inference() for t in tensors):
            return None  # they have no version
        return [(t.data_ptr() if type(t) in _PLAIN else 0, t._version) for t in tensors]

    def still(self, *tensors: Tensor) -> bool:
        same = len(self.tensors) == len(tensors) and all(p is q for p, q in zip(self.tensors, tensors, strict=True))
        return same and self.state is not None and self.state == self._state(tensors)


class _Cache:
    def __init__(self):
        self.clear()

    def clear(self) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo) -> "_Cache":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class DoraNorm(_Cache):
    """‖W + scale · B A‖ per row. Under no_grad it is cached until W, A, B or the scale changes; where gradients are
    recorded only ‖W‖ is, until W changes. A recorded forward clears the rest."""

    def clear(self) -> None:
        self._weight = self._factors = None  # (Seen, result)

    def __call__(
        self, weight: Tensor, a: Tensor, b: Tensor, scale: float, dense: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """weight: W, or where it is quantised what changes with it, with ``dense`` to get W [O, I] itself."""
        dense = dense or (lambda: weight)
        if torch.compiler.is_compiling():
            return F.dora_norm(dense(), a, b, scale)
        if _in_process_group():
            self.clear()
            return F.dora_norm(dense(), a, b, scale)
        if torch.is_grad_enabled():
            self._factors = None
        elif self._factors and self._factors[1] == scale and self._factors[0].still(weight, a, b):
            return self._factors[2]
        w, cached = dense(), self._weight
        if not (cached and cached[0].still(weight)):
            cached = Seen(weight), F.dora.row_norm(w)
        norm = F.dora_norm(w, a, b, scale, cached[1])
        if type(norm) is Tensor:  # nothing stays of a fake run
            self._weight = cached
            if not torch.is_grad_enabled():
                self._factors = Seen(weight, a, b), scale, norm
        return norm


class MixedFactors(_Cache):
    """The factors of several adapters as one multi-LoRA pool: A [R, I] and B [O, R] of each adapter ->
    a_pool [P, I], b_pool [P, O], pages [A, 1, M], ranks [A, 1]."""

    def clear(self) -> None:
        self._cached = None  # (Seen, dtype, result)

    def __call__(self, factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [t for pair in factors for t in pair]
        if self._cached and self._cached[1] == dtype and self._cached[0].still(*tensors):
            return self._cached[2]
        result = self._build(factors, dtype)
        self._cached = None if _in_process_group() else (Seen(*tensors), dtype, result)
        return result

    @staticmethod
    @torch.no_grad()
    def _build(factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a, _ in factors]
        counts = [-(-r // PAGE) for r in ranks]

        def pool(each: list[Tensor]) -> Tensor:
            """One cat: a copy per adapter would cost more than the products on a small model."""
            tail = each[0].new_zeros(PAGE, each[0].shape[1])
            return torch.cat([t for rows in each for t in (rows, tail[: -len(rows) % PAGE])]).to(dtype)

        pages, page = [], 0
        for count in counts:
            pages.append([[*range(page, page + count), *[0] * (max(counts) - count)]])
            page += count
        to = lambda values: torch.tensor(values, dtype=torch.int32).to(factors[0][0].device)
        a_pool, b_pool = pool([a for a, _ in factors]), pool([b.mT for _, b in factors])
        return a_pool, b_pool, to(pages), to(ranks)[:, None]
