# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401
"""The ops: typed wrappers over ``torch.ops.lrkern``, their fakes, autograd and autocast. Nothing else calls _C.so.

Letters: T tokens (any leading dimensions), I in, O out, R rank (0 to 512). Activations and base weights are float32,
float16 or bfloat16; a, b and s are of that dtype or float32, and s is float32 where a and b are float16. D is dropout by Philox: element (row, column) of x
flattened to [T, I] is kept iff its 16 random bits under ``seed`` are >= round(65536 dropout_p), and kept elements are
divided by the keep probability. The mask is recomputed wherever it is needed and never stored.
Bad arguments raise RuntimeError as ``lrkern::op: argument must ..., got ...``.
"""

import os

from .basis import basis_combine, basis_dot, basis_fill, basis_matmul, basis_matmul_
from .disable import disable as _disable
from .disable import disabled
from .dispatch import LIBRARY, build_info
from .lora import linear_expand, lora_add, lora_expand_, lora_linear, lora_shrink
from .mora import mora_add, mora_compress, mora_decompress, mora_decompress_, mora_linear
from .multi_lora import (
    multi_lora_embedding,
    multi_lora_expand,
    multi_lora_expand_,
    multi_lora_linear,
    multi_lora_plan,
    multi_lora_shrink,
)
from .mx import mx_dequantize, mx_linear, mx_linear_expand, mx_matmul, mx_quantize, nvfp4_dequantize, nvfp4_quantize
from .s2ft import gather_matmul, gather_matmul_, scatter_add, scatter_add_, slice_gather, slice_linear

_disable(os.environ.get("LRKERN_DISABLE", ""))
