# SPDX-License-Identifier: Apache-2.0
"""Refusing files: always a ValueError, which says what must be and what is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def require(holds: Any, text: str) -> None:
    if not holds:
        raise ValueError(text)


@contextmanager
def refusal(before: str, after: str = "", of: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """What is refused in the block is refused in these words."""
    try:
        yield
    except of as error:
        raise ValueError(f"{before}{error}{after}") from error


def check_shape(key: str, tensor: Tensor, shape: Sequence[int]) -> None:
    require(tensor.shape == tuple(shape), f"{key} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_finite(key: str, tensor: Tensor) -> None:
    require(tensor.is_floating_point() and tensor.isfinite().all(), f"{key} must be finite floats")
