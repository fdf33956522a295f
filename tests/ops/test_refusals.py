# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: an error that names op, argument, expected and got, for each argument of each op."""

import math

import pytest
import torch
from op_checks import is_float, want_gradients
from torch.autograd import forward_ad

import lrkern.functional as F
import lrkern.ops
from lrkern.reference import OPS

T, I, O, R = 6, 16, 12, 4
COLUMNS, IDS, EACH = (
    torch.tensor([0, 2, 3, 9]).int(),
    torch.tensor([0, -1, 1, 1, 0, 0]).int(),
    torch.tensor([[0, 1], [4, -1]]).int(),
)


def good(name):
    x, w, bias = torch.randn(T, I), torch.randn(O, I), torch.randn(O)
    a, b, s = torch.randn(R, I), torch.randn(O, R), torch.randn(T, R)
    return {
        "lora_shrink": {"x": x, "a": a, "scale": 1.0, "dropout_p": 0.0, "seed": None},
        "linear_expand": {"x": x, "weight": w, "bias": bias, "s": s, "b": b, "scale": 1.0},
        "lora_linear": {
            "x": x,
            "weight": w,
            "bias": bias,
            "a": a,
            "b": b,
            "scale": 1.0,
            "dropout_p": 0.0,
            "seed": None,
        },
        "lora_add": {"y": torch.randn(T, O), "x": x, "a": a, "b": b, "scale": 1.0, "dropout_p": 0.0, "seed": None},
        "lora_expand_": {"y": torch.randn(T, O), "s": s, "b": b, "scale": 1.0},
        "mora_compress": {"x": x, "rank": R, "type": 6, "circular": True, "chunks": 0, "adjoint": False},
        "mora_decompress": {"h": s, "out_features": O, "type": 1, "circular": True, "adjoint": False},
        "mora_decompress_": {"y": torch.randn(T, O), "h": s, "type": 1, "circular": True, "adjoint": False},
        "mora_linear": {"x": x, "weight": w, "bias": bias, "m": torch.randn(R, R), "type": 1, "circular": True},
        "mora_add": {"y": torch.randn(T, O), "x": x, "m": torch.randn(R, R), "type": 6, "circular": True},
        "slice_gather": {"x": x, "index": COLUMNS, "ids": None, "scales": None},
        "scatter_add": {"y": torch.randn(T, O), "h": s, "index": COLUMNS, "ids": None, "scales": None},
        "scatter_add_": {"y": torch.randn(T, O), "h": s, "index": COLUMNS, "ids": None, "scales": None},
        "gather_matmul": {
            "y": torch.randn(T, O),
            "x": x,
            "d": torch.randn(R, O),
            "index": COLUMNS,
            "ids": None,
            "scales": None,
        },
        "gather_matmul_": {
            "y": torch.randn(T, O),
            "x": x,
            "d": torch.randn(R, O),
            "index": COLUMNS,
            "ids": None,
            "scales": None,
        },
        "mx_quantize": {
            "x": x,
            "rule": "even",
            "hadamard": True,
            "signs": SIGNS,
            "seed": SEED,
            "gain": 1.0,
            "mask": False,
        },
        "mx_dequantize": {"codes": CODES, "scales": SCALES, "columns": I, "dtype": torch.float32},
        "nvfp4_quantize": {"x": x, "amax": torch.ones(1), "seed": SEED},
        "nvfp4_dequantize": {
            "codes": CODES,
            "scales": NV,
            "global_scale": torch.ones(1),
            "columns": 2 * I,
            "dtype": torch.float32,
        },
        "mx_linear": {"x": x, "codes": CODES, "scales": SCALES, "bias": bias, "experts": None},
        "mx_linear_expand": {
            "x": x,
            "codes": CODES,
            "scales": SCALES,
            "bias": bias,
            "s": s,
            "b": b,
            "experts": None,
        },
        "mx_matmul": {
            "a_codes": CODES,
            "a_scales": SCALES,
            "b_codes": CODES,
            "b_scales": SCALES,
            "columns": I,
            "dtype": torch.float32,
            "alpha": 0.5,
            "bias": torch.randn(O),
            "s": torch.randn(O, R),
            "u": torch.randn(O, R),
        },
        "slice_linear": {"x": x, "weight": w, "bias": bias, "slice": torch.randn(O, R), "index": COLUMNS, "dim": 1},
    }[name]


