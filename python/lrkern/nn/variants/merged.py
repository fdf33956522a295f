# SPDX-License-Identifier: Apache-2.0
"""Layers whose ΔW is made of more than their own coefficients."""

from torch import Tensor

from ..linear import LowRankLinear


class FixedWhenMerged(LowRankLinear):
    """ΔW depends on W or on other layers, which do not stay: what ``merge`` added is kept as the factors that it had then."""

    def _merged_weight(self, w: Tensor) -> Tensor:
        """Called on the snapshot that merge makes."""
        a, b, self._scale_then = self.factors()
        self.register_buffer("A_then", a.float().clone())
        self.register_buffer("B_then", b.float().clone())
        return w + self._then()

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        return w - self._then()

    def _then(self) -> Tensor:
        return self._scale_then * (self.B_then @ self.A_then)
