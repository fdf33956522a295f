# SPDX-License-Identifier: Apache-2.0
"""What each variant of LoRA computes (lrkern.nn.variants): ``VARIANTS`` by name."""

from . import blocks, branches, gates, middle, sparse, spectral  # noqa: F401
from .table import VARIANTS as VARIANTS
from .table import Variant as Variant
