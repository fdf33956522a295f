# SPDX-License-Identifier: Apache-2.0
"""What methods that score and mask weights share."""

from collections.abc import Iterator

import torch
from torch import Tensor

_MOST = 2**18  # elements of a block of rows: a MiB in float32


def row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, each of few elements: for sums over a matrix that is never there as a whole."""
    step = max(1, _MOST // max(cols, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def largest_in_rows(scores: Tensor, share: float) -> Tensor:
    """A mask of exactly floor(share · columns) elements of each row, at least one: the largest. Which of equal ones, topk decides."""
    count = max(1, int(share * scores.shape[1] + 1e-9))  # 0.29 · 100 is 28.999...
    index = scores.topk(count, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True)
