# SPDX-License-Identifier: Apache-2.0
"""S2FT's kernels: plans of csrc/cuda/s2ft/, and calls that launch them."""

from collections.abc import Iterator

from tools.families import Kernel, Plan, Shape, Timed

# Beyond the registry: columns that do not exist, slots that share one, W written in place.
TESTS = {"tests/ops/test_s2ft.py": "cpu"}

KERNELS = {
    "slice_gather": Kernel(lambda *_: Plan(8), "xf"),
    "slice_scatter": Kernel(lambda *_: Plan(8), "xf"),
    "slice_write": Kernel(lambda *_: Plan(8), "xf", part=True),
    "slice_pages": Kernel(lambda *_: Plan(8), part=True),
}

SHAPES = [
    Shape(T=8192, I=4096, O=4096, R=64),
    Shape(T=8192, I=11008, O=4096, R=224),
    Shape(A=16, T=64, I=4096, O=4096, R=64),
]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """Slices that are neighbours, as those of a co-permuted layer; each row of an adapter of its own where there are several."""
    import torch

    T, I, s, A = shape.T, shape.I, shape.R, shape.A
    x, h = torch.randn(T, I, device=device).to(dtype), torch.randn(T, s, device=device).to(dtype)
    index = torch.arange(s, dtype=torch.int32, device=device)
    ids, which = None, (index,)
    if A:
        index = index.repeat(A, 1)
        ids = torch.arange(T, dtype=torch.int32, device=device) % A
        which = (index, ids)
    mine = x[:, :s]
    yield Timed("slice_gather", lambda: op.slice_gather(x, index, ids), {"x": mine, "h": h}, T * s, which)
    moved = {"y": mine, "base": mine, "h": h}
    yield Timed("slice_scatter", lambda: op.scatter_add_(x, h, index, ids), moved, T * s, which)
