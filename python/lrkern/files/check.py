# SPDX-License-Identifier: Apache-2.0
"""Refusing files: always a ValueError, which says what must be and what is."""

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

FP32_MAX = float.fromhex("0x1.fffffep127")  # scales are float32 on the device

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100


def shown(value: Any) -> str:
    """repr, short however long or deep the value is: it may be anybody's."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python's limit on the digits of an integer
        return "a whole number of thousands of digits"


def named(key: str) -> str:
    """A name or key of a file as it is where that is plain to read, else as repr has it."""
    return key if key.isprintable() and 0 < len(key) <= 500 else shown(key)


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


def is_whole(value: Any, low: int, high: int) -> bool:
    """bool is an int to Python, not to a file."""
    return type(value) is int and low <= value <= high


def is_finite(value: Any) -> bool:
    """A number, and finite in float32. Comparing is exact for integers of any size, and false for nan."""
    return type(value) in (int, float) and -FP32_MAX <= value <= FP32_MAX


def check_shape(key: str, tensor: Tensor, shape: Sequence[int]) -> None:
    require(tensor.shape == tuple(shape), f"{named(key)} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_finite(key: str, tensor: Tensor) -> None:
    require(tensor.is_floating_point() and tensor.isfinite().all(), f"{named(key)} must be finite floats")
