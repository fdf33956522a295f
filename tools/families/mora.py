# SPDX-License-Identifier: Apache-2.0
"""MoRA's kernels: plans of csrc/cuda/mora/, and calls that launch them."""

from collections.abc import Iterator
from itertools import product

from tools.families import Kernel, Plan, Shape, Timed

# Beyond the registry: every type over sizes that divide and do not, the padding, dead columns.
TESTS = {"tests/ops/test_mora.py": "cpu and 97"}


def stream(x: str, h: str, width: int, turns: bool) -> Plan:
    """A load of each operand a thread; of vectors 128 bits."""
    return Plan(6, wide=2 if width == 8 else 0)


WAYS = list(product((1, 8), (False, True)))
KERNELS = {
    "mora_rotation": Kernel(lambda *_: Plan(8), part=True),
    "mora_fold": Kernel(stream, "xf", WAYS),
    "mora_unfold": Kernel(stream, "xf", WAYS),
}


SHAPES = [Shape(T=8192, I=4096, O=4096, R=8), Shape(T=8192, I=4096, O=14336, R=8), Shape(T=8192, I=4096, O=4096, R=128)]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """Type 1 of as many parameters as LoRA of this rank, at whole vectors."""
    import torch

    T, I, O = shape.T, shape.I, shape.O
    r = max(8, int(((I + O) * shape.R) ** 0.5 + 0.5) // 8 * 8)
    wide = torch.float32 if dtype == torch.float16 else dtype
    x, h = torch.randn(T, I, device=device).to(dtype), torch.randn(T, r, device=device).to(wide)
    y = torch.randn(T, O, device=device).to(dtype)
    yield Timed("mora_fold", lambda: op.mora_compress(x, r), {"x": x, "h": h}, T * I)
    moved = {"y": y, "base": y, "h": h}
    yield Timed("mora_unfold", lambda: op.mora_decompress_(y, h), moved, T * O)
