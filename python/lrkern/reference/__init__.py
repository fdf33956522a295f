# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401
"""What each op means, in plain PyTorch, and the samples every test and benchmark runs it on: the registry ``OPS``.

A family is a module here that registers its ops. Letters as in ops.
"""

from .basis import basis_combine, basis_dot, basis_fill, basis_matmul, basis_matmul_
from .lora import add, linear_expand, lora_add, lora_expand_, lora_linear, lora_shrink
from .mora import mora_add, mora_compress, mora_decompress, mora_decompress_, mora_linear
from .multi_lora import (
    factors,
    multi_lora_embedding,
    multi_lora_expand,
    multi_lora_expand_,
    multi_lora_linear,
    multi_lora_plan,
    multi_lora_shrink,
    pages_of,
)
from .mx import mx_dequantize, mx_linear, mx_linear_expand, mx_matmul, mx_quantize, nvfp4_dequantize, nvfp4_quantize
from .registry import OPS, Draw, Op, Sample
from .rng import BITS, basis_elements, dropout_multiplier, philox4x32
from .s2ft import gather_matmul, gather_matmul_, scatter_add, scatter_add_, slice_gather, slice_linear
