# SPDX-License-Identifier: Apache-2.0
"""How a budget moves over the steps of a training."""

import math


def cubic(step: int, start: float, end: float, first: float, last: float) -> float:
    """first up to step ``start``, last from ``end`` on, between them last + (first - last) (1 - (step - start) / (end - start))³."""
    if step <= start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def cosine(step: int, end: int, first: float) -> float:
    """first · (1 + cos(π step / end)) / 2, and 0 from ``end`` on."""
    return first * (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0
