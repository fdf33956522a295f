# SPDX-License-Identifier: Apache-2.0
"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 elements along the last dimension, e2m1 codes of 4 bits and one e8m0 scale.

e2m1: a sign and 0, .5, 1, 1.5, 2, 3, 4, 6. e8m0: byte b is 2^(b - 127), 0x00 is 2^-127 and 0xFF is NaN. codes uint8 [..., 16 G], two
elements a byte, the even one in the low half; scales uint8 [..., G]; G = ceil(K / 32), elements past K are zeros. A block with a NaN or
an infinity is NaN as a whole (scale 0xFF, codes 0); one of zeros has scale 0x00. NVFP4, a codec, has blocks of 16 with e4m3 scales.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from .composites import mx as composites
from .dispatch import Op, below_autograd, library, once

BLOCK = 32
RULES = ("floor", "rceil", "ceil", "even", "quest", "quest_nearest")


def _packed(x, mask, **_):
    G = -(-x.shape[-1] // BLOCK)
    bytes_of = lambda n, dtype: x.new_empty((*x.shape[:-1], n), dtype=dtype)
    return bytes_of(16 * G, torch.uint8), bytes_of(G, torch.uint8), bytes_of(G, torch.int32) if mask else None


_quantize = Op("mx_quantize", composites.mx_quantize, results=_packed)


def mx_quantize(
    x: Tensor,
    rule: str = "even",
    hadamard: bool = False,
    signs: Tensor | None = None,
    seed: Tensor | None = None,
    gain: float = 1.0,
    mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scales and, where asked for, mask of x [..., K] in float32, float16 or bfloat16; a matrix at any strides (``x.mT`` is not
    copied).

    rule, of a block's largest magnitude m: "floor" 2^(floor(log2 m) - 2) as OCP has it, "ceil" 2^(ceil(log2 m) - 2), "rceil"
    2^ceil(log2(m / 6)), "even" m rounded to one bit of mantissa, then as floor (the least error on Gaussian data); of its root mean
    square s: "quest" 2^floor(log2(0.487079 s + 1e-8)) as Quartet's kernels (arXiv 2505.14669), "quest_nearest" the nearest power instead,
    of less error. Elements are rounded to the nearest, ties to even; with ``seed`` int64 [1] stochastically, by 16 bits of Philox for each
    (row, column), the same on every device. Beyond 6 scales they saturate.

    hadamard: of each block H x / √32 first, with bit i of ``signs`` int32 [1] turning element i. gain: elements are multiplied by it
    between scaling and rounding (Quartet's backward: 0.75 with "floor"). mask int32 [..., G]: bit i says that element i is below 6 scales.
    Not differentiable.
    """
    return _quantize(x, rule, hadamard, signs, seed, gain, mask)


_dequantize = Op(
    "mx_dequantize",
    composites.mx_dequantize,
    results=lambda codes, columns, dtype, **_: codes.new_empty((*codes.shape[:-1], columns), dtype=dtype),
)


def mx_dequantize(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., columns], each element rounded once to dtype: exact in float32 and bfloat16, but that of scales of 2^126 and 2^127
    codes beyond their range become infinite; float16 holds scales of 2^-23 to 2^13 exactly.

    codes [..., 16 G] and scales [..., G]; columns in [32 G - 31, 32 G].
    """
    return _dequantize(codes, scales, columns, dtype)


_matmul = Op(
    "mx_matmul",
    composites.mx_matmul,
    results=lambda a_codes, b_codes, dtype, **_: a_codes.new_empty(
        (*a_codes.shape[:-1], b_codes.shape[0]), dtype=dtype
    ),
)


def mx_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    columns: int,
    dtype: torch.dtype = torch.float32,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    s: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """y [..., O] = alpha · (A Bᵀ + S Uᵀ) + bias with A [..., columns] and B [O, columns] in MXFP4: FP4 times FP4, sums in float32, rounded
    once to dtype.

    a_codes [..., 16 G], a_scales [..., G], b_codes [O, 16 G], b_scales [O, G]; columns in [32 G - 31, 32 G]: what lies past them has no
    part. A may be in MXFP8: a_codes float8_e4m3fn [..., 32 G]. alpha, the GEMM's, is for what quantisers multiplied by: 16/9 of two that
    had gain 0.75. bias [O], s [..., R] and u [O, R], a low-rank term, are of dtype; s and u come together. No gradient: the operands are
    integers.

    FP4 units, of sm_100 and sm_120, multiply where LRKERN_FUSED=1 asks for them, dtype is bfloat16 and the build found CUTLASS
    (``lrkern._host.explain("mx_product", T=.., O=.., K=..)``; no GPU has run them). Elsewhere elements are those of ``mx_dequantize``, A's
    whole and B's in panels, for ATen's GEMM: in float32, or in bfloat16 for a GPU's result of bfloat16. Both hold them exactly, but that of
    scales of 2^126 and 2^127 codes beyond their range become infinite. So it is no faster than a dense product. Few rows that meet one B
    often are better off with ``mx_linear(mx_dequantize(a_codes, a_scales, columns, dtype), b_codes, b_scales)``, which reads B's codes.
    """
    return _matmul(a_codes, a_scales, b_codes, b_scales, columns, dtype, alpha, bias, s, u)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, codes, scales, bias, experts):
        with below_autograd():
            y = library().mx_linear.default(x, codes, scales, bias, experts)
        ctx.save_for_backward(codes, scales, experts)
        ctx.columns = x.shape[-1]
        return y

    @staticmethod
    def backward(ctx, dy):
        codes, scales, experts = ctx.saved_tensors
        need_x, _, _, need_bias, _ = ctx.needs_input_grad
        dx, dbias = once("mx_linear", _bwd(dy, codes, scales, ctx.columns, need_x, need_bias, experts), (dy,))
        return dx, None, None, dbias, None


def _bwd(*args):
    with below_autograd():
        return library().mx_linear_bwd.default(*args)


def _y(x, codes, **_):
    return x.new_empty((*x.shape[:-1], *codes.shape[-2:-1]))


_linear = Op("mx_linear", composites.mx_linear, results=_y, trains="x bias", function=_Linear, casts="x bias")


def mx_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, experts: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias with W [O, I] in MXFP4: x in 16 bits or float32, W as ``mx_dequantize`` gives it, frozen.

    x [..., I]; codes [O, 16 G]; scales [O, G]; bias [O] of x's dtype or None. Differentiable in x and bias: dx comes from the same bytes.
    Few rows of x decode codes in registers and sum in float32; more of them decode W in panels, never whole, for ATen's GEMM
    (``lrkern._host.explain("mx_linear", ...)``). Saves W's bytes alone. Double backward is refused.

    experts int32 [...], one index for each row of x, selects one of E weights: codes [E, O, 16 G], scales [E, O, G], bias [E, O] or None. A
    row whose index is negative has no expert: it is zeros, without a bias, and so is its dx. An index of E or more is refused on the CPU;
    on CUDA, where values are not validated, that row of y and dx is NaN and no other. Rows are sorted by expert on the device, as
    ``multi_lora_plan`` does it. On CUDA up to 16 E and 1024 rows take one launch, where a row's bits are those of the row alone, and
    nothing is read back: a CUDA graph replays it with other indices. More rows there, all on the CPU and every gradient go expert by
    expert, whose rows give what ``mx_linear`` gives of these rows; on CUDA the numbers of rows are then read back
    (``lrkern._host.explain("mx_linear_experts", T=.., E=..)``).
    """
    return _linear(x, codes, scales, bias, experts)


class _LinearExpand(Function):
    @staticmethod
    def forward(ctx, x, codes, scales, bias, s, b, experts):
        with below_autograd():
            y = library().mx_linear_expand.default(x, codes, scales, bias, s, b, experts)
        ctx.save_for_backward(codes, scales, s, b, experts)
        ctx.columns = x.shape[-1]
        return y

    @staticmethod
    def backward(ctx, dy):
        codes, scales, s, b, experts = ctx.saved_tensors
        need_x, _, _, need_bias, need_s, need_b, _ = ctx.needs_input_grad
        if experts is None:
            base = _bwd(dy, codes, scales, ctx.columns, need_x, need_bias)
            with below_autograd():
                *_, ds, db = library().linear_expand_bwd.default(
                    dy, None, None, s, b, 1.0, False, False, False, need_s, need_b
                )
            grads = *base, ds, db
        else:
            needs = need_x, need_bias, need_s, need_b
            with below_autograd():
                grads = library().mx_linear_expand_bwd.default(dy, codes, scales, ctx.columns, s, b, experts, *needs)
        dx, dbias, ds, db = once("mx_linear_expand", grads, (dy, s, b))
        return dx, None, None, dbias, ds, db, None


_linear_expand = Op(
    "mx_linear_expand",
    composites.mx_linear_expand,
    results=_y,
    trains="x bias s b",
    function=_LinearExpand,
    gradient="mx_linear linear_expand",
    casts="x bias s b",
)


def mx_linear_expand(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    experts: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + S Bᵀ with W in MXFP4: LoRA's second half, S = ``lora_shrink`` with its scale in it, beside ``mx_linear``.

    s [..., R]; b [O, R], of x's dtype or float32. One sum in float32 and one rounding for few rows, and for more where b has x's dtype and
    that is not float16: there B's columns join those of a panel of W. Else y is rounded twice, as LoRA's over a dense W.
    Differentiable in x, bias, s and b. Double backward is refused.

    experts: as ``mx_linear`` has them, with b [E, O, R]. S of E factors A is ``multi_lora_shrink``'s.
    """
    return _linear_expand(x, codes, scales, bias, s, b, experts)


# ---- NVFP4


def _nv_packed(x, **_):
    G = -(-x.shape[-1] // 16)
    bytes_of = lambda n: x.new_empty((*x.shape[:-1], n), dtype=torch.uint8)
    return bytes_of(8 * G), bytes_of(G), x.new_empty(1, dtype=torch.float32)


_nv_quantize = Op("nvfp4_quantize", composites.nvfp4_quantize, results=_nv_packed)


def nvfp4_quantize(x: Tensor, amax: Tensor | None = None, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales and global scale of x [..., K] in float32, float16 or bfloat16, in NVIDIA's NVFP4; a matrix at any strides.

    x = code · scale · global, two levels of scales: global = amax / (448 · 6), float32 [1], at least 2^-120; for each block of 16 along K
    scale = m / 6 / global in e4m3 within [2^-6, 448], m the block's largest magnitude; codes are e2m1 of x / (scale · global), to the
    nearest with ties to even. Beyond 6 scales an element saturates. With ``seed`` int64 [1] elements are rounded stochastically, by the bits
    that ``mx_quantize`` has for (row, column).

    amax: float32 [1], of a calibration; None takes the largest magnitude of x. codes uint8 [..., 8 G], the even element in the low half;
    scales uint8 [..., G], e4m3 (``scales.view(torch.float8_e4m3fn)``); G = ⌈K / 16⌉, elements past K are zeros. A block with a NaN or an
    infinity is NaN as a whole (scale 0x7F, codes 0), and all of them are where amax is not finite. Bits are those of torchao's
    ``nvfp4_quantize`` where amax is at least 2^-108. Not differentiable.
    """
    return _nv_quantize(x, amax, seed)


_nv_dequantize = Op(
    "nvfp4_dequantize",
    composites.nvfp4_dequantize,
    results=lambda codes, columns, dtype, **_: codes.new_empty((*codes.shape[:-1], columns), dtype=dtype),
)


def nvfp4_dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [..., columns] = code · (scale · global), each product rounded in float32, then to dtype.

    codes [..., 8 G], scales [..., G] and global_scale float32 [1] of ``nvfp4_quantize``; columns in [16 G - 15, 16 G].
    """
    return _nv_dequantize(codes, scales, global_scale, columns, dtype)
