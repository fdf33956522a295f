# SPDX-License-Identifier: Apache-2.0
"""S2FT (Yang et al., arXiv 2412.06289) on whole transformers models: heads and channels are chosen, brought together, trained, and
handed out as adapters (docs/s2ft.md)."""

from .adapter import Adapter, Slice, fuse, to_lora
from .file import load, save
from .find import FFN, Attention, find
from .permute import Record, permute, reorder, unpermute
from .prepare import Prepared, extract, prepare, release
from .select import Chosen, Selection, select
from .switch import switch

__all__ = [
    "FFN", "Adapter", "Attention", "Chosen", "Prepared", "Record", "Selection", "Slice", "extract", "find", "fuse", "load", "permute",
    "prepare", "release", "reorder", "save", "select", "switch", "to_lora", "unpermute",
]  # fmt: skip
