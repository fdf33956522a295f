# SPDX-License-Identifier: Apache-2.0
"""S2FT (Yang et al., arXiv 2412.06289) on whole transformers models: heads and channels are chosen, brought together, trained, and
handed out as adapters (docs/s2ft.md)."""

from .find import FFN, Attention, find
from .permute import Record, permute, reorder, unpermute
from .select import Chosen, Selection, select

__all__ = ["FFN", "Attention", "Chosen", "Record", "Selection", "find", "permute", "reorder", "select", "unpermute"]
