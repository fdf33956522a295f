# SPDX-License-Identifier: Apache-2.0
"""The kinds of adapters that a pool holds and a batch mixes: a file each, which makes itself known (``kind.Kind``)."""

from .kind import FAMILIES

# isort: off
from .factors import Factors  # what acts on a batch first: gains are of the base's own y
from .vectors import Shared, Vectors
from . import bases, lora  # noqa: F401
# isort: on

__all__ = ["FAMILIES", "Factors", "Shared", "Vectors"]
