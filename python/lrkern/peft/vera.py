# SPDX-License-Identifier: Apache-2.0
"""PEFT's VeRA layers on lrkern."""

from peft.tuners.vera.layer import VeraLayer

from .. import functional as F
from .basis import FusedBasis


class FusedVera(FusedBasis, layers=VeraLayer):
    """vera_A [r, Max] and vera_B [Max, r] are prefixes of a pair that the layers share.

    save_output: of a layer, False saves for backward x Aᵀ [T, r] alone where PEFT's code saves a [T, O] as well, for a GEMM
    more there.
    """

    save_output = True

    _method, _forwards = "VeRA", "peft.tuners.vera.layer"
    _own, _vectors = "vera", ("lambda_d", "lambda_b")

    def _arguments(self, name, d, b, A, B):
        if len({t.dtype for t in (d, b, A, B)}) > 1:
            return f"vectors and projections of dtype {d.dtype}, {b.dtype}, {A.dtype}, {B.dtype}"
        r, I, O = len(d), self.in_features, self.out_features
        if A.shape[0] != r or B.shape[1] != r or A.shape[1] < I or B.shape[0] < O:
            return f"projections {list(A.shape)} and {list(B.shape)} for rank {r} and [{O}, {I}]"
        return d, b, A[:, :I].to(d.device), B[:O].mT.to(d.device)

    def _takes(self, plan, x):
        casts = getattr(self, "cast_input_dtype_enabled", True)  # to the dtype of the adapters
        return (casts or x.dtype == plan.adapters[0][0].dtype) and super()._takes(plan, x)

    def _linear(self, x, weight, bias, adapter):
        return F.vera_linear(x, weight, bias, *adapter, True, self.save_output)

    def _add(self, y, x, adapter):
        return F.vera_add(y, x, *adapter, True, self.save_output)
