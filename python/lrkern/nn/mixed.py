# SPDX-License-Identifier: Apache-2.0
"""The factors of several adapters as one multi-LoRA pool, kept as long as they stay as they are."""

import torch
from torch import Tensor

from .dora import _Seen

_PAGE = 16  # ranks, lrkern.ops.multi_lora's


class MixedFactors:
    """A [R, I] and B [O, R] of each adapter -> a_pool [P, I], b_pool [P, O], pages [A, 1, M], ranks [A, 1].

    What DoraNorm says of version counters and process groups holds here too.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._kept = None  # (_Seen, dtype, result)

    def __call__(self, factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [t for pair in factors for t in pair]
        if self._kept:
            seen, kept_dtype, result = self._kept
            if dtype == kept_dtype and len(seen.tensors) == len(tensors) and seen.still(*tensors):
                return result
        result = self._build(factors, dtype)
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._kept = (_Seen(*tensors), dtype, result) if alone else None
        return result

    @staticmethod
    @torch.no_grad()
    def _build(factors: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a, _ in factors]
        counts = [-(-r // _PAGE) for r in ranks]

        def pool(each: list[Tensor]) -> Tensor:
            """One cat: a copy per adapter would cost more than the products on a small model."""
            tail = each[0].new_zeros(_PAGE, each[0].shape[1])
            return torch.cat([t for rows in each for t in (rows, tail[: -len(rows) % _PAGE])]).to(dtype)

        pages, page = [], 0
        for count in counts:
            pages.append([[*range(page, page + count), *[0] * (max(counts) - count)]])
            page += count
        to = lambda values: torch.tensor(values, dtype=torch.int32).to(factors[0][0].device)
        a_pool, b_pool = pool([a for a, _ in factors]), pool([b.mT for _, b in factors])
        return a_pool, b_pool, to(pages), to(ranks)[:, None]

    def __deepcopy__(self, memo) -> "MixedFactors":
        return MixedFactors()

    def __reduce__(self):
        return MixedFactors, ()
