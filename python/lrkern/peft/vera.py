# SPDX-License-Identifier: Apache-2.0
"""PEFT's VeRA layers on lrkern."""

import peft
from peft.tuners.vera.layer import VeraLayer

from .. import functional as F
from .basis import FusedBasis


class FusedVera(FusedBasis, layers=VeraLayer):
    """vera_A [r, Max] and vera_B [Max, r] are prefixes of a pair that the layers share.

    save_output: of a layer, False saves for backward x Aᵀ [T, r] alone where PEFT's code saves a [T, O] as well, for a GEMM
    more there.
    """

    save_output = True

    _config = peft.VeraConfig
    _method, _forwards = "VeRA", "peft.tuners.vera.layer"
    _own = "vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B", "vera_dropout"

    def _arguments(self, name, d, b, A, B):
        if not d.dtype == b.dtype == A.dtype == B.dtype:
            return f"vectors and projections of dtype {d.dtype}, {b.dtype}, {A.dtype}, {B.dtype}"
        r, I, O = d.size(0), self.in_features, self.out_features
        (of_a, to_a), (to_b, of_b) = A.shape, B.shape
        if of_a != r or of_b != r or to_a < I or to_b < O:
            return f"projections {[of_a, to_a]} and {[to_b, of_b]} for rank {r} and [{O}, {I}]"
        if A.device != d.device:
            A, B = A.to(d.device), B.to(d.device)
        return d, b, A if to_a == I else A[:, :I], (B if to_b == O else B[:O]).mT

    def _takes(self, plan, x):
        # PEFT casts x to the dtype of the adapters, unless that is turned off
        same = x.dtype == plan.adapters[0][0].dtype or getattr(self, "cast_input_dtype_enabled", True)
        return same and super()._takes(plan, x)

    def _linear(self, x, weight, bias, adapter):
        return F.vera_linear(x, weight, bias, *adapter, True, self.save_output)

    def _add(self, y, x, adapter):
        return F.vera_add(y, x, *adapter, True, self.save_output)
