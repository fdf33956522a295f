# SPDX-License-Identifier: Apache-2.0
"""MX's kernels: plans of csrc/cuda/mx/, and calls that launch them."""

from collections.abc import Iterator
from itertools import product

from tools.families import SIZE, Kernel, Mixed, Plan, Shape, Timed
from tools.families.lora import gemm_shared

# Beyond the registry: codes beside torchao's, every scale, products by rows, NaN and infinities, memory.
TESTS = {f"tests/ops/test_{name}.py": "cpu" for name in ("mx", "mx_experts", "mx_matmul", "mx_fused", "nvfp4")}

SUITES = ("mxfp4",)

BOOLS = (False, True)


def quantize(x: str, hadamard: bool, random: bool) -> Plan:
    """32 elements in a thread's registers, and where it rounds at random what Philox works with beside them; 48 KB of unrolled code."""
    return Plan(4, stores=1, code=50 << 10)


TERMS = {
    "bf16": 1,
    "f16": 2,
    "float": 3,
}  # bf16 of which a number is the sum, made by a kernel before where they are several


def linear(x: str, b: str, tiles: int, plain: bool) -> Plan:
    """Instructions of the loop: a thread has 64 weights a trip, of one tile of bfloat16 two times that, so that 301 are 4.7 lane-instructions
    a weight. On sm_90a all but 9 to 16 rows of fp32 (5.0) need fewer; sm_80's listing is read where large scales take a second product."""
    ahead = 2 if TERMS[x] * tiles == 1 else 1
    return Plan(
        blocks=2 if TERMS[x] * tiles <= 3 else 1,
        shared=8 * tiles * 16 * 8 * 4,
        tensor="HMMA",
        wide=ahead * (2 + 4 * TERMS[x] * tiles),
        flight=64 << 10 if plain else 0,
        code=64 << 10,
        threads=256,
        loop={1: 602, 2: 301, 3: 325, 4: 345, 6: 385}[TERMS[x] * tiles] if plain else 0,
    )


def few(b: str, tokens: int) -> Plan:
    """Of sm_90a. A trip is 512 features of two rows, 256 weights a thread: at most 4.7 lane-instructions each. Under way are 64 KB of
    copies by count; the listing says less, as x and S before and behind the loop go at their own pace."""
    shared = 4 * 512 * 2 * tokens + 4 * 2 * 256 * 16
    return Plan(2, shared, "HGMMA", flight=32 << 10, code=64 << 10, threads=256, loop=1203)


def gemm(tile_n: int) -> Plan:
    """Of sm_90a, with the shared memory of its mainloop. A trip is two steps, 64 weights a thread: 4.75 lane-instructions each, as in x's
    own order a pair takes one more. The 8192 weights of a step are 304 of the 1024 cycles of its products by 256 rows."""
    return Plan(1, gemm_shared(tile_n), "HGMMA", code=48 << 10, threads=384, loop=304)


def units(main: str, tail: str, shared: int, threads: int) -> Plan:
    """By CUTLASS, a block on an SM: a loop of products by scales of blocks, one of bf16 for the low rank, and an epilogue."""
    return Plan(1, shared, f"{main} {tail}", code=64 << 10, threads=threads)


def product_sm100(wide: bool) -> Plan:
    return units("UTCQMMA" if wide else "UTCOMMA", "UTCHMMA", 224 << 10, 256)


def product_sm120(wide: bool) -> Plan:
    return units("QMMA.SF" if wide else "OMMA.SF", "HMMA", 96 << 10, 384)


KERNELS = {
    "mx_quantize": Kernel(quantize, "x", list(product(BOOLS, BOOLS))),
    "mx_dequantize": Kernel(lambda x: Plan(8, stores=SIZE[x] // 2), "x"),
    "nvfp4_quantize": Kernel(lambda x, random: Plan(4, wide=SIZE[x]), "x", [(random,) for random in BOOLS]),
    "nvfp4_dequantize": Kernel(lambda x: Plan(8, stores=SIZE[x] // 2), "x"),
    "mx_terms": Mixed(lambda x: Plan(8, stores=TERMS[x]), rest=[("f16",), ("float",)], part=True),
    "mx_linear": Kernel(linear, "xf", list(product((1, 2), BOOLS))),
    "mx_linear_experts": Kernel(linear, "xf", list(product((1, 2), BOOLS))),
    "mx_few": Mixed(few, rest=[("bf16", 8), ("bf16", 16)]),  # fp32 factors alike
    "mx_gemm": Kernel(gemm, "bf16", rest=[(128,), (256,)]),
    "mx_tail": Kernel(lambda *_: Plan(8), part=True),
    "mx_sum": Kernel(lambda: Plan(8), part=True),  # neighbours in one warp
    "mx_swizzle": Kernel(lambda: Plan(8), part=True, by_ops=False),
    "mx_product_sm100": Kernel(product_sm100, rest=[(wide,) for wide in BOOLS], part=True, by_ops=False),
    "mx_product_sm120": Kernel(product_sm120, rest=[(wide,) for wide in BOOLS], part=True, by_ops=False),
}

SHAPES = [
    Shape(T=1, I=4096, O=4096, R=16),
    Shape(T=1, I=4096, O=14336, R=16),
    Shape(T=16, I=4096, O=4096, R=16),
]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """A weight is quantised and decoded whole; products of few rows are those whose codes are decoded in registers. Of 8 experts the
    first T have a row each."""
    import torch

    T, I, O = min(shape.T, 16), shape.I, shape.O
    w, x = torch.randn(O, I, device=device).to(dtype), torch.randn(T, I, device=device).to(dtype)
    codes, scales, _ = op.mx_quantize(w)
    packed = {"codes": codes, "scales": scales}
    yield Timed("mx_quantize", lambda: op.mx_quantize(w), {"x": w, **packed}, O * I)
    yield Timed("mx_dequantize", lambda: op.mx_dequantize(codes, scales, I, dtype), {"y": w, **packed}, O * I)
    *small, whole = op.nvfp4_quantize(w, torch.ones(1, device=device))
    moved = {"codes": small[0], "scales": small[1]}
    yield Timed("nvfp4_quantize", lambda: op.nvfp4_quantize(w, whole), {"x": w, **moved}, O * I)
    call = lambda: op.nvfp4_dequantize(*small, whole, I, dtype)
    yield Timed("nvfp4_dequantize", call, {"y": w, **moved}, O * I)
    y = x.new_empty(T, O)
    yield Timed("mx_linear", lambda: op.mx_linear(x, codes, scales), {"x": x, "y": y, **packed}, 2 * T * O * I)
    for kernel, rows in (("mx_few", T), ("mx_gemm", max(shape.T, 128))):  # of bfloat16 alone
        z = torch.randn(rows, I, device=device).bfloat16()
        moved = {"x": z, "y": z.new_empty(rows, O), **packed}
        yield Timed(kernel, lambda z=z: op.mx_linear(z, codes, scales), moved, 2 * rows * O * I)
    E, used = 8, min(T, 8)
    w = torch.randn(E, O, I, device=device).to(dtype)
    codes, scales, _ = op.mx_quantize(w)
    experts = torch.arange(T, device=device).int() % E
    moved = {"x": x, "y": y, "codes": codes[:used], "scales": scales[:used]}
    call = lambda: op.mx_linear(x, codes, scales, None, experts)
    yield Timed("mx_linear_experts", call, moved, 2 * T * O * I, (experts,), ("multi_lora_plan",))