SEED, SIGNS = torch.tensor([1]), torch.tensor([5]).int()
CODES, SCALES = torch.zeros(O, 16, dtype=torch.uint8), torch.full((O, 1), 127, dtype=torch.uint8)
EXPERTS = {"codes": CODES[None], "scales": SCALES[None], "bias": None, "experts": torch.zeros(T).int()}  # of one
NV = SCALES.repeat(1, 2)
MIXED = {"index": EACH, "ids": IDS}  # of two adapters, of two columns at most
CASES = [
    ("slice_gather", {"x": torch.randn(T, I).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ("slice_gather", {"index": COLUMNS.long()}, "index must be int32, got int64"),
    ("slice_gather", {"index": EACH}, r"index must have shape \[s\] = \[\*\], got \[2, 2\]"),
    ("slice_gather", {"ids": IDS}, r"index must have shape \[A, s\] = \[\*, \*\], got \[4\]"),
    ("slice_gather", {"index": EACH, "ids": IDS.long()}, "ids must be int32, got int64"),
    ("slice_gather", {"index": EACH, "ids": IDS[:3]}, r"ids must have shape \[T\] = \[6\], got \[3\]"),
    ("slice_gather", {"index": EACH, "ids": IDS.new_zeros(T, 0)}, r"ids must have at least one slot, got \[6, 0\]"),
    ("slice_gather", {"scales": torch.ones(T)}, "scales must be None without ids, got a tensor"),
    ("slice_gather", MIXED | {"scales": torch.ones(T, 1)}, r"scales must have shape \[T\], as ids = \[6\], got \[6, 1\]"),
    ("slice_gather", MIXED | {"scales": torch.ones(T).half()}, "scales must be float32, got float16"),
    ("scatter_add", {"y": torch.tensor(1.0)}, "y must have at least one dimension, got a scalar"),
    ("scatter_add", {"h": torch.randn(T, R).half()}, r"h must be float32 \(the dtype of y\), got float16"),
    ("scatter_add", {"h": torch.randn(T, R + 1)}, r"h must have shape \[..., s\] = \[6, 4\], got \[6, 5\]"),
    ("scatter_add_", {"y": torch.randn(O, T).t()}, "y must be rows of contiguous elements at one pitch"),
    ("gather_matmul", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("gather_matmul", {"y": torch.randn(T, O).half()}, r"y must be float32 \(the dtype of x\), got float16"),
    ("gather_matmul", {"y": torch.randn(T + 1, O)}, r"y must have shape \[..., O\] = \[6, 12\], got \[7, 12\]"),
    ("gather_matmul", {"d": torch.randn(O, R)}, r"d must have shape \[s, O\] = \[4, 12\], got \[12, 4\]"),
    ("gather_matmul", {"d": torch.randn(R, O).half()}, r"d must be float32 \(the dtype of x\), got float16"),
    ("gather_matmul", MIXED, r"d must have shape \[A, s, O\] = \[2, 2, 12\], got \[4, 12\]"),
    ("gather_matmul_", {"y": torch.randn(O, T).t()}, "y must be rows of contiguous elements at one pitch"),
    ("gather_matmul_", {"d": torch.randn(R, O).to_sparse()}, "d must be a dense strided tensor"),
    ("slice_linear", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(weight is"),
    ("slice_linear", {"weight": torch.randn(O, I).half()}, r"weight must be float32 \(the dtype of x\), got float16"),
    ("slice_linear", {"bias": torch.randn(O + 1)}, rf"bias must have shape \[O\] = \[{O}\], got \[{O + 1}\]"),
    ("slice_linear", {"slice": torch.randn(R, I)}, rf"slice must have shape \[O, s\] = \[{O}, {R}\], got \[{R}, {I}\]"),
    ("slice_linear", {"slice": torch.randn(O, R), "dim": 0}, rf"slice must have shape \[s, I\] = \[{R}, {I}\], got \[{O}, {R}\]"),
    ("slice_linear", {"slice": torch.randn(O, R).half()}, r"slice must be float32 \(the dtype of x\), got float16"),
    ("slice_linear", {"index": COLUMNS[None]}, r"index must have shape \[s\] = \[\*\], got \[1, 4\]"),
    ("slice_linear", {"dim": 2}, r"dim must be 0 \(rows of weight\) or 1 \(columns\), got 2"),
    ("mx_quantize", {"x": torch.randn(T, I).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ("mx_quantize", {"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ("mx_quantize", {"rule": "nearest"}, "rule must be floor, rceil, ceil, even, quest or quest_nearest, got nearest"),
    ("mx_quantize", {"hadamard": False}, "signs must be None without hadamard, got a tensor"),
    ("mx_quantize", {"signs": SIGNS.long()}, "signs must be int32, got int64"),
    ("mx_quantize", {"signs": SIGNS.repeat(2)}, r"signs must have shape \[1\] = \[1\], got \[2\]"),
    ("mx_quantize", {"seed": SEED.int()}, "seed must be int64, got int32"),
    ("mx_quantize", {"seed": SEED.repeat(2)}, r"seed must have shape \[1\] = \[1\], got \[2\]"),
    ("mx_quantize", {"gain": math.nan}, "gain must be finite in float32, got nan"),
    ("mx_dequantize", {"codes": CODES.char()}, "codes must be uint8, got int8"),
    ("mx_dequantize", {"codes": CODES[:, :8]}, r"codes must have whole blocks of 16 bytes as its last dimension, got \[12, 8\]"),
    ("mx_dequantize", {"scales": SCALES.float()}, "scales must be uint8, got float32"),
    ("mx_dequantize", {"scales": SCALES[:5]}, r"scales must have shape \[..., G\] = \[12, 1\], got \[5, 1\]"),
    ("mx_dequantize", {"columns": 33}, r"columns must lie in \[1, 32\], the features of 1 blocks, got 33"),
    ("mx_dequantize", {"columns": 0}, r"columns must lie in \[1, 32\], the features of 1 blocks, got 0"),
    ("mx_dequantize", {"codes": CODES[:, :0], "scales": SCALES[:, :0], "columns": -1}, r"columns must lie in \[0, 0\]"),
    ("mx_dequantize", {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ("nvfp4_quantize", {"x": torch.randn(T, I).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ("nvfp4_quantize", {"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ("nvfp4_quantize", {"amax": torch.ones(2)}, r"amax must have shape \[1\] = \[1\], got \[2\]"),
    ("nvfp4_quantize", {"amax": torch.ones(1).half()}, "amax must be float32, got float16"),
    ("nvfp4_quantize", {"seed": SEED.int()}, "seed must be int64, got int32"),
    ("nvfp4_dequantize", {"codes": CODES.char()}, "codes must be uint8, got int8"),
    ("nvfp4_dequantize", {"codes": CODES[:, :7]}, r"codes must have whole blocks of 8 bytes as its last dimension, got \[12, 7\]"),
    ("nvfp4_dequantize", {"scales": SCALES}, r"scales must have shape \[..., G\] = \[12, 2\], got \[12, 1\]"),
    ("nvfp4_dequantize", {"scales": NV.view(torch.float8_e4m3fn)}, "scales must be uint8, got float8_e4m3fn"),
    ("nvfp4_dequantize", {"global_scale": torch.ones(1).double()}, "global_scale must be float32, got float64"),
    ("nvfp4_dequantize", {"global_scale": torch.tensor(1.0)}, r"global_scale must have shape \[1\] = \[1\], got \[\]"),
    ("nvfp4_dequantize", {"columns": 33}, r"columns must lie in \[17, 32\], the elements of 2 blocks, got 33"),
    ("nvfp4_dequantize", {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ("mx_matmul", {"a_codes": CODES.char()}, "a_codes must be uint8 or float8_e4m3fn, got int8"),
    ("mx_matmul", {"bias": torch.randn(3)}, r"bias must have shape \[O\] = \[12\], got \[3\]"),
    ("mx_matmul", {"s": None}, "s and u must be given together, got one of them"),
    ("mx_matmul", {"s": torch.randn(O, R).half()}, "s must be float32, got float16"),
    ("mx_matmul", {"u": torch.randn(O, 3)}, r"s must have shape \[..., R\] = \[12, 3\], got \[12, 4\]"),
    ("mx_matmul", {"a_scales": SCALES[:5]}, r"a_scales must have shape \[..., G\] = \[12, 1\], got \[5, 1\]"),
    ("mx_matmul", {"b_codes": CODES[0]}, r"b_codes must have shape \[O, 16 G\], got \[16\]"),
    ("mx_matmul", {"b_codes": CODES.repeat(1, 2), "b_scales": SCALES.repeat(1, 2)}, "b_codes must have 1 blocks a row, as a_codes has, got 2"),
    ("mx_matmul", {"b_scales": SCALES.float()}, "b_scales must be uint8, got float32"),
    ("mx_matmul", {"columns": 33}, r"columns must lie in \[1, 32\], the features of 1 blocks, got 33"),
    ("mx_matmul", {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ("mx_matmul", {"alpha": math.inf}, "alpha must be finite in float32, got inf"),
    ("mx_linear", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("mx_linear", {"x": torch.randn(T, 33)}, r"the last dimension of x must lie in \[1, 32\], the features of 1 blocks, got 33"),
    ("mx_linear", {"codes": CODES[0]}, r"codes must have shape \[O, 16 G\], got \[16\]"),
    ("mx_linear", {"codes": CODES.to_sparse()}, "codes must be a dense strided tensor"),
    ("mx_linear", {"scales": SCALES.repeat(1, 2)}, r"scales must have shape \[O, G\] = \[12, 1\], got \[12, 2\]"),
    ("mx_linear", {"scales": SCALES.to_sparse()}, "scales must be a dense strided tensor"),
    ("mx_linear", {"bias": torch.randn(O + 1)}, rf"bias must have shape \[O\] = \[{O}\], got \[{O + 1}\]"),
    ("mx_linear", {"bias": torch.randn(O).half()}, r"bias must be float32 \(the dtype of x\), got float16"),
    ("mx_linear", {"experts": torch.zeros(T).int()}, r"codes must have shape \[E, O, 16 G\] beside experts, got \[12, 16\]"),
    ("mx_linear", {"codes": CODES[None], "scales": SCALES[None]}, r"codes must have shape \[O, 16 G\], got \[1, 12, 16\]"),
    ("mx_linear", EXPERTS | {"scales": SCALES}, r"scales must have shape \[E, O, G\] = \[1, 12, 1\], got \[12, 1\]"),
    ("mx_linear", EXPERTS | {"experts": torch.zeros(T).long()}, "experts must be int32, got int64"),
    ("mx_linear", EXPERTS | {"experts": torch.zeros(T + 1).int()}, rf"experts must have shape \[...\] = \[{T}\], got \[{T + 1}\]"),
    ("mx_linear", EXPERTS | {"bias": torch.randn(O)}, rf"bias must have shape \[E, O\] = \[1, {O}\], got \[{O}\]"),
    ("mx_linear_expand", EXPERTS, rf"b must have shape \[E, O, R\] = \[1, {O}, \*\], got \[{O}, {R}\]"),
    ("mx_linear_expand", {"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ("mx_linear_expand", {"codes": CODES[:, :8]}, "codes must have whole blocks of 16 bytes"),
    ("mx_linear_expand", {"scales": SCALES[:5]}, r"scales must have shape \[O, G\] = \[12, 1\], got \[5, 1\]"),
    ("mx_linear_expand", {"bias": torch.randn(O).half()}, r"bias must be float32 \(the dtype of x\), got float16"),
    ("mx_linear_expand", {"s": torch.randn(T + 1, R)}, rf"s must have shape \[..., R\] = \[{T}, {R}\], got \[{T + 1}, {R}\]"),
    ("mx_linear_expand", {"s": torch.randn(T, R).half()}, r"s must be float32 \(the dtype of b\), got float16"),
    ("mx_linear_expand", {"b": torch.randn(O + 1, R)}, rf"b must have shape \[O, R\] = \[{O}, \*\], got \[{O + 1}, {R}\]"),
    ("mx_linear_expand", {"b": torch.randn(O, R).half()}, r"b must be float32 \(the dtype of x\), got float16"),
    ("mx_linear_expand", {"b": torch.randn(O, 513)}, "b must have a rank of at most 512, got 513"),
    # op, changed arguments, what the message says
    ("lora_shrink", {"x": torch.randn(T, I).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ("lora_shrink", {"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ("lora_shrink", {"x": torch.randn(T, I).to(torch.complex64)}, "x must be float32, float16 or bfloat16, got complex64"),
    ("lora_shrink", {"x": torch.randn(T, I).to(torch.float8_e4m3fn)}, "x must be .*, got float8_e4m3fn"),
    ("lora_shrink", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(a is \[R, I\] = \[{R}, {I}\]\), got {I + 1}"),
    ("lora_shrink", {"a": torch.randn(I)}, rf"a must have shape \[R, I\] = \[\*, \*\], got \[{I}\]"),
    ("lora_shrink", {"a": torch.randn(R, I).half()}, r"a must be float32 \(the dtype of x\), got float16"),
    ("lora_shrink", {"a": torch.randn(R, I).char()}, "a must be float32, float16 or bfloat16, got int8"),
    ("lora_shrink", {"a": torch.randn(R, I).int()}, "a must be float32, float16 or bfloat16, got int32"),
    ("lora_shrink", {"a": torch.randn(513, I)}, "a must have a rank of at most 512, got 513"),
    ("lora_shrink", {"scale": math.inf}, "scale must be finite in float32, got inf"),
    ("lora_shrink", {"scale": math.nan}, "scale must be finite in float32, got nan"),
    ("lora_shrink", {"scale": 1e300}, r"scale must be finite in float32, got 1e\+300"),
    ("lora_shrink", {"dropout_p": -0.1}, r"dropout_p must lie in \[0, 1\], got -0.1"),
    ("lora_shrink", {"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\], got 1.5"),
    ("lora_shrink", {"dropout_p": math.nan}, r"dropout_p must lie in \[0, 1\], got nan"),
    ("lora_shrink", {"dropout_p": 0.5}, r"seed must be an int64 tensor of shape \[1\] where dropout_p > 0, got None"),
    ("lora_shrink", {"dropout_p": 0.5, "seed": SEED.int()}, "seed must be int64, got int32"),
    ("lora_shrink", {"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, r"seed must have shape \[1\] = \[1\], got \[2\]"),
    ("linear_expand", {"x": None}, "x and weight must come together, got only weight"),
    ("linear_expand", {"weight": None}, "x and weight must come together, got only x"),
    ("linear_expand", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(weight is \[O, I\] = \[{O}, {I}\]\), got {I + 1}"),
    ("linear_expand", {"weight": torch.randn(O, I).half()}, r"weight must be float32 \(the dtype of x\), got float16"),
    ("linear_expand", {"weight": torch.randn(O, I).short()}, r"weight must be float32 \(the dtype of x\), got int16"),
    ("linear_expand", {"bias": torch.randn(O + 1)}, rf"bias must have shape \[O\] = \[{O}\], got \[{O + 1}\]"),
    ("linear_expand", {"bias": torch.randn(O).bfloat16()}, r"bias must be float32 \(the dtype of x\), got bfloat16"),
    ("linear_expand", {"s": torch.randn(T + 1, R)}, rf"s must have shape \[..., R\] = \[{T}, {R}\], got \[{T + 1}, {R}\]"),
    ("linear_expand", {"s": torch.randn(T, R).half()}, r"s must be float32 \(the dtype of b\), got float16"),
    ("linear_expand", {"b": torch.randn(O + 1, R)}, rf"b must have shape \[O, R\] = \[{O}, \*\], got \[{O + 1}, {R}\]"),
    ("linear_expand", {"b": torch.randn(O, R).half()}, r"b must be float32 \(the dtype of x\), got float16"),
    ("linear_expand", {"scale": -math.inf}, "scale must be finite in float32, got -inf"),
    ("lora_linear", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("lora_linear", {"x": torch.randn(T, I).to_sparse()}, "x must be a dense strided tensor"),
    ("lora_linear", {"weight": torch.randn(O, I).to_sparse()}, "weight must be a dense strided tensor"),
    ("lora_linear", {"bias": torch.randn(O).to_sparse()}, "bias must be a dense strided tensor"),
    ("lora_linear", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(weight is \[O, I\] = \[{O}, {I}\]\), got {I + 1}"),
    ("lora_linear", {"a": torch.randn(R, I + 1)}, rf"a must have shape \[R, I\] = \[\*, {I}\], got \[{R}, {I + 1}\]"),
    ("lora_linear", {"weight": torch.randn(O)}, r"weight must have shape \[O, I\]"),
    ("lora_linear", {"weight": torch.randn(O, I).bfloat16()}, r"weight must be float32 \(the dtype of x\), got bfloat16"),
    ("lora_linear", {"bias": torch.randn(1, O)}, rf"bias must have shape \[O\] = \[{O}\], got \[1, {O}\]"),
    ("lora_linear", {"a": torch.randn(R + 1, I)}, rf"b must have shape \[O, R\] = \[{O}, {R + 1}\], got \[{O}, {R}\]"),
    ("lora_linear", {"b": torch.randn(R, O)}, rf"b must have shape \[O, R\] = \[{O}, {R}\], got \[{R}, {O}\]"),
    ("lora_linear", {"scale": math.nan}, "scale must be finite in float32, got nan"),
    ("lora_linear", {"dropout_p": 2.0}, r"dropout_p must lie in \[0, 1\], got 2"),
    ("lora_linear", {"dropout_p": 0.1, "seed": SEED.float()}, "seed must be int64, got float32"),
    ("lora_linear", {"base_scale": torch.randn(O + 1)}, rf"base_scale must have shape \[O\] = \[{O}\], got \[{O + 1}\]"),
    ("lora_linear", {"base_scale": torch.randn(O).half()}, r"base_scale must be float32 \(the dtype of x\), got float16"),
    ("lora_add", {"y": torch.randn(T, O).double()}, "y must be float32, float16 or bfloat16, got float64"),
    ("lora_add", {"y": torch.randn(T + 1, O)}, rf"y must have shape .* = \[{T}, {O}\], got \[{T + 1}, {O}\]"),
    ("lora_add", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("lora_add", {"a": torch.randn(R, I).half()}, r"a must be float32 \(the dtype of x\), got float16"),
    ("lora_add", {"b": torch.randn(O, R).half()}, r"b must be float32 \(the dtype of y\), got float16"),
    ("lora_add", {"b": torch.randn(O, R + 1)}, rf"b must have shape \[O, R\] = \[\*, {R}\], got \[{O}, {R + 1}\]"),
    ("lora_add", {"scale": math.inf}, "scale must be finite in float32, got inf"),
    ("lora_add", {"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\], got 1.5"),
    ("lora_add", {"dropout_p": 0.5, "seed": SEED.int()}, "seed must be int64, got int32"),
    ("lora_add", {"dropout_p": 0.5}, r"seed must be an int64 tensor of shape \[1\] where dropout_p > 0, got None"),
    ("lora_add", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(a is \[R, I\] = \[{R}, {I}\]\), got {I + 1}"),
    ("lora_add", {"y": torch.randn(T, O + 1)}, rf"y must have shape \[..., O\] = \[{T}, {O}\], got \[{T}, {O + 1}\]"),
    ("lora_expand_", {"y": torch.randn(T, O + 1)}, rf"y must have {O} features \(b is \[O, R\] = \[{O}, {R}\]\), got {O + 1}"),
    ("lora_expand_", {"y": torch.randn(O, T).T}, "y must be rows of contiguous elements at one pitch, since it is written"),
    ("lora_expand_", {"y": torch.randn(O)}, r"s must have shape \[..., R\]"),
    ("lora_expand_", {"y": torch.randn(T, O).double()}, "y must be float32, float16 or bfloat16, got float64"),
    ("lora_expand_", {"s": torch.randn(T, R + 1)}, rf"s must have shape \[..., R\] = \[{T}, {R}\], got"),
    ("lora_expand_", {"b": torch.randn(O)}, rf"b must have shape \[O, R\] = \[\*, \*\], got \[{O}\]"),
    ("lora_expand_", {"scale": math.inf}, "scale must be finite in float32, got inf"),
    ("mora_compress", {"x": torch.randn(T, I).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ("mora_compress", {"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ("mora_compress", {"rank": 0}, r"rank must lie in \[1, 268435456\), got 0"),
    ("mora_compress", {"rank": 3}, "rank must be even for type 6, whose rotation is of pairs, got 3"),
    ("mora_compress", {"type": 5}, r"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got 5"),
    ("mora_compress", {"chunks": -1}, r"chunks must lie in \[0, 268435456\), got -1"),
    ("mora_compress", {"chunks": 2**27}, r"chunks times rank must lie in \[0, 268435456\), got 536870912"),
    ("mora_compress", {"chunks": 1, "type": 2}, "chunks must be 0 but for type 6, got 1"),
    ("mora_decompress", {"h": torch.randn(T, R).double()}, "h must be float32, float16 or bfloat16, got float64"),
    ("mora_decompress", {"h": torch.randn(T, 0)}, "h must have a rank of at least 1 as its last dimension, got 0"),
    ("mora_decompress", {"h": torch.randn(R), "type": 6}, "h must have at least 2 dimensions, got 1"),
    ("mora_decompress", {"out_features": -1}, r"out_features must lie in \[0, 268435456\), got -1"),
    ("mora_decompress", {"type": 0}, r"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got 0"),
    ("mora_decompress_", {"y": torch.randn(O, T).T}, "y must be rows of contiguous elements at one pitch, since it is written"),
    ("mora_decompress_", {"h": torch.randn(T + 1, R)}, rf"h must have shape \[..., r\] = \[{T}, {R}\], got \[{T + 1}, {R}\]"),
    ("mora_decompress_", {"h": torch.randn(T, R), "type": 6}, rf"h must have shape \[..., n, r\] = \[{T}, {T}, {R}\], got"),
    ("mora_decompress_", {"h": torch.randn(T, R).half()}, r"h must be float32 \(the dtype of y\), got float16"),
    ("mora_decompress_", {"type": 5}, r"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got 5"),
    ("mora_linear", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("mora_linear", {"x": torch.randn(T, I + 1)}, rf"x must have {I} features \(weight is \[O, I\] = \[{O}, {I}\]\), got {I + 1}"),
    ("mora_linear", {"weight": torch.randn(O, I).half()}, r"weight must be float32 \(the dtype of x\), got float16"),
    ("mora_linear", {"bias": torch.randn(O + 1)}, rf"bias must have shape \[O\] = \[{O}\], got \[{O + 1}\]"),
    ("mora_linear", {"m": torch.randn(R, R + 1)}, rf"m must have shape \[r, r\] = \[\*, {R}\], got \[{R}, {R + 1}\]"),
    ("mora_linear", {"m": torch.randn(R)}, rf"m must have shape \[r, r\] = \[\*, {R}\], got \[{R}\]"),
    ("mora_linear", {"m": torch.randn(0, 0)}, "m must have a rank of at least 1, got 0"),
    ("mora_linear", {"m": torch.randn(R, R).half()}, r"m must be float32 \(the dtype of x\), got float16"),
    ("mora_linear", {"type": 5}, r"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got 5"),
    ("mora_add", {"y": torch.randn(T, O).double()}, "y must be float32, float16 or bfloat16, got float64"),
    ("mora_add", {"y": torch.randn(T + 1, O)}, rf"y must have shape .* = \[{T}, {O}\], got \[{T + 1}, {O}\]"),
    ("mora_add", {"x": torch.randn(T, I).long()}, "x must be float32, float16 or bfloat16, got int64"),
    ("mora_add", {"m": torch.randn(3, 3)}, "rank must be even for type 6, whose rotation is of pairs, got 3"),
    ("mora_add", {"m": torch.randn(R, R).half()}, r"m must be float32 \(the dtype of x\), got float16"),
    ("mora_add", {"type": 7}, r"type must be 1, 2, 3, 4 or 6 \(there is no 5\), got 7"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "text"), CASES, ids=[f"{op}-{next(iter(c))}-{i}" for i, (op, c, _) in enumerate(CASES)]
)
def test_refuses(op, change, text, device):
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (good(op) | change).items()}
    before = kwargs["y"].clone() if "y" in kwargs else None
    for track in (False, True) if OPS[op].mutates is None else (False,):
        if track:
            want_gradients(OPS[op], kwargs)
        with pytest.raises(RuntimeError, match=rf"lrkern::{op}: {text}"):
            getattr(lrkern.ops, op)(**kwargs)
    if before is not None:
        assert torch.equal(kwargs["y"], before), "a refused call must not write"


def test_16_bit_base_and_factors_of_the_other_type():
    x, w = torch.randn(T, I).bfloat16(), torch.randn(O, I).bfloat16()
    with pytest.raises(
        RuntimeError, match=r"lora_linear: a must be bfloat16 \(the dtype of x\) or float32, got float16"
    ):
        lrkern.ops.lora_linear(x, w, None, torch.randn(R, I).half(), torch.randn(O, R).half())
    with pytest.raises(RuntimeError, match=r"lora_linear: b must be float32 \(the dtype of a\), got bfloat16"):
        lrkern.ops.lora_linear(x, w, None, torch.randn(R, I), torch.randn(O, R).bfloat16())


@pytest.mark.parametrize("a_dtype", [torch.bfloat16, torch.float32])
def test_backward_refuses_factors_of_two_dtypes(a_dtype):
    """The kernels read a, b and S as one dtype: taken for the other one they would run past the end."""
    b_dtype = torch.float32 if a_dtype == torch.bfloat16 else torch.bfloat16
    x, dy, w = (torch.randn(*shape).bfloat16() for shape in ((T, I), (T, O), (O, I)))
    a, s, b = torch.randn(R, I).to(a_dtype), torch.randn(T, R).to(a_dtype), torch.randn(O, R).to(b_dtype)
    text = rf"b must be {str(a_dtype)[6:]} \(the dtype of a\), got {str(b_dtype)[6:]}"
    with pytest.raises(RuntimeError, match=rf"lrkern::lora_add \(backward\): {text}"):
        torch.ops.lrkern.lora_add_bwd(dy, x, a, b, s, 1.0, 0.0, None, True, True, True)
    tail = (1.0, 0.0, None, None, None, True, False, False, True, True, False)
    with pytest.raises(RuntimeError, match=rf"lrkern::lora_linear \(backward\): {text}"):
        torch.ops.lrkern.lora_linear_bwd(dy, x, w, a, b, s, *tail)


def test_devices_do_not_mix_and_meta_traces():
    kw = good("lora_linear")
    with pytest.raises(RuntimeError, match="lrkern::lora_linear: all tensors must be on one device, got cpu and meta"):
        lrkern.ops.lora_linear(**(kw | {"a": kw["a"].to("meta")}))
    y = lrkern.ops.lora_linear(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kw.items()})
    assert y.shape == (T, O) and y.device.type == "meta"


def test_backward_refuses_a_gradient_of_another_shape_or_dtype():
    x, w, a, b, s = torch.randn(T, I), torch.randn(O, I), torch.randn(R, I), torch.randn(O, R), torch.randn(T, R)
    tail = (1.0, 0.0, None, None, None, True, False, False, True, True, False)
    with pytest.raises(
        RuntimeError, match=rf"lora_linear \(backward\): dy must have shape \[..., O\] = \[{T}, {O}\], got \[{T}, {I}\]"
    ):
        torch.ops.lrkern.lora_linear_bwd(torch.randn(T, I), x, w, a, b, s, *tail)
    text = r"lora_linear \(backward\): dy must be float32 \(the dtype of x\), got bfloat16"
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lrkern.lora_linear_bwd(torch.randn(T, O).bfloat16(), x, w, a, b, s, *tail)


def test_backward_refuses_what_does_not_fit_the_gradient():
    x, w, s, b, dy = torch.randn(T, I), torch.randn(O, I), torch.randn(T, R), torch.randn(O, R), torch.randn(T, O)
    needs = (1.0, True, True, False, False, False)
    for wrong, text in (
        ((dy, x[:-1], w), rf"x must have shape \[..., I\] = \[{T}, {I}\], got \[{T - 1}, {I}\]"),
        ((dy, x.half(), w), r"x must be float32 \(the dtype of dy\), got float16"),
        ((dy, x, w.half()), r"weight must be float32 \(the dtype of dy\), got float16"),
        ((dy, x, w[:-1]), rf"weight must have shape \[O, I\] = \[{O}, \*\], got"),
    ):
        with pytest.raises(RuntimeError, match=rf"lrkern::linear_expand \(backward\): {text}"):
            torch.ops.lrkern.linear_expand_bwd(*wrong, s, b, *needs)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex128, torch.float64], ids=lambda d: str(d)[6:])
def test_errors_name_what_was_called(op, dtype):
    """Where gradients are recorded X_fwd runs; the user called X. Dtypes are named as torch names them."""
    s = op.sample(op.family.direct_sample, "cpu", torch.float32)
    name = str(dtype).removeprefix("torch.")
    for i, argument in enumerate(op.parameters[: len(s.args)]):
        args = op.leaves(s)
        if not isinstance(args[i], torch.Tensor):
            continue
        args[i] = args[i].detach().to(dtype)
        with pytest.raises(RuntimeError) as error:
            getattr(lrkern.ops, op.name)(*args, **s.kwargs)
        assert str(error.value).startswith(f"lrkern::{op.name}: {argument} must be "), argument
        assert f", got {name}" in str(error.value) and "_fwd" not in str(error.value)


@pytest.mark.parametrize("op", [op for op in OPS.values() if any(map(is_float, next(op.samples("cpu", torch.float32)).args))],
                         ids=lambda op: op.name)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_is_refused_and_not_lost(op, grad):
    """By the wrapper, by the op itself, and under torch.func."""
    sample = next(op.samples("cpu", torch.float32))
    i = next(i for i, arg in enumerate(sample.args) if is_float(arg))
    args, t = list(sample.args), sample.args[i]
    refused = pytest.raises(RuntimeError, match=f"lrkern::{op.name}.*: forward-mode differentiation is not supported")
    for fn in (getattr(lrkern.ops, op.name), getattr(torch.ops.lrkern, op.name)):

        def call(t, fn=fn):
            return fn(*args[:i], t, *args[i + 1 :], **sample.kwargs)

        with torch.set_grad_enabled(grad):
            with forward_ad.dual_level(), refused:
                call(forward_ad.make_dual(t.detach().clone(), torch.ones_like(t)))
            with refused:
                torch.func.jvp(call, (t.detach().clone(),), (torch.ones_like(t),))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "seed"])
def test_forms_of_random_bases_refuse_forward_mode_without_gradients(stored):
    a, b = (F.Basis(1, "vera", R, n, R, tensor=i) for i, n in enumerate((I, O)))
    a, b = (p.fill(torch.empty(0)) if stored else p for p in (a, b))
    dual = lambda: forward_ad.make_dual(torch.randn(T, I), torch.ones(T, I))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="lrkern::vera_linear: forward-m"):
        F.vera_linear(dual(), torch.randn(O, I), None, torch.randn(R), torch.randn(O), a, b)


def test_devices_do_not_mix_where_gradients_are_recorded():
    kw = good("lora_linear")
    kw["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="lrkern::lora_linear: all tensors must be on one device, got cpu and meta"):
        lrkern.ops.lora_linear(**(kw | {"a": kw["a"].to("meta")}))


def test_s_beside_float16():
    """float32, or float16 as PEFT's own is; its gradient has its dtype."""
    b, bias = torch.randn(O, R).half().requires_grad_(), torch.randn(O).half()
    for dtype in (torch.float16, torch.float32):
        s = torch.randn(T, R).to(dtype).requires_grad_()
        y = lrkern.ops.linear_expand(None, None, bias, s, b)
        y.sum().backward()
        assert y.dtype == torch.float16 and s.grad.dtype == dtype and b.grad.dtype == torch.float16
        assert lrkern.ops.linear_expand(None, None, None, s, b).dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"s must be float32 or float16 \(the dtype of b\), got bfloat16"):
        lrkern.ops.linear_expand(None, None, bias, torch.randn(T, R).bfloat16(), b)


def test_functional_forms_refuse_what_torch_would_broadcast_or_ignore():
    x, w, a, b, m = (torch.randn(*n) for n in ((T, I), (O, I), (R, I), (O, R), (O,)))
    A, B, d = torch.randn(R, I), torch.randn(R, O), torch.randn(R)
    lam, gam, rand_a, rand_b = (torch.randn(*n) for n in ((R, 3), (3, O), (R, O), (3 * R, I)))
    forms = {
        "lora_linear": lambda p: F.lora_linear(x, w, None, a, b, 1.0, p, False),
        "lora_add": lambda p: F.lora_add(x @ w.T, x, a, b, 1.0, p, False),
        "dora_linear": lambda p: F.dora_linear(x, w, None, a, b, m, 1.0, p, False),
        "vera_linear": lambda p: F.vera_linear(x, w, None, d, m, A, B, p, False),
        "vera_add": lambda p: F.vera_add(x @ w.T, x, d, m, A, B, p, False),
        "randlora_linear": lambda p: F.randlora_linear(x, w, None, lam, gam, rand_a, rand_b, 1.0, p, False),
    }
    for name, call in forms.items():
        assert call(0.5).shape == (T, O)
        for p in (-0.5, 1.5, math.nan):
            with pytest.raises(RuntimeError, match=rf"lrkern::{name}: dropout_p must lie in \[0, 1\], got {p}"):
                call(p)
    with pytest.raises(RuntimeError, match=rf"dora_linear: magnitude must have shape \[O\] = \[{O}\], got \[1\]"):
        F.dora_linear(x, w, None, a, b, m[:1])
    with pytest.raises(RuntimeError, match=rf"vera_linear: d must have shape \[r\] = \[{R}\], got \[1\]"):
        F.vera_linear(x, w, None, d[:1], m, A, B)
    with pytest.raises(RuntimeError, match=rf"vera_linear: b must have shape \[O\] = \[{O}\], got \[1\]"):
        F.vera_linear(x, w, None, d, m[:1], A, B)
    with pytest.raises(
        RuntimeError, match=rf"randlora_linear: lam must have shape \[r, n\] = \[{R}, 3\], got \[{R}, 1\]"
    ):
        F.randlora_linear(x, w, None, lam[:, :1], gam, rand_a, rand_b)
