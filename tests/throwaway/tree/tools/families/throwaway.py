# SPDX-License-Identifier: Apache-2.0
"""The throwaway family's kernel: its plan, and a call that launches it."""

from collections.abc import Iterator

from tools.families import Kernel, Shape, Timed, streams

TESTS: dict[str, str] = {}
KERNELS = {"throwaway": Kernel(streams(8), "x")}
SHAPES = [Shape(T=512, I=2048, O=2048, R=16)]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    import torch

    x, gain = torch.randn(shape.T, shape.I, device=device).to(dtype), torch.randn(shape.I, device=device)
    yield Timed("throwaway", lambda: op.throwaway(x, gain), {"x": x, "y": x}, shape.T * shape.I)
