# SPDX-License-Identifier: Apache-2.0
"""MX's kernels: plans of csrc/cuda/mx/, and calls that launch them."""

from collections.abc import Iterator
from itertools import product

from tools.families import SIZE, Kernel, Plan, Shape, Timed

# Beyond the registry: codes beside torchao's, every scale, products by rows, NaN and infinities, memory.
TESTS = {"tests/ops/test_mx.py": "cpu", "tests/ops/test_mx_experts.py": "cpu", "tests/ops/test_nvfp4.py": "cpu"}

BOOLS = (False, True)


def quantize(x: str, hadamard: bool, random: bool) -> Plan:
    """32 elements in a thread's registers, and where it rounds at random what Philox works with beside them; 48 KB of unrolled code."""
    return Plan(4, stores=1, code=50 << 10)


def linear(x: str, b: str, tiles: int, plain: bool) -> Plan:
    """Lane-instructions a weight in the loop of bfloat16: 4.7 for 9 to 16 rows of x and less for up to 8. A thread has 64 weights a trip,
    of one tile two times that. A large scale takes a second product for each pair, which sm_80's listing is read with."""
    vectors = {"float": 2, "bf16": 1, "f16": 1}[x]
    ahead = 2 if x == "bf16" and tiles == 1 else 1
    wide = ahead * (2 + 4 * vectors * tiles)
    few = plain and x == "bf16"
    return Plan(
        blocks=2 if SIZE[x] == 2 and (x == "bf16" or tiles == 1) else 1,
        shared=8 * tiles * 16 * 8 * 4,
        tensor="HMMA",
        wide=wide,
        flight=64 << 10 if few else 0,
        code=64 << 10,
        threads=256,
        loop=301 * ahead if few else 0,
    )


KERNELS = {
    "mx_quantize": Kernel(quantize, "x", list(product(BOOLS, BOOLS))),
    "mx_dequantize": Kernel(lambda x: Plan(8, stores=SIZE[x] // 2), "x"),
    "nvfp4_quantize": Kernel(lambda x, random: Plan(4, wide=SIZE[x]), "x", [(random,) for random in BOOLS]),
    "nvfp4_dequantize": Kernel(lambda x: Plan(8, stores=SIZE[x] // 2), "x"),
    "mx_linear": Kernel(linear, "xf", list(product((1, 2), BOOLS))),
    "mx_linear_experts": Kernel(linear, "xf", list(product((1, 2), BOOLS))),
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
    E, used = 8, min(T, 8)
    w = torch.randn(E, O, I, device=device).to(dtype)
    codes, scales, _ = op.mx_quantize(w)
    experts = torch.arange(T, device=device).int() % E
    moved = {"x": x, "y": y, "codes": codes[:used], "scales": scales[:used]}
    call = lambda: op.mx_linear(x, codes, scales, None, experts)
    yield Timed("mx_linear_experts", call, moved, 2 * T * O * I, (experts,), ("multi_lora_plan",))
