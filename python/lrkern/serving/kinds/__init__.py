# SPDX-License-Identifier: Apache-2.0
"""The kinds of adapters that a pool holds and a batch mixes: a file each, which makes itself known (``kind.Kind``)."""

from . import lora  # noqa: F401
from .factors import Factors
from .kind import FAMILIES
from .vectors import Shared, Vectors

__all__ = ["FAMILIES", "Factors", "Shared", "Vectors"]
