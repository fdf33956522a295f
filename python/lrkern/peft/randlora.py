# SPDX-License-Identifier: Apache-2.0
"""PEFT's RandLoRA layers on lrkern: U = Λ A Γ is formed in row panels where PEFT's code stores it, and x Uᵀ, for every layer."""

import peft
from peft.tuners.randlora.layer import RandLoraLayer

from .. import functional as F
from .basis import FusedBasis


class FusedRandLora(FusedBasis, layers=RandLoraLayer):
    """randlora_A [r, 1, Min] and randlora_B [Max, N, r] are prefixes of a pair that the layers share.

    save_output: of a layer with in > out, False does not save for backward the [T, n r] that PEFT's code saves, for a GEMM
    more there.
    """

    save_output = True

    _config = peft.RandLoraConfig
    _method, _forwards = "RandLoRA", "peft.tuners.randlora.layer"
    _own = "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B", "randlora_dropout"

    def _arguments(self, name, lam, gam, A, B):
        (r, n), small, large = lam.shape, *sorted((self.in_features, self.out_features))
        if A.dtype != B.dtype:
            return f"projections of dtype {A.dtype} and {B.dtype}"
        if A.shape[0] != r or B.shape[2] != r or B.shape[1] < n or A.shape[2] < small or B.shape[0] < large:
            return f"projections {list(A.shape)} and {list(B.shape)} for {n} bases of rank {r}, {small} by {large}"
        if self.num_bases != n:  # PEFT keeps the number of the adapter that was added last
            return f"{n} bases, PEFT's layer has {self.num_bases}"
        B = B[:large, :n].flatten(1).mT  # [n r, large], row j r + k
        return lam, gam, A[:, 0, :small].to(lam.device), B.to(lam.device), float(self.scaling[name])

    def _linear(self, x, weight, bias, adapter):
        return F.randlora_linear(x, weight, bias, *adapter, True, False, self.save_output)

    def _add(self, y, x, adapter):
        return F.randlora_add(y, x, *adapter, True, False, self.save_output)
